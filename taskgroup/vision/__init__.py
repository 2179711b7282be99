"""The paper's benchmarks: data, losses, metrics and networks for dense prediction.

Needs the extra ``train``: ``pip install 'taskgroup[train]'``.
"""

from taskgroup.vision.losses import criterion
from taskgroup.vision.metrics import evaluate
from taskgroup.vision.models import ViTFeatures, vit
from taskgroup.vision.motorcycle import Motorcycle
from taskgroup.vision.samples import Samples
from taskgroup.vision.tasks import NYUD, PASCAL, TASKONOMY, Task

__all__ = [
    "NYUD",
    "PASCAL",
    "TASKONOMY",
    "Motorcycle",
    "Samples",
    "Task",
    "ViTFeatures",
    "criterion",
    "evaluate",
    "vit",
]
