"""The losses of the published runs, each over the pixels whose label is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from taskgroup.lab.vision.tasks import TASKONOMY, Task

__all__ = ["criterion"]

_EDGE_WEIGHT = 0.95  # of the rare class, an edge
_IGNORE = 255  # no class: where nothing is known
_EPS = 1e-8  # for the product of the two lengths, as in F.cosine_similarity


def criterion(
    outputs: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    tasks: Mapping[str, Task] = TASKONOMY,
) -> dict[str, Tensor]:
    r"""One masked loss per task.

    With the set V of valid pixels of the batch, :math:`L = \frac{1}{\max(|V|, 1)} \sum_{p \in V}
    \ell_p`, and by the task's ``loss``

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

    where w is .95 for weighted, and for balanced cross-entropy the share of the negatives in V.

    What a masked label holds, NaN included, reaches neither the loss nor its gradient. A batch
    without a valid pixel has the loss 0, with a graph and zero gradients.

    Args:
        outputs: ``{task: [B, C, H, W]}``, of ``tasks``.
        labels: ``{task: [B, C, H, W]}``, at least the tasks of ``outputs``; of classes their
            numbers, ``[B, 1, H, W]``, of a binary task 0 and 1.
        masks: ``{task: [B, 1, H, W]}``, bool, at least the tasks of ``outputs``.
        tasks: what is known of the tasks.

    Returns:
        ``{task: scalar}``, the tasks of ``outputs`` in their order.

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
        # Many times faster than F.cosine_similarity, whose norms over dim 1 are slow on the CPU.
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
    # Zero where masked before anything else: zero is also what flows back there.
    error = torch.where(mask, output - label, 0)
    total = error.abs().sum() if kind == "l1" else error.square().sum()
    return total / (valid * output.shape[1])
