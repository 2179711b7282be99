"""Words for messages."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["listed"]

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
