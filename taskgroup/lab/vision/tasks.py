"""The tasks of the three benchmarks: what a network predicts, its loss and its metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["NYUD", "PASCAL", "TASKONOMY", "Task"]

Loss = Literal["l1", "unit_l1", "cosine", "mse", "cross_entropy", "balanced_bce", "weighted_bce"]
Metric = Literal["l1", "rmse", "angle", "miou", "max_f", "ods_f"]

_HIGHER_IS_BETTER = ("miou", "max_f", "ods_f")
_METRIC_NAMES = {
    "l1": "L1",
    "rmse": "RMSE",
    "angle": "mean angle (°)",
    "miou": "mIoU",
    "max_f": "maxF",
    "ods_f": "odsF",
}


@dataclass(frozen=True)
class Task:
    """One dense prediction task.

    Attributes:
        name: as the data set calls it.
        channels: of the prediction: values, classes, or one logit.
        loss: see :func:`taskgroup.lab.vision.criterion`.
        metric: see :func:`taskgroup.lab.vision.evaluate`.
        title: Short title for figures.
        max_dist: of ``"ods_f"``: how far a predicted edge may lie from a true one, as a share of
            the image's diagonal.
    """

    name: str
    channels: int
    loss: Loss
    metric: Metric
    title: str
    max_dist: float = 0.0

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller metric is the better one."""
        return self.metric not in _HIGHER_IS_BETTER

    @property
    def metric_name(self) -> str:
        """What the metric is called, its unit included."""
        return _METRIC_NAMES[self.metric]

    @property
    def kind(self) -> Literal["classes", "binary", "values"]:
        """What a label holds, class numbers, 0 or 1, or values for every channel."""
        if self.loss == "cross_entropy":
            return "classes"
        return "binary" if self.loss.endswith("bce") else "values"


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


#: The eleven tasks of Taskonomy by name, always in this order.
TASKONOMY: dict[str, Task] = _by_name(
    Task("depth_euclidean", 1, "l1", "l1", "Euclidean depth"),
    Task("depth_zbuffer", 1, "l1", "l1", "Z-buffer depth"),
    Task("normal", 3, "cosine", "l1", "Surface normals"),
    Task("reshading", 3, "l1", "l1", "Reshading"),
    Task("edge_occlusion", 1, "l1", "l1", "Occlusion edges"),
    Task("principal_curvature", 2, "mse", "rmse", "Principal curvature"),
    Task("keypoints3d", 1, "l1", "l1", "3D keypoints"),
    Task("segment_unsup25d", 1, "l1", "l1", "2.5D segments"),
    Task("edge_texture", 1, "l1", "l1", "Texture edges"),
    Task("keypoints2d", 1, "l1", "l1", "2D keypoints"),
    Task("segment_unsup2d", 1, "l1", "l1", "2D segments"),
)

#: The four tasks of NYUD-v2.
NYUD: dict[str, Task] = _by_name(
    Task("semseg", 40, "cross_entropy", "miou", "Segmentation"),
    Task("depth", 1, "l1", "rmse", "Depth"),
    Task("normals", 3, "unit_l1", "angle", "Surface normals"),
    Task("edge", 1, "weighted_bce", "ods_f", "Edges", max_dist=0.011),
)

#: The five tasks of PASCAL-Context.
PASCAL: dict[str, Task] = _by_name(
    Task("semseg", 21, "cross_entropy", "miou", "Segmentation"),
    Task("human_parts", 7, "cross_entropy", "miou", "Human parts"),
    Task("sal", 1, "balanced_bce", "max_f", "Saliency"),
    Task("edge", 1, "weighted_bce", "ods_f", "Edges", max_dist=0.0075),
    Task("normals", 3, "unit_l1", "angle", "Surface normals"),
)
