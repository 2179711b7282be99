"""Checks of arguments, and their messages, for all parts of the package."""

from __future__ import annotations

import operator
from collections.abc import Collection

import numpy as np
from torch import Tensor

__all__ = ["described", "flag", "listed", "whole_number"]


def whole_number(name: str, value: object, at_least: int) -> int:
    """The argument, an integer of Python, NumPy or torch, as a plain int.

    Example:
        >>> import numpy as np
        >>> whole_number("warmup", np.int64(5), at_least=0)
        5
    """
    try:
        # True is an integer to Python, and never the number that was meant.
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")
    return number


def flag(name: str, value: object) -> bool:
    """The argument, a bool of Python or NumPy, as a plain bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


_MOST = 12


def listed(names: Collection[str]) -> str:
    """The names as a list, for messages; a long list is shortened.

    Example:
        >>> listed(["depth", "normal"])
        "['depth', 'normal']"
        >>> listed([f"task{k}" for k in range(1000)])[-36:]
        "'task8', 'task9', ... (1000 in all)]"
    """
    names = list(names)
    if len(names) <= _MOST:
        return repr(names)
    return f"{repr(names[:10])[:-1]}, ... ({len(names)} in all)]"


def described(value: object) -> str:
    """The type of the value, or the dtype and shape of a tensor."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__
