"""The paper's data sets, read from their public layouts, and the embedded ones."""

from taskgroup.lab.data.augment import Augment, Fit, Resize
from taskgroup.lab.data.dense_dataset import DenseDataset, Scene
from taskgroup.lab.data.files import BadSampleError
from taskgroup.lab.data.loader import all_batches, collate, training_batches
from taskgroup.lab.data.nyud import NYUDv2
from taskgroup.lab.data.pascal import PASCALContext
from taskgroup.lab.data.taskonomy import Taskonomy

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

#: ``{name of the recipe: data set}``.
DATASETS: dict[str, type[DenseDataset]] = {
    "nyud-v2": NYUDv2,
    "pascal-context": PASCALContext,
    "taskonomy": Taskonomy,
}
