"""Experiment trackers: what ``log=`` of :class:`taskgroup.Recorder` takes, behind one interface."""

from __future__ import annotations

import importlib
import inspect
import re
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from types import MethodType, ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["PREFIX", "Tracker", "tracker"]

#: All names begin with it, so that they are not those of the user's own values.
PREFIX = "taskgroup/"

_ACCEPTED = (
    "log must be a SummaryWriter, a W&B run, the wandb or mlflow module, a Lightning logger, a "
    "function of (values, step), or a list of these"
)


class Tracker(Protocol):
    """Shows values and images while a network trains.

    An object with these two methods can be passed as ``log=`` too.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show the values of one batch.

        Args:
            values: ``{name: value}``; a value may be NaN or infinite.
            step: the number of the batch.
        """

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Show an image.

        Args:
            name: the name of the image.
            pixels: ``[H, W, 3]`` in red, green and blue.
            step: the number of the batch.
        """


def tracker(log: object) -> Tracker:
    """What is passed as ``log=``, as a tracker.

    Names get the prefix ``"taskgroup/"``. The tracker never raises an Exception: if the library
    behind it does, this is a RuntimeWarning, once for values and once for images. It is then left
    alone for 20 times as long as the failed call took, and tried again, so a server that cannot be
    reached costs at most about 5% of the time.

    Args:
        log: a SummaryWriter of torch or tensorboardX; a W&B run, or the ``wandb`` module, whose
            active run is taken at the first value; the ``mlflow`` module (the active run, or a new
            one, as in MLflow's own functions) or an active run of it; a logger of Lightning, or
            any object with ``log_metrics(values, step=step)``; a function of ``(values, step)``;
            a :class:`Tracker`; or a list or tuple of these. None is no tracker.

    Raises:
        TypeError: if ``log`` is something else.

    Example:
        >>> tracker(lambda values, step: print(step, values)).scalars({"loss/depth": 0.5}, 7)
        7 {'taskgroup/loss/depth': 0.5}
    """
    if isinstance(log, MethodType) and log.__name__ == "log" and _is_wandb_run(log.__self__):
        log = log.__self__  # run.log as a function would lose values, see _WandbRun
    if log is None:
        return _Several([])
    if isinstance(log, list | tuple):
        return _Several([tracker(one) for one in log])
    if isinstance(log, type):
        raise TypeError(f"{_ACCEPTED}; got the class {log.__name__}: pass an instance of it.")
    kind = type(log).__name__
    if isinstance(log, ModuleType):
        if log.__name__ == "wandb":
            return _Guarded("W&B", lambda: _WandbRun(_active_run(log)))
        if log.__name__ == "mlflow":
            return _Guarded("MLflow", lambda: _MLflow(log.MlflowClient(), _fluent_run(log)))
        raise TypeError(f"{_ACCEPTED}; got the module {log.__name__}.")
    if hasattr(log, "log_metrics"):
        _check_call(f"{kind}.log_metrics", log.log_metrics, {}, step=0)
        return _Guarded(kind, lambda: _of_logger(log))
    if _is_summary_writer(log):
        return _Guarded(kind, lambda: _TensorBoard(log))
    if _is_wandb_run(log):
        return _Guarded("W&B", lambda: _WandbRun(log))
    if type(log).__module__.startswith("mlflow.") and hasattr(log, "info"):
        run_id = log.info.run_id
        return _Guarded("MLflow", lambda: _MLflow(_module("mlflow").MlflowClient(), run_id))
    if hasattr(log, "scalars") and hasattr(log, "image"):
        return _Guarded(kind, lambda: log)
    if callable(log):
        name = f"the function {getattr(log, '__name__', kind)}"
        _check_call(name, log, {}, 0)
        return _Guarded(name, lambda: _Function(log))
    raise TypeError(f"{_ACCEPTED}; got {kind}.")


def _check_call(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise a TypeError if the function has not the parameters for this call."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{_ACCEPTED}; {name}{signature} does not take a dict of values and a step ({error})."
        ) from None


def _module(name: str) -> Any:
    """A module of a library that is imported already, because the user has an object of it."""
    return importlib.import_module(name)


class _Several:
    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for one in self._trackers:
            one.scalars(values, step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        for one in self._trackers:
            one.image(name, pixels, step)


class _Guarded:
    """Opens a tracker at the first value, adds the prefix, and survives its errors.

    Opened late, a trainer that starts its W&B or MLflow run itself has done so, and loggers make
    no folders before training.
    """

    _REST = 20  # times as long as the failed call took

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self._name = name
        self._open = open_tracker
        self._tracker: Tracker | None = None
        self._rests_until: dict[str, float] = {}  # by what is shown: values fail without images
        self._warned: set[str] = set()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        named = {PREFIX + name: value for name, value in values.items()}
        self._try("values", lambda tracker: tracker.scalars(named, step))

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._try("images", lambda tracker: tracker.image(PREFIX + name, pixels, step))

    def _try(self, what: str, show: Callable[[Tracker], None]) -> None:
        began = time.monotonic()
        if began < self._rests_until.get(what, 0):
            return
        try:
            if self._tracker is None:
                self._tracker = self._open()
            show(self._tracker)
        except Exception as error:
            now = time.monotonic()
            self._rests_until[what] = now + self._REST * (now - began)
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(
                    f"{self._name} failed to take {what} ({type(error).__name__}: {error}). "
                    "Training goes on, and later values are still offered to it now and then. "
                    f"This warning is shown once for its {what}.",
                    RuntimeWarning,
                    stacklevel=4,
                )


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")


def _is_summary_writer(log: object) -> bool:
    return hasattr(log, "add_scalar") and hasattr(log, "add_image")


class _WandbRun:
    """A run of Weights & Biases.

    W&B numbers the rows of a run's table by its *step*, which never goes back: a row whose step is
    in the past is dropped, with all that is in it. So we write into the row that is open, whoever
    opened it, and open the next one only where we would replace values of our own. Rows stay open,
    so that users who log with a step of their own can still write into the same row. This takes the
    step from W&B's own process in every call. The x axis of our charts is the batch.
    """

    _BATCH = PREFIX + "batch"

    def __init__(self, run: Any) -> None:
        self._run = run
        self._wandb = _module("wandb")
        self._active = self._wandb.run is run
        self._shared = getattr(getattr(run, "settings", None), "mode", None) == "shared"
        self._batch: int | None = None
        self._row = -1
        self._defined: set[str] = set()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(values, step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._log({name: self._wandb.Image(pixels)}, step)

    def _log(self, values: Mapping[str, Any], batch: int) -> None:
        if self._active and self._wandb.run is not self._run:
            raise RuntimeError("the run is finished")  # run.step would wait 30 seconds for it
        # One by one: a pattern such as "taskgroup/*" competes with those of others ("*" of
        # Lightning and of Transformers), and W&B takes any of those that match.
        for name in values.keys() - self._defined:
            self._defined.add(name)
            if "*" not in name:  # which W&B refuses here
                self._run.define_metric(name, step_metric=self._BATCH)
        values = {**values, self._BATCH: batch}
        if self._shared:  # by several processes: the run has no step, and each call gets a row
            self._run.log(values)
            return
        self._row = max(self._run.step, self._row + (batch != self._batch))
        self._batch = batch
        self._run.log(values, step=self._row)


def _is_wandb_run(log: object) -> bool:
    return hasattr(log, "log") and hasattr(log, "define_metric")  # asking for log.step takes long


def _active_run(wandb: Any) -> Any:
    if wandb.run is None:
        raise RuntimeError("no run is active: call wandb.init() before the first batch")
    return wandb.run


class _MLflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        metric, now = _module("mlflow.entities").Metric, round(time.time() * 1000)
        metrics = [metric(_legal(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._client.log_image(self._run_id, pixels, key=_legal(name), step=step)


def _fluent_run(mlflow: Any) -> str:
    """The run of MLflow's own functions: the active one, or a new one.

    It is asked for once: after ``mlflow.end_run()``, the last values still belong to it.
    """
    run_id: str = (mlflow.active_run() or mlflow.start_run()).info.run_id
    return run_id


def _legal(name: str) -> str:
    """The name as MLflow allows it on all systems; names stay different from each other.

    Example:
        >>> _legal("affinity/depth->edges")
        'affinity/depth to edges'
        >>> _legal("loss/a:b")
        'loss/a_b-9b0d7393'
    """
    wanted = name.replace("->", " to ")
    legal = re.sub(r"[^\w./ -]", "_", wanted)[:240]  # of 250
    # Names are paths, and may not have empty parts, "." or "..".
    legal = "/".join(
        part if part.strip(".") else "_" * max(1, len(part)) for part in legal.split("/")
    )
    return legal if legal == wanted else f"{legal}-{zlib.crc32(name.encode()):08x}"


class _Metrics:
    """A logger with ``log_metrics(values, step)``; it shows no images."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics(values, step=step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        pass


def _of_logger(logger: Any) -> Tracker:
    """The tracker behind a logger of Lightning, which can show images; or the logger itself."""
    experiment = getattr(logger, "experiment", None)
    if _is_summary_writer(experiment):
        return _TensorBoard(experiment)
    if _is_wandb_run(experiment):
        return _WandbRun(experiment)
    if hasattr(experiment, "log_batch") and hasattr(logger, "run_id"):
        return _MLflow(experiment, logger.run_id)
    return _Metrics(logger)


class _Function:
    def __init__(self, function: Callable[[Mapping[str, float], int], Any]) -> None:
        self._function = function

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._function(values, step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        pass
