"""Where files are kept that are computed once, on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$TASKGROUP_CACHE``, or else ``taskgroup`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.

    Raises:
        ValueError: if neither variable is set and there is no home directory.
    """
    if own := os.environ.get("TASKGROUP_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "taskgroup"
    try:
        return Path.home() / ".cache" / "taskgroup"
    except RuntimeError:
        raise ValueError(
            "There is no home directory to keep files in; set TASKGROUP_CACHE to a folder."
        ) from None
