"""A training run: the loop, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

import taskgroup as tg
from taskgroup.experiment.recipe import Recipe, read_recipe
from taskgroup.experiment.trainer import MODEL_SECTIONS, Progress, Trainer
from taskgroup.report import plots

__all__ = ["Interrupted", "Run", "load_metrics", "load_summary"]

_CHECKPOINT_VERSION = 2
_EVENTS_EVERY = 10  # batches; TensorBoard thins finer curves out anyway


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user asked to stop, and a checkpoint has been written."""


class Run:
    """One training run in a folder of its own.

    The folder holds ``config.yaml``; ``metrics.jsonl``, a line per batch; ``checkpoint.pt``;
    TensorBoard events; and, at the end, ``summary.json`` and pictures. A run that was stopped, even
    by SIGKILL, goes on exactly from its last checkpoint.

    Args:
        recipe: the settings.
        out: the folder; new or empty.

    Raises:
        ValueError: if the folder is in use, or the recipe's baseline has no summary.
    """

    def __init__(self, recipe: Recipe, out: str | Path) -> None:
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(
                f"{out} exists and is not empty; name another folder with --out, or go on with it "
                f"by --resume {out}."
            )
        self._set_up(recipe, out)
        out.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
        (out / "config.yaml").write_text(settings)

    @classmethod
    def resume(cls, out: str | Path) -> Run:
        """Take up a run where its last checkpoint was written.

        Raises:
            ValueError: if there is no run, or its checkpoint cannot be read.
        """
        out = Path(out)
        config = out / "config.yaml"
        if not config.is_file():
            raise ValueError(f"{out} is no run: it has no config.yaml.")
        run = cls.__new__(cls)
        run._set_up(read_recipe(config), out)
        if (out / "checkpoint.pt").is_file():
            run._load(out / "checkpoint.pt")
        run._cut_metrics()
        return run

    def _set_up(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self._baseline = load_summary(recipe.baseline)["metrics"] if recipe.baseline else None
        self._seconds = 0.0  # in batches, everything
        self.trainer = Trainer(recipe)

    @property
    def batch(self) -> int:
        """Batches done."""
        return self.trainer.batch

    def train(self, listen: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
        """Train to the end, then evaluate, draw and write the summary.

        Args:
            listen: called after every batch.

        Returns:
            What ``summary.json`` holds.

        Raises:
            Interrupted: at the first SIGINT or SIGTERM, once the batch at hand is done and a
                checkpoint is written.
        """
        trainer = self.trainer
        with (
            _stop_signals() as stop,
            (self.out / "metrics.jsonl").open("a", buffering=1) as metrics,
            SummaryWriter(str(self.out), purge_step=trainer.batch or None) as board,
        ):
            while trainer.batch < self.recipe.batches:
                started = time.perf_counter()
                progress = trainer.step()
                _write_line(metrics, progress)
                if trainer.batch % _EVENTS_EVERY == 0:
                    _write_events(board, progress)
                listen(progress)
                self._seconds += time.perf_counter() - started
                if stop.asked or trainer.batch % self.recipe.checkpoint_every == 0:
                    self.save()
                if stop.asked:
                    raise Interrupted(
                        f"Stopped after batch {trainer.batch} of {self.recipe.batches}; go on with "
                        f"taskgroup train --resume {self.out}"
                    )
            if (
                not (self.out / "checkpoint.pt").is_file()
                or trainer.batch % self.recipe.checkpoint_every
            ):
                self.save()
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        trainer, problem, groups = self.trainer, self.trainer.problem, self.trainer.groups
        metrics = trainer.evaluate("held_out")
        delta = None
        if self._baseline is not None:
            delta = tg.delta_m(
                metrics, self._baseline, dict.fromkeys(metrics, problem.lower_is_better)
            )
        history = load_metrics(self.out)
        inside = sum(trainer.seconds[section] for section in MODEL_SECTIONS)
        summary = {
            "data": self.recipe.data,
            "method": self.recipe.method,
            "batches": trainer.batch,
            "steps": sum(len(line["groups"]) for line in history),
            "metric": problem.metric,
            "lower_is_better": problem.lower_is_better,
            "metrics": metrics,
            "delta_m": delta,
            "baseline": self.recipe.baseline,
            "partition": [list(group) for group in groups.partition],
            "unconverged": groups.unconverged,
            "seconds_per_batch": self._seconds / trainer.batch,
            "share_outside_model": 1 - inside / self._seconds,
            "seconds": {**trainer.seconds, "everything": self._seconds},
        }
        titles = {task: problem.titles[task] for task in trainer.tasks}
        learned = [line for line in history if line["batch"] > self.recipe.warmup]
        plots.affinity(groups.affinity.matrix, titles, groups.partition, self.out / "affinity.png")
        plots.number_of_groups(
            [len(line["partition"]) for line in history],
            self.recipe.warmup,
            self.out / "groups.png",
        )
        plots.cogrouping(
            [line["partition"] for line in learned or history], titles, self.out / "cogrouping.png"
        )
        problem.draw(trainer.model, self.out)
        tg.checkpoint.write_atomically(
            self.out / "summary.json",
            lambda file: file.write(json.dumps(summary, indent=2).encode()),
        )
        return summary

    def save(self) -> None:
        """Write ``checkpoint.pt``; a crash on the way leaves the one before.

        Raises:
            OSError: if it cannot be written; the sentence says so.
        """
        state = {
            "version": _CHECKPOINT_VERSION,
            "seconds": self._seconds,
            "trainer": self.trainer.state_dict(),
        }
        tg.checkpoint.save(self.out / "checkpoint.pt", state)

    def _load(self, path: Path) -> None:
        state = tg.checkpoint.load(path)
        version = state.get("version")
        if version != _CHECKPOINT_VERSION:
            raise ValueError(
                f"{path} has version {version}, this taskgroup reads {_CHECKPOINT_VERSION}; "
                "resume with the taskgroup that wrote it."
            )
        self.trainer.load_state_dict(state["trainer"])
        self._seconds = state["seconds"]

    def _cut_metrics(self) -> None:
        """Drop the lines of batches that ran after the checkpoint, and a line cut short."""
        path = self.out / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        tg.checkpoint.write_atomically(path, lambda file: file.writelines(lines[: self.batch]))


def load_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of a run."""
    with (Path(run) / "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def load_summary(run: str | Path) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        ValueError: if there is none.
    """
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{run} has no summary.json: it is no run, or not finished.")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


class _Stop:
    asked = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM sets a flag; the second acts as if this were not here."""
    stop = _Stop()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread, which alone gets signals
            break
    try:
        yield stop
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)


def _write_line(file: Any, progress: Progress) -> None:
    line = {
        "batch": progress.batch,
        "losses": progress.losses,
        "groups": progress.groups,
        "partition": progress.partition,
    }
    file.write(json.dumps(line) + "\n")


def _write_events(board: SummaryWriter, progress: Progress) -> None:
    for task, loss in progress.losses.items():
        board.add_scalar(f"loss/{task}", loss, progress.batch)
    board.add_scalar("groups", len(progress.partition), progress.batch)
