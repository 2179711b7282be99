"""Gradient vaccine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from taskgroup.methods.gradient_space import GramMethod

__all__ = ["GradVac"]


class GradVac(GramMethod):
    r"""Gradient vaccine: raises cosines to their own moving average, not only to zero.

    If the cosine between the gradient of task i and :math:`g_j` is below its average
    :math:`\hat\phi_{ij}`, a multiple of :math:`g_j` is added that makes the two equal, for all j in
    random order (torch's global generator). The step is the sum of the results, and

    .. math::
        \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \cos(g_i, g_j)

    From "Gradient Vaccine" (Wang et al., ICLR 2021, arXiv 2010.05874), computed by TorchJD.

    Args:
        beta: the weight of a new cosine, in [0, 1]; TorchJD uses 0.5, the paper 0.01.

    Raises:
        ValueError: if ``beta`` is out of range.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = GradVac([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": x[1] - x[0]})
        >>> x.grad.round(decimals=4)  # as PCGrad, since the averages start at zero
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str], beta: float = 0.5
    ) -> None:
        super().__init__(shared, tasks)
        from taskgroup.methods._torchjd import GradVacWeighting

        self._weighting: GradVacWeighting = GradVacWeighting(beta, len(self._tasks))

    def _state(self) -> dict[str, Any]:
        return {"phi": self._weighting.phi.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._weighting.phi.copy_(state["phi"])
