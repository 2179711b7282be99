"""Tables for the terminal: finished runs, evaluations and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text  # for names that users choose: a str would be read as markup

from taskgroup.lab.data.check import Checked
from taskgroup.lab.problem import Problem
from taskgroup.lab.train.evaluation import Summary
from taskgroup.lab.words import counted

__all__ = ["check_table", "evaluation_table", "groups_line", "summary_table"]


def summary_table(summary: Summary, titles: Mapping[str, str]) -> Table:
    """The held-out metrics of ``summary.json``, and other figures of the run below them."""
    table = Table(title=f"{summary['method']}, {summary['batches']} batches", title_justify="left")
    table.add_column("On held-out data (↑ higher is better, ↓ lower)")
    table.add_column(summary["method"], justify="right")
    for task, value in summary["metrics"].items():
        name, lower = summary["metric"][task], summary["lower_is_better"][task]
        table.add_row(_named(titles[task], name, lower), f"{value:.4f}")
    table.add_section()
    if summary["delta_m"] is not None:
        against = Text(f"Δm against {summary['baseline']}")
        table.add_row(against, f"{summary['delta_m']:+.2f} %")
    table.add_row("Seconds per batch", f"{summary['seconds_per_batch']:.3f}")
    table.add_row("Time outside the model", f"{100 * summary['share_outside_model']:.1f} %")
    if summary["peak_bytes"] is not None:
        table.add_row("GPU memory at the peak", f"{summary['peak_bytes'] / 2**30:.2f} GiB")
    table.caption = groups_line(summary["partition"], titles)
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
    table = Table(title=Text(title), title_justify="left")
    table.add_column("↑ higher is better, ↓ lower")
    table.add_column("", justify="right")
    for task, value in metrics.items():
        lower = problem.lower_is_better[task]
        name = _named(problem.titles[task], problem.metric_names[task], lower)
        table.add_row(name, f"{value:.4f}")
    if delta is not None:
        table.add_section()
        table.add_row(Text(f"Δm against {baseline}"), f"{delta:+.2f} %")
    return table


def check_table(title: str, checked: Sequence[Checked]) -> Table:
    """The contents of a data set, one row for each split."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("split")
    for column in ("listed", "public release", "whole", "problems"):
        table.add_column(column, justify="right")
    for split in checked:
        published = "" if split.published is None else f"{split.published:,}"
        counts = [f"{split.listed:,}", published, f"{split.whole:,}", f"{len(split.problems):,}"]
        table.add_row(split.split, *counts)
    return table


def _named(title: str, metric: str, lower_is_better: bool) -> str:
    return f"{title}, {metric} {'↓' if lower_is_better else '↑'}"


def groups_line(partition: list[list[str]], titles: Mapping[str, str]) -> str:
    """The number of groups and their tasks, in words."""
    groups = "; ".join(", ".join(titles[task] for task in group) for group in partition)
    return f"{counted(len(partition), 'group')}: {groups}"
