"""Tables for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod
from rich.table import Table
from rich.text import Text

__all__ = ["TerminalTable", "markdown_table", "save_csv"]

Rows = Sequence[Sequence[str]]

_GAP = 2  # characters between columns, and at both edges together
_NAME = 16  # characters, from which on the first column is wrapped


class TerminalTable:
    """A table that is no wider than the terminal, and breaks or crops no number.

    A cell is one line, except in the first column, which is wrapped where the others need the room.
    Columns that do not fit stand in another table below, after the same first column. Rows whose
    first cell begins with ``bold`` are printed bold.
    """

    def __init__(self, header: Sequence[str], rows: Rows, bold: str | None = None) -> None:
        self._header = header
        self._rows = rows
        self._bold = bold

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        columns = range(1, len(self._header))
        least = [self._least(k) for k in columns]
        room = options.max_width - 2 * _GAP - min(self._least(0), _NAME)
        # As few tables as possible, with about as many columns each.
        most = len(least)
        parts = _packed(least, room, most)
        most = math.ceil(most / len(parts))
        if len(balanced := _packed(least, room, most)) == len(parts):
            parts = balanced
        widest = max(sum(least[k] + _GAP for k in part) for part in parts)
        first = min(self._least(0), max(_NAME, options.max_width - 2 * _GAP - widest))
        for part in parts:
            spare = options.max_width - 2 * _GAP - first - sum(least[k] + _GAP for k in part)
            widths = {0: first}
            for k in part:  # a header that has the room is one line
                more = cell_len(self._header[k + 1]) - least[k]
                more = more if 0 < more <= spare else 0
                widths[k + 1] = least[k] + more
                spare -= more
            yield self._table(widths)

    def _least(self, k: int) -> int:
        """The width of a column whose cells are not wrapped; the header may be, over numbers."""
        header = self._header[k].split() if k else [self._header[k]]
        return max(cell_len(text) for text in [*header, *(row[k] for row in self._rows), ""])

    def _table(self, widths: Mapping[int, int]) -> Table:
        """The table of some columns with these widths."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for k, width in widths.items():
            justify: JustifyMethod = "right" if k else "left"
            header = Text(self._header[k])  # as Text, since a str would be read as markup
            table.add_column(header, justify=justify, width=width, overflow="fold")
        for row in self._rows:
            bold = self._bold is not None and row[0].startswith(self._bold)
            cells = [Text(row[k]) for k in widths]
            table.add_row(*cells, style="bold" if bold else "")
        return table


def _packed(widths: Sequence[int], room: int, most: int) -> list[list[int]]:
    """The positions of the widths in parts, of up to ``most`` each, that fit into the room."""
    parts: list[list[int]] = [[]]
    for k, width in enumerate(widths):
        taken = sum(widths[other] + _GAP for other in parts[-1])
        if parts[-1] and (len(parts[-1]) == most or taken + width + _GAP > room):
            parts.append([])
        parts[-1].append(k)
    return parts


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
