"""The paper's benchmarks: tasks, losses, metrics and networks for dense prediction.

Needs the extra ``train``: ``pip install 'taskgroup[train]'``. Each name is imported when it is
first used, so that networks and losses can be imported without the extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

from taskgroup.lab.vision.tasks import NYUD, PASCAL, TASKONOMY, Task

if TYPE_CHECKING:
    from taskgroup.lab.vision.backbones import ViTFeatures
    from taskgroup.lab.vision.dense_losses import criterion
    from taskgroup.lab.vision.metrics import evaluate
    from taskgroup.lab.vision.models import vit
    from taskgroup.lab.vision.samples import Samples

__all__ = [
    "NYUD",
    "PASCAL",
    "TASKONOMY",
    "Samples",
    "Task",
    "ViTFeatures",
    "criterion",
    "evaluate",
    "vit",
]

_WHERE = {
    "Samples": f"{__name__}.samples",
    "ViTFeatures": f"{__name__}.backbones",
    "criterion": f"{__name__}.dense_losses",
    "evaluate": f"{__name__}.metrics",
    "vit": f"{__name__}.models",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
