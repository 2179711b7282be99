"""What a trainer around the loop may not do: hold back the step of a group."""

from __future__ import annotations

import sys

__all__ = ["refuse_accumulation"]


def refuse_accumulation() -> None:
    """Raise if Accelerate accumulates gradients, which would mix the groups.

    It counts batches, or calls of ``accumulate()``, whichever group they are of: between two steps
    the gradients of several groups add up. So does Hugging Face's Trainer, which tells Accelerate.
    """
    accelerate = sys.modules.get("accelerate.state")  # only where the loop has imported it
    if accelerate is None:
        return
    state = accelerate.GradientState()
    if state.num_steps > 1 or not state.sync_gradients:
        raise RuntimeError(
            "Accelerate (or an earlier Accelerator of this process) is set to "
            "gradient_accumulation_steps above 1, which would mix the groups: leave it at 1 "
            "(accelerator.gradient_accumulation_steps = 1), and in each of the n micro-batches of "
            "a group call accelerator.backward(group.loss(losses, share=1/n)), then "
            "optimizer.step() once. In Hugging Face's Trainer there is no such place: take larger "
            "batches."
        )
