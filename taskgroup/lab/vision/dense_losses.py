"""The losses of the published runs, over the pixels whose label is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from taskgroup.lab.vision.tasks import TASKONOMY, Task

__all__ = ["criterion"]

_EDGE_WEIGHT = 0.95  # weight of edges, the rare class
_IGNORE = 255  # class number of unknown pixels
_EPS = 1e-8  # smallest product of the two lengths, as in F.cosine_similarity


def criterion(
    outputs: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    tasks: Mapping[str, Task] = TASKONOMY,
) -> dict[str, Tensor]:
    r"""Compute one masked loss per task.

    With the set V of valid pixels of the batch, :math:`L = \frac{1}{\max(|V|, 1)} \sum_{p \in V}
    \ell_p`. The task's ``loss`` defines :math:`\ell_p`:

    .. math::
        \ell_p = \begin{cases}
            \frac{1}{C} \sum_c |o_{pc} - y_{pc}| & \text{l1} \\
            \sum_c |o_{pc} / \lVert o_p \rVert - y_{pc}| & \text{unit\_l1} \\
            \frac{1}{C} \sum_c (o_{pc} - y_{pc})^2 & \text{mse} \\
            1 - \cos(o_p, y_p) \text{ over the channels} & \text{cosine} \\
            -\log \mathrm{softmax}(o_p)_{y_p} & \text{cross\_entropy} \\
            -w y_p \log \sigma(o_p) - (1 - w) (1 - y_p) \log \sigma(-o_p) &
                \text{weighted\_bce, balanced\_bce}
        \end{cases}

    where w is .95 for ``weighted_bce``, and the share of negatives in V for ``balanced_bce``.

    Masked labels, even NaN, affect neither the loss nor its gradient. A batch without a valid pixel
    has the loss 0, with a graph and zero gradients.

    Args:
        outputs: ``{task: [B, C, H, W]}``, with tasks in ``tasks``.
        labels: ``{task: [B, C, H, W]}``, at least for the tasks of ``outputs``: values, class
            numbers ``[B, 1, H, W]``, or 0 and 1 for a binary task.
        masks: ``{task: [B, 1, H, W]}``, bool, at least for the tasks of ``outputs``.
        tasks: ``{task: Task}``.

    Returns:
        ``{task: scalar}``, in the order of ``outputs``.

    Example:
        >>> output, label = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, torch.nan]]]])
        >>> criterion({"reshading": output}, {"reshading": label}, {"reshading": label == label})
        {'reshading': tensor(3.)}
    """
    return {
        name: _masked(tasks[name].loss, output, labels[name], masks[name])
        for name, output in outputs.items()
    }


def _masked(kind: str, output: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    valid = mask.sum().clamp(min=1)
    if kind == "cosine":
        label = torch.where(mask, label, 0)
        # Much faster on the CPU than F.cosine_similarity, whose norms over dim 1 are slow there.
        squares = output.square().sum(1, keepdim=True) * label.square().sum(1, keepdim=True)
        cosine = (output * label).sum(1, keepdim=True) * squares.clamp(min=_EPS**2).rsqrt()
        return torch.where(mask, 1 - cosine, 0).sum() / valid
    if kind == "cross_entropy":
        classes = torch.where(mask, label, _IGNORE).squeeze(1).long()
        return F.cross_entropy(output, classes, ignore_index=_IGNORE, reduction="sum") / valid
    if kind.endswith("bce"):
        target = torch.where(mask, label, 0).to(output.dtype)
        positive = _EDGE_WEIGHT if kind == "weighted_bce" else 1 - target.sum() / valid
        weight = torch.where(target > 0, positive, 1 - positive)
        entropy = F.binary_cross_entropy_with_logits(output, target, weight, reduction="none")
        return torch.where(mask, entropy, 0).sum() / valid
    if kind == "unit_l1":
        return torch.where(mask, F.normalize(output, dim=1) - label, 0).abs().sum() / valid
    # Masked pixels are set to zero first, so that their gradient is zero too.
    error = torch.where(mask, output - label, 0)
    total = error.abs().sum() if kind == "l1" else error.square().sum()
    return total / (valid * output.shape[1])
