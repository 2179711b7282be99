"""What a trainer around the loop may do: save at any line, and accumulate gradients (refused)."""

from __future__ import annotations

import functools
import signal
import sys
from types import CodeType

__all__ = ["in_signal_handler", "refuse_accumulation"]


def in_signal_handler() -> bool:
    """Whether a signal handler is running."""
    handlers = {
        code
        for number in signal.valid_signals()
        if (code := _code(signal.getsignal(number))) is not None
    }
    frame = sys._getframe(1) if handlers else None
    while frame is not None:
        if frame.f_code in handlers:
            return True
        frame = frame.f_back
    return False


def _code(handler: object) -> CodeType | None:
    """The code that runs when the handler is called; None if it is not written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    for function in (handler, getattr(handler, "__func__", None), type(handler).__call__):
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            return code
    return None


def refuse_accumulation() -> None:
    """Raise if Accelerate accumulates gradients, which would mix the groups.

    Accelerate counts batches, or calls of ``accumulate()``, and knows nothing of groups: between
    two steps it would add up the gradients of several groups. Hugging Face's Trainer uses it.
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
            "optimizer.step() once. In Hugging Face's Trainer this is not possible: use larger "
            "batches."
        )
