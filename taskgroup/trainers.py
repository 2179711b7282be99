"""What a trainer around the loop may not do: hold back the step of a group."""

from __future__ import annotations

import sys

__all__ = ["refuse_accumulation"]


def refuse_accumulation() -> None:
    """Raise if Accelerate's gradient accumulation would mix the groups.

    It divides every loss, and counts calls of ``accumulate()``, whichever group or batch they are
    of: between two steps the gradients of several groups add up.
    """
    accelerate = sys.modules.get("accelerate.state")  # only where the loop has imported it
    steps = 1 if accelerate is None else accelerate.GradientState().num_steps
    if steps > 1:
        raise RuntimeError(
            f"Accelerate is set to gradient_accumulation_steps={steps}, which would mix the "
            "groups: leave it at 1 (accelerator.gradient_accumulation_steps = 1), and in each of "
            "the n micro-batches of a group call "
            "accelerator.backward(group.loss(losses, share=1/n)), then optimizer.step() once."
        )
