"""Running statistics of normalisation layers move once per batch, however many groups it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taskgroup.nn.step import Step

__all__ = ["statistics_once"]

# By module, its layers that may have running statistics, and by layer, what it writes to instead.
_layers: WeakKeyDictionary[nn.Module, WeakSet[_NormBase]] = WeakKeyDictionary()
_scratch: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()

_NOTHING: AbstractContextManager[None] = nullcontext()


def statistics_once(module: nn.Module, group: Step) -> AbstractContextManager[None]:
    """Around a forward: running statistics move only for the first group that runs the module.

    A batch of M groups has M forwards, on each of which BatchNorm (SyncBatchNorm, InstanceNorm)
    in training mode would move its running mean and variance, M times as far as a joint step, and
    most of the way on features of steps half taken. Within this context they move as in a joint
    step: on the forward of the first group, before any step, and not on the others of its batch.
    Every forward normalises by its own samples all the same.

    :class:`MultiTaskModel` does this by itself where it is called with ``group=group``, for the
    encoder and each head apart: a head that runs in one group only moves its statistics there.

    The micro-batches of one group all move them, as in any gradient accumulation. Layers are looked
    up once per module: replace them (``convert_sync_batchnorm``) before the first batch. Not within
    a ``torch.compile`` of the model as a whole, where it has no effect: around the call.

    Args:
        module: the model, or a part that is run as a whole.
        group: the group whose forward this is.

    Example:
        >>> import taskgroup as tg
        >>> model = nn.BatchNorm1d(2)
        >>> groups = tg.TaskGroups(["a", "b"])
        >>> for group in groups:
        ...     with tg.statistics_once(model, group):
        ...         out = model(torch.ones(4, 2) * (1 if group.first else 5))
        ...     group.skip()
        >>> model.running_mean
        tensor([0.1000, 0.1000])
    """
    # While torch compiles the model as a whole there is no telling one group from another.
    if torch.compiler.is_compiling() or not _layers_of(module):
        return _NOTHING
    return _redirected(module, group)


@contextmanager
def _redirected(module: nn.Module, group: Step) -> Iterator[None]:
    layers = [
        layer
        for layer in _layers_of(module)
        if layer.training and layer.track_running_stats and not _is_redirected(layer)
    ]
    if not layers or group.runs_first(module):
        yield
        return
    kept = [_Kept(layer) for layer in layers]
    # Other tensors stand in the place of the statistics: nothing is copied, and for a compiled
    # module, which takes buffers as inputs, nothing has changed.
    for layer in layers:
        layer._buffers.update(_scratch_of(layer))
    try:
        yield
    finally:
        for own in kept:
            own.put_back()


class _Kept:
    """The statistics of a layer that writes to others for the time being.

    Whoever copies, pickles or saves the layer meanwhile (a checkpoint at a signal, an average of
    the weights) gets the kept ones.
    """

    def __init__(self, layer: _NormBase) -> None:
        self._layer = layer
        self._statistics = {name: layer._buffers[name] for name in _NAMES if name in layer._buffers}
        # Set on the layer itself, which hides what its class has. The buffers stay a plain dict,
        # since the compiler would compile anew for another.
        vars(layer).update(zip(_OVERRIDDEN, (self._state, self._save), strict=True))

    def put_back(self) -> None:
        for name in _OVERRIDDEN:
            del vars(self._layer)[name]
        self._layer._buffers.update(self._statistics)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = type(self._layer).__getstate__(self._layer)
        buffers = {**state["_buffers"], **self._statistics}
        own = {name: value for name, value in state.items() if name not in _OVERRIDDEN}
        return {**own, "_buffers": buffers}

    def _save(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        type(self._layer)._save_to_state_dict(self._layer, destination, prefix, keep_vars)
        for name, tensor in self._statistics.items():
            if tensor is not None and prefix + name in destination:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()


_OVERRIDDEN = ("__getstate__", "_save_to_state_dict")
_NAMES = ("running_mean", "running_var", "num_batches_tracked")


def _is_redirected(layer: _NormBase) -> bool:
    return "__getstate__" in vars(layer)


def _layers_of(module: nn.Module) -> WeakSet[_NormBase]:
    layers = _layers.get(module)
    if layers is None:
        layers = WeakSet(part for part in module.modules() if isinstance(part, _NormBase))
        _layers[module] = layers
    return layers


def _scratch_of(layer: _NormBase) -> dict[str, Tensor]:
    scratch = _scratch.setdefault(layer, {})
    for name in _NAMES:
        buffer = layer._buffers.get(name)
        if buffer is None:
            continue
        other = scratch.get(name)
        if other is None or other.device != buffer.device or other.dtype != buffer.dtype:
            scratch[name] = torch.clone(buffer.detach())
    return scratch
