"""The display in the terminal while many runs are trained."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from taskgroup.lab.report.live import LiveDisplay
from taskgroup.lab.studies.cell import Cell, Result

__all__ = ["ComparisonDisplay"]


class ComparisonDisplay(LiveDisplay):
    """How many runs of each variant are finished, and the mean of their Δm where it is known.

    Use as a context manager and pass :meth:`update` as the listener. ``titles`` names the variants,
    and ``delta`` gives the Δm of a run in percent, or None.
    """

    def __init__(
        self,
        title: str,
        titles: Mapping[str, str],
        console: Console,
        delta: Callable[[Result], float | None] = lambda result: None,
    ) -> None:
        super().__init__(title, "runs", console)
        self._titles = titles
        self._delta = delta
        self._stage = ""
        self._done: Counter[str] = Counter()
        self._diverged: Counter[str] = Counter()
        self._deltas: defaultdict[str, list[float]] = defaultdict(list)

    def update(self, stage: str, done: int, total: int, cell: Cell, result: Result | None) -> None:
        """Show that a run is finished, or was finished before."""
        if stage != self._stage:
            self._stage = stage
            for counts in (self._done, self._diverged, self._deltas):
                counts.clear()
            self._begin(stage)
        name = cell.name if cell.name in self._titles else _other(cell)
        self._done[name] += 1
        if result is not None and result["diverged"] is not None:
            self._diverged[name] += 1
        elif result is not None and name in self._titles:
            delta = self._delta(result)
            if delta is not None:
                self._deltas[name].append(delta)
        self._update(done, total, f"{stage}, run")

    def _details(self) -> Sequence[RenderableType]:
        entries = []
        for name, done in self._done.items():
            text = Text(f"{done:4d}")
            if name in self._deltas:
                text.append(f"{statistics.fmean(self._deltas[name]):+7.1f} %", style="green")
            if name in self._diverged:
                text.append(f" ({self._diverged[name]} diverged)", style="red")
            entries.append((Text(self._titles.get(name, name)), text))
        return [self._columns(entries)]


def _other(cell: Cell) -> str:
    """What a run that belongs to no variant trains."""
    tasks = cell.recipe.tasks
    return "Single-task" if tasks is None or len(tasks) == 1 else "Pairs"
