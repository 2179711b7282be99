"""Checks of what a user gives to TaskGroups; each raises an error that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor

from taskgroup._arguments import described, listed
from taskgroup.loop.rounds import Members

__all__ = ["check_part", "check_share", "check_state", "checked_present", "checked_tasks"]


def checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The task names as plain strings."""
    if isinstance(tasks, str):
        split = [name.strip() for name in tasks.split(",")]
        raise TypeError(f"tasks takes a list of names, got the string {tasks!r}; write {split}.")
    if isinstance(tasks, Set) or not isinstance(tasks, Iterable):
        raise TypeError(
            f"tasks takes a list of names, whose order is that of stacked losses; got {tasks!r}."
        )
    names = tuple(tasks)
    if not names:
        raise ValueError("tasks is empty; name at least one.")
    for k, task in enumerate(names):
        if not isinstance(task, str) or not task:
            raise ValueError(f"Task {k} must be a non-empty string, got {task!r}.")
    if len(set(names)) < len(names):
        twice = next(task for task in names if names.count(task) > 1)
        raise ValueError(f"Task {twice!r} is named twice; give every task a name of its own.")
    # Strings of a subclass, such as NumPy's, would not load under weights_only=True.
    return tuple(str.__str__(task) for task in names)


def check_part(name: str, part: object, fits: bool, examples: str) -> None:
    """Raise unless the affinity or grouping fits."""
    if isinstance(part, type):
        raise TypeError(
            f"{name} takes an object, got the class {part.__name__}; call it, as in {examples}."
        )
    if isinstance(part, str) and (meant := _meant(name, part)):
        raise TypeError(
            f"{name} takes an object such as {examples}; got the string {part!r}. Write "
            f"{name}={meant}."
        )
    if not fits:
        raise TypeError(f"{name} takes an object such as {examples}; got {part!r}.")


_SHORTEST = 3  # letters that tell what is meant
_PARTS = {
    "affinity": ("tg.ProximalAffinity()", "tg.GradientAffinity(model.encoder)"),
    "grouping": (
        *("tg.AffinityPropagation()", "tg.GraphColoring()", "tg.Exhaustive(m)", "tg.KMeans(m)"),
        *("tg.Spectral(m)", "tg.Together()", "tg.Singletons()", "tg.Fixed(partition)"),
        *("tg.RandomGroups(m)", "tg.Heterogeneous()"),
    ),
}


def _meant(name: str, text: str) -> str | None:
    """The object that a string such as ``"graph-coloring"`` or ``"random:3"`` means."""

    def letters(text: str) -> str:
        return re.sub("[^a-z]", "", text.lower())

    wanted = letters(text)
    if len(wanted) < _SHORTEST:
        return None
    return next(
        (p for p in _PARTS[name] if letters(p.split("(")[0]).startswith(f"tg{wanted}")), None
    )


def check_share(share: object) -> None:
    """Raise unless a share of a step is a number in (0, 1]."""
    number = isinstance(share, int | float | np.floating | Tensor) and not isinstance(share, bool)
    if not number or not 0.0 < share <= 1.0:  # type: ignore[operator]
        raise ValueError(f"share must be in (0, 1], got {share!r}.")


def checked_present(present: Iterable[str], tasks: tuple[str, ...]) -> Members:
    """The positions of the labelled tasks."""
    if isinstance(present, str):
        raise TypeError(f"batch() takes a collection of tasks, got {present!r}; put it in [].")
    if isinstance(present, Mapping):
        raise TypeError(
            "batch() takes the names of the labelled tasks, got a mapping, whose values it "
            "would not look at: write groups.batch([task for task, mask in masks.items() if "
            "mask.any()]), or groups.batch(labels.keys()) if every task in it is labelled."
        )
    if not isinstance(present, Iterable):
        raise TypeError(f"batch() takes the names of the labelled tasks, got {present!r}.")
    present = list(present)
    if wrong := [task for task in present if not isinstance(task, str)]:
        raise TypeError(
            f"batch() takes the names of the labelled tasks, got {wrong[0]!r} among them."
        )
    present = set(present)
    if unknown := sorted(present.difference(tasks), key=repr):
        raise ValueError(f"batch() got unknown tasks {listed(unknown)}; they are {listed(tasks)}.")
    return tuple(k for k, task in enumerate(tasks) if task in present)


def check_state(state: Mapping[str, Any], own: Mapping[str, Any], optional: str) -> None:
    """Raise unless ``state`` fits the TaskGroups whose state is ``own``.

    It may or may not have the key ``optional``.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"load_state_dict() takes the dict that state_dict() returned, got {described(state)}."
        )
    if differing := sorted(map(str, (set(own) ^ set(state)) - {optional})):
        if differing == ["weights"]:
            there, here = (
                repr(one["weights"]["method"]) if "weights" in one else "no method"
                for one in (state, own)
            )
            raise ValueError(
                f"The state was saved with {there} as the weights of the losses, these TaskGroups "
                f"have {here}; give them the same weights=."
            )
        raise ValueError(
            f"This is not the state of a TaskGroups: {', '.join(differing)} missing or "
            "unexpected; pass what state_dict() returned."
        )
    if state["version"] != own["version"]:
        raise ValueError(
            f"The state has version {state['version']}, this taskgroup reads version "
            f"{own['version']}; load it with the taskgroup that wrote it."
        )
    if list(state["tasks"]) != own["tasks"]:
        raise ValueError(
            f"The state is of the tasks {listed(state['tasks'])}, these are "
            f"{listed(own['tasks'])}; name the same tasks in the same order."
        )
