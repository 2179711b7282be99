"""The paper's benchmarks: data, losses, metrics and networks for dense prediction.

Needs the extra ``train``: ``pip install 'taskgroup[train]'``. Networks and losses need torch alone,
since a part is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_WHERE = {
    "Motorcycle": "motorcycle",
    "Samples": "samples",
    "ViTFeatures": "models",
    "criterion": "losses",
    "evaluate": "metrics",
    "vit": "models",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'tasks')}"), name)
