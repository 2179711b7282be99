"""A training run: the loop, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

import taskgroup as tg
from taskgroup.lab.report import matplotlib_figures
from taskgroup.lab.report.run_data import load_run_data, read_lines
from taskgroup.lab.train.clock import LateCopy
from taskgroup.lab.train.evaluation import (
    CHECKPOINT_VERSION,
    change_settings,
    delta_m,
    read_baseline,
    read_checkpoint,
    read_settings,
    without_source,
)
from taskgroup.lab.train.lock import Hold, hold, is_empty
from taskgroup.lab.train.recipe import Recipe, make_problem
from taskgroup.lab.train.trainer import MODEL_SECTIONS, Progress, Trainer, task_names
from taskgroup.lab.words import listed

__all__ = ["Interrupted", "Run", "load_metrics"]

_EVENTS_EVERY = 10  # batches; TensorBoard thins finer curves out anyway
_RECORDS = 400  # of affinity and seconds at most, evenly spread: a picture shows no more
_LINES = (
    *("metrics.jsonl", "affinity.jsonl", "seconds.jsonl", "conflicts.jsonl"),
    "evaluations.jsonl",  # the last one; Run.resume relies on it
)
_RECORDED = (*_LINES, "summary.json")  # what a run must not lose


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user asked to stop, and a checkpoint has been written."""


class Run:
    """One training run in a folder of its own.

    The folder holds ``config.yaml``; ``metrics.jsonl``, a line per batch; ``affinity.jsonl`` and
    ``seconds.jsonl``, the matrix and the time so far up to 400 times a run; ``conflicts.jsonl`` and
    ``evaluations.jsonl`` where the recipe wants any on the way; ``checkpoint.pt``; TensorBoard
    events; and, at the end, ``summary.json`` and pictures. A run that was stopped, even by SIGKILL,
    goes on exactly from its last checkpoint, of which there is one from the beginning. No other
    process can write to the folder until the training has ended.

    Args:
        recipe: the settings.
        out: the folder; new or empty.

    Raises:
        ValueError: if the folder is in use, or the recipe's baseline has no summary.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, recipe: Recipe, out: str | Path) -> None:
        out = Path(out)
        _check_empty(out)
        self._set_up(recipe, out)
        out.mkdir(parents=True, exist_ok=True)
        self._hold: Hold | None = None
        with self._holding():
            _check_empty(out)  # another process may have been quicker
            self._write_config()
            self.trainer.problem.keep(self.trainer.model, out)
            # Before the first record: a run with records and no checkpoint has lost it.
            self.save()

    def _write_config(self) -> None:
        settings = yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False).encode()
        write = tg.checkpoint.write_atomically
        write(self.out / "config.yaml", lambda file: file.write(settings))

    @classmethod
    def resume(cls, out: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
        """Take up a run where its last checkpoint was written.

        Args:
            out: the folder.
            changes: ``{key: value}``, settings of
                :data:`~taskgroup.lab.train.recipe.CHANGEABLE` that are others now.

        Raises:
            ValueError: if there is no run, its checkpoint is lost or cannot be read, or another
                process trains it. Nothing in the folder has changed then.
        """
        out = Path(out)
        run = cls.__new__(cls)
        recipe = change_settings(read_settings(out), changes or {})
        run.out, run._hold = out, None
        with run._holding():
            state = run._read_state()
            run._set_up(recipe, out, recipe if state is None else without_source(recipe, out))
            if state is not None:
                run._load(state)
            run._write_config()
            for name in _LINES:
                last = run._cut(out / name)
        run._evaluated = last  # of the evaluations, which come last
        return run

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold the folder, and keep hold of it unless something goes wrong."""
        self._hold = self._hold or hold(self.out)
        try:
            yield
        except BaseException:
            self._hold = None
            raise

    def _read_state(self) -> dict[str, Any] | None:
        """The checkpoint; None of a run that was stopped before it had one."""
        out = self.out
        if (out / "checkpoint.pt").is_file():
            return read_checkpoint(out)
        lost = [
            name for name in _RECORDED if (out / name).is_file() and (out / name).stat().st_size
        ]
        if lost:
            raise ValueError(
                f"{out} has no checkpoint.pt to go on from, but {listed(lost)} of a training, "
                "which would be lost; put its checkpoint.pt back, or train in another folder with "
                "--out."
            )
        return None

    def _set_up(self, recipe: Recipe, out: Path, built: Recipe | None = None) -> None:
        self.recipe = recipe
        self.out = out
        self._seconds = 0.0  # in batches, everything
        self._evaluated = 0  # the batch of the last evaluation
        self._saved: int | None = None  # that of the checkpoint
        # Recorded after this batch, and not written yet.
        self._affinity: tuple[int, LateCopy] | None = None
        self._baseline: dict[str, float] | None = None
        if recipe.baseline:
            tasks = task_names(recipe, make_problem(recipe))
            self._baseline = read_baseline(recipe.baseline, tasks)
        self.trainer = Trainer(built or recipe)

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.trainer.load_state_dict(state["trainer"])
            self._seconds = state["seconds"]
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.out / 'checkpoint.pt'} does not fit the settings in "
                f"{self.out / 'config.yaml'} ({' '.join(str(error).split())[:200]}); put back the "
                "two files that belong together, or use the taskgroup that wrote them."
            ) from error
        self._saved = self.batch

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
            ValueError: if another process trains the run.
        """
        with self._holding():
            summary = self._train(listen)
        self._hold = None
        return summary

    def _train(self, listen: Callable[[Progress], None]) -> dict[str, Any]:
        trainer = self.trainer
        with (
            _stop_signals() as stop,
            (self.out / "metrics.jsonl").open("a", buffering=1) as metrics,
            SummaryWriter(str(self.out), purge_step=trainer.batch or None) as board,
        ):
            while trainer.batch < self.recipe.batches and not stop.asked:
                if self._evaluates_now() and self._evaluated < trainer.batch:
                    self._record_evaluation(board)
                    continue  # and look whether to stop
                started = time.perf_counter()
                conflicts = self.recipe.conflicts_every
                if conflicts is not None and trainer.batch % conflicts == 0:
                    trainer.peek()  # whose time is that of the training
                    paused = time.perf_counter()
                    self._record_conflicts()
                    started += time.perf_counter() - paused
                try:
                    progress = trainer.step()
                finally:
                    self._write_affinity()
                _write_line(metrics, progress)
                recorded = trainer.batch % -(-self.recipe.batches // _RECORDS) == 0
                if recorded:
                    self._record_affinity()
                if trainer.batch % _EVENTS_EVERY == 0:
                    _write_events(board, progress)
                listen(progress)
                # Before an evaluation as well, which may take long and be stopped.
                every = trainer.batch % self.recipe.checkpoint_every == 0
                saves = stop.asked or every or self._evaluates_now()
                if saves or trainer.batch == self.recipe.batches:
                    trainer.wait()  # what the GPU still has to do belongs to the training
                self._seconds += time.perf_counter() - started
                if recorded:
                    line = {"batch": trainer.batch, "seconds": self._all_seconds()}
                    self._append("seconds.jsonl", line)
                if saves:
                    self.save()
            if self._saved != trainer.batch:
                self.save()
            if stop.asked:
                raise Interrupted(
                    f"Stopped after batch {trainer.batch} of {self.recipe.batches}; go on with "
                    f"taskgroup train --resume {self.out}"
                )
        try:
            return self._finish()
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped before the evaluation was done; go on with taskgroup train --resume "
                f"{self.out}"
            ) from None

    def _record_affinity(self) -> None:
        if self.recipe.method != "selective":
            return
        matrix = self.trainer.affinity()
        self._affinity = self.batch, LateCopy(matrix)
        if matrix.device.type == "cpu":
            self._write_affinity()

    def _write_affinity(self) -> None:
        """Write the affinity that was recorded last, unless it is written.

        From a GPU that is after the next step, when it has long arrived and nobody waits for it.
        """
        if self._affinity is not None:
            (batch, copy), self._affinity = self._affinity, None
            self._append_matrix("affinity.jsonl", batch, copy.wait())

    def _record_conflicts(self) -> None:
        """Of the batch to come, whose number the line has."""
        self._append_matrix("conflicts.jsonl", self.batch + 1, self.trainer.conflicts())

    def _append_matrix(self, name: str, batch: int, matrix: Tensor) -> None:
        """A line with a matrix; null where that is NaN, which JSON does not have."""
        rounded = [
            [None if math.isnan(value) else float(f"{value:.5g}") for value in row]
            for row in matrix.tolist()
        ]
        self._append(name, {"batch": batch, "tasks": self.trainer.tasks, "matrix": rounded})

    def _all_seconds(self) -> dict[str, float]:
        return {**self.trainer.seconds, "everything": self._seconds}

    def _evaluates_now(self) -> bool:
        every = self.recipe.evaluate_every
        if every is None or not 0 < self.batch < self.recipe.batches:  # the end is evaluated anyway
            return False
        return self.batch % every == 0

    def _record_evaluation(self, board: SummaryWriter) -> None:
        metrics = self.trainer.evaluate("held_out", quick=True)
        self._append("evaluations.jsonl", {"batch": self.batch, "metrics": metrics})
        self._evaluated = self.batch
        for task, value in metrics.items():
            board.add_scalar(f"held_out/{task}", value, self.batch)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.out / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _finish(self) -> dict[str, Any]:
        trainer, problem, groups = self.trainer, self.trainer.problem, self.trainer.groups
        peak_bytes = trainer.peak_bytes
        metrics = trainer.evaluate("held_out")
        delta = None
        if self._baseline is not None:
            delta = delta_m(metrics, self._baseline, problem)
        history = load_metrics(self.out)
        inside = sum(trainer.seconds[section] for section in MODEL_SECTIONS)
        summary = {
            "data": self.recipe.data,
            "method": self.recipe.method,
            "batches": trainer.batch,
            "steps": sum(len(line["groups"]) for line in history),
            "metric": {task: problem.metrics[task] for task in metrics},
            "lower_is_better": {task: problem.lower_is_better[task] for task in metrics},
            "metrics": metrics,
            "delta_m": delta,
            "baseline": self.recipe.baseline,
            "partition": [list(group) for group in groups.partition],
            "unconverged": groups.unconverged,
            "seconds_per_batch": self._seconds / trainer.batch,
            "share_outside_model": 1 - inside / self._seconds,
            "seconds": self._all_seconds(),
            "peak_bytes": peak_bytes,
        }
        tg.checkpoint.write_atomically(
            self.out / "summary.json",
            lambda file: file.write(json.dumps(summary, indent=2).encode()),
        )
        titles = {task: problem.titles[task] for task in trainer.tasks}
        affinity = trainer.affinity().cpu().double().numpy()
        matplotlib_figures.run_figures(load_run_data(self.out), affinity, titles, self.out)
        problem.draw(trainer.model, self.out)
        return summary

    def save(self) -> None:
        """Write ``checkpoint.pt``; a crash on the way leaves the one before.

        Raises:
            OSError: if it cannot be written; the sentence says so.
        """
        self._write_affinity()  # a run that resumes here cannot write it
        state = {
            "version": CHECKPOINT_VERSION,
            "seconds": self._seconds,
            "trainer": self.trainer.state_dict(),
        }
        tg.checkpoint.save(self.out / "checkpoint.pt", state)
        self._saved = self.batch

    def _cut(self, path: Path) -> int:
        """Drop the lines of batches that ran after the checkpoint, and a line cut short.

        Returns:
            The batch of the last line that stays; 0 if there is none.
        """
        if not path.is_file():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if 1 <= _batch_of(line) <= self.batch]
        if len(kept) < len(lines):
            tg.checkpoint.write_atomically(path, lambda file: file.writelines(kept))
        return _batch_of(kept[-1]) if kept else 0


def _batch_of(line: bytes) -> int:
    """The batch that a line is about; 0 for one that cannot be read."""
    try:
        return int(json.loads(line)["batch"]) if line.endswith(b"\n") else 0
    except (ValueError, KeyError, TypeError):
        return 0


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or not is_empty(out)):
        raise ValueError(
            f"{out} exists and is not empty; name another folder with --out, or go on with it "
            f"by --resume {out}."
        )


def load_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of a run, but for one cut short at the end.

    Raises:
        ValueError: if another line cannot be read.
    """
    return list(read_lines(Path(run) / "metrics.jsonl"))


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
