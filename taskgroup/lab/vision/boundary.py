r"""The boundary benchmark of the Berkeley segmentation data set, in one number: the ODS F-measure.

A predicted boundary pixel is right if it can be matched to a labelled pixel near it, and no other
predicted pixel is matched to the same one. Martin, Fowlkes & Malik, PAMI 2004; Arbelaez, Maire,
Fowlkes & Malik, PAMI 2011.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from taskgroup.lab.processes import in_processes
from taskgroup.lab.vision.boundary_matching import count_boundaries

__all__ = ["OdsF"]

Bools = NDArray[np.bool_]

_STEPS = 100  # points of the interpolation between two thresholds, both ends included


class _Image(NamedTuple):
    """The maps of an image that are counted, all [H, W].

    ``reached`` is the number of thresholds that the probability reaches.
    """

    reached: NDArray[np.uint8]
    label: Bools
    known: Bools


class OdsF(Metric):
    r"""F-measure of boundaries at the optimal data-set scale: one threshold for all images.

    At each of the thresholds k / (n + 1), k = 1 to n, the pixels whose probability reaches the
    threshold are thinned (``skimage.morphology.thin``, MATLAB's ``bwmorph(..., 'thin', Inf)``) and
    matched one to one with those of the label (``match``). Summed over all images, at a
    threshold t,

    .. math::
        P_t = \frac{\text{matched}}{\text{predicted}}, \qquad
        R_t = \frac{\text{matched}}{\text{labelled}}, \qquad
        F = \max_t \frac{2 P_t R_t}{P_t + R_t},

    where 0 / 0 is 0; so P is 0 where nothing is predicted. P and R are interpolated linearly in 100
    steps between neighbouring thresholds, and the maximum includes these steps. Martin,
    Fowlkes & Malik, PAMI 2004; Arbelaez et al., PAMI 2011, and their ``collect_eval_bdry.m``.

    As in the benchmark, the label is not thinned, and there is no non-maximum suppression, which
    some apply before they publish F. Unlike in the benchmark, probabilities are not rounded to 8
    bits, and an image has one label, not one from each of several people.

    Args:
        max_dist: Largest distance of a match, as a share of the diagonal
            :math:`\sqrt{H^2 + W^2}` of the rectangle around the known pixels: of the image
            without its padding. The benchmark's is 0.0075; 0.011 is usual on NYUD-v2.
        thresholds: Their number n.
        workers: Number of ``DataLoader`` workers that match; 0 matches in this process.
        **kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: ``max_dist`` is not in [0, 1], or ``thresholds`` is less than 1.

    Example:
        >>> label = torch.zeros(1, 20, 20, dtype=torch.bool)
        >>> label[:, 10] = True
        >>> metric = OdsF(max_dist=0.05)
        >>> metric.update(0.7 * label, label)
        >>> metric.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor  # [3, n]: pixels matched, predicted and labelled, int64

    def __init__(
        self, max_dist: float, thresholds: int = 99, workers: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= max_dist <= 1:
            raise ValueError(f"max_dist: a share of the diagonal, in [0, 1], got {max_dist}")
        if not 1 <= thresholds <= 255:
            raise ValueError(f"thresholds: 1 to 255 of them, got {thresholds}")
        self.max_dist = max_dist
        self.thresholds = thresholds
        self._workers = workers
        self._pending: list[_Image] = []  # not counted yet
        self.add_state("counts", torch.zeros(3, thresholds, dtype=torch.int64), "sum")

    def update(self, probability: Tensor, label: Tensor, known: Tensor | None = None) -> None:
        """Add a batch. An image of 425 x 560 pixels takes half a second at 99 thresholds.

        Args:
            probability: [B, H, W] or [B, 1, H, W], floating, in [0, 1], on any device. Compared
                with the thresholds in float32, or float64 if it is that.
            label: Of the same shape, bool.
            known: Of the same shape, bool; other pixels count as neither predicted nor labelled.
                They are dropped after thinning. None means that all pixels are known.

        Raises:
            TypeError: ``probability`` is not floating, or ``label`` or ``known`` is not bool.
            ValueError: The shapes are not as above, or a probability is not in [0, 1].
        """
        if known is None:
            known = torch.ones_like(label)
        _check(probability, label, known)
        exact = torch.float64 if probability.dtype == torch.float64 else torch.float32
        n = self.thresholds
        thresholds = (torch.arange(1, n + 1, dtype=torch.float64, device="cpu") / (n + 1)).to(exact)
        reached = torch.bucketize(probability.detach().cpu().to(exact), thresholds, right=True)
        maps = (reached.byte(), label.cpu(), known.cpu())
        self._pending += map(_Image, *(x.flatten(0, -3).numpy() for x in maps))
        # Many at a time, since starting workers takes time; not all, since their maps would take
        # gigabytes.
        if len(self._pending) >= 32 * self._workers:
            self._count()

    def _count(self) -> None:
        """Count the pending images."""
        count = partial(_count, max_dist=self.max_dist, n=self.thresholds)
        for counts in in_processes(count, self._pending, self._workers):
            self.counts += torch.as_tensor(counts).to(self.counts.device)
        self._pending = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and return its F."""
        self._count()
        return super().forward(*args, **kwargs)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Sum the counts over the ranks."""
        self._count()
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._pending = []

    def compute(self) -> Tensor:
        """F at the best threshold.

        Returns:
            Scalar in [0, 1], float32; 0 if no predicted pixel was matched, NaN if there was no
            label pixel.
        """
        self._count()
        matched, predicted, labelled = self.counts.double()
        if not labelled.any():
            return torch.full_like(labelled[0], torch.nan, dtype=torch.float32)
        at = torch.stack([matched / predicted.clamp(min=1), matched / labelled.clamp(min=1)])
        following = torch.cat([at[:, 1:], at[:, -1:]], 1)
        steps = torch.linspace(0, 1, _STEPS, dtype=at.dtype, device=at.device)
        p, r = torch.lerp(at[..., None], following[..., None], steps)
        f: Tensor = (2 * p * r / (p + r)).nan_to_num(0).max()
        return f.float()


def _check(probability: Tensor, label: Tensor, known: Tensor) -> None:
    shape = probability.shape
    if len(shape) != 3 and not (len(shape) == 4 and shape[1] == 1):
        raise ValueError(f"probability: [B, H, W] or [B, 1, H, W] is needed, got {list(shape)}")
    if not probability.is_floating_point():
        raise TypeError(f"probability: floating point is needed, got {probability.dtype}")
    for name, mask in (("label", label), ("known", known)):
        if mask.shape != shape:
            raise ValueError(f"{name}: {list(shape)}, as probability, got {list(mask.shape)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: bool is needed, got {mask.dtype}")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("probability: not in [0, 1]; a sigmoid turns logits into probabilities")


def _count(image: _Image, max_dist: float, n: int) -> NDArray[np.int64]:
    """Count the matched, predicted and labelled pixels of an image at every threshold: [3, n]."""
    reached, label, known = image
    sides = [np.flatnonzero(known.any(axis)) for axis in (1, 0)]
    distance = max_dist * math.hypot(*(np.ptp(side) + 1 if len(side) else 0 for side in sides))
    return count_boundaries(reached, label, known, distance, n)
