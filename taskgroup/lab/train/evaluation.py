"""What a run has left, read again: settings, checkpoint, trained network, metrics, baseline."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

import taskgroup as tg
from taskgroup.lab.problem import Problem, make_problem
from taskgroup.lab.recipe import CHANGEABLE, Recipe, read_recipe
from taskgroup.lab.train.source import changed_source
from taskgroup.lab.train.trainer import find_device, make_model, task_names
from taskgroup.lab.words import listed

__all__ = [
    "CHECKPOINT_VERSION",
    "Summary",
    "Trained",
    "delta_m",
    "load_summary",
    "load_trained",
    "read_baseline",
    "read_checkpoint",
    "read_settings",
    "unfit_checkpoint",
    "without_source",
]

CHECKPOINT_VERSION = 4


class Summary(TypedDict):
    """What ``summary.json`` of a finished run holds."""

    data: str
    method: str
    batches: int
    steps: int
    metric: dict[str, str]  # {task: name of its metric}
    lower_is_better: dict[str, bool]
    metrics: dict[str, float]  # on held-out data
    delta_m: float | None  # percent
    baseline: str | None
    partition: list[list[str]]
    unconverged: int
    seconds_per_batch: float
    share_outside_model: float
    seconds: dict[str, float]  # {section: seconds} in all
    peak_bytes: int | None  # on a GPU


class Trained(NamedTuple):
    """A network in evaluation mode, and how many batches a run has trained it so far."""

    recipe: Recipe
    problem: Problem
    model: nn.Module
    batch: int


def load_trained(run: str | Path, changes: Mapping[str, Any] | None = None) -> Trained:
    """The network of a run's last checkpoint; the run may still be training.

    ``changes`` override settings, such as where the data is now.

    Raises:
        ValueError: if there is no run, or no checkpoint that can be read.
    """
    run = Path(run)
    recipe = read_settings(run, changes)
    state = read_checkpoint(run)
    problem = make_problem(without_source(recipe, run))
    model = make_model(problem, task_names(recipe, problem), find_device(recipe.device))
    try:
        model.load_state_dict(state["trainer"]["model"])
    except RuntimeError as error:
        raise ValueError(unfit_checkpoint(run, recipe, error)) from error
    if changed := changed_source(run, recipe.data):
        warnings.warn(
            f"{listed(changed)} changed since {run} was trained; the network is built, and "
            "evaluated, by the new version.",
            stacklevel=1,  # one place in the code, so that it is shown once
        )
    return Trained(recipe, problem, model.eval(), state["trainer"]["batch"])


def unfit_checkpoint(run: Path, recipe: Recipe, error: Exception) -> str:
    """A sentence about a checkpoint that does not fit what its run's settings build."""
    cure = "put back the two files that belong together, or use the taskgroup that wrote them"
    if changed := changed_source(run, recipe.data):
        cure = f"{listed(changed)} changed since; put back the version that it was trained with"
    return (
        f"{run / 'checkpoint.pt'} does not fit the settings in {run / 'config.yaml'} "
        f"({' '.join(str(error).split())[:200]}); {cure}."
    )


def without_source(recipe: Recipe, run: Path) -> Recipe:
    """The settings that build a run's network without its pretrained weights.

    The weights are in the checkpoint, and the source of the pretrained ones may be gone.
    """
    if recipe.backbone == "tiny":
        return recipe
    kept = run / "backbone"
    name = str(kept) if (kept / "config.json").is_file() else recipe.backbone
    return recipe.replace(backbone=name, weights="random")


def read_settings(run: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The settings of a run, with other values for some of ``recipe.CHANGEABLE``.

    Raises:
        ValueError: if the folder is not a run, its settings cannot be read, or a change would
            affect what the run learns.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} is not a run: it has no config.yaml; name a folder that taskgroup train has "
            "made."
        )
    recipe = read_recipe(run / "config.yaml", changes)
    if fixed := [name for name in changes or {} if name not in CHANGEABLE]:
        raise ValueError(
            f"A run keeps the {', '.join(fixed)} that it was started with; the settings that may "
            f"change are {', '.join(CHANGEABLE)}."
        )
    return recipe


def read_checkpoint(run: Path) -> dict[str, Any]:
    """The last checkpoint of a run.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{run} has no checkpoint.pt yet; train it for longer.")
    state = tg.checkpoint.load(path)
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} has version {state.get('version')}, and this taskgroup reads version "
            f"{CHECKPOINT_VERSION}; use the taskgroup that wrote it."
        )
    return state


def load_summary(run: str | Path) -> Summary:
    """``summary.json`` of a finished run.

    Raises:
        ValueError: if there is none, or it cannot be read.
    """
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{run} has no summary.json: it is not a run, or not finished.")
    try:
        summary: Summary = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} cannot be read; delete it, and resume the run.") from None
    return summary


def read_baseline(path: str | Path, tasks: list[str]) -> dict[str, float]:
    """Read what Δm is computed against, ``{task: metric}``, for the tasks that need it.

    The path is a finished run, or a YAML file of ``task: metric``, as
    ``taskgroup evaluate RUN... --save FILE`` writes it from single-task runs.

    Raises:
        ValueError: if it cannot be read, lacks a task, or has a metric that nothing can be divided
            by.
    """
    path = Path(path)
    if not path.is_file():
        found = load_summary(path)["metrics"]
    else:
        try:
            lines = yaml.safe_load(path.read_text())
            found = TypeAdapter(dict[str, float]).validate_python(lines, strict=True)
        except (yaml.YAMLError, UnicodeDecodeError, ValidationError):
            raise ValueError(
                f"{path} must hold lines 'task: metric', where every metric is a number."
            ) from None
    if lacking := [task for task in tasks if task not in found]:
        raise ValueError(
            f"The baseline {path} has no metric of {listed(lacking)}; it has {listed(found)}."
        )
    if useless := [task for task in tasks if not 0 < found[task] < math.inf]:
        raise ValueError(
            f"Δm divides by the metrics of the baseline, and in {path} the metric of "
            f"{listed(useless)} is not a positive number."
        )
    return {task: float(found[task]) for task in tasks}


def delta_m(metrics: Mapping[str, float], baseline: Mapping[str, float], problem: Problem) -> float:
    """Δm of a problem's metrics against a baseline, in percent, without its auxiliary tasks."""
    counted = {task: value for task, value in metrics.items() if task not in problem.auxiliary}
    lower = {task: problem.lower_is_better[task] for task in counted}
    return tg.delta_m(counted, {task: baseline[task] for task in counted}, lower)
