"""A comparison: the display while it runs, its tables and its picture."""

from __future__ import annotations

import csv
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

__all__ = ["ComparisonDisplay", "delta_m_plot", "markdown", "tables", "write_csv"]

_DPI = 150
_COLUMNS = [
    *("variant", "budget", "split", "batches", "rate", "runs", "diverged"),
    *("delta_m", "delta_m_half", "gain", "gain_half", "noise_floor", "verdict"),
    *("time", "memory", "steps", "groups", "changes"),
]


class _Estimate(Protocol):
    @property
    def mean(self) -> float: ...
    @property
    def half(self) -> float: ...
    @property
    def n(self) -> int: ...


class ComparisonDisplay:
    """Which runs are done, method by method; in a pipe, a line now and then.

    Use as a context manager and pass :meth:`update` as the listener.

    Args:
        title: above all.
        titles: ``{name of a variant: title}``.
        console: where to draw.
        delta: Δm of a run in percent, where it is known; shown as the mean so far.
    """

    def __init__(
        self,
        title: str,
        titles: Mapping[str, str],
        console: Console,
        delta: Callable[[Any], float | None] = lambda result: None,
    ) -> None:
        self._delta = delta
        self._deltas: dict[str, list[float]] = {}
        self._title = title
        self._titles = titles
        self._console = console
        self._done: dict[str, int] = {}
        self._diverged: dict[str, int] = {}
        self._bar: Progress | None = None
        self._stage = ""
        self._task: Any = None
        self._next_line = 0.0
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4)

    def __enter__(self) -> ComparisonDisplay:
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(
        self, stage: str, done: int, total: int, cell: Any, result: Mapping[str, Any] | None
    ) -> None:
        """Take in that a run is finished, or was found finished."""
        if stage != self._stage:
            self._begin(stage, total)
        assert self._bar is not None
        self._bar.update(self._task, completed=done, total=total)
        name = cell.name if cell.name in self._titles else _other(cell)
        self._done[name] = self._done.get(name, 0) + 1
        if result is not None and result["diverged"] is not None:
            self._diverged[name] = self._diverged.get(name, 0) + 1
        elif result is not None and name in self._titles:
            delta = self._delta(result)
            if delta is not None:
                self._deltas.setdefault(name, []).append(delta)
        if not self._console.is_terminal and (done >= self._next_line or done == total):
            self._next_line = done + total / 10
            self._console.print(
                f"{self._title}: {stage}, run {done} of {total}, "
                f"{time.monotonic() - self._started:.0f} s",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )

    def _begin(self, stage: str, total: int) -> None:
        self._stage = stage
        self._next_line = 0.0
        self._done.clear()
        self._diverged.clear()
        self._deltas.clear()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("runs · left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(stage, total=total)

    def _draw(self) -> Panel:
        if self._bar is None:
            return Panel("starting", title=Text(self._title), border_style="dim")
        cells = []
        for name, done in self._done.items():
            title = self._titles.get(name, name)
            text = Text(f"{title:<27}{done:4d}")
            if found := self._deltas.get(name):
                text.append(f"{statistics.fmean(found):+7.1f} %", style="green")
            if name in self._diverged:
                text.append(f" ({self._diverged[name]} diverged)", style="red")
            cells.append(text)
        grid = RichTable.grid(padding=(0, 2))
        columns = max(1, self._console.width // 40)
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return Panel(Group(self._bar, "", grid), title=Text(self._title), border_style="dim")


def _other(cell: Any) -> str:
    """What is run besides the variants, by how many tasks it trains."""
    tasks = cell.recipe.tasks
    return "Single-task" if tasks is None or len(tasks) == 1 else "Pairs"


def tables(table: Any) -> list[RenderableType]:
    """The results for a terminal: the gains, and below them what must be known to read them."""
    shown: list[RenderableType] = [Text(_headline(table), style="bold")]
    for header, rows in (_gain_rows(table), _difference_rows(table)):
        # A figure as one word, and no column narrower than its longest: Rich breaks a line at any
        # space, and crops what does not fit.
        rows = [[cell.replace("\N{NO-BREAK SPACE}", "") for cell in row] for row in rows]
        part = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for k, column in enumerate(header):
            longest = max(len(word) for row in [header, *rows] for word in row[k].split() or [""])
            part.add_column(
                column, justify="right" if k else "left", no_wrap=k == 0, min_width=longest
            )
        for row in rows:
            part.add_row(*row, style="bold" if row[0].startswith("Selective") else "")
        shown.append(part)
    return [*shown, *(Text(f"{note}\n", style="dim") for note in _notes(table))]


def markdown(table: Any, command: str) -> str:
    """The results as Markdown: gains and cost, metrics per task, groups.

    Args:
        table: a :class:`taskgroup.lab.compare.comparison.Table`.
        command: that made it.
    """
    parts = [f"# {_headline(table)}", f"```\n{command}\n```"]
    parts.append(_markdown_table(*_gain_rows(table)))
    parts.append(_markdown_table(*_difference_rows(table)))
    parts.append("\n".join(f"- {note}" for note in _notes(table)))
    for budget in table.budgets:
        parts.append(f"## {_metric(table)} of each task, {budget.title}")
        parts.append(
            "Mean over the seeds; in brackets the gain over single-task training in percent."
        )
        for split, title in (("held_out", "Held-out data"), ("train", "Fixed training data")):
            parts.append(f"{title}:")
            parts.append(_markdown_table(*_task_rows(table, budget.name, split)))
    parts.append("## Groups")
    parts.append(
        "Mean number of groups over the second half of a run, and the share of the batches of the "
        "last quarter after which the partition was another one."
    )
    groups = [
        [row.variant.title, f"{row.groups:.1f}", f"{100 * row.changes:.0f} %"]
        for row in table.rows
        if row.variant.settings.get("method") == "selective"
    ]
    parts.append(_markdown_table(["", "groups", "batches with a change"], groups))
    return "\n\n".join(parts) + "\n"


def write_csv(table: Any, path: str | os.PathLike[str]) -> None:
    """All figures, a line per variant, budget and split."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            _COLUMNS + [f"{table.problem.metrics[task]} {task}" for task in table.tasks]
        )
        for row in table.rows:
            for (budget, split), delta in row.delta.items():
                gain = row.gain[budget, split]
                metrics = row.metrics.get((budget, split), {})
                values: dict[str, Any] = {
                    "variant": row.variant.name,
                    "budget": budget,
                    "split": split,
                    "batches": row.batches[budget],
                    "rate": row.rate if budget == "tuned" else table.recipe.lr,
                    "runs": delta.n,
                    "diverged": row.diverged[budget],
                    "delta_m": delta.mean,
                    "delta_m_half": delta.half,
                    "gain": gain.mean,
                    "gain_half": gain.half,
                    "noise_floor": row.floor[budget, split],
                    "verdict": row.verdict(budget, split),
                    "time": row.time,
                    "memory": row.memory,
                    "steps": row.steps,
                    "groups": row.groups,
                    "changes": row.changes,
                }
                figures = [*values.values(), *(metrics.get(t, math.nan) for t in table.tasks)]
                writer.writerow([_figure(value) for value in figures])
        for split, metrics in table.single.items():
            values = dict.fromkeys(_COLUMNS, "") | {"variant": "single-task", "split": split}
            values |= {"budget": "batches", "batches": table.recipe.batches}
            values |= {"rate": table.recipe.lr, "runs": table.seeds}
            figures = [*values.values(), *(metrics[task] for task in table.tasks)]
            writer.writerow([_figure(value) for value in figures])


def delta_m_plot(table: Any, path: str | os.PathLike[str]) -> None:
    """Δm against the cost of a batch, and Δm of all methods given the same time.

    Left the trade of the paper's Figure 2, with the result on the other axis; right the fair
    comparison, sorted, with the noise floor about joint training shaded.

    Args:
        table: a :class:`taskgroup.lab.compare.comparison.Table`.
        path: of the PNG.
    """
    last = table.budgets[-1]
    rows = [row for row in table.rows if row.delta[last.name, "held_out"].n]
    rows.sort(key=lambda row: row.delta[last.name, "held_out"].mean, reverse=True)
    names = [f"{row.variant.title}  {n}" for n, row in enumerate(rows, start=1)]
    height = 1.6 + 0.27 * max(8, len(rows))
    figure = Figure(figsize=(12.5, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))

    _draw_cost(left, rows)
    left.set(
        xlabel="time of a batch, relative to joint training",
        ylabel="Δm against single-task training, %",
    )
    left.set_title("Given as many batches (numbers: see the right)", loc="left")

    joint = next(row for row in table.rows if row.variant.settings.get("method") == "gd")
    centre, floor = joint.delta[last.name, "held_out"].mean, joint.floor[last.name, "held_out"]
    if math.isfinite(centre + floor):  # not of a single seed
        right.axvspan(centre - floor, centre + floor, color="#eeeeee", zorder=0)
    for y, row in enumerate(rows):
        mean, half, _ = row.delta[last.name, "held_out"]
        right.errorbar(mean, y, xerr=half, fmt="o", color=_colour(row), markersize=5, capsize=2)
    right.set_yticks(range(len(rows)), names)
    right.set(
        xlabel="Δm against single-task training, % (shaded: noise floor about GD)",
        ylim=(len(rows) - 0.3, -0.7),
    )
    right.set_title(f"Given {last.title}", loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=_DPI)


def _draw_cost(axes: Any, rows: Sequence[Any]) -> None:
    """The rows by their number, Δm over the time of a batch."""
    known = [
        (n, row.time, row.delta["batches", "held_out"], _colour(row))
        for n, row in enumerate(rows, start=1)
        if row.delta["batches", "held_out"].n and math.isfinite(row.time)
    ]
    if not known:  # all joint runs diverged
        return
    axes.set_xscale("log")
    most = max(time for _, time, _, _ in known)
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if t <= 1.2 * most]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08)
    # What lies far off would press the others together: it is drawn at the edge, with its value.
    means = sorted(delta.mean for _, _, delta, _ in known)
    middle = statistics.median(means)
    reach = 1 + 4 * statistics.median(abs(mean - middle) for mean in means)
    low = max(means[0], middle - reach)
    high = min(means[-1], middle + reach)
    margin = 0.15 * (high - low) + 0.1
    for n, time_, (mean, half, _), colour in known:
        y = min(max(mean, low), high)
        if y == mean:
            axes.errorbar(time_, y, yerr=half, fmt="none", color=colour, alpha=0.4, zorder=1)
        else:
            up = mean > high
            axes.annotate(
                f"{mean:+.0f}",
                (time_, y),
                xytext=(0, 22 if up else -22),
                textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": colour},
                ha="center",
                va="bottom" if up else "top",
                fontsize=8,
                color=colour,
            )
        axes.plot(time_, y, "o", color=colour, markersize=12, zorder=2 + n, markeredgecolor="white")
        axes.annotate(
            str(n), (time_, y), ha="center", va="center", fontsize=7, color="white", zorder=3 + n
        )
    axes.set_ylim(low - 2 * margin, high + 2 * margin)


def _colour(row: Any) -> str:
    settings = row.variant.settings
    if settings.get("method") == "selective":
        return "#d6604d"
    return "#222222" if settings.get("method") == "gd" else "#4393c3"


def _headline(table: Any) -> str:
    seeds = f"{table.seeds} seed{'s' if table.seeds > 1 else ''}"
    return (
        f"{table.recipe.data}: {len(table.tasks)} tasks, {table.recipe.batches} batches of "
        f"{table.recipe.batch_size}, {seeds}"
    )


def _gain_rows(table: Any) -> tuple[list[str], list[list[str]]]:
    header = ["Δm, %", "time", "memory", *(budget.title for budget in table.budgets)]
    rows = []
    for row in table.rows:
        cells = [row.variant.title, _times(row.time), _times(row.memory)]
        for budget in table.budgets:
            cells.append(_shown(row.delta[budget.name, "held_out"], row.diverged[budget.name]))
            if budget.name == "tuned" and row.rate is not None:
                cells[-1] += f" ({row.rate:.2g})"
        rows.append(cells)
    return header, rows


def _difference_rows(table: Any) -> tuple[list[str], list[list[str]]]:
    budgets = [budget.name for budget in table.budgets]
    last = table.budgets[-1]
    header = ["Δm minus that of GD"]
    header += [f"held-out, {budget.title}" for budget in table.budgets]
    header.append(f"training data, {last.title}")
    rows = []
    for row in table.rows:
        if row.variant.name == row.variant.against:
            continue
        keys = [*((budget, "held_out") for budget in budgets), (last.name, "train")]
        rows.append([row.variant.title, *(_gain(row.gain[k], row.verdict(*k)) for k in keys)])
    return header, rows


def _metric(table: Any) -> str:
    """What the tasks' metric is called, if all have the same."""
    names = {table.problem.metrics[task] for task in table.tasks}
    return names.pop() if len(names) == 1 else "Metric"


def _task_rows(table: Any, budget: str, split: str) -> tuple[list[str], list[list[str]]]:
    single = table.single[split]
    titles = [table.problem.titles[task] for task in table.tasks]
    rows = [["Single-task", *(f"{single[task]:.4f}" for task in table.tasks)]]
    for row in table.rows:
        metrics = row.metrics.get((budget, split), {})
        cells = [row.variant.title]
        for task in table.tasks:
            if task in metrics:
                sign = -1 if table.problem.lower_is_better[task] else 1
                gain = sign * 100 * (metrics[task] - single[task]) / single[task]
                cells.append(f"{metrics[task]:.4f} ({gain:+.1f})")
            else:
                cells.append("")
        rows.append(cells)
    return ["", *titles], rows


def _notes(table: Any) -> list[str]:
    last = table.budgets[-1]
    joint = next(row for row in table.rows if row.variant.settings.get("method") == "gd")
    floor = joint.floor[last.name, "held_out"]
    if math.isnan(floor):
        said = "Noise floor: unknown; it takes at least two seeds whose joint run did not diverge."
    else:
        said = (
            f"Noise floor: two sets of {table.seeds} joint runs differ by up to {floor:.1f} by "
            f"chance ({last.title}, held-out). A difference is called better or worse only outside "
            f"both this floor and its own interval; of {len(table.rows)} rows up to one in twenty "
            "is so by luck."
        )
    notes = [
        "Δm: gain over single-task training, mean over the seeds and its 95% interval, on held-out "
        "data. Higher is better.",
        said,
        "Time and memory: of a batch, relative to GD; processor seconds on one thread, and the "
        "most bytes that tensors take.",
    ]
    if any(budget.name != "batches" for budget in table.budgets):
        notes.append(
            f"As much time: as many batches as take the time of {table.reference}. Single-task "
            "training, which Δm refers to, has the recipe's batches and rate throughout."
        )
    if any(budget.name == "tuned" for budget in table.budgets):
        notes.append(
            f"Best rate: of {len(table.rates)}, the same for encoder and heads, by held-out Δm "
            "over other seeds; in brackets."
        )
    notes += [
        f"{row.variant.title} found no weights for {row.skipped} of "
        f"{table.seeds * table.recipe.batches} batches, and took no step on them."
        for row in table.rows
        if row.skipped > 0
    ]
    notes += [f"{title} is left out: {reason}" for title, reason in table.refused.items()]
    return notes


def _shown(delta: _Estimate, diverged: int) -> str:
    lost = f" ({diverged} diverged)" if diverged else ""
    if delta.n == 0:
        return "diverged" if diverged else ""
    if math.isnan(delta.half):
        return f"{delta.mean:+.1f}{lost}"
    return f"{delta.mean:+.1f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{delta.half:.1f}{lost}"


def _gain(gain: _Estimate, verdict: str) -> str:
    shown = _shown(gain, 0)
    return f"{shown} {verdict}".rstrip()


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}x"


def _figure(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |"]
    lines.append("|---" + "|---:" * (len(header) - 1) + "|")
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)
