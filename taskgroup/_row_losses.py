"""The parser of the losses of a batch where every row belongs to one task."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from taskgroup._arguments import described, listed

__all__ = ["check_row_losses", "check_row_tasks", "means_of_rows"]


def check_row_losses(losses: object, task_of_row: object) -> tuple[Tensor, Tensor]:
    """Check the losses of rows and the tasks of the rows.

    Args:
        losses: floating-point ``[N]``, with a graph.
        task_of_row: integers ``[N]``, the position of the task of each row; -1 does not count.

    Returns:
        The losses, and the tasks in int64 on the host.

    Raises:
        ValueError: if an argument has another shape or dtype, or the losses have no graph.
        TypeError: if ``losses`` is not a tensor.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"losses takes a tensor [N], one loss for each row, got {described(losses)}."
        )
    if losses.dim() != 1 or not losses.is_floating_point() or len(losses) == 0:
        raise ValueError(
            f"losses must be a floating-point tensor [N], one loss for each row, got "
            f"{described(losses)}: reduce the losses over everything but the rows."
        )
    if not losses.requires_grad:
        raise ValueError(
            "losses has no graph, so it has no gradient: compute it outside of torch.no_grad(), "
            "and without .detach()."
        )
    if (
        not isinstance(task_of_row, Tensor)
        or task_of_row.shape != losses.shape
        or task_of_row.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ):
        raise ValueError(
            f"The tasks of the rows must be integers [{len(losses)}], one for each loss, got "
            f"{described(task_of_row)}."
        )
    return losses, task_of_row.detach().cpu().long()


def check_row_tasks(tasks: Tensor, n_tasks: int) -> Tensor:
    """Return the tasks of the rows, or raise a ``ValueError`` if one is out of range."""
    least, most = int(tasks.min()), int(tasks.max())
    if least < -1 or most >= n_tasks:
        raise ValueError(
            f"A row is of task {least if least < -1 else most}, but tasks are numbered from 0 to "
            f"{n_tasks - 1}, and -1 is a row that does not count."
        )
    return tasks


def means_of_rows(
    losses: object,
    task_of_row: Tensor,
    tasks: Sequence[str],
    wanted: Sequence[int] | None = None,
    absent: Collection[int] = (),
) -> dict[str, Tensor]:
    """``{task: loss}``: the mean loss of the rows of each task, with a graph.

    Args:
        losses: as for :func:`check_row_losses`.
        task_of_row: as for :func:`check_row_losses`.
        tasks: the K names.
        wanted: the positions of the tasks to return; None is all.
        absent: those that may have no row, because they have some on another rank; their loss is a
            zero with a graph.

    Raises:
        ValueError: if an argument has another shape or value, or a wanted task has no row.
        TypeError: if ``losses`` is not a tensor.
    """
    losses, host = check_row_losses(losses, task_of_row)
    counts = torch.bincount(check_row_tasks(host, len(tasks)) + 1, minlength=len(tasks) + 1)[1:]
    wanted = range(len(tasks)) if wanted is None else wanted
    if missing := [tasks[k] for k in wanted if not counts[k] and k not in absent]:
        raise ValueError(
            f"The batch has no row of {listed(missing)}: draw rows of every task, or in a loop "
            "over groups, say which tasks have rows, with groups.batch(present)."
        )
    # A row that does not count is added to a place of its own, since 0 times NaN is NaN.
    index = torch.where(host < 0, len(tasks), host).to(losses.device)
    losses = losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
    sums = losses.new_zeros(len(tasks) + 1).index_add(0, index, losses)
    return {tasks[k]: sums[k] / max(1, int(counts[k])) for k in wanted}
