"""Calls of code that a user wrote: what goes wrong in it becomes one sentence."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["in_words", "is_of_user"]

A = TypeVar("A")

_PACKAGE = Path(__file__).resolve().parents[1]
_PYTHON = Path(traceback.__file__).parent


def in_words(what: str, call: Callable[[], A]) -> A:
    """The result of a call; an error of the user's code becomes a sentence that names its line.

    A sentence of this package, which says what to do, is passed on.

    Args:
        what: the beginning of the sentence, such as ``"losses() of my_module:MyProblem fails"``.
        call: what to call.

    Raises:
        ValueError: if the call raises an error; that error is its cause.
    """
    try:
        return call()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError | ImportError) and _is_ours(frames[-1].filename):
            raise
        text = " ".join(str(error).split())[:300].rstrip(".")
        lines = [frame for frame in frames if is_of_user(frame.filename)]
        where = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
        raise ValueError(f"{what}: {type(error).__name__}: {text}{where}.") from error


def is_of_user(file: str | Path) -> bool:
    """Whether a file is neither of Python, nor of an installed package, nor of this one."""
    installed = {"site-packages", "dist-packages"} & set(Path(file).parts)
    of_python = str(file).startswith("<frozen ") or Path(file).is_relative_to(_PYTHON)
    return not installed and not of_python and not _is_ours(file)


def _is_ours(file: str | Path) -> bool:
    return Path(file).resolve().is_relative_to(_PACKAGE)
