"""Checks of arguments, and their messages, for all parts of the package."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Iterable

import numpy as np
from torch import Tensor, nn

__all__ = ["described", "flag", "listed", "number", "parameters_of", "whole_number"]


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


def number(name: str, value: object, wanted: str = "a finite number") -> float:
    """The argument, a number of Python or NumPy or a scalar tensor, as a plain float.

    Raises if it is not finite; a range is for the caller to check.
    """
    scalar = isinstance(value, Tensor | np.ndarray) and value.ndim == 0
    if scalar or (isinstance(value, numbers.Real) and not isinstance(value, bool)):
        found = float(value)  # type: ignore[arg-type]
        if math.isfinite(found):
            return found
    raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def parameters_of(name: str, value: object) -> list[Tensor]:
    """The parameters of a module, or those of a list or a generator."""
    found = value.parameters() if isinstance(value, nn.Module) else value
    found = [found] if isinstance(found, Tensor) else found
    wanted = f"{name} takes a module or its parameters, model.encoder for instance; got"
    if not isinstance(found, Iterable) or isinstance(found, str | type):
        raise TypeError(f"{wanted} {value!r}.")
    parameters = list(found)
    for parameter in parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{wanted} a {type(parameter).__name__} among them.")
    return parameters


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
