"""Everything to run, compare, draw and report experiments, from the command line or from Python.

A recipe holds the settings of a run. It names a problem: a data set with its network, losses and
metrics. The packages build on these two, each on those before it: vision, data, train, report,
studies, commands.

The names below are imported when they are first used, so that ``from taskgroup import lab`` is
quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgroup.lab.problem import Problem
    from taskgroup.lab.recipe import Recipe, read_recipe
    from taskgroup.lab.streams import endless
    from taskgroup.lab.studies.compared import Compared, compare
    from taskgroup.lab.studies.presets import Variant

__all__ = ["Compared", "Problem", "Recipe", "Variant", "compare", "endless", "read_recipe"]

_HOMES = {
    "Compared": "studies.compared",
    "Problem": "problem",
    "Recipe": "recipe",
    "Variant": "studies.presets",
    "compare": "studies.compared",
    "endless": "streams",
    "read_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"taskgroup.lab.{name} needs {error.name}, which is not installed: "
            "pip install 'taskgroup[train]'"
        ) from error
    return getattr(module, name)
