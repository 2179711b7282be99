"""Methods that weigh the losses and take one backward pass: GD, SI, RLW, UW, IMTL-L."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._generator import HostGenerator
from taskgroup._losses import Losses
from taskgroup.methods.method import JointMethod, enabled, torch_defaults, values_of

__all__ = ["GD", "IMTLL", "RLW", "SI", "UW", "LossMethod", "ScalarizerMethod", "WeighingMethod"]

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


class WeighingMethod(LossMethod):
    """Base class of the methods that can weigh the losses of some of the tasks alone.

    :class:`taskgroup.TaskGroups` takes an object of such a class as ``weights``, and calls the
    methods below instead of :meth:`~JointMethod.backward`.

    Attributes:
        checks_losses: True where :meth:`check` may raise.
    """

    checks_losses: bool = False

    def begin_batch(self) -> None:
        """A batch begins."""

    def check(self, values: Sequence[float], members: Sequence[int]) -> None:
        """Raise ValueError if the loss of a task, one of ``members``, cannot be weighed."""

    def weigh_group(self, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """What a step on some of the tasks minimises, and its derivatives.

        Args:
            values: float32 ``[n]``, the losses without a graph, on the device of the method.
            at: int64 ``[n]``, the positions of the tasks.

        Returns:
            The loss to step on, a scalar whose graph holds the learned parameters, if there are
            any; and the weights ``[n]``, its derivatives for the losses, without a graph.
        """
        raise NotImplementedError

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        self.begin_batch()
        values = values.to(self.device)
        with torch.enable_grad():
            total, weights = self.weigh_group(values, torch.arange(len(values), device=self.device))
        self._learn(total, scaler)
        return weights

    def _learn(self, total: Tensor, scaler: GradScaler | None) -> None:
        """Add to the gradients of the learned parameters."""

    @property
    def device(self) -> torch.device:
        """The device of the memory of the method, that of the shared parameters."""
        return self._shared[0].device


class GD(WeighingMethod):
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

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        return values.sum(), torch.ones_like(values)


class SI(WeighingMethod):
    r"""Scale-invariant: gradient descent on the sum of the logarithms of the losses.

    .. math::
        \sum_k \log L_k, \qquad w_k = 1 / L_k

    A constant factor of a loss changes nothing. Losses must be positive. They are read on the host,
    which waits for the device.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> SI([x], ["a", "b"]).backward({"a": x.sum(), "b": 10 * x.sum()})
        tensor([0.5000, 0.0500])
        >>> x.grad
        tensor([1., 1.])
    """

    checks_losses = True

    def backward(self, losses: Losses, scaler: GradScaler | None = None) -> Tensor:
        """Add to the gradients as :meth:`JointMethod.backward` does.

        Raises:
            ValueError: as in :meth:`JointMethod.backward`, and if a loss is zero or negative.
                Nothing has changed then.
        """
        self.check(values_of(self._read(losses)).tolist(), range(len(self._tasks)))
        return super().backward(losses, scaler)

    def check(  # noqa: D102 (inherited)
        self, values: Sequence[float], members: Sequence[int]
    ) -> None:
        for k, value in zip(members, values, strict=True):
            if value <= 0:
                raise ValueError(
                    f"The loss of task {self._tasks[k]!r} is {value}, but SI takes its logarithm: "
                    "losses must be positive. Add a constant to it, or clamp it."
                )

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        return values.log().sum(), values.reciprocal()


class RLW(WeighingMethod):
    r"""Random loss weighting: draws new weights for every batch.

    .. math::
        w = \operatorname{softmax}(z), \qquad z_k \sim \mathcal N(0, 1)

    The weights of all K tasks add up to 1. From "Reasonable Effectiveness of Random Weighting: A
    Litmus Test for Multi-Task Learning" (Lin et al., TMLR 2022). The method has a random generator
    of its own, whose state is part of :meth:`JointMethod.state_dict`.

    Args:
        seed: seed of the generator.

    Raises:
        ValueError: if the seed is not an integer of at most 64 bits.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> weights = RLW([x], ["a", "b"], seed=1).backward({"a": x.sum(), "b": x.sum()})
        >>> weights.sum()
        tensor(1.)
    """

    def __init__(
        self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str], seed: int = 0
    ) -> None:
        super().__init__(shared, tasks)
        self._generator = HostGenerator(seed)
        self._weights = torch.ones(len(self._tasks), dtype=torch.float32, device="cpu")

    def begin_batch(self) -> None:  # noqa: D102 (inherited)
        size = len(self._tasks)
        normal = torch.randn(size, generator=self._generator, dtype=torch.float32, device="cpu")
        self._weights = normal.softmax(0).to(self.device, non_blocking=True)

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = self._weights[at]
        return weights @ values, weights

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        before = self._generator.get_state()
        weights = super()._weigh(values, scaler)
        if scaler is not None and not values.isfinite().all():
            self._generator.set_state(before)
        return weights

    def _state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())


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


class LearnedMethod(WeighingMethod):
    """Base class of the methods that learn one number per task together with the model."""

    _passes = 0  # backward passes since the start, or since a state was loaded

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks)
        zeros = torch.zeros(len(self._tasks), dtype=torch.float32, device=self.device)
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

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        learned = self._learned[at]
        weights, rest = self._factors(learned)
        return weights @ values + rest.sum(), weights.detach()

    def _factors(self, learned: Tensor) -> tuple[Tensor, Tensor]:
        """The weights ``[n]``, and the terms ``[n]`` that do not depend on the losses."""
        raise NotImplementedError

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


class UW(LearnedMethod):
    r"""Uncertainty weighting: learns a log-variance per task together with the model.

    .. math::
        \sum_k \tfrac12 e^{-s_k} L_k + \tfrac12 s_k, \qquad w_k = \tfrac12 e^{-s_k}

    From "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics"
    (Kendall et al., CVPR 2018). The :math:`s_k` start at zero; pass
    :meth:`JointMethod.parameters` to the optimizer.

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
    be positive.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = IMTLL([x], ["a", "b"])
        >>> optimizer = torch.optim.SGD([x, *method.parameters()], lr=0.1)
        >>> method.backward({"a": x.sum(), "b": x.square().sum()})
        tensor([1., 1.])
    """

    def _factors(self, learned: Tensor) -> tuple[Tensor, Tensor]:
        return learned.exp(), -learned
