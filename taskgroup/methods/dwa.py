"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup.methods.loss_space import ScalarizerMethod

__all__ = ["DWA"]


class DWA(ScalarizerMethod):
    r"""Dynamic weight average: gives more weight to tasks whose losses fall more slowly.

    .. math::
        w_k = K \operatorname{softmax}_k \bigl( \bar L_k(t-1) / (T \, \bar L_k(t-2)) \bigr)

    with :math:`\bar L_k(t)` the mean loss of epoch :math:`t`. All weights are 1 in the first two
    epochs. From "End-to-End Multi-Task Learning with Attention" (Liu et al., CVPR 2019), computed
    by TorchJD. With a ``GradScaler``, a batch whose losses are not finite does not count.

    Args:
        epoch: the number of backward passes in an epoch, such as ``len(loader)``. The method counts
            them and finds the end of an epoch by itself.
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
        from taskgroup.methods._torchjd import DWA as Average  # noqa: N811

        self._scalarizer: Average = Average(temperature)
        self._epoch = epoch

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        kept = self._scalarizer.history
        weights = super()._weigh(values, scaler)
        if scaler is not None and not values.isfinite().all():
            self._scalarizer.history = kept
        _, n_batches, _ = self._scalarizer.history
        if n_batches >= self._epoch:
            self._scalarizer.step()
        return weights

    def _state(self) -> dict[str, Any]:
        total, n_batches, averages = self._scalarizer.history
        # The shapes never change: zeros stand for what is not known yet.
        zeros = torch.zeros(len(self._tasks), dtype=torch.float32, device="cpu")
        rows = [*(average.cpu() for average in averages), zeros, zeros][:2]
        return {
            "sum": (zeros if total is None else total).to("cpu", copy=True),
            "batches": n_batches,
            "averages": torch.stack(rows),
            "epochs": len(averages),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        total = state["sum"].to(self._device, copy=True) if state["batches"] else None
        averages = state["averages"].to(self._device, copy=True)[: state["epochs"]]
        self._scalarizer.history = total, state["batches"], list(averages)
