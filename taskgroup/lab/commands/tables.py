"""Tables for the terminal: finished runs, evaluations and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from taskgroup.lab.data.check import Checked
from taskgroup.lab.problem import Problem
from taskgroup.lab.studies.formats import TerminalTable
from taskgroup.lab.train.evaluation import Summary
from taskgroup.lab.words import counted

__all__ = ["check_table", "evaluation_table", "groups_line", "summary_table"]


def summary_table(summary: Summary, titles: Mapping[str, str]) -> Table:
    """The held-out metrics of ``summary.json``, and other figures of the run below them."""
    rows = [
        (_named(titles[task], summary["metric"][task], summary["lower_is_better"][task]), value)
        for task, value in summary["metrics"].items()
    ]
    others = []
    if summary["delta_m"] is not None:
        others.append((f"Δm against {summary['baseline']}", f"{summary['delta_m']:+.2f} %"))
    others.append(("Seconds per batch", f"{summary['seconds_per_batch']:.3f}"))
    others.append(("Time outside the model", f"{100 * summary['share_outside_model']:.1f} %"))
    if summary["peak_bytes"] is not None:
        others.append(("GPU memory at the peak", f"{summary['peak_bytes'] / 2**30:.2f} GiB"))
    table = _table(
        f"{summary['method']}, {summary['batches']} batches",
        ("On held-out data (↑ higher is better, ↓ lower)", summary["method"]),
        [[(name, f"{value:.4f}") for name, value in rows], others],
    )
    table.caption = Text(groups_line(summary["partition"], titles))
    table.caption_justify = "left"
    return table


def evaluation_table(
    title: str,
    metrics: Mapping[str, float],
    problem: Problem,
    baseline: str | None,
    delta: float | None,
) -> Table:
    """The metric of every task, and Δm in percent against a baseline where it is known."""
    rows = []
    for task, value in metrics.items():
        lower = problem.lower_is_better[task]
        name = _named(problem.titles[task], problem.metric_names[task], lower)
        rows.append((name, f"{value:.4f}"))
    gain = [] if delta is None else [(f"Δm against {baseline}", f"{delta:+.2f} %")]
    return _table(title, ("↑ higher is better, ↓ lower", ""), [rows, gain])


def check_table(title: str, checked: Sequence[Checked]) -> RenderableType:
    """The contents of a data set, one row for each split."""
    header = ("split", "listed", "public release", "whole", "problems")
    rows = []
    for split in checked:
        published = "" if split.published is None else f"{split.published:,}"
        counts = [f"{split.listed:,}", published, f"{split.whole:,}", f"{len(split.problems):,}"]
        rows.append([split.split, *counts])
    return Group(Text(title, style="bold"), TerminalTable(header, rows))


def _table(
    title: str, header: tuple[str, str], sections: Sequence[Sequence[tuple[str, str]]]
) -> Table:
    """A table of names and numbers; in a narrow terminal the names are wrapped, and no number is.

    All texts become ``Text``, since a str would be read as markup.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column(Text(header[0]), overflow="fold")
    table.add_column(Text(header[1]), justify="right", no_wrap=True)
    for rows in sections:
        for name, number in rows:
            table.add_row(Text(name), Text(number))
        table.add_section()
    return table


def _named(title: str, metric: str, lower_is_better: bool) -> str:
    return f"{title}, {metric} {'↓' if lower_is_better else '↑'}"


def groups_line(partition: list[list[str]], titles: Mapping[str, str]) -> str:
    """The number of groups and their tasks, in words."""
    groups = "; ".join(", ".join(titles[task] for task in group) for group in partition)
    return f"{counted(len(partition), 'group')}: {groups}"
