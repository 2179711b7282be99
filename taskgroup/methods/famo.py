"""Fast adaptive multitask optimization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup._losses import Losses
from taskgroup.methods.loss_space import WeighingMethod
from taskgroup.methods.method import enabled, values_of

__all__ = ["FAMO"]

_MEMORY = ("logits", "exp_avg", "exp_avg_sq", "steps", "losses")


class FAMO(WeighingMethod):
    r"""FAMO: makes all losses fall at about the same rate, without the gradients of single tasks.

    .. math::
        w_k = \frac{c \, z_k}{L_k}, \qquad z = \operatorname{softmax}(\xi), \qquad
        c = \Bigl( \sum_k z_k / L_k \Bigr)^{-1}

    After the step, Adam updates the logits :math:`\xi` along :math:`J^\top (\log L - \log L')`,
    with J the Jacobian of z. From "FAMO: Fast Adaptive Multitask Optimization" (Liu et al., NeurIPS
    2023). Losses must be positive. The losses :math:`L_k'` after the step cost a forward pass::

        method.backward(losses(batch))
        optimizer.step()
        with torch.no_grad():
            method.observe(losses(batch))

    A step that changes no loss, such as one that a ``GradScaler`` skips, does not change the
    logits. Losses are read on the host, which waits for the device.

    As ``weights`` of :class:`taskgroup.TaskGroups`, a group G of n of the K tasks is a problem of
    its own: the softmax and both sums are over G, and c is multiplied by n / K, so that a task
    weighs 1 / K on average in groups of any size. Its logits move by the effect of its own step,
    :math:`\log L_k - \log L_k'` with the losses before it and those of the next group's forward
    pass, k in G. No further forward pass is needed. So logits move only in batches that observe the
    affinity (see ``observe_every``), not by the last step of a batch, and not in groups of a single
    task. Losses are not read on the host.

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
    checks_losses = True

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
        self._lr = lr
        self._weight_decay = weight_decay
        zeros = torch.zeros(len(self._tasks), dtype=torch.float32, device=self._device)
        self._logits = self._exp_avg = self._exp_avg_sq = self._steps = zeros
        self._losses = zeros  # before the step of backward()
        self._open = False  # whether it has not been observed yet

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
        values = values_of(self._read(losses))
        self.check(values.tolist(), range(len(self._tasks)))
        if enabled(scaler) is None:
            for task, value in zip(self._tasks, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"The loss of task {task!r} is {value}: skip this batch, and check the "
                        "loss."
                    )
        weights = super().backward(losses, scaler)
        self._losses = values.to(self._device)
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
        with torch.inference_mode(False):
            after = values_of(scalars).to(self._device)
            self.observe_step(self._losses, after, torch.arange(len(after), device=self._device))
        self._open = False

    def check(  # noqa: D102 (inherited)
        self, values: Sequence[float], members: Sequence[int]
    ) -> None:
        for k, value in zip(members, values, strict=True):
            if value < 0:
                raise ValueError(
                    f"The loss of task {self._tasks[k]!r} is {value}, but FAMO takes its "
                    "logarithm: losses must be positive. Add a constant to it, or clamp it."
                )

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        shares = self._logits[at].softmax(0) / (values + _EPSILON)
        weights = shares / shares.sum() * (len(values) / len(self._tasks))
        return (weights * values).sum(), weights

    @torch.no_grad()
    def observe_step(  # noqa: D102 (inherited)
        self, before: Tensor, after: Tensor, at: Tensor
    ) -> None:
        if len(at) == 1 < len(self._tasks):
            return  # there is nothing to balance
        both = torch.stack([before, after])
        # The logarithm of any other number would leave NaN or infinity in the logits.
        moves = (both.isfinite() & (both >= 0)).all() & (before != after).any()
        logits = self._logits[at]
        shares = logits.softmax(0)
        fall = (before + _EPSILON).log() - (after + _EPSILON).log()
        gradient = shares * (fall - (shares * fall).sum()) + self._weight_decay * logits
        # Adam, with the number of steps of each task.
        steps = self._steps[at] + 1
        mean = self._exp_avg[at].lerp(gradient, 1 - _BETAS[0])
        square = self._exp_avg_sq[at].lerp(gradient.square(), 1 - _BETAS[1])
        root = (square / (1 - _BETAS[1] ** steps)).sqrt() + _EPSILON
        logits = logits - self._lr * mean / (1 - _BETAS[0] ** steps) / root

        def moved(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, at, torch.where(moves, new, old[at]))

        self._logits = moved(self._logits, logits)
        self._exp_avg = moved(self._exp_avg, mean)
        self._exp_avg_sq = moved(self._exp_avg_sq, square)
        self._steps = moved(self._steps, steps)

    def _state(self) -> dict[str, Any]:
        return {**{name: getattr(self, f"_{name}") for name in _MEMORY}, "open": self._open}

    def _load(self, state: Mapping[str, Any]) -> None:
        for name in _MEMORY:
            setattr(self, f"_{name}", state[name].to(self._device, copy=True))
        self._open = state["open"]


_BETAS = (0.9, 0.999)
_EPSILON = 1e-8
