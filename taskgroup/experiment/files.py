"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_atomically"]


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write beside ``path``, then put it in its place; a crash on the way leaves what was there.

    Args:
        path: of the file.
        write: is given the open binary file.

    Raises:
        OSError: if it cannot be written; the sentence says so.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write it as well
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({' '.join(str(error).split())}); what was there before "
            "is kept. Make room, or name another folder with --out."
        ) from error
