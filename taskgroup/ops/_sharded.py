"""Runs the ops on the local shards of gradients that are distributed over ranks (DTensor).

An inner product is the sum of the inner products of the shards. So the Gram matrix is the sum over
the ranks of the Gram matrices of their shards, and a combination of shards is a shard of the
combination.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from taskgroup.ops._gradient_list import Gradients

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "any_sharded",
    "gram_over_ranks",
    "is_sharded",
    "local_like",
    "put_shards_back",
    "wrapped",
]


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, without importing ``torch.distributed.tensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(gradients: list[Tensor]) -> bool:
    """Whether any of the gradients is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(g, module.DTensor) for g in gradients)


def put_shards_back(model: nn.Module) -> None:
    """Replaces the parameters of a model by their shards, between a forward and a backward pass.

    FSDP does not reshard some modules after a forward pass, such as the outermost one. They then
    hold whole parameters, but the gradients go to the shards.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_like(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The part of a gradient on this rank, once it is distributed as ``like``."""
    if gradient is None:
        return None
    if is_sharded(gradient) != is_sharded(like):
        raise ValueError(
            "Gradients on one parameter must all be DTensors, or none of them; got "
            f"{type(gradient).__name__} and {type(like).__name__}."
        )
    if not is_sharded(gradient) or not is_sharded(like):
        return gradient
    if gradient.placements != like.placements:
        gradient = gradient.redistribute(like.device_mesh, like.placements)
    return gradient.to_local()


def wrapped(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor, distributed as ``like``, whose part on this rank is ``local``."""
    from torch.distributed.tensor import DTensor

    assert is_sharded(like)
    made: Tensor = DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return made


def gram_over_ranks(gradients: Gradients, gram: Callable[[Gradients], Tensor]) -> Tensor:
    """The Gram matrix of gradients of which some are DTensors; the same on every rank.

    ``gram`` computes that of local gradients.
    """
    from torch.distributed.tensor import Replicate

    # Parameters that are distributed in the same way share one all-reduce.
    spread: dict[Any, list[list[Tensor | None]]] = {}
    for column in zip(*gradients, strict=True):
        first = next((gradient for gradient in column if gradient is not None), None)
        if first is None:
            continue
        key = None
        if is_sharded(first):
            settled = [Replicate() if p.is_partial() else p for p in first.placements]
            first = first.redistribute(first.device_mesh, settled)
            sharded = tuple(dim for dim, p in enumerate(first.placements) if not p.is_replicate())
            key = (first.device_mesh, sharded)
        spread.setdefault(key, []).append([local_like(own, first) for own in column])
    total: Tensor | None = None
    for key, columns in spread.items():
        part = gram(list(zip(*columns, strict=True)))
        if key is not None:
            mesh, sharded = key
            wide = part.double()
            for dim in sharded:
                torch.distributed.all_reduce(wide, group=mesh.get_group(dim))
            part = wide.to(part.dtype)
        total = part if total is None else total + part
    assert total is not None
    return total
