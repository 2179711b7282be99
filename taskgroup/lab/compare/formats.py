"""Tables for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = ["markdown_table", "save_csv", "terminal_table"]

Rows = Sequence[Sequence[str]]


def terminal_table(header: Sequence[str], rows: Rows, bold: str | None = None) -> Table:
    """A table with a left-aligned first column, which is never wrapped.

    Rows whose first cell begins with ``bold`` are printed bold.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    # Rich crops what does not fit, so no column is narrower than its longest word.
    for k, column in enumerate(header):
        longest = max(len(word) for row in [header, *rows] for word in row[k].split() or [""])
        table.add_column(
            column, justify="right" if k else "left", no_wrap=k == 0, min_width=longest
        )
    for row in rows:
        table.add_row(*row, style="bold" if bold and row[0].startswith(bold) else "")
    return table


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    """The table in Markdown; all columns but the first are right-aligned."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def save_csv(
    path: str | os.PathLike[str], header: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Write a CSV file; numbers have six digits, and NaN is empty."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([_number(value) for value in row] for row in rows)


def _number(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
