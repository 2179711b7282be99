"""One process at a time writes to a folder of results."""

from __future__ import annotations

import os
import socket
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "Hold", "hold", "is_empty"]

#: The file that is locked; there while a folder is in use, and after that process was killed.
LOCK = ".lock"

_HELD: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()


def hold(folder: Path) -> Hold:
    """Keep other processes out of a folder for as long as something refers to the result.

    ``with hold(folder): ...`` does so for a block. The system releases the lock when the process
    ends, however it ends. What holds the folder in this process already shares the hold.

    Args:
        folder: that exists.

    Raises:
        ValueError: if another process has the folder; the sentence says which.
        OSError: if the folder cannot be written to.
    """
    key = folder.resolve()
    held = _HELD.get(key)
    if held is None:
        held = _HELD[key] = Hold(folder)
    return held


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock."""
    return all(path.name == LOCK for path in folder.iterdir())


class Hold:
    """A locked folder; made by :func:`hold`."""

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        opened = _lock(folder, path)
        while not _is(opened, path):  # it was removed by the process that had it
            os.close(opened)
            opened = _lock(folder, path)
        os.ftruncate(opened, 0)
        os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._end = weakref.finalize(self, _release, opened, path, os.getpid())

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: it ends with the last reference to it, of which the block was one."""

    def forget(self) -> None:
        """In a forked process: leave the folder to the parent."""
        self._end()


def _lock(folder: Path, path: Path) -> int:
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(opened, 200, 0).decode(errors="replace") or "another process"
        os.close(opened)
        raise ValueError(
            f"{folder} is in use by {who}; wait until that one has ended and start again, or name "
            "another folder with --out."
        ) from None
    except OSError:  # a file system without locks: as well as it can be done there
        pass
    return opened


def _is(opened: int, path: Path) -> bool:
    """Whether an open file is still what the path names."""
    try:
        return os.path.samestat(os.fstat(opened), path.stat())
    except FileNotFoundError:
        return False


def _release(opened: int, path: Path, owner: int) -> None:
    # Removed before it is unlocked; a forked process only closes what it inherited.
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
    os.close(opened)


def _forget() -> None:
    """In a forked process, a worker say: the folder is the parent's alone.

    It could not be taken up again until the last worker has ended, were it killed.
    """
    for held in list(_HELD.values()):
        held.forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
