"""Names of runs, and the settings in which runs differ, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from pathlib import Path

from taskgroup.lab.report.run_data import RunData
from taskgroup.lab.words import listed

__all__ = [
    "INCIDENTAL",
    "WAYS",
    "differences",
    "differing",
    "left_out",
    "mean_of",
    "of_common_tasks",
    "settings_in_words",
    "short",
    "short_names",
    "tasks_of",
    "titles",
    "values",
]

_LONGEST = 40  # characters of a name
#: Runs that differ only in these settings are averaged. Method and tasks are compared separately.
INCIDENTAL = {
    *("seed", "checkpoint_every", "evaluate_every", "conflicts_every", "baseline"),
    *("root", "bad", "workers", "method", "tasks"),
}
#: Settings of selective updates, which mean nothing to another method.
WAYS = (
    *("grouping", "affinity", "decay", "credit", "outside", "shared_state", "replay_rng"),
    *("groups_per_batch", "observe_every", "regroup_every", "warmup", "preference"),
)
_SPEAKING = {"data", "grouping", "backbone", "device", "precision"}  # their values need no name


def short(name: str, longest: int = _LONGEST) -> str:
    """The name, shortened in the middle if it has more than ``longest`` characters."""
    return name if len(name) <= longest else f"{name[: longest - 9]}…{name[-8:]}"


def titles(run: RunData) -> dict[str, str]:
    """``{task: name as shown}`` for a run's tasks: on the page, in pictures, in the terminal.

    A task without a title is shown by its name, and so is one that shares its title with another.
    """
    known = run.titles
    shown = Counter(known.get(task, task) for task in run.tasks)
    found = {task: known.get(task, task) for task in run.tasks}
    return {task: title if shown[title] == 1 else task for task, title in found.items()}


def short_names(runs: Sequence[RunData]) -> list[str]:
    """The short names of the runs, without the folders that all of them share."""
    parts = [Path(run.name).parts for run in runs]
    above = 0
    while all(len(part) > above + 1 and part[above] == parts[0][above] for part in parts):
        above += 1
    return [short("/".join(part[above:])) for part in parts]


def mean_of(runs: int) -> str:
    """What a title adds if it shows the mean of several runs."""
    return f", mean of {runs} runs" if runs > 1 else ""


def differences(runs: Sequence[RunData]) -> list[str]:
    """For each run, its values of the settings in which the runs differ, in words.

    The method, the grouping, the seed, the batches, and settings that do not change the training
    are left out. Settings of selective updates are compared among selective runs. A setting that a
    run does not have is not mentioned for it.
    """
    hidden = {*INCIDENTAL, "batches", "grouping"}
    names = [n for n in dict.fromkeys(n for run in runs for n in run.settings) if n not in hidden]
    selective = [run for run in runs if run.method == "selective"]
    differ = [
        *differing(runs, [name for name in names if name not in WAYS]),
        *differing(selective, [name for name in names if name in WAYS]),
    ]
    return [
        ", ".join(
            _setting(name, run.settings[name])
            for name in differ
            if name in run.settings and (name not in WAYS or run.method == "selective")
        )
        for run in runs
    ]


def differing(runs: Iterable[RunData], names: Iterable[str]) -> list[str]:
    """The settings among ``names`` that are not the same for all runs."""
    runs = list(runs)
    return [name for name in names if len({values(run, [name]) for run in runs}) > 1]


def values(run: RunData, names: Iterable[str]) -> tuple[Hashable, ...]:
    """The values of some settings, as a key of a dict."""
    found = (run.settings.get(name) for name in names)
    return tuple(tuple(value) if isinstance(value, list) else value for value in found)


def settings_in_words(run: RunData, names: Iterable[str], runs: Collection[RunData]) -> list[str]:
    """Some settings of a run, for its label.

    A setting whose value needs its name to be understood is left out if most of ``runs`` share it,
    and so is one that the run does not know, since a recorded loop has its own settings.
    """
    words = []
    for name in names:
        if name not in run.settings:
            continue
        usual = Counter(values(other, [name]) for other in runs).most_common(1)[0][0]
        if name in _SPEAKING:
            words.append(str(run.settings.get(name)))
        elif values(run, [name]) != usual:
            words.append(_setting(name, run.settings.get(name)))
    return words


def _setting(name: str, value: object) -> str:
    if value is None:
        shown = "all" if name == "groups_per_batch" else "by default"
    elif isinstance(value, list | tuple):
        shown = "x".join(map(str, value))
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{name.replace('_', ' ')} {shown}"


def tasks_of(run: RunData) -> tuple[str, frozenset[str]]:
    """The data set and the tasks of a run, in any order."""
    return str(run.settings.get("data")), frozenset(run.tasks)


def of_common_tasks(runs: Sequence[RunData]) -> list[RunData]:
    """The runs on the tasks of one data set that most runs have; the first of equals."""
    common = Counter(map(tasks_of, runs)).most_common(1)[0][0]
    return [run for run in runs if tasks_of(run) == common]


def left_out(
    figure: str, runs: Iterable[RunData], kept: Collection[RunData], why: str
) -> list[str]:
    """A sentence that names the runs that a figure leaves out, if there are any."""
    names = [run.name for run in runs if run not in kept]
    return [f"The {figure} figure leaves out {listed(names)}: {why}."] if names else []
