"""The paper's benchmark in small: data, losses, metrics and networks for dense prediction.

Needs the extra ``train``: ``pip install 'taskgroup[train]'``.
"""

from taskgroup.vision.losses import criterion
from taskgroup.vision.metrics import evaluate
from taskgroup.vision.models import ViTFeatures, vit
from taskgroup.vision.motorcycle import Motorcycle, Samples
from taskgroup.vision.tasks import TASKONOMY, Task

__all__ = [
    "TASKONOMY",
    "Motorcycle",
    "Samples",
    "Task",
    "ViTFeatures",
    "criterion",
    "evaluate",
    "vit",
]
