"""Locks a folder of results, so that one process at a time writes to it."""

from __future__ import annotations

import os
import socket
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "FolderInUseError", "Hold", "hold", "is_empty"]

#: The locked file. It exists while a folder is in use, and stays if that process is killed.
LOCK = ".lock"

_HELD: weakref.WeakValueDictionary[Path, Hold] = weakref.WeakValueDictionary()


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


def hold(folder: Path) -> Hold:
    """Keep other processes out of an existing folder while something refers to the result.

    ``with hold(folder): ...`` does so for a block. The system releases the lock when the process
    ends, however it ends. A second call in the same process returns the same hold.

    Raises:
        FolderInUseError: if another process holds the folder; the sentence names the process.
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
    """A locked folder, made by :func:`hold`; ``forget()`` releases it early."""

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        opened = _lock(folder, path)
        while not _is(opened, path):  # the process that had it has removed it
            os.close(opened)
            opened = _lock(folder, path)
        os.ftruncate(opened, 0)
        os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self.forget = weakref.finalize(self, _release, opened, path, os.getpid())

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the hold ends with the last reference to it, and the block was one."""


def _lock(folder: Path, path: Path) -> int:
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(opened, 200, 0).decode(errors="replace") or "another process"
        os.close(opened)
        raise FolderInUseError(
            f"{folder} is in use by {who}; wait until that process has ended and start again, or "
            "name another folder."
        ) from None
    except OSError:  # this file system has no locks: go on without
        pass
    return opened


def _is(opened: int, path: Path) -> bool:
    """Whether the path still names an open file."""
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
    """In a forked process, such as a worker of a data loader: leave the folders to the parent.

    If the parent is killed, a folder would otherwise stay locked until its last worker ends.
    """
    for held in list(_HELD.values()):
        held.forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
