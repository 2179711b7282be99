"""Updates the running statistics of normalisation layers once per batch, not once per group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from taskgroup.nn.step import Step, check_step

__all__ = ["statistics_once"]

# The layers of a module that may have running statistics, and the tensors that a layer writes to in
# place of its statistics.
_layers: WeakKeyDictionary[nn.Module, WeakSet[_NormBase]] = WeakKeyDictionary()
_scratch: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()

_NOTHING: AbstractContextManager[None] = nullcontext()


def statistics_once(module: nn.Module, group: Step) -> AbstractContextManager[None]:
    """Context manager for a forward pass that updates running statistics once per batch.

    A batch of M groups has M forward passes. In training mode BatchNorm (SyncBatchNorm,
    InstanceNorm) would update its running mean and variance in each of them: M times as far as in a
    joint step, and mostly with features from between the steps of a batch. Within this context only
    the first group of a batch that runs the module updates them, before any step, as in a joint
    step. Every forward pass still normalises by its own samples.

    :class:`MultiTaskModel` does this itself when it is called with ``group=group``, separately for
    the encoder and each head: a head that runs in one group alone updates its statistics there.

    All micro-batches of one group update the statistics, as in any gradient accumulation. The
    layers of a module are looked up once, so replace layers (``convert_sync_batchnorm``) before the
    first batch. Enter the context outside of a model that is compiled as a whole; inside of it, it
    has no effect.

    Args:
        module: the model, or a part of it that always runs as a whole.
        group: the group that the forward pass is for.

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
    if not isinstance(module, nn.Module):
        raise TypeError(f"statistics_once takes a module, got {module!r}.")
    check_step(group)
    # A graph that torch compiles for the whole model serves all groups.
    if torch.compiler.is_compiling() or not _layers_of(module):
        return _NOTHING
    return _redirected(module, group)


@contextmanager
def _redirected(module: nn.Module, group: Step) -> Iterator[None]:
    layers = [
        layer
        for layer in _layers_of(module)
        # A context around this one may have redirected the layer.
        if layer.training and layer.track_running_stats and _OVERRIDDEN[0] not in vars(layer)
    ]
    if not layers or group.runs_first(module):
        yield
        return
    kept = [_Kept(layer) for layer in layers]
    # Other tensors take the place of the statistics. Nothing is copied, and a compiled module
    # needs no new graph, because its buffers are inputs.
    for layer in layers:
        layer._buffers.update(_scratch_of(layer))
    try:
        yield
    finally:
        for own in kept:
            own.put_back()


class _Kept:
    """The statistics of a layer while the layer writes to other tensors.

    Copies, pickles and state dicts that are made of the layer meanwhile (a checkpoint in a signal
    handler, an average of the weights) get these statistics.
    """

    def __init__(self, layer: _NormBase) -> None:
        self._layer = layer
        self._statistics = {name: layer._buffers[name] for name in _NAMES if name in layer._buffers}
        # Set on the layer itself, which hides the methods of its class. The buffers stay a plain
        # dict, because the compiler would recompile for another type.
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
