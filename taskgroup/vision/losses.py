"""The losses of the published Taskonomy runs, each over the pixels whose label is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taskgroup.vision.tasks import TASKONOMY

__all__ = ["criterion"]

_EPS = 1e-8  # for the product of the two lengths, as in F.cosine_similarity


def criterion(
    outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    r"""One masked loss per task.

    With the set V of valid pixels of the batch,

    .. math::
        L = \frac{1}{\max(|V|, 1)} \sum_{p \in V} \ell_p, \qquad
        \ell_p = \begin{cases}
            \frac{1}{C} \sum_c |o_{pc} - y_{pc}| & \text{L1} \\
            \frac{1}{C} \sum_c (o_{pc} - y_{pc})^2 & \text{curvature} \\
            1 - \cos(o_p, y_p) \text{ over the channels} & \text{normals.}
        \end{cases}

    What a masked label holds, NaN included, reaches neither the loss nor its gradient. A batch
    without a valid pixel has the loss 0, with a graph and zero gradients.

    Args:
        outputs: {task: [B, C, H, W]}, tasks of :data:`~taskgroup.vision.tasks.TASKONOMY`.
        labels: {task: [B, C, H, W]}, at least the tasks of ``outputs``.
        masks: {task: [B, 1, H, W]}, bool, at least the tasks of ``outputs``.

    Returns:
        {task: scalar}, the tasks of ``outputs`` in their order.

    Example:
        >>> output, label = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, torch.nan]]]])
        >>> criterion({"reshading": output}, {"reshading": label}, {"reshading": label == label})
        {'reshading': tensor(3.)}
    """
    return {
        name: _masked(TASKONOMY[name].loss, output, labels[name], masks[name])
        for name, output in outputs.items()
    }


def _masked(kind: str, output: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    valid = mask.sum().clamp(min=1)
    if kind == "cosine":
        label = torch.where(mask, label, 0)
        # Many times faster than F.cosine_similarity, whose norms over dim 1 are slow on the CPU.
        squares = output.square().sum(1, keepdim=True) * label.square().sum(1, keepdim=True)
        cosine = (output * label).sum(1, keepdim=True) * squares.clamp(min=_EPS**2).rsqrt()
        return torch.where(mask, 1 - cosine, 0).sum() / valid
    # Zero where masked before anything else: zero is also what flows back there.
    error = torch.where(mask, output - label, 0)
    total = error.abs().sum() if kind == "l1" else error.square().sum()
    return total / (valid * output.shape[1])
