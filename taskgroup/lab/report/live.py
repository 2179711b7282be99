"""The displays in the terminal while something runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from taskgroup.lab.train.trainer import Progress as BatchProgress
from taskgroup.lab.words import counted

__all__ = ["Display", "LiveDisplay"]

_Shown = TypeVar("_Shown", bound="LiveDisplay")
_LONGEST, _SHORTEST, _GAP = 40, 8, 2  # characters of a name, and between columns
_NARROWEST = 20  # characters of the frame
_SMOOTHING = 0.95  # of the losses shown
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


class LiveDisplay:
    """A progress bar, which counts ``unit``, with details below it; in a pipe, ten lines in all.

    Use as a context manager. A subclass implements :meth:`_details` and calls :meth:`_update`.
    """

    def __init__(self, title: str, unit: str, console: Console) -> None:
        self._title = title
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(f"{unit} · left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            expand=True,
        )
        self._next_line = 0.0
        self._cleared = False

    def __enter__(self: _Shown) -> _Shown:
        self._started = time.monotonic()
        # A thread of its own draws four times a second, so an update only stores numbers.
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=4,
            vertical_overflow="crop",  # the usual "..." would fill the last line, see _draw()
        )
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._console.is_terminal:
            # What ended it is said in a sentence, without half a bar above.
            self._live.transient = self._cleared = kind is not None
            self._live.stop()

    def _begin(self, description: str) -> None:
        """Start a bar, in place of the last one."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(description, total=None)
        self._next_line = 0.0

    def _update(self, done: int, total: int, what: str, details: str = "") -> None:
        self._bar.update(self._bar.task_ids[-1], completed=done, total=total)
        if not self._console.is_terminal and (done >= self._next_line or done == total):
            self._next_line = done + max(1, total / 10)
            elapsed = time.monotonic() - self._started
            self._console.print(
                f"{self._title}: {what} {done} of {total}, {elapsed:.0f} s{details}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def _draw(self) -> RenderableType:
        if self._cleared:  # a frame higher than the terminal could not be taken back
            return ""
        shown = Group(self._bar, "", *self._details())
        # A terminal writes ^C after the frame. In a full line it would go on to the next line, and
        # the frame would be drawn again in the wrong place.
        width = max(_NARROWEST, self._console.width - len("^C^C"))
        title, room = self._title, width - len("╭─  ─╮")  # a longer title would widen the frame
        title = title if len(title) <= room else f"…{title[len(title) - room + 1 :]}"
        return Panel(shown, title=Text(title), border_style="dim", width=width)

    def _details(self) -> Sequence[RenderableType]:
        raise NotImplementedError

    def _columns(self, entries: Sequence[tuple[Text, Text]]) -> Table:
        """Names and their numbers, in as many columns as the terminal has room for.

        Long names are shortened, numbers never.
        """
        room = self._console.width - 8  # within the frame
        value = max((number.cell_len for _, number in entries), default=0)
        longest = max((name.cell_len for name, _ in entries), default=0)
        name = max(_SHORTEST, min(longest, _LONGEST, room - value - 1))
        columns = max(1, (room + _GAP) // (name + 1 + value + _GAP))
        grid = Table.grid(padding=(0, _GAP, 0, 0))
        for _ in range(columns):
            grid.add_column(no_wrap=True)
        cells = []
        for text, number in entries:
            cell = text.copy()
            cell.truncate(name, overflow="ellipsis", pad=True)
            cells.append(Text.assemble(cell, " ", number))
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return grid


class Display(LiveDisplay):
    """The loss of every task and the groups of a training run; ``titles`` names the tasks.

    Use as a context manager and call :meth:`update` after every batch.
    """

    def __init__(self, title: str, titles: Mapping[str, str], console: Console) -> None:
        super().__init__(title, "batches", console)
        self._titles = titles
        self._smoothed: dict[str, float] = {}
        self._partition: Sequence[Sequence[str]] = []
        self._begin("training")

    def update(self, progress: BatchProgress) -> None:
        """Show what is known after a batch."""
        for task, loss in progress.losses.items():
            before = self._smoothed.get(task, loss)
            self._smoothed[task] = _SMOOTHING * before + (1 - _SMOOTHING) * loss
        self._partition = progress.partition
        loss = sum(self._smoothed.values())
        details = f", summed loss {loss:.3f}, {counted(len(progress.partition), 'group')}"
        self._update(progress.batch, progress.batches, "batch", details)

    def _details(self) -> Sequence[RenderableType]:
        group_of = {task: n for n, tasks in enumerate(self._partition) for task in tasks}
        shown = {task: f"{loss:.4f}" for task, loss in self._smoothed.items()}
        width = max(map(len, shown.values()), default=0)
        losses = []
        for task, loss in shown.items():
            style = _colour(group_of.get(task))
            losses.append((Text(self._titles[task], style), Text(loss.rjust(width), style)))
        groups = Text(f"{counted(len(self._partition), 'group')}  ", style="bold")
        for n, tasks in enumerate(self._partition):
            groups.append(f"[{', '.join(self._titles[t] for t in tasks)}] ", style=_colour(n))
        return [self._columns(losses), "", groups]


def _colour(group: int | None) -> str:
    return "default" if group is None else _COLOURS[group % len(_COLOURS)]
