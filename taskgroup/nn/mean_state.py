"""The mean of what an optimizer keeps for one parameter in several states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskgroup._arguments import listed

__all__ = ["Entry", "check_entry", "mean_entry"]

Entry = dict[str, Any]  # what an optimizer keeps for one parameter, as in optimizer.state

# The running means of Adam and of those like it, each with the place of its beta in "betas".
_BETAS = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
_KNOWN = {*_BETAS, "momentum_buffer", "step"}


def check_entry(entry: Mapping[str, Any], optimizer: str) -> None:
    """Raise if the entry has parts that :func:`mean_entry` cannot average."""
    wrong = None
    if unknown := sorted(map(str, set(entry) - _KNOWN)):
        wrong = f"keeps {listed(unknown)} for each parameter"
    elif "exp_avg_sq" in entry and "step" not in entry:
        wrong = "does not count the steps of each parameter"
    if wrong is not None:
        raise ValueError(
            f"{optimizer} {wrong}, so shared_state='group' of attach() cannot average its state "
            "over the tasks of a new group: take Adam, AdamW or SGD, or leave shared_state='all'."
        )


def mean_entry(entries: Sequence[tuple[Entry, int]], betas: Sequence[Any] | None) -> Entry:
    """The mean of entries, each with the number of times that it counts; in new tensors.

    Adam's moments after t steps from zero are 1 - beta^t times an estimate without bias. The
    estimates are averaged, not the moments. The mean has the mean number of steps, and is
    multiplied by its 1 - beta^t, which Adam divides it by. If all entries have as many steps, as
    after whole rounds of groups, this is the plain mean of the moments; if not, the plain mean
    would be biased. An entry of no steps is no estimate, and does not count: the first step of a
    parameter may have been skipped by a GradScaler.

    Args:
        entries: what the optimizer keeps for the parameter in each state; at least one.
        betas: those of the optimizer; None if it has none.
    """
    if len(entries) == 1:
        return {name: _copy(value) for name, value in entries[0][0].items()}
    # Numbers of steps on a GPU stay there: reading them would wait for it.
    steps = [_number(entry.get("step", 1)) for entry, _ in entries]
    weights = [count * (t > 0) for (_, count), t in zip(entries, steps, strict=True)]
    step = sum(w * t for w, t in zip(weights, steps, strict=True)) / _at_least_one(sum(weights))
    mean: Entry = {}
    for name in dict.fromkeys(name for entry, _ in entries for name in entry):
        parts = [(i, entry[name]) for i, (entry, _) in enumerate(entries) if name in entry]
        if name == "step":
            mean[name] = _like(step, parts[0][1])
            continue
        parts = [(i, part) for i, part in parts if part is not None]  # as before a first momentum
        total = _at_least_one(sum(weights[i] for i, _ in parts))
        for i, part in parts:
            weight = weights[i] / total
            if name in _BETAS and betas is not None:
                beta = betas[_BETAS[name]]
                bias = 1 - beta ** steps[i]
                weight = weight * (1 - beta**step) / (bias + (bias == 0))
            share = part * weight
            mean[name] = mean[name].add_(share) if name in mean else share
    return mean


def _number(step: Any) -> Any:
    """A number of steps: a number, or a tensor if it is on a GPU."""
    return step.item() if isinstance(step, Tensor) and step.device.type == "cpu" else step


def _at_least_one(total: Any) -> Any:
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def _like(step: Any, other: Any) -> Any:
    """The number of steps as a tensor like another, or as an integer if that is one."""
    if not isinstance(other, Tensor):
        return type(other)(round(step))
    return step.to(other) if isinstance(step, Tensor) else torch.full_like(other, step)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
