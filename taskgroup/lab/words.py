"""Words for messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from torch import Tensor

__all__ = ["counted", "kind_of", "listed", "nearest"]

_MOST = 12


def listed(names: Collection[str]) -> str:
    """Format names as a list; if there are more than twelve, only the first ten.

    Example:
        >>> listed(["depth", "normal"])
        "['depth', 'normal']"
    """
    names = list(names)
    if len(names) <= _MOST:
        return repr(names)
    return f"{repr(names[:10])[:-1]}, ... ({len(names)} in all)]"


def counted(number: int, noun: str) -> str:
    """``"1 seed"``, ``"5 seeds"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def kind_of(thing: object) -> str:
    """What an object is, for a message about one that does not fit.

    Example:
        >>> kind_of({}), kind_of(Tensor([1.0, 2.0]))
        ('an object of type dict', 'a tensor [2]')
    """
    if isinstance(thing, Tensor):
        return f"a tensor {list(thing.shape)}"
    return f"an object of type {type(thing).__name__}"


def nearest(name: str, known: Collection[str]) -> str:
    """The known names, those most like a name first."""
    return ", ".join(difflib.get_close_matches(name, known, n=len(known), cutoff=0.0))
