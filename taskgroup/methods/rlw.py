"""Random loss weighting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskgroup._generator import HostGenerator
from taskgroup.methods.loss_space import WeighingMethod

__all__ = ["RLW"]


class RLW(WeighingMethod):
    r"""Random loss weighting: draws new weights for every batch.

    .. math::
        w = \operatorname{softmax}(z), \qquad z_k \sim \mathcal N(0, 1)

    The weights of all K tasks add up to 1. From "Reasonable Effectiveness of Random Weighting: A
    Litmus Test for Multi-Task Learning" (Lin et al., TMLR 2022). The method has a random generator
    of its own, whose state is part of :meth:`JointMethod.state_dict`. As ``weights`` of
    :class:`taskgroup.TaskGroups` it draws once per batch for all K tasks, and a group takes the
    weights of its own tasks.

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

    _counts = True

    def __init__(
        self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str], seed: int = 0
    ) -> None:
        super().__init__(shared, tasks)
        self._generator = HostGenerator(seed)
        self._weights = torch.ones(len(self._tasks), dtype=torch.float32, device=self._device)

    def begin_batch(self) -> None:  # noqa: D102 (inherited)
        size = len(self._tasks)
        normal = torch.randn(size, generator=self._generator, dtype=torch.float32, device="cpu")
        self._weights = normal.softmax(0).to(self._device, non_blocking=True)

    def weigh_group(  # noqa: D102 (inherited)
        self, values: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = self._weights[at]
        return (weights * values).sum(), weights

    def _state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())
