"""Records the training of any loop, for the report and for trackers."""

from __future__ import annotations

import atexit
import json
import math
import os
import pkgutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from torch import Tensor

from taskgroup._arguments import listed, whole_number
from taskgroup._losses import Losses
from taskgroup._version import __version__
from taskgroup.gradients.analysis import conflicts
from taskgroup.gradients.per_task import task_gradients
from taskgroup.loop.schedule import TaskGroups
from taskgroup.methods.method import JointMethod
from taskgroup.ops.task_gram import task_gram
from taskgroup.recording.batches import Batches, BatchRecord
from taskgroup.recording.logs import Logs
from taskgroup.recording.records import Records
from taskgroup.recording.run_files import FORMAT, Header

__all__ = ["Recorder"]

_STATE_VERSION = 1


class Recorder:
    """Records the training of your own loop: for ``taskgroup report``, and for a tracker.

    It listens to the groups, so the loop needs no other line::

        groups = tg.TaskGroups(tasks)
        recorder = tg.Recorder(groups, "runs/mine")
        ...                                                   # the loop, as it was
        recorder.metrics({"depth": 0.61, "edges": 0.80}, better={"depth": "lower"})
        recorder.report()                                     # runs/mine/report.html

    The folder holds, as JSON: every batch with the losses before its first step (of a task that
    the first step does not need, before the first step that does), the partition and the learning
    rates; the affinity and the time per section of a batch, as often as ``every`` says; and what
    :meth:`metrics` and :meth:`conflicts` are given. The page "Record your own loop" of the
    documentation describes the files. A line is in its file as soon as the next batch has ended,
    so a process that is killed loses the last batch at most.

    It does not make the loop wait for a GPU. With several ranks, the first one records the losses
    averaged over all. Nothing that goes wrong while writing, such as a full disk, stops the
    training: a warning says it once. If the folder holds another run, the next free one of
    ``mine-2``, ``mine-3``, ... is taken.

    The optimizers that step between :meth:`Group.loss` and the next group are noticed without
    :meth:`TaskGroups.attach`.

    Args:
        groups: the :class:`TaskGroups` of the loop; or a method of ``tg.methods``, to
            record joint training for comparison.
        folder: the folder of the run, which is made at the first batch; ``~`` is your home.
        log: trackers that are handed the numbers as well: a ``SummaryWriter``, a W&B run, the
            module ``mlflow``, a logger of Lightning, a function ``(dict, step)``, or a list of
            these. Scalars are named ``taskgroup/loss/depth``, ``.../groups``, ``.../lr/0``,
            ``.../metric/depth``, ``.../affinity/depth->edges``; a heat map of the affinity is an
            image.
        log_every: number of batches from one that is handed to the trackers to the next.
        pairs: pairs of tasks whose affinity is handed to the trackers: what a step on the first
            does to the loss of the second, relative to what a step on the second does to it.
        every: number of batches from one whose affinity and seconds are recorded to the next. By
            default 1, doubled whenever there are 400 records (fewer for more than 200 tasks), which
            are then thinned; with K tasks it starts at K * K / 10,000.
        settings: of your run, such as ``{"lr": 1e-3, "seed": 0}``; the report tells runs apart by
            them. They may replace those of the groups. Values that JSON does not have are written
            as text.
        titles: ``{task: name}`` as the report shows it; the tasks' own names by default.

    Raises:
        TypeError: if ``groups`` or ``log`` is none of these, or JSON cannot hold the settings.
        ValueError: if a pair or ``titles`` holds an unknown task, or a number is out of range.

    Example:
        >>> import tempfile, torch
        >>> import taskgroup as tg
        >>> groups = tg.TaskGroups(["a", "b"], warmup=1)
        >>> recorder = tg.Recorder(groups, Path(tempfile.mkdtemp()) / "run")
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x], lr=0.01)
        >>> for batch in range(3):
        ...     for group in groups:
        ...         losses = {"a": (x - 3).square().sum(), "b": (x - 4).square().sum()}
        ...         optimizer.zero_grad()
        ...         group.loss(losses).backward()
        ...         optimizer.step()
        >>> recorder.close()
        >>> lines = list(tg.recording.read_lines(recorder.folder / "metrics.jsonl"))
        >>> lines[0]["losses"], lines[-1]["partition"]
        ({'a': 18.0, 'b': 32.0}, [['a', 'b']])
    """

    def __init__(
        self,
        groups: TaskGroups | JointMethod,
        folder: str | os.PathLike[str],
        *,
        log: object = None,
        log_every: int = 10,
        pairs: Iterable[tuple[str, str]] = (),
        every: int | None = None,
        settings: Mapping[str, Any] | None = None,
        titles: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(groups, TaskGroups | JointMethod):
            raise TypeError(
                "Recorder takes the TaskGroups of the loop, or a method of tg.methods, got a "
                f"{type(groups).__name__}; write tg.Recorder(groups, folder)."
            )
        self._groups = groups if isinstance(groups, TaskGroups) else None
        self._tasks = groups.tasks
        # The partition, and the same in lists, which JSON has: made again when it changes.
        self._seen: list[tuple[str, ...]] = []
        self._lists: list[list[str]] = []
        self._logs = Logs(self._tasks, log, pairs, whole_number("log_every", log_every, at_least=1))
        own = {"method": type(groups).__name__} if self._groups is None else self._groups.settings
        header = _header(self._tasks, titles or {}, {**own, **_settings(settings)})
        every = None if every is None else whole_number("every", every, at_least=1)
        # Absolute: the program may go to another folder.
        self._records = Records(Path(folder).expanduser().absolute(), header, every)
        self._closed = False
        self._batches = Batches(self._note, self._take, joint=self._groups is None)
        groups.listen(self._batches)
        _close_at_exit(self)

    @property
    def folder(self) -> Path:
        """The folder of the run; another one than asked for if that holds another run."""
        return self._records.folder

    @property
    def seconds(self) -> dict[str, float]:
        """``{section: seconds}`` of all batches so far, and of all sections, ``"everything"``.

        On a GPU, the last batch is missing until :meth:`flush`.
        """
        return self._batches.clock.read(wait=False)

    def log_to(self, log: object) -> None:
        """Hand the numbers to another tracker as well, from now on; see ``log`` above."""
        self._logs.add(log)

    def begin_batch(self) -> None:
        """Say that the forward pass of a batch of a joint method begins, to have it timed.

        Only joint methods need it, and only for that: what they tell begins with the losses.
        """
        self._batches.begin_batch()
        self._batches.begin_step()

    def metrics(
        self,
        values: Mapping[str, float],
        better: Mapping[str, Literal["lower", "higher"]] | None = None,
    ) -> None:
        """Record an evaluation after the batches so far.

        The time since the last batch is not counted as training.

        Args:
            values: ``{task: metric}``; the report draws them by task. A metric of another name,
                such as a mean over the tasks, is a row of its table alone.
            better: ``{task: "lower" or "higher"}``, which values are better; the report marks the
                best run.

        Raises:
            TypeError: if a metric is not a number.
            ValueError: if a direction is neither of the two, or of a metric that is not there.
        """
        numbers = {str(name): _metric(name, value) for name, value in values.items()}
        better = dict(better or {})
        if wrong := [name for name, way in better.items() if way not in ("lower", "higher")]:
            raise ValueError(
                f"better must say 'lower' or 'higher' for every metric, got {better[wrong[0]]!r} "
                f"for {wrong[0]!r}."
            )
        if unknown := [name for name in better if name not in values]:
            raise ValueError(
                f"better names {listed(unknown)}, and the metrics are {listed(list(values))}."
            )
        self._warn_if_closed("metrics")
        self.flush()
        self._batches.clock.pause()
        batch = self._batches.whole
        line = {"batch": batch, "metrics": _json(numbers), "better": better}
        if self._first_rank():
            self._records.append("evaluations.jsonl", line)
            self._logs.scalars({f"metric/{name}": value for name, value in numbers.items()}, batch)

    def conflicts(self, losses: Losses, parameters: Iterable[Tensor]) -> Tensor:
        """Record the cosines of the tasks' gradients on the shared parameters.

        Call it outside of the loop over the groups, with the losses of a forward pass of its own.
        The gradients stay as they are, and the time since the last batch is not counted.

        Args:
            losses: ``{task: scalar}`` or ``[K]`` in task order, with a graph.
            parameters: the shared ones, such as ``model.encoder.parameters()``.

        Returns:
            The cosines ``[K, K]``, on the device of the losses.
        """
        self._warn_if_closed("conflicts")
        self.flush()
        self._batches.clock.pause()
        found = conflicts(task_gram(task_gradients(losses, parameters)))
        if self._first_rank():
            self._records.append_conflicts(self._batches.whole + 1, found)
        return found

    def flush(self) -> None:
        """Write what is known of all batches that have ended; waits for those still on a GPU."""
        self._batches.flush()
        self._batches.clock.read(wait=True)

    def close(self) -> None:
        """Write what is left, hand a last heat map to the trackers, and end the recording.

        Call it before you close the trackers. A ``with`` block calls it at its end. When Python
        ends, the files are written in any case.
        """
        self._close(ended=True)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(ended=kind is None)

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Write the HTML report of the run so far, as ``taskgroup report`` does.

        After :meth:`close` it has a table of the last metrics as well.

        Args:
            out: the file; ``report.html`` in the folder by default.

        Returns:
            The file.

        Raises:
            ImportError: if plotly or another library of the extra ``report`` is missing.
            ValueError: if no batch has been recorded.
        """
        self.flush()
        if not self._batches.whole:
            raise ValueError(
                f"{self.folder} has no batch to report; train on one with these groups, and then "
                "call report()."
            )
        path = self.folder / "report.html" if out is None else Path(out)
        load_runs, write_report = _drawing()
        if self._first_rank():
            runs, _ = load_runs([self.folder])
            write_report(runs, path)
        return path

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """A copy of a module that keeps a recorder has the same one: its files are open once."""
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, because a copy in another process would hear nothing there."""
        raise TypeError(
            "A Recorder cannot be pickled. Create it in the process that trains; in a checkpoint, "
            "save its state_dict()."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on recording into the same folder.

        It loads under ``weights_only=True``. Save it with the state of the groups: inside a batch
        it is the state before that batch, as that of the groups in a signal handler.
        """
        self.flush()
        self._batches.clock.pause()
        if self._first_rank():
            self._records.open(cut=False)  # the folder is known by the id from now on
        return {
            "version": _STATE_VERSION,
            "run": self._records.id,
            "batch": self._batches.whole,
            "seconds": self._batches.clock.read(wait=True),
            "every": self._records.every,
            "conflicts": self._records.last_conflicts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on recording where :meth:`state_dict` was taken; later records are dropped.

        If the folder no longer holds that run, the recording goes on in another one.

        Raises:
            ValueError: if the state is of another version.
            RuntimeError: if a batch was recorded already.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"The state of a Recorder has version {state.get('version')}, and this taskgroup "
                f"reads version {_STATE_VERSION}; record into a new folder."
            )
        if self._records.is_open() or self._batches.batch:
            raise RuntimeError(
                "load_state_dict() after the first batch; load the state before the loop."
            )
        self._records.resume(state["run"], state["batch"], state["every"], state["conflicts"])
        self._batches.batch = state["batch"]
        self._batches.clock.load(dict(state["seconds"]))

    def _close(self, ended: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._batches.close()
        if self._batches.batch and self._matrix_is_known():
            self._logs.image(self._affinity(), self._partition(), self._batches.batch)
        self._records.close(ended)

    def _warn_if_closed(self, what: str) -> None:
        if self._closed:
            warnings.warn(
                f"{self.folder} is closed, so these {what} are not recorded; record them before "
                "close(), or before the trainer ends, which closes its recorder.",
                stacklevel=3,
            )

    # What the batches hand on.

    def _note(self, batch: int) -> tuple[dict[str, Any], Tensor | None]:
        groups = self._groups
        if groups is None:
            return {"partition": [list(self._tasks)]}, None
        extra: dict[str, Any] = {"partition": self._partition()}
        if groups.warming_up:
            extra["warmup"] = True
        due = self._records.due(batch) or self._logs.wants_affinity(batch)
        return extra, self._affinity() if due else None

    def _take(self, record: BatchRecord) -> None:
        batch, tasks = record.batch, self._tasks
        losses = {tasks[k]: record.losses[k] for k in sorted(record.losses)}
        line: dict[str, Any] = {"batch": batch, "losses": _json(losses), "steps": record.steps}
        if record.extra.get("warmup"):
            line["warmup"] = True
        partition = record.extra["partition"]
        line |= {"partition": partition, "lr": _listed(record.lr)}
        self._records.append_batch(line)
        matrix = None if record.matrix is None or record.matrix.isnan().all() else record.matrix
        if self._records.due(batch):
            if matrix is not None:
                self._records.append_affinity(batch, matrix)
            self._records.append_seconds(batch, self.seconds)
        self._logs.batch(record, losses, partition, matrix)

    def _first_rank(self) -> bool:
        return self._groups is None or self._groups.first_rank

    def _partition(self) -> list[list[str]]:
        assert self._groups is not None
        partition = self._groups.partition
        if partition != self._seen:
            self._seen, self._lists = partition, [list(group) for group in partition]
        return self._lists

    def _matrix_is_known(self) -> bool:
        return self._groups is not None and bool(self._groups.affinity.observed.any())

    def _affinity(self) -> Tensor:
        assert self._groups is not None
        return self._groups.affinity.known()


def _json(values: Mapping[str, float]) -> dict[str, float | None]:
    """The values with None for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _listed(rates: Sequence[float]) -> list[float | None]:
    return [rate if math.isfinite(rate) else None for rate in rates]


def _header(tasks: Sequence[str], titles: Mapping[str, str], settings: dict[str, Any]) -> Header:
    """The header of a new run.

    Raises:
        ValueError: if ``titles`` holds an unknown task.
    """
    if unknown := sorted(set(titles).difference(tasks)):
        raise ValueError(
            f"titles names the unknown tasks {listed(unknown)}; the tasks are {listed(tasks)}."
        )
    return {
        "format": FORMAT,
        "taskgroup": __version__,
        "id": os.urandom(8).hex(),
        "tasks": list(tasks),
        "titles": {task: str(title) for task, title in titles.items()},
        "settings": settings,
        "ended": False,
    }


def _drawing() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What reads runs and writes their report; by name, since training needs none of it.

    Raises:
        ImportError: if a library that draws is missing.
    """
    try:
        load_runs = pkgutil.resolve_name("taskgroup.lab.report.run_data:load_runs")
        return load_runs, pkgutil.resolve_name("taskgroup.lab.report.page:write_report")
    except ModuleNotFoundError as error:  # that of plotly says this already
        raise ImportError(
            f"The report needs {error.name}: pip install 'taskgroup[report]'"
        ) from error


def _metric(name: str, value: object) -> float:
    """A number, or an array or tensor of one, as a number."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The metric of {name!r} must be a number, got a {type(value).__name__} ({error}); for "
            "several values of a task record their mean."
        ) from None


def _settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings as JSON gives them back.

    Raises:
        TypeError: if JSON cannot hold them.
    """
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(settings or {}), default=_plain))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"settings must be a dict that JSON can hold, got {type(settings).__name__} ({error}); "
            'write such as {"lr": 1e-3}.'
        ) from None
    return found


def _plain(value: object) -> object:
    """A value that JSON does not have: a number of torch or numpy, or its text."""
    one = getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if one else str(value)  # type: ignore[attr-defined]


def _close_at_exit(recorder: Recorder) -> None:
    """Close the recorder when Python ends, if it is still there."""
    alive, owner = weakref.ref(recorder), os.getpid()

    def close() -> None:
        found = alive()
        if found is None or os.getpid() != owner:  # a forked process leaves the files alone
            return
        found._logs.end()  # which may be closed by now
        # Set if an exception ended the program.
        found._close(ended=getattr(sys, "last_value", None) is None)

    atexit.register(close)
    weakref.finalize(recorder, atexit.unregister, close).atexit = False
