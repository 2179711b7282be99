"""Methods that learn a weight per task together with the model: UW and IMTL-L."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._losses import Losses
from taskgroup.methods.loss_space import WeighingMethod

__all__ = ["IMTLL", "UW"]

# After so many backward passes without a step on the learned parameters, the optimizer surely does
# not hold them: nobody accumulates over as many micro-batches.
_FORGOTTEN = 100


class LearnedMethod(WeighingMethod):
    """Base class of the methods that learn one number per task together with the model."""

    _passes = 0  # backward passes since the start, or since a state was loaded

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks)
        zeros = torch.zeros(len(self._tasks), dtype=torch.float32, device=self._device)
        self._learned = nn.Parameter(zeros)
        self._start = zeros.clone()

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

    def weigh_group(self, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        learned = self._learned[at]
        weights, rest = self._factors(learned)
        return (weights * values + rest).sum(), weights.detach()

    def _factors(self, learned: Tensor) -> tuple[Tensor, Tensor]:
        """The weights ``[n]``, and the terms ``[n]`` that do not depend on the losses."""
        raise NotImplementedError

    def _learn(self, total: Tensor, scaler: GradScaler | None) -> None:
        if scaler is not None:
            total = scaler.scale(total)
        total.backward(inputs=[self._learned])

    def _state(self) -> dict[str, Any]:
        return {"learned": self._learned.detach()}

    def _load(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self._learned.copy_(state["learned"])
        self._start = self._learned.detach().clone()
        self._passes = 0


class UW(LearnedMethod):
    r"""Uncertainty weighting: learns a log-variance per task together with the model.

    .. math::
        \sum_k \tfrac12 e^{-s_k} L_k + \tfrac12 s_k, \qquad w_k = \tfrac12 e^{-s_k}

    From "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics"
    (Kendall et al., CVPR 2018). The :math:`s_k` start at zero; pass
    :meth:`JointMethod.parameters` to the optimizer. As ``weights`` of
    :class:`taskgroup.TaskGroups`, the sum is over the tasks of the group.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = UW([x], ["a", "b"])
        >>> optimizer = torch.optim.SGD([x, *method.parameters()], lr=0.1)
        >>> method.backward({"a": x.sum(), "b": x.square().sum()})
        tensor([0.5000, 0.5000])
    """

    def _factors(self, learned: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * learned.neg().exp(), 0.5 * learned


class IMTLL(LearnedMethod):
    r"""IMTL-L, impartial loss balance: learns a scale per task together with the model.

    .. math::
        \sum_k e^{s_k} L_k - s_k, \qquad w_k = e^{s_k}

    From "Towards Impartial Multi-task Learning" (Liu et al., ICLR 2021). The
    :math:`s_k` start at zero; pass :meth:`JointMethod.parameters` to the optimizer. Losses should
    be positive. As ``weights`` of :class:`taskgroup.TaskGroups`, the sum is over the tasks of the
    group.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = IMTLL([x], ["a", "b"])
        >>> optimizer = torch.optim.SGD([x, *method.parameters()], lr=0.1)
        >>> method.backward({"a": x.sum(), "b": x.square().sum()})
        tensor([1., 1.])
    """

    def _factors(self, learned: Tensor) -> tuple[Tensor, Tensor]:
        return learned.exp(), -learned
