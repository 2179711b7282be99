"""Checkpoints that are written whole or not at all, and read with a sentence where they cannot be.

A training run that may be killed at any moment writes one now and then, and goes on from it::

    tg.checkpoint.save(path, {"model": model.state_dict(), "groups": groups.state_dict(), ...})
    state = tg.checkpoint.load(path)
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "save", "write_atomically"]


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a checkpoint with ``torch.save``; a crash on the way leaves the one before.

    Over several ranks one of them writes, of states that are the same on all; those of random
    generators are not, and are gathered first (``torch.distributed.gather_object``).

    Args:
        path: of the file; its folder is made where it is missing.
        state: what to save; what loads under ``weights_only=True``: tensors, numbers, strings and
            None, in any nesting of dicts, lists and tuples, as ``state_dict()`` gives them.

    Raises:
        OSError: if it cannot be written; the sentence says why. What was there is kept.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run" / "checkpoint.pt"
        >>> save(path, {"batch": 7})
        >>> load(path)
        {'batch': 7}
    """
    write_atomically(Path(path), lambda file: torch.save(dict(state), file))


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU; no code in it is run (``weights_only=True``).

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read; the sentence says why.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no checkpoint {path}; start without one.") from None
    except Exception as error:  # whatever torch, zipfile or pickle make of a damaged file
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({_short(error)}); go on from another one, or "
            "start again."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, not the dict that tg.checkpoint.save() wrote; "
            "go on from another one, or start again."
        )
    return state


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write beside ``path``, then put it in its place; a crash on the way leaves what was there.

    Args:
        path: of the file; its folder is made where it is missing.
        write: is given the open binary file.

    Raises:
        OSError: if it cannot be written; the sentence says why. What was there is kept.
    """
    path = path.resolve()  # what a link points to
    # Others may write the same file meanwhile, on this machine or on another.
    partial = path.with_name(f"{path.name}.{_HOST}-{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # A full disk is a RuntimeError where torch.save writes.
        if not isinstance(error, OSError | RuntimeError):
            raise
        raise OSError(
            f"{path} could not be written ({_short(error)}); what was there before is kept. Make "
            "room if the disk is full, or write to another place."
        ) from error


_HOST = socket.gethostname()


def _remove_abandoned(path: Path) -> None:
    """What processes of this machine left that were killed while they wrote."""
    if os.name != "posix":  # elsewhere there is no asking for a process
        return
    left = re.compile(rf"{re.escape(f'{path.name}.{_HOST}-')}(\d+)\.partial")
    for partial in path.parent.iterdir():
        found = left.fullmatch(partial.name)
        if found is None:
            continue
        try:
            os.kill(int(found[1]), 0)  # asks whether there is such a process
        except ProcessLookupError:
            partial.unlink(missing_ok=True)
        except (OSError, OverflowError):
            pass  # not ours to judge


def _short(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes some of it in bold
    return " ".join(text.split())[:200] or type(error).__name__
