"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskgroup.methods.loss_space import WeighingMethod

__all__ = ["DWA"]


class DWA(WeighingMethod):
    r"""Dynamic weight average: gives more weight to tasks whose losses fall more slowly.

    .. math::
        w_k = K \operatorname{softmax}_k \bigl( \bar L_k(t-1) / (T \, \bar L_k(t-2)) \bigr)

    with :math:`\bar L_k(t)` the mean loss of epoch :math:`t`. The ratio of a task counts as 1 until
    its means of two epochs are known, so all weights are 1 in the first two epochs. From
    "End-to-End Multi-Task Learning with Attention" (Liu et al., CVPR 2019). Losses that are not
    finite do not count; with a ``GradScaler``, nor does their batch.

    As ``weights`` of :class:`taskgroup.TaskGroups`, the softmax is over all K tasks, and a group
    takes the weights of its own tasks. A batch counts the loss of each of its tasks once, before
    the first step on it. An epoch keeps the old mean of a task that it never stepped on.

    Args:
        epoch: the number of batches in an epoch, such as ``len(loader)``. The method counts them
            and finds the end of an epoch by itself.
        temperature: :math:`T` > 0; a larger one makes the weights more uniform. The paper uses 2.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> method = DWA([x], ["a", "b"], epoch=1)
        >>> for scale in (1.0, 0.5, 0.5):  # the loss of b halves, that of a does not
        ...     weights = method.backward({"a": x.sum(), "b": scale * x.sum()})
        >>> weights
        tensor([1.1244, 0.8756])
    """

    _counts = True

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        epoch: int,
        temperature: float = 2.0,
    ) -> None:
        super().__init__(shared, tasks)
        if not isinstance(epoch, int) or epoch < 1:
            raise ValueError(
                f"epoch must be the number of batches in an epoch, 1 or more, got {epoch!r}."
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        self._epoch = epoch
        self._temperature = temperature
        zeros = torch.zeros(len(self._tasks), dtype=torch.float32, device=self._device)
        self._batches = 0  # of this epoch
        self._sum = zeros  # of the losses of this epoch
        self._counted = zeros  # losses of this epoch
        self._averages = torch.stack([zeros, zeros])  # of the last epochs; 0 is not known
        self._weights = self._weights_of(self._averages)

    def begin_batch(self) -> None:  # noqa: D102 (inherited)
        if self._batches == self._epoch:
            known = self._counted > 0
            newest = torch.where(known, self._sum / self._counted, self._averages[1])
            older = torch.where(known, self._averages[1], self._averages[0])
            self._averages = torch.stack([older, newest])
            self._weights = self._weights_of(self._averages)
            self._sum, self._counted = torch.zeros_like(self._sum), torch.zeros_like(self._sum)
            self._batches = 0
        self._batches += 1

    def count(self, values: Tensor, at: Tensor) -> None:  # noqa: D102 (inherited)
        finite = values.isfinite()
        self._sum = self._sum.index_add(0, at, values.where(finite, 0))
        self._counted = self._counted.index_add(0, at, finite.to(values.dtype))

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = self._weights[at]
        return (weights * values).sum(), weights

    def _weights_of(self, averages: Tensor) -> Tensor:
        older, newest = averages
        ratios = newest / older
        ratios = ratios.where(ratios.isfinite() & (newest != 0), 1)
        weights: Tensor = len(self._tasks) * (ratios / self._temperature).softmax(0)
        return weights

    def _state(self) -> dict[str, Any]:
        return {
            "batches": self._batches,
            "sum": self._sum,
            "counted": self._counted,
            "averages": self._averages,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._batches = state["batches"]
        self._sum, self._counted, self._averages = (
            state[name].to(self._device, copy=True) for name in ("sum", "counted", "averages")
        )
        self._weights = self._weights_of(self._averages)
