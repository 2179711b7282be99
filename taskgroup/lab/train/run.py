"""A training run in a folder: trained, stopped, resumed, evaluated and summarised."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

import taskgroup as tg
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.train.clock import LateCopy
from taskgroup.lab.train.evaluation import (
    CHECKPOINT_VERSION,
    Summary,
    delta_m,
    read_baseline,
    read_checkpoint,
    read_settings,
    without_source,
)
from taskgroup.lab.train.lock import Hold, hold, is_empty
from taskgroup.lab.train.run_files import (
    RECORDS,
    append_line,
    append_matrix,
    cut_records,
    read_lines,
    write_text,
)
from taskgroup.lab.train.trainer import MODEL_SECTIONS, Progress, Trainer, task_names
from taskgroup.lab.words import listed

__all__ = ["Interrupted", "Run"]

_EVENTS_EVERY = 10  # batches; TensorBoard thins out finer curves anyway
_RECORDS = 400  # most records of affinity and seconds in a run: a picture shows no more


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user asked to stop, and a checkpoint has been written."""


class Run:
    """One training run in a folder of its own.

    The folder holds ``config.yaml``, the settings; ``metrics.jsonl``, a line per batch;
    ``affinity.jsonl`` and ``seconds.jsonl``, the affinity and the time so far, up to 400 times a
    run; ``conflicts.jsonl`` and ``evaluations.jsonl``, if the recipe asks for them;
    ``checkpoint.pt``; TensorBoard events; and, at the end, ``summary.json``. The command line adds
    pictures. The first checkpoint is written before the first batch. A run that was stopped, even
    by SIGKILL, resumes exactly from its last checkpoint. No other process can write to the folder
    until the training has ended.

    Args:
        recipe: the settings.
        out: the folder; new or empty.

    Raises:
        ValueError: if the folder is not empty or in use, or the recipe's baseline cannot be read.
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
            # Written before the first record: records without a checkpoint mean that it was lost.
            self.save()

    def _write_config(self) -> None:
        settings = self.recipe.model_dump(mode="json")
        write_text(self.out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    @classmethod
    def resume(cls, out: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
        """Resume a run from its last checkpoint, with other values for some of ``CHANGEABLE``.

        Raises:
            ValueError: if there is no run, its checkpoint is lost or cannot be read, or another
                process trains it. The folder is not changed then.
        """
        out = Path(out)
        run = cls.__new__(cls)
        recipe = read_settings(out, changes)
        run.out, run._hold = out, None
        with run._holding():
            state = run._read_state()
            run._set_up(recipe, out, recipe if state is None else without_source(recipe, out))
            if state is not None:
                run._load(state)
            run._write_config()
            run._evaluated = cut_records(out, run.batch)["evaluations.jsonl"]
        return run

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold the folder, and let go of it only if something goes wrong."""
        self._hold = self._hold or hold(self.out)
        try:
            yield
        except BaseException:
            self._hold = None
            raise

    def _read_state(self) -> dict[str, Any] | None:
        """The checkpoint; None if the run was stopped before it had one."""
        out = self.out
        if (out / "checkpoint.pt").is_file():
            return read_checkpoint(out)
        files = [out / name for name in (*RECORDS, "summary.json")]
        if lost := [file.name for file in files if file.is_file() and file.stat().st_size]:
            raise ValueError(
                f"{out} has no checkpoint.pt to go on from, but {listed(lost)} of a training, "
                "which would be lost; put its checkpoint.pt back, or name another folder with "
                "--out."
            )
        return None

    def _set_up(self, recipe: Recipe, out: Path, built: Recipe | None = None) -> None:
        self.recipe = recipe
        self.out = out
        self._seconds = 0.0  # of all batches, everything in them included
        self._evaluated = 0  # the batch of the last evaluation
        self._saved: int | None = None  # the batch of the last checkpoint
        # The batch and the affinity recorded after it, if it is not written yet.
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

    def train(self, listen: Callable[[Progress], None] = lambda progress: None) -> Summary:
        """Train to the end, then evaluate and write the summary.

        Args:
            listen: called after every batch.

        Returns:
            What ``summary.json`` holds.

        Raises:
            Interrupted: after the first SIGINT or SIGTERM, when the current batch is done and a
                checkpoint is written.
            ValueError: if another process trains the run.
        """
        with self._holding():
            summary = self._train(listen)
        self._hold = None
        return summary

    def _train(self, listen: Callable[[Progress], None]) -> Summary:
        trainer = self.trainer
        with (
            _stop_signals() as stop,
            (self.out / "metrics.jsonl").open("a", buffering=1) as metrics,
            SummaryWriter(str(self.out), purge_step=trainer.batch or None) as board,
        ):
            while trainer.batch < self.recipe.batches and not stop.is_set():
                if self._evaluates_now() and self._evaluated < trainer.batch:
                    self._record_evaluation(board)
                    continue  # a signal may have asked to stop
                started = time.perf_counter()
                conflicts = self.recipe.conflicts_every
                if conflicts is not None and trainer.batch % conflicts == 0:
                    trainer.batches.peek()  # loading it counts as training
                    paused = time.perf_counter()
                    file, found = self.out / "conflicts.jsonl", trainer.conflicts()
                    append_matrix(file, trainer.batch + 1, trainer.tasks, found)
                    started += time.perf_counter() - paused
                try:
                    progress = trainer.step()
                finally:
                    self._write_affinity()
                line = {name: v for name, v in vars(progress).items() if name != "batches"}
                metrics.write(json.dumps(line) + "\n")
                recorded = trainer.batch % -(-self.recipe.batches // _RECORDS) == 0
                if recorded and self.recipe.method == "selective":
                    self._affinity = trainer.batch, LateCopy(trainer.affinity())
                if trainer.batch % _EVENTS_EVERY == 0:
                    _write_events(board, progress)
                listen(progress)
                # Also before an evaluation, which may take long and be stopped.
                every = trainer.batch % self.recipe.checkpoint_every == 0
                saves = stop.is_set() or every or self._evaluates_now()
                if saves or trainer.batch == self.recipe.batches:
                    trainer.wait()  # the work that the GPU has left counts as training
                self._seconds += time.perf_counter() - started
                if recorded:
                    line = {"batch": trainer.batch, "seconds": self._all_seconds()}
                    append_line(self.out / "seconds.jsonl", line)
                if saves:
                    self.save()
            if self._saved != trainer.batch:
                self.save()
            if stop.is_set():
                raise Interrupted(
                    f"Stopped after batch {trainer.batch} of {self.recipe.batches}; to continue: "
                    f"taskgroup train --resume {self.out}"
                )
        try:
            return self._finish()
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped before the evaluation was done; to continue: taskgroup train --resume "
                f"{self.out}"
            ) from None

    def _write_affinity(self) -> None:
        """Write the affinity that was recorded last, unless it is written.

        This is done after the next batch: by then a copy from a GPU has arrived, and nothing waits.
        """
        if self._affinity is not None:
            (batch, copy), self._affinity = self._affinity, None
            tasks = self.trainer.tasks
            append_matrix(self.out / "affinity.jsonl", batch, tasks, copy.wait())

    def _all_seconds(self) -> dict[str, float]:
        return {**self.trainer.seconds, "everything": self._seconds}

    def _evaluates_now(self) -> bool:
        every = self.recipe.evaluate_every
        if every is None or not 0 < self.batch < self.recipe.batches:  # the end always is
            return False
        return self.batch % every == 0

    def _record_evaluation(self, board: SummaryWriter) -> None:
        metrics = self.trainer.evaluate("held_out", quick=True)
        append_line(self.out / "evaluations.jsonl", {"batch": self.batch, "metrics": metrics})
        self._evaluated = self.batch
        for task, value in metrics.items():
            board.add_scalar(f"held_out/{task}", value, self.batch)

    def _finish(self) -> Summary:
        trainer, problem, groups = self.trainer, self.trainer.problem, self.trainer.groups
        peak_bytes = trainer.peak_bytes
        metrics = trainer.evaluate("held_out")
        delta = None
        if self._baseline is not None:
            delta = delta_m(metrics, self._baseline, problem)
        lines = read_lines(self.out / "metrics.jsonl")
        inside = sum(trainer.seconds[section] for section in MODEL_SECTIONS)
        summary: Summary = {
            "data": self.recipe.data,
            "method": self.recipe.method,
            "batches": trainer.batch,
            "steps": sum(len(line["groups"]) for line in lines),
            "metric": {task: problem.metric_names[task] for task in metrics},
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
        write_text(self.out / "summary.json", json.dumps(summary, indent=2))
        return summary

    def save(self) -> None:
        """Write ``checkpoint.pt``; if the process crashes meanwhile, the last one stays.

        Raises:
            OSError: if it cannot be written.
        """
        self._write_affinity()  # a run that is resumed from here could not write it
        state = {
            "version": CHECKPOINT_VERSION,
            "seconds": self._seconds,
            "trainer": self.trainer.state_dict(),
        }
        tg.checkpoint.save(self.out / "checkpoint.pt", state)
        self._saved = self.batch


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or not is_empty(out)):
        raise ValueError(
            f"{out} exists and is not empty; name another folder with --out, or resume the run in "
            f"it with --resume {out}."
        )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Let the first SIGINT or SIGTERM set a flag; the second has its usual effect."""
    stop = threading.Event()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # this is not the main thread, the only one that gets signals
            break
    try:
        yield stop
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)


def _write_events(board: SummaryWriter, progress: Progress) -> None:
    for task, loss in progress.losses.items():
        board.add_scalar(f"loss/{task}", loss, progress.batch)
    board.add_scalar("groups", len(progress.partition), progress.batch)
