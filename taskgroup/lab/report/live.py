"""The display while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from taskgroup.lab.report.tables import count_groups

__all__ = ["Display"]

_SMOOTHING = 0.95  # of the losses shown
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


class Snapshot(Protocol):
    """What the display reads of a batch."""

    @property
    def batch(self) -> int: ...
    @property
    def batches(self) -> int: ...
    @property
    def losses(self) -> Mapping[str, float]: ...
    @property
    def partition(self) -> Sequence[Sequence[str]]: ...


class Display:
    """A progress bar, the loss of every task, and the groups; in a pipe, a line now and then.

    Use as a context manager and call :meth:`update` after every batch.

    Args:
        title: above the bar.
        titles: ``{task: name}`` as shown.
        console: where to draw.
    """

    def __init__(self, title: str, titles: Mapping[str, str], console: Console) -> None:
        self._title = title
        self._titles = titles
        self._console = console
        self._smoothed: dict[str, float] = {}
        self._partition: Sequence[Sequence[str]] = []
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("batches · left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=None)
        # Drawn by a thread of its own, four times a second: a batch pays for noting numbers only.
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4)
        self._next_line = 0

    def __enter__(self) -> Display:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, snapshot: Snapshot) -> None:
        """Take in what a batch gave."""
        for task, loss in snapshot.losses.items():
            before = self._smoothed.get(task, loss)
            self._smoothed[task] = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        self._partition = snapshot.partition
        self._bar.update(self._task, completed=snapshot.batch, total=snapshot.batches)
        if not self._console.is_terminal and (
            snapshot.batch >= self._next_line or snapshot.batch == snapshot.batches
        ):
            self._next_line = snapshot.batch + max(1, snapshot.batches // 10)
            total = sum(self._smoothed.values())
            self._console.print(
                f"{self._title}: batch {snapshot.batch} of {snapshot.batches}, "
                f"{time.monotonic() - self._started:.0f} s, summed loss {total:.3f}, "
                f"{count_groups(snapshot.partition)}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def _draw(self) -> Panel:
        group_of = {task: n for n, tasks in enumerate(self._partition) for task in tasks}
        losses = Table.grid(padding=(0, 2))
        columns = max(1, self._console.width // 40)
        cells = [
            Text(f"{self._titles[task]:<22}{loss:9.4f}", style=self._colour(group_of.get(task)))
            for task, loss in self._smoothed.items()
        ]
        for start in range(0, len(cells), columns):
            losses.add_row(*cells[start : start + columns])
        return Panel(Group(self._bar, "", losses, "", self._groups()), border_style="dim")

    def _groups(self) -> Text:
        text = Text(f"{count_groups(self._partition)}  ", style="bold")
        for n, tasks in enumerate(self._partition):
            names = self._names(tasks)
            text.append(f"[{names}] ", style=self._colour(n))
        return text

    def _names(self, tasks: Iterable[str]) -> str:
        return ", ".join(self._titles[task] for task in tasks)

    @staticmethod
    def _colour(group: int | None) -> str:
        return "default" if group is None else _COLOURS[group % len(_COLOURS)]
