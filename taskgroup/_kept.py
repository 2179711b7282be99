"""Keeps everything that steps change, and restores it bitwise."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Kept"]


class Kept:
    """Keeps everything that the steps of optimizers change, and restores it.

    The parameters, the tensors in the states of the optimizers and the buffers stay the same
    objects, and so do the gradients.

    Args:
        optimizers: their states and the parameters that they hold are kept.
        parameters: further parameters to keep, with their gradients.
        modules: the buffers of these modules are kept; those of their parts are not.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Iterable[Tensor],
        modules: Iterable[nn.Module] = (),
    ) -> None:
        held = (p for own in optimizers for group in own.param_groups for p in group["params"])
        self._parameters = list({id(p): p for p in (*held, *parameters)}.values())
        self._values = [parameter.detach().clone() for parameter in self._parameters]
        self._gradients = [parameter.grad for parameter in self._parameters]
        seen = {id(p) for p in self._parameters}
        parts = (*optimizers, *(module._buffers for module in modules))
        self._restorers = [_restorer(part, seen) for part in parts]

    def clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def restore_parameters(self, besides: list[Tensor] | None = None) -> None:
        left = {id(parameter) for parameter in besides or ()}
        for parameter, value in zip(self._parameters, self._values, strict=True):
            if id(parameter) not in left:
                parameter.copy_(value)

    @torch.no_grad()
    def restore(self) -> None:
        self.restore_parameters()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        for restore in self._restorers:
            restore()


def _restorer(value: Any, seen: set[int], stands_in: bool = True) -> Callable[[], Any]:
    """A function that restores an optimizer, or a part of one, to what it is now, and returns it.

    Tensors, generators, lists, dicts and optimizers stay the same objects, since others may refer
    to them. Objects of other types are replaced by a copy if ``stands_in``, as in the state of an
    optimizer; otherwise they are not touched, since an attribute may be the model. Objects whose
    ids are in ``seen`` are restored elsewhere.
    """
    if id(value) in seen or value is None or isinstance(value, str | int | float | complex):
        return lambda: value
    if isinstance(value, Optimizer):
        seen.add(id(value))
        inside = {
            name: _restorer(part, seen, name in ("state", "param_groups"))
            for name, part in vars(value).items()
        }
        return _in_place(value, vars(value), inside)
    if isinstance(value, dict):
        seen.add(id(value))
        return _in_place(
            value, value, {key: _restorer(part, seen, stands_in) for key, part in value.items()}
        )
    if isinstance(value, list | tuple | deque):
        seen.add(id(value))
        parts = [_restorer(part, seen, stands_in) for part in value]

        def refill() -> Any:
            restored = [part() for part in parts]
            if not isinstance(value, tuple):
                value.clear()
                value.extend(restored)
            return value

        return refill
    if isinstance(value, Tensor):
        seen.add(id(value))
        return partial(value.copy_, value.detach().clone())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if stands_in and not callable(value):
        copied = copy.deepcopy(value)
        return lambda: copy.deepcopy(copied)
    return lambda: value


def _in_place(
    value: Any, mapping: dict[Any, Any], parts: dict[Any, Callable[[], Any]]
) -> Callable[[], Any]:
    """A function that refills the mapping, which is the value or holds its attributes."""

    def refill() -> Any:
        restored = {key: part() for key, part in parts.items()}
        mapping.clear()
        mapping.update(restored)
        return value

    return refill
