"""What must be true of a problem, checked on one batch before hours are spent on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import taskgroup as tg
from taskgroup.lab.problem import Batch, Problem
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.train.trainer import Trainer
from taskgroup.lab.user_code import in_words
from taskgroup.lab.words import kind_of, listed

__all__ = ["rehearse", "rehearse_step"]


def rehearse(recipe: Recipe, relative: bool = False) -> Literal["cpu", "cuda"]:
    """Check a problem on one batch: its batches, network, losses, gradients and metrics.

    Batch 1 of the stream must also be the first of a stream that begins there. Every task must have
    a finite scalar loss with a gradient on shared parameters, and one task alone must have a loss
    too. Every split must have a finite metric of every task. All of this runs in this process, and
    takes a forward and K backward passes and a quick evaluation of every split. It runs on the CPU,
    because the memory of a GPU is for the processes that train; a problem that fails there is tried
    on a GPU, if the recipe asks for one.

    Args:
        recipe: the settings.
        relative: also raise for a negative metric, of which no relative gain can be computed.

    Returns:
        The device on which the problem works.

    Raises:
        ValueError: if something is not true. The sentence names the method of the problem and the
            task, and says what to do.
        ImportError: if the problem needs a library that is not installed.
    """
    try:
        _rehearse(recipe.replace(device="cpu", workers=0), relative)
    except ValueError as error:
        if recipe.device == "cpu" or error.__cause__ is None:  # no error of the user's code
            raise
        if not torch.cuda.is_available():
            raise ValueError(
                f"{error} This was tried on the CPU, because this machine has no GPU."
            ) from error
    else:
        return "cpu"
    try:
        _rehearse(recipe.replace(device="cuda", workers=0), relative)
    finally:
        torch.cuda.empty_cache()
    return "cuda"


def _rehearse(recipe: Recipe, relative: bool) -> None:
    trainer = in_words(f"{recipe.data} cannot be set up", lambda: Trainer(recipe))
    _check_batches(trainer)
    _check_losses(trainer)
    for split in trainer.problem.splits:
        _check_metrics(trainer, split, relative)
    if len(trainer.tasks) > 1:
        task = trainer.tasks[0]
        alone = recipe.replace(tasks=(task,), method="gd")
        what = f"{recipe.data} cannot be set up for the task {task!r} alone"
        _check_losses(in_words(what, lambda: Trainer(alone)))


def rehearse_step(trainer: Trainer, title: str) -> None:
    """Train on one batch by the method of a trainer.

    Raises:
        ValueError: if that fails; the sentence names the method.
    """
    in_words(f"{title} fails on the first batch of {trainer.recipe.data}", trainer.step)


def _check_batches(trainer: Trainer) -> None:
    recipe = trainer.recipe
    what = f"batches() of {recipe.data}"
    stream = in_words(f"{what} fails", lambda: _stream(trainer, 0))
    if not isinstance(stream, Iterator):
        raise ValueError(
            f"{what} must return an iterator, got {kind_of(stream)}; write it as a generator, "
            "which yields batch after batch without an end."
        )
    two = in_words(f"{what} fails", lambda: [*islice(stream, 2)])
    if len(two) < 2:
        raise ValueError(
            f"{what} ends after {len(two)} of its batches, and training needs an endless stream. "
            "Begin again after the last batch, in a new order; or define loader(batch_size) "
            "instead, which is repeated for you."
        )
    if elsewhere := {t.device.type for t in _tensors(two[0])} - {"cpu"}:
        raise ValueError(
            f"{what} gives tensors on {', '.join(sorted(elsewhere))}. Give them on the CPU; "
            "training sends them to its device."
        )
    again = in_words(f"{what} fails", lambda: next(_stream(trainer, 1)))
    if not _equal(two[1], again):
        arguments = f"{recipe.batch_size}, seed={recipe.seed}"
        raise ValueError(
            f"{what} is not reproducible: batch 1 of batches({arguments}) differs from the first "
            f"batch of batches({arguments}, start=1). Batch n must depend on the seed and n alone, "
            "so that a run can be resumed: draw it with numpy.random.default_rng((seed, n)); or "
            "define loader(batch_size) instead, which is seeded for you."
        )


def _stream(trainer: Trainer, start: int) -> Iterator[Batch]:
    recipe = trainer.recipe
    return trainer.problem.batches(recipe.batch_size, recipe.seed, start)


def _check_losses(trainer: Trainer) -> None:
    """Check outputs, losses and gradients on the first batch of a trainer."""
    problem, tasks, name = trainer.problem, trainer.tasks, trainer.recipe.data
    of = f"of {name}" if len(tasks) > 1 else f"of {name}, trained on {tasks[0]!r} alone,"
    batch = trainer.batches.peek()
    in_words(f"inputs() {of} fails", lambda: problem.inputs(batch))
    outputs = in_words(
        f"The network {of} fails, called with the result of inputs()",
        lambda: trainer.outputs(batch),
    )
    if missing := [task for task in tasks if task not in outputs]:
        raise ValueError(
            f"The network {of} gives no output for {listed(missing)}; it must return {{task: "
            "output} for the tasks that model(tasks) is called with."
        )
    losses = in_words(f"losses() {of} fails", lambda: trainer.losses(outputs, batch))
    if not isinstance(losses, Mapping):
        raise ValueError(f"losses() {of} must return {{task: loss}}, got {kind_of(losses)}.")
    if differing := sorted(set(losses) ^ set(tasks)):
        raise ValueError(
            f"losses() {of} must return a loss for each task of the outputs, {listed(tasks)}, and "
            f"no other; {listed(differing)} differ. Loop over the tasks in outputs."
        )
    for task, loss in losses.items():
        _check_loss(f"The loss of {task!r} from losses() {of}", task, loss)
    gradients = tg.task_gradients(losses, trainer.parts.shared)
    for task, found in zip(losses, gradients, strict=True):
        if all(gradient is None for gradient in found):
            raise ValueError(
                f"The loss of {task!r} from losses() {of} does not depend on the shared "
                "parameters, those outside heads. Compute it from features that are not detached; "
                "leave the task out if it shares nothing."
            )


def _check_loss(whose: str, task: str, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.ndim:
        cure = "; take its mean" if isinstance(loss, Tensor) else ""
        raise ValueError(f"{whose} must be a scalar tensor, got {kind_of(loss)}{cure}.")
    if not math.isfinite(loss.item()):
        raise ValueError(
            f"{whose} is {loss.item()} on the first batch; look for empty masks, the logarithm of "
            "zero, and inputs or labels that are not finite."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{whose} has no graph; compute it from outputs[{task!r}] in torch, without detach(), "
            "item() or numpy()."
        )


def _check_metrics(trainer: Trainer, split: str, relative: bool) -> None:
    problem, name = trainer.problem, trainer.recipe.data
    what = f"evaluate(model, {split!r}) of {name}"
    found = in_words(f"{what} fails", lambda: trainer.evaluate(split, quick=True))
    missing = [task for task in trainer.tasks if task not in found]
    if missing and type(problem).evaluate_quickly is Problem.evaluate_quickly:
        raise ValueError(
            f"{what} returns no metric of {listed(missing)}; it must return {{task: metric}} for "
            "all tasks that the model is trained on."
        )
    for task, value in found.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{what} returns {value} for {task!r} before training; return a finite number."
            )
        if relative and value < 0:
            raise ValueError(
                f"{what} returns {value:.4g} for {task!r}, and a comparison needs metrics that "
                "are never negative, since Δm divides by them; return an error or an accuracy, for "
                "example 1 - R² in place of R²."
            )


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor)]


def _leaves(batch: Batch) -> list[Any]:
    """The leaves of a batch, and of mappings in it that torch does not know."""
    leaves = tree_flatten(batch)[0]
    return [
        inner
        for leaf in leaves
        for inner in (_leaves(dict(leaf)) if isinstance(leaf, Mapping) else [leaf])
    ]


def _equal(one: Batch, other: Batch) -> bool:
    ones, others = _leaves(one), _leaves(other)
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor | np.ndarray):
        if type(one) is not type(other) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        a, b = (torch.as_tensor(x).detach() for x in (one, other))
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # NaN too
    return bool(type(one) is type(other) and one == other)
