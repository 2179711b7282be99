"""The parser of losses: ``{task: scalar}``, or one tensor in the order of the tasks.

Every error is a sentence that names the task. No check reads a loss, so none waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from taskgroup._arguments import described, listed

__all__ = ["Losses", "check_graph", "check_losses", "check_one_device", "losses_by_task"]

Losses: TypeAlias = Mapping[str, Tensor] | Tensor  # {task: scalar}, or one tensor [K] in task order

_ATTACH = "compute it with gradients on, from outputs that are not detached"


def losses_by_task(
    losses: Mapping[Any, Tensor] | Tensor,
    tasks: Sequence[str] | None = None,
    *,
    what: str = "Losses",
) -> dict[Any, Tensor]:
    """The losses of all tasks one by one, in task order.

    Args:
        losses: ``{task: scalar}`` or one tensor ``[K]``.
        tasks: the K task names; None takes the names from the mapping, or the positions 0 to K-1.
        what: the first words of an error about ``losses`` as a whole.

    Raises:
        ValueError: if a task is unknown or missing, or a loss is not a floating-point scalar.
        TypeError: if ``losses`` is neither a mapping nor a tensor.

    Example:
        >>> import torch
        >>> losses_by_task({"b": torch.tensor(2.0), "a": torch.tensor(1.0)}, ["a", "b"])
        {'a': tensor(1.), 'b': tensor(2.)}
        >>> losses_by_task(torch.tensor([1.0, 2.0]))
        {0: tensor(1.), 1: tensor(2.)}
    """
    check_losses(losses, tasks, what=what)
    if isinstance(losses, Tensor):
        return dict(zip(tasks or range(len(losses)), losses.unbind(), strict=True))
    return {task: losses[task] for task in tasks or losses}


def check_losses(
    losses: object,
    tasks: Sequence[str] | None,
    needed: Sequence[str] | None = None,
    *,
    what: str = "Losses",
    names: str = "tasks",
) -> None:
    """Raise the errors of :func:`losses_by_task`.

    Args:
        losses: ``{task: scalar}``, or one tensor: of all tasks, or of those in ``needed``.
        tasks: the K task names; None if they are not known beforehand.
        needed: the tasks that must have a loss; None for all of them.
        what: the first words of an error about ``losses`` as a whole.
        names: what the user's code calls ``needed``.
    """
    needed = needed or tasks
    if isinstance(losses, Mapping):
        if tasks is not None and needed is not None:
            known = frozenset(tasks)
            if unknown := [task for task in losses if task not in known]:
                raise ValueError(
                    f"Unknown task {unknown[0]!r} among the losses; the tasks are {listed(tasks)}. "
                    f"Leave it out: {{t: losses[t] for t in {names}}}."
                )
            if missing := [task for task in needed if losses.get(task) is None]:
                raise ValueError(
                    f"The loss of task {missing[0]!r} is missing; pass the losses of all tasks in "
                    f"{names}, {listed(needed)}."
                )
        for task in needed or losses:
            _check_scalar(task, losses[task])
    elif not (
        isinstance(losses, Tensor)
        and losses.is_floating_point()
        and losses.dim() == 1
        and (tasks is None or len(losses) in (len(tasks), len(needed or tasks)))
    ):
        size, order = ("K", "") if tasks is None else (len(tasks), f" in the order {listed(tasks)}")
        few = f", or [{len(needed)}], those of {names}" if needed and needed != tasks else ""
        raise (ValueError if isinstance(losses, Tensor) else TypeError)(
            f"{what} must be {{task: scalar}} or one floating-point tensor [{size}], one per task"
            f"{order}{few}; got {described(losses)}."
        )
    if len(losses) == 0:
        raise ValueError(f"{what} must hold the loss of at least one task, got none.")


def _check_scalar(task: object, loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        cure = "reduce it, with .mean() for instance"
        if isinstance(loss, int | float):
            cure = "pass the tensor itself, without .item() or float()"
        raise ValueError(
            f"The loss of task {task!r} must be a floating-point scalar tensor, got "
            f"{described(loss)}; {cure}."
        )


def check_one_device(losses: Mapping[Any, Tensor]) -> None:
    """Raise ValueError if the scalars in ``{task: scalar}`` are on several devices."""
    first, *others = losses
    for task in others:
        if losses[task].device != losses[first].device:
            raise ValueError(
                f"The loss of task {task!r} is on {losses[task].device}, that of {first!r} on "
                f"{losses[first].device}; move them to one device."
            )


def check_graph(
    losses: Mapping[Any, Tensor], so: str = "it has no gradient", cure: str = _ATTACH
) -> None:
    """Raise ValueError if a scalar in ``{task: scalar}`` has no graph.

    The error says what cannot be done ``so``, and the ``cure``.
    """
    for task, loss in losses.items():
        if not loss.requires_grad:
            raise ValueError(f"The loss of task {task!r} has no graph, so {so}; {cure}.")
