"""One model, one method, batch after batch: the loop that every run shares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils._pytree import tree_map

import taskgroup as tg
from taskgroup.lab.compare.credit import PublishedCredit
from taskgroup.lab.train.clock import Clock, LateCopy
from taskgroup.lab.train.problem import Problem
from taskgroup.lab.train.recipe import Recipe, make_problem

__all__ = ["MODEL_SECTIONS", "Progress", "Trainer", "find_device", "make_model", "task_names"]

#: What a user would pay for without taskgroup, of the parts of a batch that are timed.
MODEL_SECTIONS = ("forward", "loss", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known after a batch.

    Attributes:
        batch: batches done.
        batches: batches of the whole run.
        losses: of every task, before the first step of the batch.
        groups: as they were stepped on.
        partition: as it stands.
    """

    batch: int
    batches: int
    losses: dict[str, float]
    groups: list[tuple[str, ...]]
    partition: list[tuple[str, ...]]


class Trainer:
    """Trains a network by a recipe: selectively, or by a joint method.

    Weights, batches and the order of the groups come from the recipe's seed: two trainers of one
    seed and different methods start from the same weights and see the same batches.

    Args:
        recipe: the settings.

    Attributes:
        problem: the data set.
        tasks: those that are trained.
        model: the network.
        groups: the task groups; for a joint method all tasks are one.
        device: that it is trained on.
        batch: batches done.
        skipped: those without a step, for which the method found no weights.
        seconds: ``{section: seconds}``, so far; on a GPU but for the batch at hand, see
            :meth:`wait`.

    Raises:
        ValueError: if the recipe does not fit the data set, or there is no GPU as it wants one.
        ImportError: if the method or the data set needs what is not installed.
        RuntimeError: if the network does not fit in the GPU's memory.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problem: Problem = make_problem(recipe)
        self.tasks = task_names(recipe, self.problem)
        self.batch = 0
        self.skipped = 0
        self.device = find_device(recipe.device)
        self.seconds = dict.fromkeys(MODEL_SECTIONS, 0.0)
        self._clock = Clock(self.seconds, self.device)
        self._peak_bytes = 0  # before this object was made
        self._drawn = 0
        self._ahead: Any = None  # a batch of the stream that was looked at
        self._error_ahead: Exception | None = None  # raised while it was loaded
        self._stream = self.problem.batches(recipe.batch_size, recipe.seed)

        torch.manual_seed(recipe.seed)
        with self._memory_in_words():
            self.model = make_model(self.problem, self.tasks, self.device)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.groups = self._make_groups()
        self._method = self._make_method()
        head_lr = recipe.lr if recipe.head_lr is None else recipe.head_lr
        parameters = [
            {"params": list(self.model.encoder.parameters()), "lr": recipe.lr},
            {"params": list(self.model.heads.parameters()), "lr": head_lr},
        ]
        if self._method is not None and self._method.parameters():
            learned = {"params": self._method.parameters(), "lr": recipe.lr, "weight_decay": 0.0}
            parameters.append(learned)
        self.optimizer = torch.optim.Adam(
            parameters,
            weight_decay=recipe.weight_decay,
            fused=True,  # a third of the time of the default on a CPU
        )
        self.groups.attach(self.optimizer, self.model.heads, outside=recipe.outside)
        self.scheduler = PolynomialLR(self.optimizer, recipe.batches, recipe.poly_power)
        self.model.train()

    def _make_groups(self) -> tg.TaskGroups:
        recipe = self.recipe
        affinity: tg.Affinity = tg.ProximalAffinity(decay=recipe.decay)
        grouping = recipe.make_grouping() if self._steps_on_groups else tg.Together()
        if recipe.affinity == "gradient":
            affinity = tg.GradientAffinity(self.model.encoder, decay=recipe.decay)
        elif recipe.credit == "published" and grouping.reads_affinity:
            affinity = PublishedCredit(decay=recipe.decay)
        return tg.TaskGroups(
            self.tasks,
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
        if self._steps_on_groups:
            return None
        options: dict[str, Any] = {}
        if self.recipe.method == "dtp":
            options["score"] = self.problem.score
        elif self.recipe.method == "dwa":
            options["epoch"] = max(1, self.recipe.batches // _EPOCHS)
        method = tg.methods.find(self.recipe.method)
        return method(self.model.encoder, self.tasks, **options)

    def step(self) -> Progress:
        """Train on one batch.

        Raises:
            FloatingPointError: if a loss is not finite.
            RuntimeError: if the batch does not fit in the GPU's memory.
        """
        method = self._method
        with self._memory_in_words():
            batch = self._next()
            read, stepped = (
                self._step_on_groups(batch) if method is None else self._step_jointly(batch, method)
            )
            if self._on_gpu and self.batch + 1 < self.recipe.batches:
                self._load_ahead()  # the GPU has enough to do meanwhile
        losses = read()
        self._clock.read()
        self.scheduler.step()
        self.batch += 1
        return Progress(
            batch=self.batch,
            batches=self.recipe.batches,
            losses=losses,
            groups=stepped,
            partition=self.groups.partition,
        )

    def _next(self) -> Any:
        """The next batch of the stream, on the device."""
        batch, self._ahead = self.peek(), None
        self._drawn += 1
        return batch

    def _load_ahead(self) -> None:
        """Load the next batch; an error is raised when that batch is asked for."""
        try:
            self.peek()
        except Exception as error:  # this batch is trained on, and must be counted first
            self._error_ahead = error

    def peek(self) -> Any:
        """The batch to come, on the device."""
        if self._error_ahead is not None:
            error, self._error_ahead = self._error_ahead, None
            raise error
        if self._ahead is None:
            self._ahead = tree_map(self._send, next(self._stream))
        return self._ahead

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device, without waiting for it: from pinned memory where that is a GPU."""
        if self._on_gpu and not tensor.is_pinned():
            # Of the tensor's own numbers alone, where it is a part of a larger one.
            tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _losses(self, outputs: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """In float32: a bfloat16 has no digits to tell what one step changed."""
        return self.problem.losses({task: out.float() for task, out in outputs.items()}, batch)

    def _reading(self, losses: Mapping[str, Tensor]) -> Callable[[], dict[str, float]]:
        """What reads the losses as numbers, and raises where one is not finite.

        On a GPU they are on their way from now on: who reads them once the steps of the batch are
        launched waits for the forward pass alone, and the GPU goes on with what follows it.
        """
        tasks, values = tuple(losses), torch.stack([loss.detach() for loss in losses.values()])
        copy = LateCopy(values)

        def read() -> dict[str, float]:
            found = dict(zip(tasks, copy.wait().tolist(), strict=True))
            if lost := [task for task, value in found.items() if not math.isfinite(value)]:
                raise FloatingPointError(
                    f"The loss of {', '.join(lost)} is not finite after batch {self.batch}; take a "
                    "smaller learning rate."
                )
            return found

        return read

    def _step_on_groups(self, batch: Any) -> tuple[_Read, list[tuple[str, ...]]]:
        """The loop that the README shows, with a clock beside it."""
        inputs = self.problem.inputs(batch)
        clock = self._clock
        read: _Read | None = None
        stepped = []
        for group in self.groups:
            clock.start()
            with self._autocast():
                outputs = self.model(inputs, group=group)
            clock.lap("forward")
            losses = self._losses(outputs, batch)
            clock.lap("loss")
            self.optimizer.zero_grad()
            clock.lap("optimizer")
            loss = group.loss(losses)
            if read is None:
                read = self._reading({task: losses[task] for task in group.observed})
            clock.start()
            loss.backward()
            clock.lap("backward")
            with self._scaled_head_lr():
                self.optimizer.step()
            clock.lap("optimizer")
            stepped.append(group.tasks)
        assert read is not None
        return read, stepped

    def _step_jointly(
        self, batch: Any, method: tg.methods.JointMethod
    ) -> tuple[_Read, list[tuple[str, ...]]]:
        inputs = self.problem.inputs(batch)
        clock = self._clock
        clock.start()
        with self._autocast():
            outputs = self.model(inputs)
        clock.lap("forward")
        losses = self._losses(outputs, batch)
        clock.lap("loss")
        self.optimizer.zero_grad()
        clock.lap("optimizer")
        read = self._reading(losses)
        if not self._on_gpu:
            read()  # raises one error, where the methods have one each
        clock.start()
        try:
            method.backward(losses)
        except tg.methods.NoWeightsError:
            self.skipped += 1
            return read, []
        except Exception:
            read()  # the losses first
            raise
        clock.lap("backward")
        with self._scaled_head_lr():
            self.optimizer.step()
        clock.lap("optimizer")
        if method.observes_step:
            with torch.no_grad(), self._autocast():
                outputs = self.model(inputs)
            method.observe(self._losses(outputs, batch))
            clock.lap("forward")
        return read, [tuple(self.tasks)]

    @contextmanager
    def _scaled_head_lr(self) -> Iterator[None]:
        """The learning rate of the heads, times what the recipe says, for one step."""
        n_groups = len(self.groups.partition)
        times = {"1": 1, "sqrt(M)": math.sqrt(n_groups), "M": n_groups, "K": len(self.tasks)}
        heads = self.optimizer.param_groups[1]
        before = heads["lr"]  # which the scheduler goes on from
        heads["lr"] = before * times[self.recipe.head_lr_times]
        try:
            yield
        finally:
            heads["lr"] = before

    def conflicts(self) -> Tensor:
        """Cosines of the tasks' gradients on the encoder, ``[K, K]``, on the batch to come.

        Nothing of the training changes: it goes on as if nobody had looked.
        """
        batch = self.peek()
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self._on_gpu else []), self._autocast():
            outputs = self.model(self.problem.inputs(batch))
        losses = self._losses(outputs, batch)
        gradients = tg.task_gradients(losses, self.model.encoder.parameters())
        for buffer, before in buffers:  # running statistics
            buffer.copy_(before)
        return tg.conflicts(tg.task_gram(gradients))

    def affinity(self) -> Tensor:
        """The affinity that is learned, ``[K, K]``; NaN of an entry that was never observed."""
        affinity = self.groups.affinity
        return affinity.matrix.masked_fill(affinity.observed == 0, math.nan)

    def lookahead(self) -> Tensor:
        """The inter-task affinity by its definition, ``[K, K]``, on a fresh batch."""
        batch = self._next()
        inputs = self.problem.inputs(batch)
        return tg.lookahead_affinity(
            lambda: self._losses(self.model(inputs), batch),
            self.optimizer,
            self.model.encoder,
        )

    def evaluate(self, split: str, quick: bool = False) -> dict[str, float]:
        """``{task: metric}`` on a split of the data; ``quick`` may leave out what takes long."""
        with self._memory_in_words():
            return self.problem.evaluate(self.model, split, quick)

    def wait(self) -> None:
        """Wait until the GPU is done with all batches so far; ``seconds`` has them all then."""
        self._clock.read(wait=True)

    @property
    def peak_bytes(self) -> int | None:
        """Bytes of torch's allocator on the GPU at the peak, so far; None on the CPU."""
        if not self._on_gpu:
            return None
        return max(self._peak_bytes, torch.cuda.max_memory_allocated(self.device))

    @contextmanager
    def _memory_in_words(self) -> Iterator[None]:
        """Say which settings take less of the GPU's memory where it is not enough."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            recipe = self.recipe
            height, width = recipe.size
            raise RuntimeError(
                f"The memory of the GPU is not enough for {recipe.data} with batch_size: "
                f"{recipe.batch_size}, size: {height}x{width}, backbone: {recipe.backbone} and "
                f"precision: {recipe.precision}. Lower one of these, with --set "
                f"batch_size={max(1, recipe.batch_size // 2)} or --set precision=bfloat16 for "
                "instance; where several processes share the GPU, take fewer --jobs. Torch says: "
                f"{str(error).splitlines()[0][:200]}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs; it loads under ``weights_only=True``."""
        self.wait()
        return {
            "batch": self.batch,
            "skipped": self.skipped,
            "seconds": dict(self.seconds),
            "peak_bytes": self.peak_bytes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "groups": self.groups.state_dict(),
            "method": {} if self._method is None else self._method.state_dict(),
            "drawn": self._drawn,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self._on_gpu else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.groups.load_state_dict(state["groups"])
        if self._method is not None:
            self._method.load_state_dict(state["method"])
        self._drawn, self._ahead = state["drawn"], None
        recipe = self.recipe
        self._stream = self.problem.batches(recipe.batch_size, recipe.seed, self._drawn)
        torch.set_rng_state(state["torch"])
        if self._on_gpu and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        self.batch = state["batch"]
        self.skipped = state["skipped"]
        self.seconds = state["seconds"]
        self._clock = Clock(self.seconds, self.device)
        self._peak_bytes = state.get("peak_bytes") or 0


_Read = Callable[[], dict[str, float]]
_EPOCHS = 20  # that DWA divides a run into: batches are drawn at random, without epochs


def find_device(name: str) -> torch.device:
    """The device that a recipe names; ``"auto"`` is a GPU where torch sees one.

    Raises:
        ValueError: if there is no GPU where one is asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        reason = "nvidia-smi says whether the driver sees one"
        if torch.version.cuda is None:
            reason = "it was built without CUDA, pytorch.org says how to install one with it"
        raise ValueError(
            f"device: cuda needs a GPU, and this torch {torch.__version__} finds none ({reason}); "
            "to run on the CPU, take --set device=cpu."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def make_model(problem: Problem, tasks: Sequence[str], device: torch.device) -> tg.MultiTaskModel:
    """The network of a problem in float32 on a device, whatever torch's defaults are.

    Its weights are drawn on the CPU, so that they are the same for every device.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return problem.model(tasks).to(device)
    finally:
        torch.set_default_dtype(dtype)


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
