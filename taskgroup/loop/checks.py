"""Checks of what a user gives to TaskGroups; each raises an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from taskgroup._arguments import listed
from taskgroup.loop.rounds import Members

__all__ = ["check_part", "check_state", "checked_present", "checked_tasks"]


def checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The task names as plain strings."""
    if isinstance(tasks, str):
        raise TypeError(f"tasks takes a list of names, got the string {tasks!r}; put it in [].")
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
    if not fits:
        raise TypeError(f"{name} takes an object such as {examples}; got {part!r}.")


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
    present = set(present)
    if unknown := sorted(present.difference(tasks), key=repr):
        raise ValueError(f"batch() got unknown tasks {listed(unknown)}; they are {listed(tasks)}.")
    return tuple(k for k, task in enumerate(tasks) if task in present)


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless ``state`` fits the TaskGroups whose state is ``own``."""
    if differing := sorted(set(own) ^ set(state)):
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
