"""Tables of finished runs, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

__all__ = ["count_groups", "groups_line", "summary_table"]


def summary_table(summary: Mapping[str, Any], titles: Mapping[str, str]) -> Table:
    """The held-out metric of every task, and below it the figures of the run.

    Args:
        summary: what ``summary.json`` holds.
        titles: ``{task: name}`` as shown.
    """
    table = Table(title=f"{summary['method']}, {summary['batches']} batches", title_justify="left")
    better = "lower" if summary["lower_is_better"] else "higher"
    table.add_column(f"Held-out {summary['metric']} ({better} is better)")
    table.add_column(summary["method"], justify="right")
    for task, value in summary["metrics"].items():
        table.add_row(titles[task], f"{value:.4f}")
    table.add_section()
    if summary["delta_m"] is not None:
        table.add_row(f"Δm against {summary['baseline']}", f"{summary['delta_m']:+.2f} %")
    table.add_row("Seconds per batch", f"{summary['seconds_per_batch']:.3f}")
    table.add_row("Time outside the model", f"{100 * summary['share_outside_model']:.1f} %")
    table.caption = groups_line(summary["partition"], titles)
    table.caption_justify = "left"
    return table


def groups_line(partition: list[list[str]], titles: Mapping[str, str]) -> str:
    """A partition in words."""
    groups = "; ".join(", ".join(titles[task] for task in group) for group in partition)
    return f"{count_groups(partition)}: {groups}"


def count_groups(partition: Sequence[Sequence[str]]) -> str:
    """How many groups there are: ``"1 group"``, ``"4 groups"``."""
    return f"{len(partition)} group{'' if len(partition) == 1 else 's'}"
