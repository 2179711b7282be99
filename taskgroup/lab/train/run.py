"""A training run in a folder: trained, stopped, resumed, evaluated and summarised."""

from __future__ import annotations

import json
import signal
import threading
import warnings
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
from taskgroup.lab.train.evaluation import (
    CHECKPOINT_VERSION,
    Summary,
    delta_m,
    read_baseline,
    read_checkpoint,
    read_settings,
    unfit_checkpoint,
    without_source,
)
from taskgroup.lab.train.source import changed_source, note_source
from taskgroup.lab.train.trainer import Progress, Trainer, task_names
from taskgroup.lab.words import listed

__all__ = ["Interrupted", "Run"]

#: The sections of a batch that would also take time without taskgroup.
_MODEL_SECTIONS = ("forward", "backward", "optimizer")


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user asked to stop, and a checkpoint has been written."""


class Run:
    """One training run in a folder of its own.

    The folder holds ``config.yaml``, the settings; ``source.yaml``, digests of the source of a
    problem of the user's own; the files of a :class:`taskgroup.Recorder`; ``checkpoint.pt``;
    TensorBoard events; and, at the end, ``summary.json``. The command line adds
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
        self._hold: tg.recording.Hold | None = None
        with self._holding():
            _check_empty(out)  # another process may have been quicker
            self._write_config()
            note_source(out, recipe.data)
            self.trainer.problem.keep(self.trainer.model, out)
            # Written before the first record: records without a checkpoint mean that it was lost.
            self.save()

    def _write_config(self) -> None:
        settings = self.recipe.model_dump(mode="json")
        tg.recording.write_text(self.out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))

    @classmethod
    def resume(cls, out: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
        """Resume a run from its last checkpoint, with other values for some of ``CHANGEABLE``.

        If the source of a problem of the user's own has changed, a warning says so.

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
            else:  # it has recorded nothing
                (out / tg.recording.HEADER).unlink(missing_ok=True)
            run._write_config()
            if state is not None and (changed := changed_source(out, recipe.data)):
                warnings.warn(
                    f"{listed(changed)} changed since {out} was last trained. The run goes on with "
                    "the new version, so its batches are not all of one version.",
                    stacklevel=2,
                )
            note_source(out, recipe.data)
        return run

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold the folder, and let go of it only if something goes wrong."""
        self._hold = self._hold or tg.recording.hold(self.out)
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
        files = [out / name for name in (*tg.recording.RECORDS, "summary.json")]
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
        self._saved: int | None = None  # the batch of the last checkpoint
        self._evaluated: int | None = None  # the batch of the last evaluation
        self._baseline: dict[str, float] | None = None
        if recipe.baseline:
            tasks = task_names(recipe, make_problem(recipe))
            self._baseline = read_baseline(recipe.baseline, tasks)
        self.trainer = trainer = Trainer(built or recipe)
        settings = recipe.model_dump(mode="json")
        # Batches whose steps a joint method takes are known by its losses.
        heard = trainer.groups if trainer.method is None else trainer.method
        self.recorder = tg.Recorder(
            heard,
            out,
            settings=settings,
            titles={task: trainer.problem.titles[task] for task in trainer.tasks},
        )

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self.trainer.load_state_dict(state["trainer"])
            self.recorder.load_state_dict(state["recorder"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(unfit_checkpoint(self.out, self.recipe, error)) from error
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
        trainer, recorder = self.trainer, self.recorder
        with SummaryWriter(str(self.out), purge_step=trainer.batch or None) as board, recorder:
            recorder.log_to(board)
            self._train_on(listen)
            try:
                return self._finish()
            except KeyboardInterrupt:
                raise Interrupted(
                    f"Stopped before the evaluation was done; to continue: taskgroup train "
                    f"--resume {self.out}"
                ) from None

    def _train_on(self, listen: Callable[[Progress], None]) -> None:
        trainer, recorder = self.trainer, self.recorder
        with _stop_signals() as stop:
            while trainer.batch < self.recipe.batches and not stop.is_set():
                if self._evaluates_now() and not self._has_evaluated():
                    self._record_evaluation()
                    continue  # a signal may have asked to stop
                conflicts = self.recipe.conflicts_every
                if conflicts is not None and trainer.batch % conflicts == 0:
                    with trainer.losses_ahead() as losses:
                        recorder.conflicts(losses, trainer.parts.shared)
                if trainer.method is not None:
                    trainer.batches.peek()  # loading the batch is no part of its forward pass
                    recorder.begin_batch()
                listen(trainer.step())
                # Also before an evaluation, which may take long and be stopped.
                every = trainer.batch % self.recipe.checkpoint_every == 0
                if stop.is_set() or every or self._evaluates_now():
                    self.save()
            if self._saved != trainer.batch:
                self.save()
            if stop.is_set():
                raise Interrupted(
                    f"Stopped after batch {trainer.batch} of {self.recipe.batches}; to continue: "
                    f"taskgroup train --resume {self.out}"
                )

    def _evaluates_now(self) -> bool:
        every = self.recipe.evaluate_every
        if every is None or not 0 < self.batch < self.recipe.batches:  # the end always is
            return False
        return self.batch % every == 0

    def _has_evaluated(self) -> bool:
        if self._evaluated == self.batch:
            return True  # even if the disk is full
        lines = tg.recording.read_lines(self.out / "evaluations.jsonl")
        return any(line["batch"] == self.batch for line in lines)

    def _record_evaluation(self) -> None:
        lower = self.trainer.problem.lower_is_better
        metrics = self.trainer.evaluate("held_out", quick=True)
        self._evaluated = self.batch
        self.recorder.metrics(
            metrics, {task: "lower" if lower[task] else "higher" for task in metrics}
        )

    def _finish(self) -> Summary:
        trainer, problem, groups = self.trainer, self.trainer.problem, self.trainer.groups
        peak_bytes = trainer.peak_bytes
        metrics = trainer.evaluate("held_out")
        delta = None
        if self._baseline is not None:
            delta = delta_m(metrics, self._baseline, problem)
        lines = tg.recording.read_lines(self.out / "metrics.jsonl")
        seconds = self.recorder.seconds
        inside = sum(seconds.get(section, 0.0) for section in _MODEL_SECTIONS)
        summary: Summary = {
            "data": self.recipe.data,
            "method": self.recipe.method,
            "batches": trainer.batch,
            "steps": sum(line["steps"] for line in lines) - trainer.skipped,
            "metric": {task: problem.metric_names[task] for task in metrics},
            "lower_is_better": {task: problem.lower_is_better[task] for task in metrics},
            "metrics": metrics,
            "delta_m": delta,
            "baseline": self.recipe.baseline,
            "partition": [list(group) for group in groups.partition],
            "unconverged": groups.unconverged,
            "seconds_per_batch": seconds["everything"] / trainer.batch,
            "share_outside_model": 1 - inside / seconds["everything"],
            "seconds": seconds,
            "peak_bytes": peak_bytes,
        }
        tg.recording.write_text(self.out / "summary.json", json.dumps(summary, indent=2))
        return summary

    def save(self) -> None:
        """Write ``checkpoint.pt``; if the process crashes meanwhile, the last one stays.

        Raises:
            OSError: if it cannot be written.
        """
        state = {
            "version": CHECKPOINT_VERSION,
            "recorder": self.recorder.state_dict(),
            "trainer": self.trainer.state_dict(),
        }
        tg.checkpoint.save(self.out / "checkpoint.pt", state)
        self._saved = self.batch


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or not tg.recording.is_empty(out)):
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
