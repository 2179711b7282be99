"""Fast adaptive multitask optimization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._losses import Losses
from taskgroup.methods.loss_space import ScalarizerMethod
from taskgroup.methods.method import enabled, torch_defaults, values_of

__all__ = ["FAMO"]


class FAMO(ScalarizerMethod):
    r"""FAMO: makes all losses fall at about the same rate, without the gradients of single tasks.

    .. math::
        w_k = \frac{c \, z_k}{L_k}, \qquad z = \operatorname{softmax}(\xi), \qquad
        c = \Bigl( \sum_k z_k / L_k \Bigr)^{-1}

    After the step, Adam updates the logits :math:`\xi` along :math:`\log L_k - \log L_k'`. From
    "FAMO: Fast Adaptive Multitask Optimization" (Liu et al., NeurIPS 2023), computed by TorchJD.
    Losses must be positive. The losses :math:`L_k'` after the step cost a forward pass::

        method.backward(losses(batch))
        optimizer.step()
        with torch.no_grad():
            method.observe(losses(batch))

    A step that changes no loss, such as one that a ``GradScaler`` skips, does not change the
    logits. Losses are read on the host, which waits for the device.

    Args:
        lr: the learning rate of the logits; the paper uses 0.025.
        weight_decay: the weight decay of the logits; the paper uses 1e-3.

    Raises:
        ValueError: if an option is negative.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = FAMO([x], ["a", "b"])
        >>> method.backward({"a": x.sum(), "b": 3 * x.sum()})
        tensor([0.7500, 0.2500])
        >>> method.observe({"a": x.sum(), "b": 2 * x.sum()})
        >>> method.backward({"a": x.sum(), "b": 3 * x.sum()})  # b fell faster: more to a
        tensor([0.7593, 0.2407])
    """

    observes_step = True

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        lr: float = 0.025,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(shared, tasks)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value!r}.")
        from taskgroup.methods._torchjd import FAMO as Scalarizer  # noqa: N811

        with torch_defaults():
            self._scalarizer: Scalarizer = Scalarizer(
                len(self._tasks), lr, weight_decay, self._device
            )
        self._open = False  # whether a step has not been observed yet

    def backward(self, losses: Losses, scaler: GradScaler | None = None) -> Tensor:
        """Add to the gradients as :meth:`JointMethod.backward` does, once per step.

        Raises:
            RuntimeError: if the last step has not been observed.
            ValueError: as in :meth:`JointMethod.backward`, and if a loss is negative.
            FloatingPointError: if a loss is not finite and there is no scaler. Nothing has changed
                then.
        """
        if self._open:
            raise RuntimeError(
                "FAMO has not seen the effect of the last step: after optimizer.step(), compute "
                "the losses on the same batch again and call observe(losses)."
            )
        for task, value in zip(self._tasks, values_of(self._read(losses)).tolist(), strict=True):
            if value < 0:
                raise ValueError(
                    f"The loss of task {task!r} is {value}, but FAMO takes its logarithm: losses "
                    "must be positive. Add a constant to it, or clamp it."
                )
            if not math.isfinite(value) and enabled(scaler) is None:
                raise FloatingPointError(
                    f"The loss of task {task!r} is {value}: skip this batch, and check the loss."
                )
        weights = super().backward(losses, scaler)
        self._open = True
        return weights

    def observe(self, losses: Losses) -> None:
        """Learn from the losses on the same batch after the step; they need no graph.

        Args:
            losses: as for :meth:`backward`, not scaled. Nothing is learned if any of them is
                negative or not finite, or was not finite before the step.

        Raises:
            RuntimeError: if there is no step to observe.
        """
        if not self._open:
            raise RuntimeError("There is no step to observe: call backward(losses) before it.")
        scalars = self._read(losses, with_graph=False)
        with torch.inference_mode(False), torch_defaults():
            after = values_of(scalars).to(self._device)
            before = self._scalarizer.memory()["losses"]
            both = torch.stack([before, after])
            # The logarithm of any other number would leave NaN or infinity in the logits.
            if (both.isfinite() & (both >= 0)).all() & (before != after).any():
                self._scalarizer.update(after)
        self._open = False

    def _state(self) -> dict[str, Any]:
        kept = self._scalarizer.memory().items()
        return {**{name: value.to("cpu", copy=True) for name, value in kept}, "open": self._open}

    def _load(self, state: Mapping[str, Any]) -> None:
        for name, value in self._scalarizer.memory().items():
            value.copy_(state[name])
        self._open = state["open"]
