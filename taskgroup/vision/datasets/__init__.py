"""The benchmarks' data sets, read from their public layouts as they are."""

from taskgroup.vision.datasets.augment import Augment, Fit, Resize
from taskgroup.vision.datasets.dense import DenseDataset, Scene
from taskgroup.vision.datasets.files import BadSampleError
from taskgroup.vision.datasets.loader import all_batches, collate, training_batches
from taskgroup.vision.datasets.nyud import NYUDv2
from taskgroup.vision.datasets.pascal import PASCALContext
from taskgroup.vision.datasets.taskonomy import Taskonomy

__all__ = [
    "DATASETS",
    "Augment",
    "BadSampleError",
    "DenseDataset",
    "Fit",
    "NYUDv2",
    "PASCALContext",
    "Resize",
    "Scene",
    "Taskonomy",
    "all_batches",
    "collate",
    "training_batches",
]

#: By the names of the recipes.
DATASETS: dict[str, type[DenseDataset]] = {
    "nyud-v2": NYUDv2,
    "pascal-context": PASCALContext,
    "taskonomy": Taskonomy,
}
