"""Words for error messages."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["listed"]

_MOST = 12


def listed(names: Collection[str]) -> str:
    """The names as a list, of many the first few.

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
