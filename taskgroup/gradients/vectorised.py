"""Helpers for vectorised backward passes, and the errors of graphs that do not allow them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def cotangents(stacked: Tensor) -> Tensor:
    """``[K + 1, K]``: one row for each task, and a row of zeros.

    A backward pass is linear, so the gradient for the row of zeros is zero. If it is not, a part of
    the gradient does not depend on the losses, and the other rows contain it too.
    """
    n_tasks = len(stacked)
    return torch.eye(n_tasks + 1, n_tasks, dtype=stacked.dtype, device=stacked.device)


def is_constant(gradient: Tensor) -> Tensor:
    """Whether the gradient for the row of zeros is not zero: a flag on its device."""
    return gradient.nan_to_num(0.0, 0.0, 0.0).any()  # NaN is 0 * inf: other rows show it


def check_vanishing(flags: list[Tensor]) -> None:
    """Raise if any flag of :func:`is_constant` is set; waits for the device."""
    if any(flags):
        raise constant_error()


def check_batched(node: Any, found: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    """Raise if a node of the graph drops the batch dimension: a hook of the node."""
    batched = torch._C._functorch.is_batchedtensor
    if any(g is not None and batched(g) for g in given) and not all(
        g is None or batched(g) or g.numel() == 0 for g in found
    ):
        raise constant_error(node.name())


_ONE_BY_ONE = "take the gradients one by one, with task_gradients(losses, params)"


# From a part of torch's message to what to do about it.
_CURES = {
    "donated buffer": (
        "The compiled model frees its buffers in its first backward pass, and gradients of single "
        "tasks need one pass each: set torch._functorch.config.donated_buffer = False before the "
        "model is compiled."
    ),
    "use_reentrant": (
        "Activation checkpointing with use_reentrant=True writes gradients only to .grad, where "
        "those of single tasks are not taken from: checkpoint with use_reentrant=False."
    ),
    "compiled backward function within vmap": (
        f"A compiled model has no vectorised backward pass: {_ONE_BY_ONE}, or leave the model "
        "uncompiled."
    ),
    "Batching rule not implemented": (
        f"An operation of the model has no vectorised backward pass: {_ONE_BY_ONE}."
    ),
}


# Errors that any backward pass may raise, vectorised or not.
_OF_ANY_PASS = (
    "a second time",
    "modified by an inplace operation",
    "returned nan values",
    "can't allocate memory",
)


class _NotVectorisedError(RuntimeError):
    """The result of a vectorised backward pass would be wrong."""


def constant_error(node: str = "") -> _NotVectorisedError:
    """The error for a gradient with a part that does not depend on the losses."""
    where = f" of {node}" if node else ""
    return _NotVectorisedError(
        f"The vectorised backward pass{where} gives a gradient that does not depend on the loss, "
        f"or that torch gets wrong: {_ONE_BY_ONE}."
    )


@contextmanager
def explained(*, vectorised: bool = False) -> Iterator[None]:
    """Raise errors that say what to do about a backward pass that torch refuses."""
    try:
        yield
    except (_NotVectorisedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # under vmap each operation raises its own
        said = " ".join(f"{error}".split())
        of_any_pass = any(part in said for part in _OF_ANY_PASS)
        if vectorised and torch.is_anomaly_enabled() and not of_any_pass:
            raise RuntimeError(
                "Anomaly mode (torch.autograd.set_detect_anomaly) has no vectorised backward pass: "
                f"leave the mode, or {_ONE_BY_ONE}."
            ) from error
        for part, cure in _CURES.items():
            if part in said:
                raise RuntimeError(cure) from error
        if not vectorised or of_any_pass:
            raise
        if "sparse" in said.lower():
            raise RuntimeError(
                "Sparse gradients have no vectorised backward pass: build the embedding with "
                f"sparse=False, or {_ONE_BY_ONE}, and call .to_dense() on the sparse ones."
            ) from error
        raise RuntimeError(
            f"The model has no vectorised backward pass: {_ONE_BY_ONE}. Torch says: {said[:300]}"
        ) from error
