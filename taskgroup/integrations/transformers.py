"""A Hugging Face Trainer that takes one optimizer step per group of tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from taskgroup import checkpoint
from taskgroup._losses import Losses, check_losses
from taskgroup.integrations.metrics import TaskMetrics, check_parts, record
from taskgroup.loop.group import Group
from taskgroup.loop.schedule import TaskGroups
from taskgroup.nn.model import MultiTaskModel
from taskgroup.nn.norm import statistics_once
from taskgroup.recording.recorder import Recorder

try:
    transformers: Any = import_module("transformers")
    _Trainer: Any = transformers.Trainer  # fails if a library that it needs is missing
    _TrainerCallback: Any = transformers.TrainerCallback
except ImportError as error:
    raise ImportError(
        "taskgroup.integrations.transformers needs the Hugging Face Trainer: pip install "
        "transformers accelerate"
    ) from error

__all__ = ["GroupTrainer"]

Inputs: TypeAlias = dict[str, Any]

FILE = "groups.pt"  # in a checkpoint folder of the Trainer


class GroupTrainer(_Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` that takes one optimizer step per group of tasks in every batch.

    It gives the same numbers as the loop in :class:`~taskgroup.TaskGroups`. In each batch all steps
    but the last are taken inside :meth:`training_step`; the Trainer takes the last one. Every step
    clips its own gradients (``max_grad_norm``). The learning-rate scheduler, ``max_steps``,
    ``logging_steps`` and so on count batches, and callbacks see one step per batch.

    The model is any module. It is called with the columns of the batch that its ``forward`` (for a
    :class:`~taskgroup.MultiTaskModel`, that of the encoder) names, and with ``group=group`` if
    ``forward`` has that argument. To call it in another way, override :meth:`run_model`.

    Each checkpoint folder contains the state of the groups and of the recorder, and
    ``train(resume_from_checkpoint=...)`` loads it. :meth:`evaluate` adds the loss of each task,
    ``eval_<task>_loss``; its ``eval_loss`` is their sum. The logged training loss is the sum of the
    losses of the tasks before their steps.

    Args:
        *args: positional arguments of ``transformers.Trainer``. ``TrainingArguments(label_names=)``
            must name the columns that hold labels.
        groups: the :class:`~taskgroup.TaskGroups`.
        losses: a function of the outputs of the model and the inputs of the batch, with the
            columns of the labels, that returns ``{task: scalar}`` or a tensor ``[K]``. If the model
            returns a plain dict with tasks as keys, the function gets the outputs of those tasks
            alone whose losses are needed.
        labelled: a function of the inputs that returns the tasks with labels in this batch. By
            default a task whose name is a column of labels has labels in a batch if the column is
            there and holds a value other than -100 and NaN; all other tasks always have labels.
        recorder: a :class:`~taskgroup.Recorder` of these groups. Its state is saved as well, it
            gets ``metrics`` after every evaluation during the training, and it is closed at the
            end.
        metrics: for each task the name of its metric in the evaluation and which values are better,
            ``{task: ("eval_accuracy", "higher")}``. By default the loss of each task.
        **kwargs: keyword arguments of ``transformers.Trainer``.

    Raises:
        ImportError: if transformers or accelerate is missing.
        TypeError: if ``groups`` is not a :class:`~taskgroup.TaskGroups`, or ``recorder`` not a
            :class:`~taskgroup.Recorder`.
        ValueError: if ``label_names`` is empty, or an argument of the Trainer does not work with
            groups: ``gradient_accumulation_steps`` above 1, ``compute_loss_func``,
            ``label_smoothing_factor``, ``model_init``, ``torch_compile`` with a
            :class:`~taskgroup.MultiTaskModel`, DeepSpeed, several GPUs in one process. If a
            checkpoint to resume from has no state of the groups.

    Example:
        ::

            def losses(outputs, inputs):
                return {task: cross_entropy(out, inputs[task]) for task, out in outputs.items()}


            arguments = TrainingArguments("runs/text", label_names=["sentiment", "topic"])
            groups = tg.TaskGroups(["sentiment", "topic"])
            trainer = GroupTrainer(
                model, arguments, groups=groups, losses=losses, train_dataset=data
            )
            trainer.train()
    """

    # Attributes of the Trainer that this class changes.
    label_names: list[str]
    _signature_columns: list[str] | None

    def __init__(
        self,
        *args: Any,
        groups: TaskGroups,
        losses: Callable[[Any, Inputs], Losses],
        labelled: Callable[[Inputs], Iterable[str]] | None = None,
        recorder: Recorder | None = None,
        metrics: TaskMetrics | None = None,
        **kwargs: Any,
    ) -> None:
        check_parts("GroupTrainer", groups, recorder, metrics)
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.losses = losses
        self.recorder = recorder
        self._metrics = metrics
        self._labelled = labelled
        self._group: Group | None = None  # of the step at hand; None in an evaluation
        self._found: dict[str, Tensor] = {}  # losses before the first step on each task
        self._evaluated = _MeanLosses(groups.tasks)
        self._evaluations = 0  # within each other
        # Of an evaluation, on the first data set that has labels of the task.
        self._task_losses: dict[str, tuple[str, Literal["lower", "higher"]]] = {}
        forward = inspect.signature(self.model.forward).parameters
        self._takes_group = "group" in forward
        if isinstance(self.model, MultiTaskModel):
            forward = inspect.signature(self.model.encoder.forward).parameters
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._columns = [name for name, own in forward.items() if own.kind not in variable]
        _check_arguments(self, self._takes_group)
        self._task_columns = [task for task in groups.tasks if task in self.label_names]
        if recorder is not None:
            # First, because the callbacks of trackers may end their run.
            self.callback_handler.callbacks.insert(0, _CloseRecorder(recorder))

    def labelled(self, inputs: Inputs) -> Iterable[str] | None:
        """The tasks with labels in this batch; None if all tasks always have labels."""
        if self._labelled is not None:
            return self._labelled(inputs)
        columns = self._task_columns
        if not columns:
            return None
        given = [task for task in columns if inputs.get(task) is not None]
        known = [_has_labels(torch.as_tensor(inputs[task])) for task in given]
        present = torch.stack(known).tolist() if known else []  # one wait for a GPU
        missing = set(columns).difference(
            task for task, known in zip(given, present, strict=True) if known
        )
        return [task for task in self.groups.tasks if task not in missing]

    def run_model(self, model: nn.Module, inputs: Inputs, group: Group | None) -> Any:
        """Call the model; override it if the model takes its inputs in another way.

        Args:
            model: the model, in the wrapper that the Trainer has put around it.
            inputs: the columns of the batch.
            group: the group of the step; None in an evaluation.
        """
        # A forward(*args, **kwargs) names no column.
        names = self._columns or [name for name in inputs if name not in self.label_names]
        given = {name: inputs[name] for name in names if name in inputs}
        if self._takes_group:
            return model(**given, group=group)
        if group is None:
            return model(**given)
        with statistics_once(self.model, group):
            return model(**given)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the group to step on; in an evaluation the sum over the labelled tasks."""
        group = self._group
        outputs = self.run_model(model, inputs, group)
        if group is not None:
            needed = group.observed
            losses = self.losses(_of_tasks(outputs, needed, self.groups.tasks), inputs)
            loss = group.loss(losses)
            for task, value in self._by_task(losses, needed).items():
                self._found.setdefault(task, value.detach())
        else:
            present = self.labelled(inputs)
            known = set(self.groups.tasks if present is None else present)
            needed = tuple(task for task in self.groups.tasks if task in known)
            own: Mapping[str, Tensor] = {}
            if needed:
                losses = self.losses(_of_tasks(outputs, needed, self.groups.tasks), inputs)
                check_losses(losses, self.groups.tasks, needed, names="the labelled tasks")
                own = self._by_task(losses, needed)
            loss = _total(own, self.args.device)
            self._evaluated.add(own, _batch_size(inputs))
        if return_outputs:  # the Trainer takes the first of a tuple for the loss
            return loss, outputs if isinstance(outputs, dict) else {"outputs": outputs}
        return loss

    def training_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Take the steps of all groups of a batch but the last, which the Trainer takes."""
        self._found = {}
        present = self.labelled(inputs)
        groups = iter(self.groups) if present is None else self.groups.batch(present)
        for group in groups:
            self._group = group
            try:
                super().training_step(model, inputs, num_items_in_batch)
            finally:
                self._group = None
            if not group.last:
                if self.args.max_grad_norm > 0:
                    self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                model.zero_grad()
        if not self._found and self.accelerator.scaler is not None:
            raise RuntimeError(
                "A batch has no labels, so it takes no step, and the gradient scaler of fp16 "
                "cannot pass over a step: use bf16=True, or leave such batches out of the data."
            )
        return _total(self._found, self.args.device)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in the Trainer, but with the labels that the batch has instead of all of them."""
        every = self.label_names
        self.label_names = [name for name in every if inputs.get(name) is not None]
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.label_names = every

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in the Trainer, with the mean loss of each task among the metrics."""
        self._evaluated = _MeanLosses(self.groups.tasks)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        losses = self._evaluated.over_ranks(self.accelerator)
        for task, loss in losses.items():
            name = f"{metric_key_prefix}_{task}_loss"
            output.metrics[name] = loss
            self._task_losses.setdefault(task, (name, "lower"))
        if losses:  # whatever number of batches have labels of each task
            output.metrics[f"{metric_key_prefix}_loss"] = sum(losses.values())
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the Trainer; during the training, the recorder gets the metrics of the tasks."""
        if self._evaluations == 0:
            self._task_losses = {}
        self._evaluations += 1  # an evaluation of several data sets calls this method for each
        try:
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            self._evaluations -= 1
        if self._evaluations == 0 and self.is_in_train and self.recorder is not None:
            record(self.recorder, self._metrics or self._task_losses, found)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; in a checkpoint of the Trainer, the state of the groups as well."""
        super().save_model(output_dir, _internal_call)
        in_checkpoint = _internal_call and output_dir is not None
        if in_checkpoint and self.args.should_save and not self.args.save_only_model:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            checkpoint.save(Path(output_dir or "") / FILE, state)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; a checkpoint to resume from restores the groups and the recorder as well."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = transformers.trainer_utils.get_last_checkpoint(self.args.output_dir)
        if folder:  # the Trainer explains that there is none
            path = Path(folder) / FILE
            if not path.exists():
                raise ValueError(
                    f"The checkpoint {folder} has no state of the groups ({FILE}), so the run "
                    "cannot go on from it: it was written by another trainer, or the job was "
                    "killed while writing. Resume from another checkpoint."
                )
            state = checkpoint.load(path)
            for name, part in self._parts().items():
                if name in state:  # a checkpoint may have been written without a recorder
                    part.load_state_dict(state[name])
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _parts(self) -> dict[str, Any]:
        """What is saved in a checkpoint, besides what the Trainer saves."""
        recorder = {} if self.recorder is None else {"recorder": self.recorder}
        return {"groups": self.groups, **recorder}

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that the Trainer keeps (``remove_unused_columns``), those of the encoder."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or []), *self._columns]

    def _by_task(self, losses: Losses, needed: tuple[str, ...]) -> Mapping[str, Tensor]:
        """The losses of the needed tasks."""
        if isinstance(losses, Tensor):
            tasks = self.groups.tasks
            names = tasks if len(losses) == len(tasks) else needed
            losses = dict(zip(names, losses.unbind(), strict=True))
        return {task: losses[task] for task in needed}


def _check_arguments(trainer: GroupTrainer, takes_group: bool) -> None:
    """Raise for arguments of the Trainer that do not work with groups."""
    args = trainer.args
    if not trainer.label_names:
        raise ValueError(
            "The Trainer does not know which columns hold labels, so it would leave them out: "
            "name them, TrainingArguments(label_names=[...])."
        )
    wrong = {
        "compute_loss_func would not be called: pass losses= instead.": (
            trainer.compute_loss_func is not None
        ),
        "label_smoothing_factor has no effect on losses=: smooth the labels there.": (
            args.label_smoothing_factor != 0
        ),
        "gradient_accumulation_steps above 1 would mix the groups: use larger batches.": (
            args.gradient_accumulation_steps > 1
        ),
        "model_init makes a new model, and the groups belong to one model: pass model=.": (
            trainer.model_init is not None
        ),
        "torch_compile compiles the MultiTaskModel as a whole, and every group runs other "
        "heads: call model.compile() instead.": args.torch_compile and takes_group,
        "DeepSpeed takes its steps inside backward(), which GroupTrainer does not support.": (
            trainer.is_deepspeed_enabled
        ),
        "nn.DataParallel, which the Trainer uses for several GPUs in one process, does not "
        "support groups: start one process per GPU with torchrun or accelerate launch, or "
        "make one GPU visible.": args.n_gpu > 1,
    }
    for sentence, found in wrong.items():
        if found:
            raise ValueError(sentence)


class _MeanLosses:
    """The mean loss of each task over the samples of the batches that have its labels."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._sums: dict[str, Tensor] = {}
        self._samples = dict.fromkeys(tasks, 0)

    def add(self, losses: Mapping[str, Tensor], samples: int) -> None:
        """Take in the losses of a batch, each a mean over its samples."""
        for task, loss in losses.items():
            own = loss.detach().float() * samples
            self._sums[task] = own + self._sums[task] if task in self._sums else own
            self._samples[task] += samples

    def over_ranks(self, accelerator: Any) -> dict[str, float]:
        """The means over the batches of all ranks; every rank calls it."""
        found = torch.zeros(2, len(self._tasks), dtype=torch.float32, device=accelerator.device)
        for k, task in enumerate(self._tasks):
            found[0, k] = self._sums.get(task, 0.0)
            found[1, k] = self._samples[task]
        columns = zip(self._tasks, *accelerator.reduce(found).tolist(), strict=True)
        return {task: total / n for task, total, n in columns if n > 0}


class _CloseRecorder(_TrainerCallback):  # type: ignore[misc]
    """Closes the recorder at the end of the training."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_train_end(self, *_: object, **__: object) -> None:
        self._recorder.close()


def _has_labels(labels: Tensor) -> Tensor:
    """Whether there is a label, a bool scalar on the device of the labels."""
    labelled = ~labels.isnan() if labels.is_floating_point() else labels != -100
    return labelled.any()


def _batch_size(inputs: Inputs) -> int:
    """The length of the first column that is a tensor."""
    columns = (len(column) for column in inputs.values() if isinstance(column, Tensor))
    return next(columns, 1)


def _of_tasks(outputs: Any, needed: Iterable[str], tasks: tuple[str, ...]) -> Any:
    """Outputs by task without those of the tasks that are not needed; other outputs unchanged."""
    if type(outputs) is not dict:
        return outputs
    others = set(tasks).difference(needed)
    return {name: output for name, output in outputs.items() if name not in others}


def _total(losses: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The sum of the losses; zero if there are none."""
    if not losses:
        return torch.zeros((), dtype=torch.float32, device=device)
    return torch.stack([loss.detach().float() for loss in losses.values()]).sum()
