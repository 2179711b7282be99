"""Methods that weigh the losses and take one backward pass: GD, UW, IMTL-L."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._losses import Losses
from taskgroup.methods.method import JointMethod, enabled, torch_defaults, values_of

__all__ = ["GD", "IMTLL", "UW", "LossMethod", "ScalarizerMethod"]

# After so many backward passes without a step on the learned parameters, the optimizer surely does
# not hold them: nobody accumulates over as many micro-batches.
_FORGOTTEN = 100


class LossMethod(JointMethod):
    """Base class of the methods that need only the values of the losses."""

    def backward(  # noqa: D102 (inherited)
        self, losses: Losses, scaler: GradScaler | None = None
    ) -> Tensor:
        scaler = enabled(scaler)
        scalars = self._read(losses)
        self._tell(scalars)
        scaled = scalars if scaler is None else list(scaler.scale(scalars))
        weights = self._weigh(values_of(scalars), scaler)
        weights = weights.to(scalars[0].device, non_blocking=True)
        cotangents = [w.to(loss.dtype) for w, loss in zip(weights, scaled, strict=True)]
        torch.autograd.backward(scaled, cotangents)
        return weights

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        """Compute the weights ``[K]`` from the losses ``[K]``, float32 without a graph.

        With a scaler, losses that are not finite must not change the memory of the method.
        """
        raise NotImplementedError


class GD(LossMethod):
    r"""Gradient descent on the sum of the losses, the baseline of all other methods.

    .. math::
        w_k = 1

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> GD([x], ["a", "b"]).backward({"a": x.sum(), "b": x.square().sum()})
        tensor([1., 1.])
        >>> x.grad
        tensor([3., 3.])
    """

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        return torch.ones_like(values)


class ScalarizerMethod(LossMethod):
    """Base class of the methods whose weights are the derivatives of a TorchJD scalarizer."""

    _requires: ClassVar[tuple[str, ...]] = ("torchjd",)
    _scalarizer: nn.Module

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks)
        self._device = self._shared[0].device  # of the memory of the method

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        values = values.to(self._device).requires_grad_()
        with torch_defaults():
            total = self._scalarizer(values)
            (weights,) = torch.autograd.grad(total, values, retain_graph=True)
            self._learn(total, scaler)
        return weights

    def _learn(self, total: Tensor, scaler: GradScaler | None) -> None:
        """Add to the gradients of the parameters that the scalarizer learns."""


class _LearnedMethod(ScalarizerMethod):
    """Base class of the methods that learn one number per task together with the model."""

    _name: ClassVar[str]  # of the scalarizer in torchjd.scalarization
    _learned: nn.Parameter
    _passes = 0  # backward passes since the start, or since a state was loaded

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks)
        made = getattr(import_module("torchjd.scalarization"), self._name)
        with torch_defaults():
            self._scalarizer = made(len(self._tasks)).to(self._device, torch.float32)
        (self._learned,) = self._scalarizer.parameters()
        self._start = self._learned.detach().clone()

    def backward(self, losses: Losses, scaler: GradScaler | None = None) -> Tensor:
        weights = super().backward(losses, scaler)
        self._passes += 1
        # Compared once, since it waits for the device. Fused optimizers do not count versions.
        if self._passes == _FORGOTTEN and torch.equal(self._learned, self._start):
            warnings.warn(
                f"{type(self).__name__} learns its weights, but no optimizer has stepped on them "
                f"in {_FORGOTTEN} backward passes: pass method.parameters() to the optimizer "
                "together with the model's. Until then the weights do not change.",
                stacklevel=2,
            )
        return weights

    def parameters(self) -> list[nn.Parameter]:
        return [self._learned]

    def _learn(self, total: Tensor, scaler: GradScaler | None) -> None:
        if scaler is not None:
            total = scaler.scale(total)
        total.backward(inputs=[self._learned])

    def _state(self) -> dict[str, Any]:
        return {"learned": self._learned.detach().to("cpu", copy=True)}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._learned.copy_(state["learned"])
        self._start = self._learned.detach().clone()
        self._passes = 0


class UW(_LearnedMethod):
    r"""Uncertainty weighting: learns a log-variance per task together with the model.

    .. math::
        \sum_k \tfrac12 e^{-s_k} L_k + \tfrac12 s_k, \qquad w_k = \tfrac12 e^{-s_k}

    From "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics"
    (Kendall et al., CVPR 2018), computed by TorchJD. The :math:`s_k` start at zero; pass
    :meth:`JointMethod.parameters` to the optimizer.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = UW([x], ["a", "b"])
        >>> optimizer = torch.optim.SGD([x, *method.parameters()], lr=0.1)
        >>> method.backward({"a": x.sum(), "b": x.square().sum()})
        tensor([0.5000, 0.5000])
    """

    _name = "UW"


class IMTLL(_LearnedMethod):
    r"""IMTL-L, impartial loss balance: learns a scale per task together with the model.

    .. math::
        \sum_k e^{s_k} L_k - s_k, \qquad w_k = e^{s_k}

    From "Towards Impartial Multi-task Learning" (Liu et al., ICLR 2021), computed by TorchJD. The
    :math:`s_k` start at zero; pass :meth:`JointMethod.parameters` to the optimizer. Losses should
    be positive.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = IMTLL([x], ["a", "b"])
        >>> optimizer = torch.optim.SGD([x, *method.parameters()], lr=0.1)
        >>> method.backward({"a": x.sum(), "b": x.square().sum()})
        tensor([1., 1.])
    """

    _name = "IMTLL"
