"""``taskgroup new problem``: write a file to begin with."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Annotated

import typer

from taskgroup.lab.commands import common

__all__ = ["problem"]

_TEMPLATE = Path(__file__).parents[1] / "templates" / "your_problem.py"


def problem(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The Python file to write.")],
) -> None:
    """Write a problem of your own, with made-up data, that runs as it is."""
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ValueError(
            f"{file} is no name for a Python module; take letters, digits and _, and end with .py."
        )
    if file.exists():
        raise ValueError(f"{file} exists, and is not overwritten; name another file.")
    if not file.parent.is_dir():
        raise ValueError(f"There is no folder {file.parent} to write {file.name} to.")
    if importlib.util.find_spec(file.stem) is not None:
        raise ValueError(
            f"{file.stem} is the name of an installed module, which {file} would hide; name "
            "another file."
        )
    text = _TEMPLATE.read_text("utf-8").replace(_TEMPLATE.name, file.name)
    file.write_text(text, "utf-8")
    name = shlex.quote(f"{file}:YourProblem")
    common.say(f"A problem of four tasks on made-up data is in {file}")
    common.say(f"Train on it: taskgroup train {name}")
    common.say(f"Compare methods: taskgroup compare {name} --methods upgrad,selective --seeds 3")
