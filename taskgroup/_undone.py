"""Marks steps of an optimizer that are taken to be undone, and are no steps of a loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["steps_are_undone", "undone_steps"]

_UNDONE = ContextVar("undone", default=False)


@contextmanager
def undone_steps() -> Iterator[None]:
    """Mark the steps that are taken in this block."""
    token = _UNDONE.set(True)
    try:
        yield
    finally:
        _UNDONE.reset(token)


def steps_are_undone() -> bool:
    """Whether a step that is taken now will be undone."""
    return _UNDONE.get()
