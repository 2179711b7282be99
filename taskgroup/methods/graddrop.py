"""Gradient sign dropout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from taskgroup.methods.gradient_space import GradientMethod, Gradients, targets

__all__ = ["GradDrop"]


class GradDrop(GradientMethod):
    r"""GradDrop: keeps, for every number, only the gradients of one randomly drawn sign.

    .. math::
        P = \frac12 \Bigl( 1 + \frac{\sum_k g_k}{\sum_k |g_k|} \Bigr), \qquad
        \sum_k g_k \, [\, U < P \text{ and } g_k > 0 \ \text{ or } \ U > P \text{ and } g_k < 0 \,]

    element by element, with U uniform in (0, 1) (torch's global generator): the more the gradients
    agree, the likelier is their common sign. From "Just Pick a Sign: Optimizing Deep Multitask
    Models with Gradient Sign Dropout" (Chen et al., NeurIPS 2020), computed by TorchJD in float32.
    Tasks have no weights as a whole, so :meth:`~JointMethod.backward` returns ones.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = GradDrop([x], ["a", "b"])
        >>> method.backward({"a": x[0] + x[1], "b": x[0] + 2 * x[1]})
        tensor([1., 1.])
        >>> x.grad  # all signs agree, so this is the sum
        tensor([2., 3.])
    """

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks)
        from torchjd.aggregation import GradDrop as Aggregator

        self._aggregate = Aggregator()

    def _merge(self, gradients: Gradients, scale: float | None) -> Tensor:
        # One parameter at a time, so that only its gradients are copied.
        for target, column in zip(targets(gradients), zip(*gradients, strict=True), strict=True):
            if target is not None:
                rows = [g.flatten().float() for g in column if g is not None]
                target.copy_(self._aggregate(torch.stack(rows)).view_as(target))
        return torch.ones(len(gradients), dtype=torch.float32, device="cpu")
