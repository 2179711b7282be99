"""The tasks of the three benchmarks: their outputs, losses and metrics."""

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
        name: the name in the data set.
        channels: number of output channels: values, classes, or one logit.
        loss: name of the loss, see :func:`taskgroup.lab.vision.criterion`.
        metric: name of the metric, see :func:`taskgroup.lab.vision.evaluate`.
        title: short title for figures.
        max_dist: for the metric ``"ods_f"``, the largest distance between a predicted edge and a
            true one, as a share of the image's diagonal.
    """

    name: str
    channels: int
    loss: Loss
    metric: Metric
    title: str
    max_dist: float = 0.0

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller metric is better."""
        return self.metric not in _HIGHER_IS_BETTER

    @property
    def metric_name(self) -> str:
        """The metric's name in tables and figures, with its unit."""
        return _METRIC_NAMES[self.metric]

    @property
    def kind(self) -> Literal["classes", "binary", "values"]:
        """Whether labels are class numbers, 0 and 1, or values for every channel."""
        if self.loss == "cross_entropy":
            return "classes"
        return "binary" if self.loss.endswith("bce") else "values"


def _by_name(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


#: The eleven tasks of Taskonomy, by name. The order is fixed.
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

#: The four tasks of NYUD-v2, by name.
NYUD: dict[str, Task] = _by_name(
    Task("semseg", 40, "cross_entropy", "miou", "Segmentation"),
    Task("depth", 1, "l1", "rmse", "Depth"),
    Task("normals", 3, "unit_l1", "angle", "Surface normals"),
    Task("edge", 1, "weighted_bce", "ods_f", "Edges", max_dist=0.011),
)

#: The five tasks of PASCAL-Context, by name.
PASCAL: dict[str, Task] = _by_name(
    Task("semseg", 21, "cross_entropy", "miou", "Segmentation"),
    Task("human_parts", 7, "cross_entropy", "miou", "Human parts"),
    Task("sal", 1, "balanced_bce", "max_f", "Saliency"),
    Task("edge", 1, "weighted_bce", "ods_f", "Edges", max_dist=0.0075),
    Task("normals", 3, "unit_l1", "angle", "Surface normals"),
)
