"""What every joint method has in common: its tasks, its losses, its state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._arguments import described
from taskgroup._losses import Losses, check_graph, check_one_device, losses_by_task

__all__ = ["JointMethod"]


class JointMethod:
    """A way to step on all tasks at once: base of the joint methods.

    ``backward`` stands where ``loss.backward()`` would::

        method = tg.methods.CAGrad(model.encoder, tasks)
        ...
        optimizer.zero_grad()
        method.backward(losses)
        optimizer.step()

    Gradients add to those that are there, as they do in any backward pass. Every method is for one
    process: under data parallelism the ranks would weigh differently.

    In float16, pass the ``GradScaler`` and the plain losses; the method scales them itself::

        method.backward(losses, scaler=scaler)  # not scaler.scale(loss)
        scaler.step(optimizer)
        scaler.update()

    The weights, and what a method remembers, are those of the plain losses and gradients: they do
    not depend on the scale. Losses that are scaled already look like any others and cannot be
    refused: with them the steps of UW, DTP, IMTL-L, Nash-MTL and FairGrad depend on the scale, and
    DWA and FAMO take a change of the scale for a change of the losses.

    The sparse gradients of an embedding with ``sparse=True`` stay sparse. Of complex parameters the
    real and the imaginary part count as two real numbers, as in torch's optimizers. Hooks of
    ``register_post_accumulate_grad_hook``, such as an optimizer that steps in the backward pass,
    run once, on what the method has made of the gradients.

    Every method can be copied with ``copy.deepcopy``, pickled, and passed to a spawned process.
    A copy has parameters of its own: copy it together with the model and the optimizer, as in
    ``copy.deepcopy((model, optimizer, method))``.

    Args:
        shared: the parameters that the tasks share, or the module that holds them (the encoder).
            What no task reaches, or is frozen, is passed over.
        tasks: the K task names, in the order of stacked losses and of the weights.

    Attributes:
        observes_step: True where :meth:`observe` must be called after every ``optimizer.step()``.

    Raises:
        ImportError: if a package that the method needs is missing; all are in the extra
            ``taskgroup[compare]``.
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
        found = shared.parameters() if isinstance(shared, nn.Module) else shared
        self._shared = list(dict.fromkeys(found))  # each once, or it would count twice
        if not self._shared:
            raise ValueError("shared is empty: name at least one parameter that the tasks share.")
        for t, parameter in enumerate(self._shared):
            if not isinstance(parameter, Tensor) or not parameter.is_leaf:
                raise ValueError(
                    f"shared must hold parameters, and entry {t} is computed or no tensor: it "
                    "gets no .grad."
                )
        # Plain strings: a state that holds NumPy's does not load under weights_only=True.
        self._tasks = tuple(str(task) if isinstance(task, str) else task for task in tasks)
        if isinstance(tasks, str) or not self._tasks or len(set(self._tasks)) < len(self._tasks):
            raise ValueError(f"tasks must be a sequence of different names, got {tasks!r}.")

    def backward(self, losses: Losses, scaler: GradScaler | None = None) -> Tensor:
        """Add to the gradients of the shared parameters and the heads, as the method says.

        Args:
            losses: ``{task: scalar}`` or ``[K]`` in task order, with a graph, of any floating
                dtype, not scaled. A dict is cheaper: through a stacked tensor the backward pass of
                one task visits the heads of all.
            scaler: of mixed precision. All gradients are multiplied by its scale; one that is not
                enabled counts as None. Where gradients are not finite they are written to ``.grad``
                as they are, so that ``scaler.step`` skips the batch and ``scaler.update`` lowers
                the scale; the method remembers nothing of it.

        Returns:
            The weights ``[K]`` of the tasks, without a graph, on the device of the losses.

        Raises:
            ValueError: if a task is unknown or missing, or its loss is not a scalar with a graph.
                Nothing has changed then.
            TypeError: if the scaler is no ``torch.amp.GradScaler``, or the losses are no tensors.
        """
        raise NotImplementedError

    def observe(self, losses: Losses) -> None:
        """Look at the losses on the same batch after the step, not scaled; only FAMO needs it."""

    def parameters(self) -> list[nn.Parameter]:
        """What the method learns by gradient, to be passed to the optimizer with the model's."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs; it loads under ``weights_only=True``.

        The keys and shapes are the same from the first moment. Methods that draw at random (PCGrad,
        GradVac, GradDrop) draw from torch's global generator, whose state is not the method's.
        """
        return {"method": type(self).__name__, "tasks": list(self._tasks), **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken; the options stay those of this object.

        Raises:
            ValueError: if the state is of another method or other tasks, or not whole. Nothing has
                changed then.
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
                    f"The state was written with {key} {state[key]!r}, this has {kept[key]!r}; "
                    "load it into the same method of the same tasks."
                )
        for key, value in kept.items():
            if described(state[key]) != described(value):
                raise ValueError(
                    f"{key} in the state of {kept['method']} must be {described(value)}, got "
                    f"{described(state[key])}; pass what state_dict() returned."
                )
        self._load(state)

    def _state(self) -> dict[str, Any]:
        """What the method remembers: numbers and tensors of the same shapes from the start."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take over a state that has been checked."""

    def _read(self, losses: Losses, with_graph: bool = True) -> list[Tensor]:
        """The losses one by one in task order, checked."""
        by_task = losses_by_task(losses, self._tasks)
        check_one_device(by_task)
        if with_graph:
            check_graph(by_task)
        return list(by_task.values())


def values_of(scalars: Sequence[Tensor]) -> Tensor:
    """The losses as plain numbers, float32 ``[K]``."""
    return torch.stack([loss.detach().float() for loss in scalars])


def enabled(scaler: GradScaler | None) -> GradScaler | None:
    """The scaler, or None where there is nothing to scale.

    Raises:
        TypeError: if it is none.
    """
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}."
        )
    return scaler if scaler.is_enabled() else None


@contextmanager
def torch_as_it_comes() -> Iterator[None]:
    """On the host, tensors are made there and operations keep their precision.

    TorchJD draws permutations and makes small tensors on torch's default device, which may be
    another (``torch.set_default_device``, ``with torch.device("meta")``), and its matrix products
    would follow an autocast around the backward pass. Each is undone only where it is on: a device
    mode slows every operation down.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        yield
