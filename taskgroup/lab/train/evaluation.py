"""A trained network by itself: loaded from a run, evaluated, and held against a baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import taskgroup as tg
from taskgroup.lab.train.problem import Problem, make_problem
from taskgroup.lab.train.recipe import CHANGEABLE, Recipe, read_recipe
from taskgroup.lab.train.trainer import find_device, make_model, task_names
from taskgroup.lab.words import listed

__all__ = [
    "CHECKPOINT_VERSION",
    "Trained",
    "change_settings",
    "delta_m",
    "load_summary",
    "load_trained",
    "read_baseline",
    "read_checkpoint",
    "read_settings",
    "without_source",
]

CHECKPOINT_VERSION = 3


class Trained(NamedTuple):
    """What a run has trained so far.

    Attributes:
        recipe: its settings.
        problem: the data set.
        model: the network, in evaluation mode.
        batch: batches that it was trained on.
    """

    recipe: Recipe
    problem: Problem
    model: tg.MultiTaskModel
    batch: int


def load_trained(run: str | Path, changes: Mapping[str, Any] | None = None) -> Trained:
    """The network of a run's last checkpoint; the run may go on meanwhile.

    Args:
        run: its folder.
        changes: ``{key: value}``, settings to override: where the data is now, say.

    Raises:
        ValueError: if there is no run, or no checkpoint that can be read.
    """
    run = Path(run)
    recipe = change_settings(read_settings(run), changes or {})
    state = read_checkpoint(run)
    problem = make_problem(without_source(recipe, run))
    model = make_model(problem, task_names(recipe, problem), find_device(recipe.device))
    model.load_state_dict(state["trainer"]["model"])
    return Trained(recipe, problem, model.eval(), state["trainer"]["batch"])


def change_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The settings of a run that goes on, or is evaluated, otherwise or elsewhere.

    Raises:
        ValueError: for a setting that decides what the run trains.
    """
    if fixed := [name for name in changes if name not in CHANGEABLE]:
        raise ValueError(
            f"A run goes on with the {', '.join(fixed)} that it has; what may change is "
            f"{', '.join(CHANGEABLE)}."
        )
    return recipe.replace(**changes)


def without_source(recipe: Recipe, run: Path) -> Recipe:
    """The settings that build the network of a run, whose weights the checkpoint has."""
    if recipe.backbone == "tiny":
        return recipe
    kept = run / "backbone"
    name = str(kept) if (kept / "config.json").is_file() else recipe.backbone
    return recipe.replace(backbone=name, weights="random")


def read_settings(run: Path) -> Recipe:
    """The settings of a run.

    Raises:
        ValueError: if it is none.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} is no run: it has no config.yaml; name a folder that taskgroup train has made."
        )
    return read_recipe(run / "config.yaml")


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The last checkpoint of a run.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{run} has no checkpoint.pt yet; train it a while longer.")
    state = tg.checkpoint.load(path)
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} has version {state.get('version')}, this taskgroup reads "
            f"{CHECKPOINT_VERSION}; use the taskgroup that wrote it."
        )
    return state


def load_summary(run: str | Path) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{run} has no summary.json: it is no run, or not finished.")
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} cannot be read; delete it, and --resume the run.") from None
    return summary


def read_baseline(path: str | Path, tasks: list[str]) -> dict[str, float]:
    """What Δm is computed against: ``{task: metric}`` of some tasks.

    Args:
        path: a finished run, or a YAML file of ``task: metric``, as
            ``taskgroup evaluate RUN... --save FILE`` writes it from single-task runs.
        tasks: those that are wanted.

    Raises:
        ValueError: if it cannot be read, or lacks a task.
    """
    path = Path(path)
    if not path.is_file():
        found = load_summary(path)["metrics"]
    else:
        try:
            found = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict) or not all(
            isinstance(value, int | float) and not isinstance(value, bool)
            for value in found.values()
        ):
            raise ValueError(f"{path} must hold lines 'task: metric', numbers all of them.")
    if lacking := [task for task in tasks if task not in found]:
        raise ValueError(
            f"The baseline {path} has no metric of {listed(lacking)}; it has {listed(found)}."
        )
    if useless := [task for task in tasks if not 0 < found[task] < math.inf]:
        raise ValueError(
            f"Δm divides by the metrics of the baseline, and in {path} that of {listed(useless)} "
            "is no positive number."
        )
    return {task: float(found[task]) for task in tasks}


def delta_m(metrics: Mapping[str, float], baseline: Mapping[str, float], problem: Problem) -> float:
    """Δm of metrics of a problem, in percent."""
    lower = {task: problem.lower_is_better[task] for task in metrics}
    return tg.delta_m(metrics, {task: baseline[task] for task in metrics}, lower)
