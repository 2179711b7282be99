"""Words for messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection

__all__ = ["counted", "listed", "nearest"]

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


def nearest(name: str, known: Collection[str]) -> str:
    """The known names, those most like a name first."""
    return ", ".join(difflib.get_close_matches(name, known, n=len(known), cutoff=0.0))
