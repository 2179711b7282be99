"""The loop that every run shares: it trains one network by one method, batch after batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import PolynomialLR

import taskgroup as tg
from taskgroup.lab.problem import Batch, Problem, make_problem, measure
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.train.batches import Batches
from taskgroup.lab.train.credit import PublishedCredit
from taskgroup.lab.train.network import find_parts, in_float32, run_network
from taskgroup.lab.words import kind_of

__all__ = ["Progress", "Trainer", "find_device", "make_model", "task_names"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known after a batch.

    Attributes:
        batch: batches done.
        batches: batches of the whole run.
        losses: ``{task: loss}`` before the first step of the batch.
        groups: the groups of the batch, in the order of their steps.
        partition: the current partition.
    """

    batch: int
    batches: int
    losses: dict[str, float]
    groups: list[tuple[str, ...]]
    partition: list[tuple[str, ...]]


class Trainer:
    """Trains a network by a recipe: selectively, or by a joint method.

    Weights, batches and the order of the groups follow from the recipe's seed: two trainers with
    the same seed and different methods start from the same weights and see the same batches.

    Args:
        recipe: the settings.

    Attributes:
        problem: the data set.
        tasks: the tasks that are trained, in the order of the data set.
        model: the network.
        parts: its parameters: those of each task alone, and the shared ones.
        batches: the training data, batch after batch.
        groups: the task groups; a joint method has all tasks in one group.
        method: the joint method; None for those that step on the groups.
        weights: the method that weighs the losses inside the groups; None sums them.
        device: where the network is trained.
        batch: batches done.
        skipped: batches without a step, since the method found no weights.

    Raises:
        ValueError: if the recipe does not fit the data set, or asks for a GPU and there is none.
        ImportError: if the method or the data set needs a library that is not installed.
        RuntimeError: if the network does not fit in the GPU's memory.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problem: Problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        self.batch = 0
        self.skipped = 0
        self.device = find_device(recipe.device)
        self._peak_bytes = 0  # before this object was made
        self.batches = Batches(self.problem, recipe, self.device)

        torch.manual_seed(recipe.seed)
        with _memory_in_words(recipe):
            self.model = make_model(self.problem, self.tasks, self.device)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.parts = find_parts(self.problem, self.model, self.tasks)
        self.weights = self._make_weights()
        self.groups = self._make_groups()
        self.method = self._make_method()
        head_lr = recipe.lr if recipe.head_lr is None else recipe.head_lr
        parameters = [
            {"params": self.parts.shared, "lr": recipe.lr},
            {"params": self.parts.alone, "lr": head_lr},
        ]
        for learner in (self.method, self.weights):
            if learner is not None and learner.parameters():
                learned = {"params": learner.parameters(), "lr": recipe.lr, "weight_decay": 0.0}
                parameters.append(learned)
        self.optimizer = torch.optim.Adam(
            parameters,
            weight_decay=recipe.weight_decay,
            fused=True,  # on a CPU it takes a third of the default's time
        )
        self.groups.attach(
            self.optimizer,
            self.parts.heads,
            outside=recipe.outside,
            shared_state=recipe.shared_state,
        )
        self.scheduler = PolynomialLR(self.optimizer, recipe.batches, recipe.poly_power)
        self.model.train()

    def _make_groups(self) -> tg.TaskGroups:
        recipe = self.recipe
        affinity: tg.Affinity = tg.ProximalAffinity(decay=recipe.decay)
        grouping = recipe.make_grouping() if self._steps_on_groups else tg.Together()
        if recipe.affinity == "gradient":
            affinity = tg.GradientAffinity(self.parts.shared, decay=recipe.decay)
        elif recipe.credit == "published" and grouping.reads_affinity:
            affinity = PublishedCredit(decay=recipe.decay)
        return tg.TaskGroups(
            self.tasks,
            weights=self.weights,
            affinity=affinity,
            grouping=grouping,
            warmup=recipe.warmup,
            regroup_every=recipe.regroup_every,
            groups_per_batch=recipe.groups_per_batch,
            observe_every=recipe.observe_every,
            seed=recipe.seed,
        )

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def _steps_on_groups(self) -> bool:
        return self.recipe.method in ("selective", "joint")

    def _make_method(self) -> tg.methods.JointMethod | None:
        return None if self._steps_on_groups else self._made(self.recipe.method)

    def _make_weights(self) -> tg.methods.WeighingMethod | None:
        if self.recipe.group_weights is None:
            return None
        method = self._made(self.recipe.group_weights)
        assert isinstance(method, tg.methods.WeighingMethod)  # the recipe has checked it
        return method

    def _made(self, name: str) -> tg.methods.JointMethod:
        """The method of this name, with the options that it needs."""
        options: dict[str, Any] = {}
        if name == "dtp":
            options["score"] = self.problem.score
        elif name == "dwa":
            options["epoch"] = max(1, self.recipe.batches // _EPOCHS)
        elif name == "rlw":
            options["seed"] = self.recipe.seed
        return tg.methods.find(name)(self.parts.shared, self.tasks, **options)

    def step(self) -> Progress:
        """Train on one batch.

        Raises:
            FloatingPointError: if a loss is not finite.
            RuntimeError: if the batch does not fit in the GPU's memory.
        """
        with _memory_in_words(self.recipe):
            batch = next(self.batches)
            if self.method is None:
                copy, stepped = self._step_on_groups(batch)
            else:
                copy, stepped = self._step_jointly(batch, self.method)
            if self._on_gpu and self.batch + 1 < self.recipe.batches:
                self.batches.load_ahead()  # while the GPU works on this one
        losses = self._read(copy)
        self.scheduler.step()
        self.batch += 1
        return Progress(
            batch=self.batch,
            batches=self.recipe.batches,
            losses=losses,
            groups=stepped,
            partition=self.groups.partition,
        )

    def outputs(self, batch: Batch, group: tg.Group | None = None) -> dict[str, Any]:
        """``{task: output}`` of the network, in the recipe's precision."""
        enabled = self.recipe.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            return run_network(self.model, self.problem.inputs(batch), self.tasks, group)

    def losses(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        """``{task: loss}`` in float32: a bfloat16 has too few digits for what one step changes."""
        outputs = {task: in_float32(output) for task, output in outputs.items()}
        return self.problem.losses(outputs, batch)

    def _forward(self, batch: Batch, group: tg.Group | None = None) -> dict[str, Tensor]:
        """The losses of a batch, with the gradients set to zero."""
        losses = self.losses(self.outputs(batch, group), batch)
        self.optimizer.zero_grad()
        return losses

    def _read(self, copy: _LossCopy) -> dict[str, float]:
        """The losses as numbers; raises if one is not finite."""
        tasks, values = copy
        losses = dict(zip(tasks, values.wait()[0].tolist(), strict=True))
        if lost := [task for task, value in losses.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"The loss of {', '.join(lost)} is not finite after batch {self.batch}; take a "
                "smaller learning rate."
            )
        return losses

    def _step_on_groups(self, batch: Batch) -> tuple[_LossCopy, list[tuple[str, ...]]]:
        """The loop of the README."""
        copy: _LossCopy | None = None
        stepped = []
        for group in self.groups:
            losses = self._forward(batch, group)
            loss = group.loss(losses)
            copy = copy or _copy_losses(losses)
            loss.backward()
            self._step_optimizer()
            stepped.append(group.tasks)
        assert copy is not None
        return copy, stepped

    def _step_jointly(
        self, batch: Batch, method: tg.methods.JointMethod
    ) -> tuple[_LossCopy, list[tuple[str, ...]]]:
        losses = self._forward(batch)
        copy = _copy_losses(losses)
        if not self._on_gpu:
            self._read(copy)  # raises the same error for all methods, before their own
        try:
            method.backward(losses)
        except tg.methods.NoWeightsError:
            self.skipped += 1
            return copy, []
        except Exception:
            self._read(copy)  # losses that are not finite are the reason, if there are any
            raise
        self._step_optimizer()
        if method.observes_step:
            with torch.no_grad():
                method.observe(self.losses(self.outputs(batch), batch))
        return copy, [tuple(self.tasks)]

    def _step_optimizer(self) -> None:
        """A step with the heads' learning rate times what the recipe says."""
        n_groups = len(self.groups.partition)
        times = {"1": 1, "sqrt(M)": math.sqrt(n_groups), "M": n_groups, "K": len(self.tasks)}
        heads = self.optimizer.param_groups[1]
        scheduled = heads["lr"]  # which the scheduler goes on from
        heads["lr"] = scheduled * times[self.recipe.head_lr_times]
        try:
            self.optimizer.step()
        finally:
            heads["lr"] = scheduled

    @contextmanager
    def losses_ahead(self) -> Iterator[dict[str, Tensor]]:
        """The losses of the next batch, with a graph, in a block that does not train.

        The training is not changed: neither its batches nor its random state.
        """
        batch = self.batches.peek()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self._on_gpu else []):
            outputs = self.outputs(batch)
        losses = self.losses(outputs, batch)
        try:
            yield losses
        finally:
            with torch.no_grad():
                for buffer, before in buffers:  # running statistics
                    buffer.copy_(before)

    def affinity(self) -> Tensor:
        """The affinity learned so far, ``[K, K]``; entries that were never observed are NaN."""
        affinity = self.groups.affinity
        return affinity.matrix.masked_fill(affinity.observed == 0, math.nan)

    def lookahead(self) -> Tensor:
        """The inter-task affinity by its definition, ``[K, K]``, on a new batch."""
        batch = next(self.batches)
        return tg.lookahead_affinity(
            lambda: self.losses(self.outputs(batch), batch), self.optimizer, self.parts.shared
        )

    def evaluate(self, split: str, quick: bool = False) -> dict[str, float]:
        """``{task: metric}`` on a split of the data; ``quick`` may leave out slow metrics."""
        with _memory_in_words(self.recipe):
            return measure(self.problem, self.model, self.tasks, split, quick)

    @property
    def peak_bytes(self) -> int | None:
        """Peak bytes of torch's allocator on the GPU so far; None on the CPU."""
        if not self._on_gpu:
            return None
        return max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact resume needs; it loads under ``weights_only=True``."""
        return {
            "batch": self.batch,
            "skipped": self.skipped,
            "peak_bytes": self.peak_bytes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "groups": self.groups.state_dict(),
            "method": {} if self.method is None else self.method.state_dict(),
            "drawn": self.batches.drawn,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self._on_gpu else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, to train on exactly from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.groups.load_state_dict(state["groups"])
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.batches = Batches(self.problem, self.recipe, self.device, state["drawn"])
        torch.set_rng_state(state["torch"])
        if self._on_gpu and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.batch = state["batch"]
        self.skipped = state["skipped"]
        self._peak_bytes = state.get("peak_bytes") or 0


_LossCopy = tuple[
    tuple[str, ...], tg.recording.HostTensors
]  # tasks, and their losses on the way to the host
_EPOCHS = 20  # epochs of DWA in a run: batches are drawn at random, and have none of their own


def _copy_losses(losses: Mapping[str, Tensor]) -> _LossCopy:
    """Send the losses to the host.

    On a GPU they are read once the steps of the batch are launched. Reading them then waits for the
    forward pass alone, and the GPU goes on with what follows it.
    """
    stacked = torch.stack([loss.detach() for loss in losses.values()])
    return tuple(losses), tg.recording.HostTensors([stacked])


@contextmanager
def _memory_in_words(recipe: Recipe) -> Iterator[None]:
    """If the GPU's memory is not enough, say which settings take less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        height, width = recipe.size
        raise RuntimeError(
            f"The memory of the GPU is not enough for {recipe.data} with batch_size: "
            f"{recipe.batch_size}, size: {height}x{width}, backbone: {recipe.backbone} and "
            f"precision: {recipe.precision}. Lower one of these, with --set "
            f"batch_size={max(1, recipe.batch_size // 2)} or --set precision=bfloat16 for "
            "instance; where several processes share the GPU, take fewer --jobs. Torch says: "
            f"{str(error).splitlines()[0][:200]}"
        ) from error


def find_device(name: str) -> torch.device:
    """The device that a recipe names; ``"auto"`` is a GPU if torch finds one.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        reason = "nvidia-smi says whether the driver sees one"
        if torch.version.cuda is None:
            reason = "it was built without CUDA; pytorch.org says how to install one with CUDA"
        raise ValueError(
            f"device: cuda needs a GPU, and this torch {torch.__version__} finds none ({reason}); "
            "to run on the CPU, give --set device=cpu."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_model(problem: Problem, tasks: Sequence[str], device: torch.device) -> nn.Module:
    """A problem's network in float32 on a device, whatever torch's default dtype and device are.

    Its weights are drawn on the CPU, so they are the same for every device.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            model = problem.model(tasks)
    finally:
        torch.set_default_dtype(dtype)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model() of {type(problem).__name__} must return a torch.nn.Module, got "
            f"{kind_of(model)}."
        )
    return model.to(device)


def task_names(recipe: Recipe, problem: Problem) -> list[str]:
    """The tasks that a recipe trains, in the order of the data set.

    Raises:
        ValueError: if the data set has no such task.
    """
    if recipe.tasks is None:
        return list(problem.titles)
    if unknown := [task for task in recipe.tasks if task not in problem.titles]:
        raise ValueError(
            f"{recipe.data} has no task {', '.join(map(repr, unknown))}; its tasks are "
            f"{', '.join(problem.titles)}."
        )
    return [task for task in problem.titles if task in recipe.tasks]
