"""The base class of the joint methods: tasks, losses, state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._arguments import described, parameters_of
from taskgroup._listeners import Listener, Listeners
from taskgroup._losses import Losses, check_graph, check_one_device, losses_by_task

__all__ = ["JointMethod"]


class JointMethod:
    """Base class of the joint methods, which step on all tasks at once.

    Call ``method.backward(losses)`` instead of ``loss.backward()``::

        method = tg.methods.CAGrad(model.encoder, tasks)
        ...
        optimizer.zero_grad()
        method.backward(losses)
        optimizer.step()

    As in any backward pass, gradients are added to ``.grad``. Every method is for a single process:
    under data parallelism, each rank would compute other weights. (As ``weights`` of
    :class:`taskgroup.TaskGroups`, methods work on several ranks.)

    In float16, pass the ``GradScaler`` and the plain losses; the method scales them itself::

        method.backward(losses, scaler=scaler)  # not scaler.scale(loss)
        scaler.step(optimizer)
        scaler.update()

    The weights and the state of a method are computed from the plain losses and gradients, so they
    do not depend on the scale. A method cannot tell that losses were already scaled. If they were,
    the steps of UW, DTP, IMTL-L, Nash-MTL and FairGrad depend on the scale, and DWA and FAMO
    mistake a change of the scale for a change of the losses.

    The sparse gradients of an embedding with ``sparse=True`` stay sparse. The real and imaginary
    parts of a complex parameter count as two real numbers, as in torch's optimizers. Hooks
    registered with ``register_post_accumulate_grad_hook``, such as an optimizer that steps in the
    backward pass, run once, on the gradients that the method has computed.

    Every method can be copied with ``copy.deepcopy``, pickled, and sent to a spawned process. A
    copy has its own parameters, so copy it together with the model and the optimizer:
    ``copy.deepcopy((model, optimizer, method))``.

    Args:
        shared: the parameters that the tasks share, or the module that holds them (the encoder).
            Parameters that are frozen or that no task reaches are skipped.
        tasks: the K task names, in the order of stacked losses and of the weights.

    Attributes:
        observes_step: True where :meth:`observe` must be called after every ``optimizer.step()``.

    Raises:
        ImportError: if a package that the method needs is missing. The extra
            ``taskgroup[compare]`` installs all of them.
        ValueError: if nothing is shared, or the tasks are not K different names.
    """

    observes_step: bool = False
    _requires: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        name = type(self).__name__
        if missing := [module for module in self._requires if find_spec(module) is None]:
            raise ImportError(
                f"{name} needs {', '.join(missing)}: pip install 'taskgroup[compare]'"
            )
        if isinstance(shared, Tensor):
            raise ValueError("shared must be a module or several parameters: pass [parameter].")
        # Each once, or it would count twice.
        self._shared = list(dict.fromkeys(parameters_of("shared", shared)))
        if not self._shared:
            raise ValueError("shared is empty: name at least one parameter that the tasks share.")
        for t, parameter in enumerate(self._shared):
            if not parameter.is_leaf:
                raise ValueError(
                    f"shared must hold parameters, but entry {t} is computed, so it gets no .grad."
                )
        rows = isinstance(tasks, np.ndarray) and tasks.ndim != 1
        if rows or isinstance(tasks, str | Tensor) or not isinstance(tasks, Iterable):
            raise ValueError(f"tasks must be a sequence of different names, got {tasks!r}.")
        # Plain strings: a state that holds NumPy's does not load under weights_only=True.
        self._tasks = tuple(str(task) if isinstance(task, str) else task for task in tasks)
        if not self._tasks or len(set(self._tasks)) < len(self._tasks):
            raise ValueError(f"tasks must be a sequence of different names, got {tasks!r}.")
        self._listeners = Listeners()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task names, in the order of stacked losses and of the weights."""
        return self._tasks

    def listen(self, listener: Listener) -> None:
        """Let an object hear of the losses of every batch; a :class:`Recorder` does."""
        self._listeners.append(listener)

    def backward(self, losses: Losses, scaler: GradScaler | None = None) -> Tensor:
        """Add the method's gradients to ``.grad`` of the shared parameters and the heads.

        Args:
            losses: ``{task: scalar}`` or ``[K]`` in task order, with a graph, of any floating-point
                dtype, not scaled. A dict is cheaper: with a stacked tensor, the backward pass of
                each task runs through the heads of all tasks.
            scaler: the ``GradScaler`` for mixed precision, by whose scale all gradients are
                multiplied. A disabled scaler counts as None. Gradients that are not finite are
                written to ``.grad`` unchanged, so that ``scaler.step`` skips the batch and
                ``scaler.update`` lowers the scale; the state of the method does not change.

        Returns:
            The weights ``[K]`` of the tasks, without a graph, on the device of the losses.

        Raises:
            ValueError: if a task is unknown or missing, or its loss is not a scalar with a graph.
                Nothing has changed then.
            TypeError: if ``scaler`` is not a ``torch.amp.GradScaler``, or ``losses`` is neither a
                mapping nor a tensor.
        """
        raise NotImplementedError

    def observe(self, losses: Losses) -> None:
        """Take the unscaled losses on the same batch after the step; only FAMO needs them."""

    def parameters(self) -> list[nn.Parameter]:
        """The learned parameters of the method; pass them to the optimizer with the model's."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs; it loads under ``weights_only=True``.

        Keys and shapes never change. PCGrad, GradVac and GradDrop draw random numbers from torch's
        global generator, whose state is not included.
        """
        return {"method": type(self).__name__, "tasks": list(self._tasks), **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume exactly where :meth:`state_dict` was taken; the options of this object stay.

        Raises:
            ValueError: if the state is that of another method or other tasks, or incomplete.
                Nothing has changed then.
        """
        kept = self.state_dict()
        if differing := sorted(set(kept) ^ set(state)):
            raise ValueError(
                f"This is not the state of {kept['method']}: {', '.join(differing)} missing or "
                "unexpected; pass what state_dict() returned."
            )
        for key in ("method", "tasks"):
            if state[key] != kept[key]:
                raise ValueError(
                    f"The state was written with {key} {state[key]!r}, but this object has "
                    f"{kept[key]!r}; load it into the same method with the same tasks."
                )
        for key, value in kept.items():
            if described(state[key]) != described(value):
                raise ValueError(
                    f"{key} in the state of {kept['method']} must be {described(value)}, got "
                    f"{described(state[key])}; pass what state_dict() returned."
                )
        self._load(state)

    def _state(self) -> dict[str, Any]:
        """The memory of the method: numbers and tensors whose shapes never change."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Load a state that has been checked."""

    def _read(self, losses: Losses, with_graph: bool = True) -> list[Tensor]:
        """The losses one by one in task order, checked."""
        by_task = losses_by_task(losses, self._tasks)
        check_one_device(by_task)
        if with_graph:
            check_graph(by_task)
        return list(by_task.values())

    def _tell(self, losses: Sequence[Tensor]) -> None:
        """Tell the listeners the losses of a step, in task order."""
        if not self._listeners:
            return
        values = values_of(losses)
        for listener in self._listeners:
            listener.begin_loss()
            listener.losses(range(len(values)), values)
            listener.end_loss()


def values_of(scalars: Sequence[Tensor]) -> Tensor:
    """The values of the losses, float32 ``[K]``, without a graph."""
    return torch.stack([loss.detach().float() for loss in scalars])


def enabled(scaler: GradScaler | None) -> GradScaler | None:
    """The scaler, or None if it is disabled."""
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}."
        )
    return scaler if scaler.is_enabled() else None


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Turn off the caller's default device and CPU autocast while TorchJD computes on the host.

    TorchJD draws permutations and creates small tensors on torch's default device, which the caller
    may have changed (``torch.set_default_device``, ``with torch.device("meta")``), and an autocast
    around the backward pass would lower the precision of its matrix products. Each is turned off
    only if it is on, because a device mode slows every operation down.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        yield
