"""One run of a comparison: trained by a worker, kept as one small file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch
import yaml

import taskgroup as tg
from taskgroup.lab.processes import alone
from taskgroup.lab.recipe import Recipe, is_own, read_recipe
from taskgroup.lab.train.memory import peak_bytes
from taskgroup.lab.train.source import SOURCE
from taskgroup.lab.train.trainer import Trainer
from taskgroup.lab.user_code import in_words

__all__ = ["Cell", "Result", "open_folder", "train_cell"]


class Result(TypedDict):
    """What a run of a comparison left; its file also holds the settings."""

    metrics: dict[str, dict[str, float]]  # {split: {task: value}}; empty if it diverged
    peak_bytes: int  # of the last batch
    steps_per_batch: float
    groups: list[int]  # after each batch
    changes: list[int]  # batches that changed the partition
    partition: list[list[str]]
    affinity: list[list[float]]  # [K, K] at the end; NaN where it was never observed
    skipped: int  # batches for which the method found no weights
    diverged: int | None  # the batch


_VERSION = 2  # of the file format; files of other versions are not read
# Settings that do not change the result of a cell.
_IRRELEVANT = {"checkpoint_every", "evaluate_every", "conflicts_every", "baseline", "workers"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of a comparison.

    The recipe has all settings, including the seed and the number of batches; ``name`` is that of
    the variant. Every ``lookahead_every`` batches the lookahead affinity is measured, whose mean
    then replaces the affinity in the result; None does not measure it.
    """

    name: str
    recipe: Recipe
    lookahead_every: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the result, in JSON types."""
        return self.recipe.model_dump(mode="json", exclude=_IRRELEVANT)

    def file(self, folder: Path) -> Path:
        """The file of the result; its name contains a digest of all settings.

        Settings with their default value are left out, so that the results of an earlier version of
        the package are still found after a setting was added. ``_VERSION`` must count on if a
        default changes.
        """
        defaults = {name: field.default for name, field in Recipe.model_fields.items()}
        settings = Recipe.model_construct(**defaults).model_dump(mode="json")
        changed = {k: v for k, v in self.settings.items() if v != settings[k]}
        key = [_VERSION, changed, self.lookahead_every]
        text = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return folder / f"{self.name}-{self.recipe.seed}-{digest}.json"

    def read(self, folder: Path) -> Result | None:
        """The result, or None if the run is not finished or its file is incomplete."""
        try:
            result: Result = json.loads(self.file(folder).read_text())
        except (OSError, ValueError):
            return None
        return result

    def write(self, folder: Path, result: Result) -> None:
        """Write the result, whole or not at all."""
        tg.recording.write_text(
            self.file(folder), json.dumps({**result, "settings": self.settings})
        )


def train_cell(cell: Cell) -> Result:
    """Train and evaluate, in whatever process calls it; one run at a time in each process."""
    with alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a run that diverges; the result says so
        # Cells run in parallel, one per core, so none has data workers of its own.
        recipe = cell.recipe.replace(workers=0)
        if not is_own(recipe.data):
            return _train(recipe, cell.lookahead_every)
        # In words, since an error of a class that cannot be unpickled would break the pool.
        what = f"{recipe.data} fails"
        return in_words(what, lambda: _train(recipe, cell.lookahead_every))


def _train(recipe: Recipe, lookahead_every: int | None) -> Result:
    trainer = Trainer(recipe)
    steps = 0
    groups: list[int] = []
    changes: list[int] = []
    partition = trainer.groups.partition
    diverged: int | None = None
    peak = 0
    lookaheads: list[torch.Tensor] = []

    def step() -> None:
        nonlocal steps, partition
        progress = trainer.step()
        steps += len(progress.groups)
        groups.append(len(progress.partition))
        if progress.partition != partition:
            changes.append(progress.batch)
            partition = progress.partition

    try:
        for batch in range(recipe.batches):
            if batch == recipe.batches - 1:
                standing = _standing_bytes(trainer)
                peak = standing + peak_bytes(step, trainer.device)
            else:
                step()
            if lookahead_every is not None and batch % lookahead_every == 0:
                lookaheads.append(trainer.lookahead())
    except FloatingPointError:
        diverged = trainer.batch
    metrics = {}
    if diverged is None:
        metrics = {split: trainer.evaluate(split) for split in trainer.problem.splits}
        if not all(math.isfinite(v) for values in metrics.values() for v in values.values()):
            diverged = trainer.batch
    affinity = trainer.affinity()
    if lookaheads:
        affinity = torch.stack(lookaheads).nanmean(0)
    return {
        "metrics": metrics,
        "peak_bytes": peak,
        "steps_per_batch": steps / max(1, trainer.batch),
        "groups": groups,
        "changes": changes,
        "partition": [list(group) for group in partition],
        "affinity": affinity.tolist(),
        "skipped": trainer.skipped,
        "diverged": diverged,
    }


def open_folder(folder: Path, recipe: Recipe) -> Path:
    """Open, or create, the folder for many runs of one recipe; returns that of the results.

    ``base.yaml`` in the folder holds the settings that the runs share, without the seed.

    Raises:
        ValueError: if the folder holds runs with other settings, or something else.
    """
    file = folder / "base.yaml"
    settings = Cell("", recipe.replace(seed=0)).settings
    unused = file.is_file() and _holds_no_run(folder)  # e.g. it was stopped before its first result
    if file.is_file() and not unused:
        there = Cell("", read_recipe(file, {"seed": 0})).settings
        if differing := [key for key in settings if settings[key] != there[key]]:
            raise ValueError(
                f"{folder} holds runs with other settings "
                f"({', '.join(f'{k}: {there[k]}' for k in differing)}); name another folder with "
                "--out, or use these settings."
            )
    elif (
        not unused
        and folder.exists()
        and (not folder.is_dir() or not tg.recording.is_empty(folder))
    ):
        raise ValueError(
            f"{folder} is not empty and holds no runs; name another folder with --out."
        )
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be created ({error.strerror}); name another folder with --out."
        ) from None
    if unused or not file.is_file():
        with tg.recording.hold(folder):
            tg.recording.write_text(file, yaml.safe_dump(settings, sort_keys=False))
    return folder / "cells"


def _holds_no_run(folder: Path) -> bool:
    """Whether a folder that was opened for runs holds no result and nothing measured."""
    made = {"base.yaml", SOURCE, "cells", tg.recording.LOCK}
    return {path.name for path in folder.iterdir()} <= made and not any(
        (folder / "cells").glob("*.json")
    )


def _standing_bytes(trainer: Trainer) -> int:
    """Bytes of the parameters, their gradients, and the state of the optimizer."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [v for values in trainer.optimizer.state.values() for v in values.values()]
    tensors = [*parameters, *gradients, *state]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
