"""What several commands use: their options, the settings they ask for, and their output."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import rich
import typer

if TYPE_CHECKING:
    from taskgroup.lab.recipe import Recipe

__all__ = [
    "Backbone",
    "Baseline",
    "Batches",
    "Changes",
    "Data",
    "RecipeName",
    "RunFolders",
    "Size",
    "given",
    "label",
    "say",
    "settings",
    "split",
    "stop",
]


def _absolute(folder: str | None) -> str | None:
    """An absolute path, so that a run finds its data from any working directory."""
    return None if folder is None else str(Path(folder).absolute())


# Read here, since importing taskgroup.lab.recipe would make --help slow.
_RECIPES = sorted(file.stem for file in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))
RecipeName = Annotated[
    str,
    typer.Argument(
        help=f"Recipe: {', '.join(_RECIPES)}; the path of a YAML file; or a problem of your own, "
        "such as my_package.my_module:MyProblem or my_file.py:MyProblem."
    ),
]
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")]
Batches = Annotated[int | None, typer.Option(help="Number of batches of a run.")]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", callback=_absolute, help="Folder of the data set, if it is read from one."
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="Pretrained encoder: vit-t, vit-s, vit-b, vit-l, ...; tiny is small, random, and "
        "needs no download."
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="HxW", help="Size of the network's input in pixels.")
]
Baseline = Annotated[
    str | None,
    typer.Option(
        metavar="RUN|FILE", help="Finished run, or YAML file of metrics, to compute Δm against."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting of the recipe; the config.yaml of a run lists all settings.",
    ),
]


def given(**options: object) -> dict[str, object]:
    """The options that were given a value."""
    return {key: value for key, value in options.items() if value is not None}


def settings(recipe: str, changes: list[str] | None, **options: object) -> Recipe:
    """A recipe, overridden by ``--set`` and by the other options that were given a value."""
    from taskgroup.lab.recipe import parse_changes, read_recipe

    return read_recipe(recipe, {**parse_changes(changes or []), **given(**options)})


def label(recipe: str) -> str:
    """What the folder of a recipe's results is named after."""
    place, colon, name = recipe.rpartition(":")
    if not colon or Path(recipe).is_file():
        return Path(recipe).stem
    module = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    return f"{module}-{name}"


def split(text: str) -> list[str]:
    """The parts of a text between commas, such as ``"A,B"``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def say(text: str) -> None:
    """Print a sentence as it is: not wrapped, so that paths in it can be copied."""
    rich.get_console().print(text, soft_wrap=True, markup=False, highlight=False)


def stop(text: str) -> NoReturn:
    """Say why the command stops after Ctrl-C, and exit with status 130."""
    say(text)
    # Another Ctrl-C ends the process at once, instead of with a traceback from Python's own exit.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise typer.Exit(130)
