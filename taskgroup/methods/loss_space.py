"""Methods that weigh the losses and take one backward pass: their base classes, GD and SI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._losses import Losses
from taskgroup.methods.method import JointMethod, enabled, values_of

__all__ = ["GD", "SI", "LossMethod", "WeighingMethod"]


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
    """Base class of the methods that can weigh the losses of a group: some of the K tasks.

    :class:`taskgroup.TaskGroups` takes an object of such a class as ``weights``. In place of
    :meth:`~JointMethod.backward` it calls, in every batch, :meth:`begin_batch`; then for every
    group :meth:`weigh_group`, once per micro-batch, and :meth:`count`, once; and after every step
    whose effect shows in the next losses, :meth:`observe_step`.

    Losses are float32 ``[n]`` without a graph, on the device of the method. Under data parallelism
    they are the means over all ranks, so that all ranks find the same weights. The positions of
    their tasks are ``at``, int64 ``[n]``, on the same device.

    Attributes:
        checks_losses: True where :meth:`check` may raise.
    """

    checks_losses: bool = False
    _counts: ClassVar[bool] = False  # whether begin_batch() or count() changes the memory

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks)
        self._device = self._shared[0].device

    @property
    def device(self) -> torch.device:
        """The device of the memory of the method: that of the shared parameters at the start."""
        return self._device

    def begin_batch(self) -> None:
        """Begin a batch."""

    def check(self, values: Sequence[float], members: Sequence[int]) -> None:
        """Raise ValueError if the loss of a task, one of those at ``members``, is out of range."""

    def count(self, values: Tensor, at: Tensor) -> None:
        """Take in the losses before a step; once per task and batch."""

    def weigh_group(self, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Weigh the losses of a group.

        Returns:
            The loss to step on, a scalar whose graph holds the learned parameters, if there are
            any; and the weights ``[n]``, its derivatives for the losses, without a graph.
        """
        raise NotImplementedError

    def observe_step(self, before: Tensor, after: Tensor, at: Tensor) -> None:
        """Take in the losses of a group before and after its own step."""

    def memory(self) -> dict[str, Any]:
        """The state with the tensors of the method itself.

        The method replaces these tensors and does not write to them, except for parameters.
        """
        return {"method": type(self).__name__, "tasks": list(self._tasks), **self._state()}

    def state_dict(self) -> dict[str, Any]:  # noqa: D102 (inherited)
        state = self.memory().items()
        return {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in state}

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        values = values.to(self._device)
        at = torch.arange(len(values), device=self._device)
        # A scaler skips a batch whose losses are not finite.
        if not self._counts or scaler is None or values.isfinite().all():
            self.begin_batch()
            self.count(values, at)
        with torch.enable_grad():
            total, weights = self.weigh_group(values, at)
        self._learn(total, scaler)
        return weights

    def _learn(self, total: Tensor, scaler: GradScaler | None) -> None:
        """Add to the gradients of the learned parameters."""


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
