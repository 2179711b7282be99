"""Measures the parts of a joint step on a model, by taking joint steps and group steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from taskgroup._kept import Kept
from taskgroup._losses import Losses
from taskgroup._random_state import RandomState
from taskgroup.costs.prediction import StepCosts
from taskgroup.costs.training import Training

__all__ = ["Stopwatch", "step_costs"]

_GROUPS = 4  # of the measured batches, or K if that is less; more would take longer
_WARMUP = 2  # rounds that are not counted: they compile, tune kernels, make the optimizer's state
_ROUNDS = range(5, 21)  # that are counted
_SECONDS = 2.0  # after which no further round is taken

_HEADS_UNKNOWN = (
    "The heads' forward pass could not be measured by itself and counts as the encoder's: the "
    "model has no modules in model.heads that it calls; pass heads={task: module}."
)
_COMPILED_WHOLE = (
    "The model is compiled as a whole, so every step runs all heads forward and backward, and "
    "their backward pass counts as the encoder's: compile a tg.MultiTaskModel with "
    "model.compile(), and call it with group=group."
)


def step_costs(
    model: nn.Module,
    inputs: Any,
    losses: Callable[[Any], Losses],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    heads: Mapping[str, nn.Module] | nn.ModuleDict | None = None,
    clock: Callable[[], float] | None = None,
) -> StepCosts:
    r"""Measure on a model of yours what group steps cost, and whether they are worth trying.

    This takes joint steps and batches of group steps, in turns, on one batch of data: 2 rounds to
    warm up, and 5 to 20 that count. With J the time of a joint step, O that of a batch of m = 4
    groups (m = K for fewer tasks) that observes, and U that of one that does not (medians over the
    rounds), encoder e, heads forward f and heads backward b take

    .. math::
        e = \frac{U - J}{m - 1}, \qquad f = \frac{O - U}{m - 1}, \qquad b = J - e - f.

    A model whose ``forward`` does not take ``group`` runs all heads in every step. Then only e + f
    follows from the steps, and f is the time of the heads and losses on features that were kept.

    No trace is left: parameters, gradients, buffers, the state of the optimizer and torch's random
    state are restored bitwise, and the modules keep their modes. The copies take the memory of
    parameters, buffers and optimizer state once more.

    The model runs in the mode that it is in, so call ``model.train()`` before. For mixed precision,
    call this function within ``torch.autocast``. Inside a ``DistributedDataParallel`` the module is
    measured without communication, so one rank can call this alone. A model that is compiled as a
    whole is measured as such, but its heads forward uncompiled.

    The time is

    - on an accelerator, the time from an idle device to an idle device;
    - on the CPU with one thread, the processor time of this thread, which other processes do not
      add to;
    - on the CPU with several threads, the time on the wall. What counts is how long they take
      together, and their processor time would include the time in which they wait for each other.
      Measure on an otherwise idle machine.

    Args:
        model: the model. With tensors as ``inputs`` it is called as ``model(inputs)``, with a tuple
            or list as ``model(*inputs)``, with a dict as ``model(**inputs)``. A ``forward`` with an
            argument ``group``, as that of :class:`MultiTaskModel`, gets the step (None for all
            tasks), and decides which heads to run.
        inputs: what the model is called with, of one batch of the usual size.
        losses: a function from the outputs of the model to the losses, ``{task: scalar}`` or one
            tensor in the order of the outputs. If the model takes ``group``, it gets outputs of
            some tasks only, and returns the losses of these.
        optimizer: the optimizer or optimizers that take the steps. Without one, the time of
            ``optimizer.step()`` is left out.
        heads: ``{task: module}``, only needed for a model that takes no ``group`` and has no
            attribute ``heads``.
        clock: a function that returns a time in seconds, in place of the times above.

    Returns:
        The times, what batches of group steps cost (:meth:`StepCosts.of`), and advice; print it.

    Raises:
        TypeError: if ``model`` is not a module, ``losses`` not a function, or the losses neither a
            mapping nor a tensor.
        ValueError: if a loss is missing, not finite, not scalar or without a graph, there are fewer
            than two tasks, a task has no head, or the model cannot be measured (without parameters
            that require a gradient, uninitialized, sharded, ``nn.DataParallel``).

    Example:
        >>> import taskgroup as tg
        >>> heads = {task: nn.Linear(32, 1) for task in ("depth", "normal", "edges")}
        >>> model = tg.MultiTaskModel(nn.Linear(8, 32), heads)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> def losses(outputs):
        ...     return {task: output.square().mean() for task, output in outputs.items()}
        >>> costs = tg.step_costs(model, torch.randn(16, 8), losses, optimizer)
        >>> costs.n_tasks, costs.joint > 0
        (3, True)
        >>> cost = costs.of(3, observe_every=10)  # print(costs) shows a table and advice
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("step_costs() takes steps: call it outside of torch.inference_mode().")
    training = Training(model, inputs, losses, optimizer)
    parameters = training.parameters
    kept = Kept(training.optimizers, parameters, training.inner.modules())
    devices = list({p.device: None for p in parameters})
    random_states = [RandomState(device) for device in devices]
    try:
        with torch.enable_grad():
            return _measured(training, heads, Stopwatch(clock, devices))
    finally:
        kept.restore()
        for state in random_states:
            state.replay()
        torch.clear_autocast_cache()


class Stopwatch:
    """Times calls by the clock that fits the devices."""

    def __init__(self, clock: Callable[[], float] | None, devices: Iterable[torch.device]) -> None:
        self._waits_for = [own for own in devices if own.type not in ("cpu", "meta")]
        self.name = ""
        self._now = clock
        if clock is None:
            self._now, self.name = self._chosen()

    def seconds(self, call: Callable[[], object]) -> float:
        """The seconds that a call takes."""
        start = self._time()
        call()
        return self._time() - start

    def _time(self) -> float:
        assert self._now is not None
        for device in self._waits_for:
            torch.accelerator.synchronize(device)
        return self._now()

    def _chosen(self) -> tuple[Callable[[], float], str]:
        if self._waits_for:
            return time.perf_counter, f"on {', '.join(map(str, self._waits_for))}"
        # Some systems count the time of a thread in steps of 16 ms.
        if torch.get_num_threads() == 1 and time.get_clock_info("thread_time").resolution < 1e-5:
            return time.thread_time, "processor time of one thread"
        return time.perf_counter, f"{torch.get_num_threads()} threads"


def _measured(
    training: Training,
    heads: Mapping[str, nn.Module] | nn.ModuleDict | None,
    stopwatch: Stopwatch,
) -> StepCosts:
    training.start()
    n_tasks = len(training.tasks)
    n_groups = min(n_tasks, _GROUPS)
    partition = [tuple(range(k, n_tasks, n_groups)) for k in range(n_groups)]
    observed = partial(training.batch, partition, observes=True)
    joint = training.joint_step
    # A joint step is short, and all costs are divided by it: it takes two turns.
    sides: list[tuple[str, Callable[[], object]]] = [("joint", joint), ("observed", observed)]
    remark = ""
    if training.takes_group:
        unobserved = partial(training.batch, partition, observes=False)
        sides += [("joint", joint), ("unobserved", unobserved)]
    elif run_heads := training.heads_forward(heads):
        sides += [("joint", joint), ("heads", run_heads)]
    else:
        remark = _HEADS_UNKNOWN
    if training.model is not training.inner:
        remark = _COMPILED_WHOLE
    found = _turns(sides, stopwatch)
    step, more = found["joint"], n_groups - 1
    if training.takes_group:
        e = min(max(found["unobserved"] - step, 0.0) / more, step)
        f = min(max(found["observed"] - found["unobserved"], 0.0) / more, step - e)
    else:
        both = min(max(found["observed"] - step, 0.0) / more, step)
        f = min(found.get("heads", 0.0), both)
        e = both - f
    return StepCosts(e, f, step - e - f, n_tasks, training.takes_group, stopwatch.name, remark)


def _turns(
    sides: Sequence[tuple[str, Callable[[], object]]], stopwatch: Stopwatch
) -> dict[str, float]:
    """The median seconds of each side over the rounds; a slow moment meets all sides alike."""
    for _ in range(_WARMUP):
        for _, call in sides:
            call()
    found: dict[str, list[float]] = {name: [] for name, _ in sides}
    begin = time.perf_counter()
    for n_rounds in range(_ROUNDS.stop - 1):
        if n_rounds >= _ROUNDS.start and time.perf_counter() - begin > _SECONDS:
            break
        for name, call in sides:
            found[name].append(stopwatch.seconds(call))
    return {name: float(np.median(seconds)) for name, seconds in found.items()}
