"""A Lightning callback that saves the groups in the checkpoints and records the evaluations."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from importlib import import_module
from typing import Any

from taskgroup.integrations.metrics import TaskMetrics, check_parts, record
from taskgroup.loop.schedule import TaskGroups
from taskgroup.recording.recorder import Recorder

__all__ = ["GroupsCallback"]


def _callback_class() -> Any:
    """The base class of callbacks, of the Lightning package in use.

    Lightning comes in two packages with the same contents, ``lightning.pytorch`` and
    ``pytorch_lightning``. In a list of callbacks, each takes those of the other as well.
    """
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):  # first one in use
        with suppress(ImportError):
            return import_module(name).Callback
    raise ImportError("taskgroup.integrations.lightning needs Lightning: pip install lightning")


_Callback: Any = _callback_class()


class GroupsCallback(_Callback):  # type: ignore[misc]
    """A Lightning callback that saves the groups in every checkpoint, and records evaluations.

    It works with ``lightning.pytorch`` and ``pytorch_lightning``::

        module = Forecast()  # its training_step loops over module.groups
        trainer = Trainer(callbacks=[GroupsCallback(module.groups)])
        trainer.fit(module, loader, ckpt_path=...)

    A run that resumes from a checkpoint at the end of a batch or an epoch goes on exactly. If
    Lightning saves in the handler of a signal (``SLURMEnvironment(auto_requeue=True)``), the
    checkpoint contains the groups at the end of the last complete batch.

    Args:
        groups: the :class:`~taskgroup.TaskGroups` of the module.
        recorder: a :class:`~taskgroup.Recorder` of these groups. Its state is saved as well,
            and it is closed at the end of ``fit``.
        metrics: for each task the name under which the module logs its validation metric and which
            values are better, ``{task: ("val_accuracy", "higher")}``. The recorder gets them after
            every validation during ``fit``.

    Raises:
        ImportError: at the import of this module, if Lightning is not installed.
        TypeError: if ``groups`` is not a :class:`~taskgroup.TaskGroups`, or ``recorder`` not a
            :class:`~taskgroup.Recorder`.
        ValueError: if ``metrics`` is given without a recorder, or names unknown tasks; after a
            validation that did not log one of the metrics.
    """

    def __init__(
        self,
        groups: TaskGroups,
        recorder: Recorder | None = None,
        metrics: TaskMetrics | None = None,
    ) -> None:
        check_parts("GroupsCallback", groups, recorder, metrics)
        self.groups = groups
        self.recorder = recorder
        self._metrics = metrics

    def state_dict(self) -> dict[str, Any]:
        """The state of the groups and of the recorder, which Lightning puts into the checkpoint."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, part in self._parts().items():
            if name in state_dict:
                part.load_state_dict(state_dict[name])

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Warn of a checkpoint without the groups."""
        if self.state_key not in checkpoint["callbacks"]:
            warnings.warn(
                "The checkpoint has no state of the groups, because it was saved without "
                "GroupsCallback: the groups are learned anew.",
                stacklevel=2,
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the metrics of a validation during the training."""
        during_training = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.recorder is not None and self._metrics and during_training:
            record(self.recorder, self._metrics, trainer.callback_metrics)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the recorder."""
        if self.recorder is not None:
            self.recorder.close()

    def _parts(self) -> dict[str, Any]:
        recorder = {} if self.recorder is None else {"recorder": self.recorder}
        return {"groups": self.groups, **recorder}
