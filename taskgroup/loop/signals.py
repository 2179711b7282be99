"""Tells whether a signal handler is running, from which a trainer may save at any line."""

from __future__ import annotations

import functools
import signal
import sys
from types import CodeType

__all__ = ["in_signal_handler"]


def in_signal_handler() -> bool:
    """Whether a signal handler is running."""
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
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
