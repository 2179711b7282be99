"""A comparison: its tables and its picture."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.text import Text

from taskgroup.lab.compare.formats import markdown_table, save_csv, terminal_table
from taskgroup.lab.compare.intervals import Estimate
from taskgroup.lab.compare.results import BUDGETS, Row, Table
from taskgroup.lab.report.colours import HARMS, SERVES
from taskgroup.lab.report.matplotlib_figures import open_axes, save
from taskgroup.lab.words import counted

__all__ = ["delta_m_plot", "markdown", "tables", "write_csv"]

Rows = tuple[list[str], list[list[str]]]  # header and rows


def tables(table: Table) -> list[RenderableType]:
    """The results for a terminal: Δm, the differences to joint training, and notes on them."""
    shown: list[RenderableType] = [Text(_headline(table), style="bold")]
    for header, rows in (_gain_rows(table), _difference_rows(table)):
        # Rich breaks a line at any space, so a number and its interval must be one word.
        words = [[cell.replace("\N{NO-BREAK SPACE}", "") for cell in row] for row in rows]
        shown.append(terminal_table(header, words, bold="Selective"))
    return [*shown, *(Text(f"{note}\n", style="dim") for note in _notes(table))]


def markdown(table: Table, command: str | None = None) -> str:
    """The results as Markdown, with the command line that made them, if there was one."""
    names = {table.problem.metric_names[task] for task in table.tasks}
    metric = names.pop() if len(names) == 1 else "Metric"
    parts = [
        f"# {_headline(table)}",
        *([] if command is None else [f"```\n{command}\n```"]),
        markdown_table(*_gain_rows(table)),
        markdown_table(*_difference_rows(table)),
        "\n".join(f"- {note}" for note in _notes(table)),
    ]
    for budget in table.budgets:
        parts += [
            f"## {metric} of each task, {BUDGETS[budget]}",
            "Mean over the seeds. In brackets: the gain over single-task training, in percent.",
        ]
        for split, title in (("held_out", "Held-out data"), ("train", "Fixed training data")):
            if split not in table.problem.splits:
                continue
            parts += [f"{title}:", markdown_table(*_task_rows(table, budget, split))]
    groups = [
        [row.variant.title, f"{row.groups:.1f}", f"{100 * row.changes:.0f} %"]
        for row in table.rows
        if row.variant.settings.get("method") == "selective"
    ]
    parts += [
        "## Groups",
        "Mean number of groups over the second half of a run, and the share of the batches in the "
        "last quarter that changed the partition.",
        markdown_table(["", "groups", "batches with a change"], groups),
    ]
    return "\n\n".join(parts) + "\n"


def write_csv(table: Table, path: str | os.PathLike[str]) -> None:
    """Write all numbers, a line per variant, budget and split."""
    lines = table.records()
    header = list(lines[0])
    save_csv(path, header, ([line.get(column, "") for column in header] for line in lines))


def delta_m_plot(table: Table, path: str | os.PathLike[str]) -> None:
    """Draw Δm against the time per batch, and Δm of all methods in the last budget.

    On the left is the trade-off of the paper's Figure 2, with Δm on the other axis. On the right is
    the fair comparison, sorted, with the noise floor around joint training shaded.
    """
    last = table.budgets[-1]
    rows = [row for row in table.rows if row.delta[last, "held_out"].n]
    rows.sort(key=lambda row: row.delta[last, "held_out"].mean, reverse=True)
    names = [f"{row.variant.title}  {n}" for n, row in enumerate(rows, start=1)]
    figure = Figure(figsize=(12.5, 1.6 + 0.27 * max(8, len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))

    _draw_cost(left, rows)
    open_axes(left, "Equal batches (numbers: see the right)").set(
        xlabel="time per batch, relative to joint training",
        ylabel="Δm against single-task training, %",
    )
    joint = table.joint
    centre, floor = joint.delta[last, "held_out"].mean, joint.floor[last, "held_out"]
    if math.isfinite(centre + floor):  # needs several seeds
        right.axvspan(centre - floor, centre + floor, color="#eeeeee", zorder=0)
    for y, row in enumerate(rows):
        mean, half, _ = row.delta[last, "held_out"]
        right.errorbar(mean, y, xerr=half, fmt="o", color=_colour(row), markersize=5, capsize=2)
    right.set_yticks(range(len(rows)), names)
    open_axes(right, BUDGETS[last].capitalize()).set(
        xlabel="Δm against single-task training, % (shaded: noise floor around GD)",
        ylim=(len(rows) - 0.3, -0.7),
    )
    for axes in (left, right):
        axes.grid(alpha=0.25)
    save(figure, path)


def _draw_cost(axes: Axes, rows: Sequence[Row]) -> None:
    """The rows by their number: Δm against the time per batch."""
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
    # A point that is far away would press the others together: it is drawn at the edge, with its
    # value beside it.
    means = sorted(delta.mean for _, _, delta, _ in known)
    middle = statistics.median(means)
    reach = 1 + 4 * statistics.median(abs(mean - middle) for mean in means)
    low = max(means[0], middle - reach)
    high = min(means[-1], middle + reach)
    margin = 0.15 * (high - low) + 0.1
    for n, time, (mean, half, _), colour in known:
        y = min(max(mean, low), high)
        if y == mean:
            axes.errorbar(time, y, yerr=half, fmt="none", color=colour, alpha=0.4, zorder=1)
        else:
            up = mean > high
            axes.annotate(
                f"{mean:+.0f}",
                (time, y),
                xytext=(0, 22 if up else -22),
                textcoords="offset points",
                arrowprops={"arrowstyle": "<-", "color": colour},
                ha="center",
                va="bottom" if up else "top",
                fontsize=8,
                color=colour,
            )
        axes.plot(time, y, "o", color=colour, markersize=12, zorder=2 + n, markeredgecolor="white")
        axes.annotate(
            str(n), (time, y), ha="center", va="center", fontsize=7, color="white", zorder=3 + n
        )
    axes.set_ylim(low - 2 * margin, high + 2 * margin)


def _colour(row: Row) -> str:
    return {"selective": HARMS, "gd": "#222222"}.get(row.variant.settings.get("method", ""), SERVES)


def _headline(table: Table) -> str:
    return (
        f"{table.recipe.data}: {len(table.tasks)} tasks, {table.recipe.batches} batches of "
        f"{table.recipe.batch_size}, {counted(table.seeds, 'seed')}"
    )


def _gain_rows(table: Table) -> Rows:
    rows = []
    for row in table.rows:
        cells = [row.variant.title, _times(row.time), _times(row.memory)]
        for budget in table.budgets:
            cells.append(_shown(row.delta[budget, "held_out"], row.diverged[budget]))
            if budget == "tuned" and row.rate is not None:
                cells[-1] += f" ({row.rate:.2g})"
        rows.append(cells)
    return ["Δm, %", "time", "memory", *(BUDGETS[budget] for budget in table.budgets)], rows


def _difference_rows(table: Table) -> Rows:
    last = table.budgets[-1]
    keys = [(budget, "held_out") for budget in table.budgets]
    columns = [f"held-out, {BUDGETS[budget]}" for budget in table.budgets]
    if "train" in table.problem.splits:
        keys.append((last, "train"))
        columns.append(f"training data, {BUDGETS[last]}")
    rows = [
        [
            row.variant.title,
            *(f"{_shown(row.gain[key])} {row.verdict(*key)}".rstrip() for key in keys),
        ]
        for row in table.rows
        if row.variant.name != row.variant.against
    ]
    return ["Δm minus that of GD", *columns], rows


def _task_rows(table: Table, budget: str, split: str) -> Rows:
    single = table.single[split]
    rows = [["Single-task", *(f"{single[task]:.4f}" for task in table.tasks)]]
    for row in table.rows:
        cells = [row.variant.title]
        metrics = row.metrics.get((budget, split), {})
        for task in table.tasks:
            cells.append("")
            if task in metrics:
                sign = -1 if table.problem.lower_is_better[task] else 1
                gain = sign * 100 * (metrics[task] - single[task]) / single[task]
                cells[-1] = f"{metrics[task]:.4f} ({gain:+.1f})"
        rows.append(cells)
    return ["", *(table.problem.titles[task] for task in table.tasks)], rows


def _notes(table: Table) -> list[str]:
    last = table.budgets[-1]
    floor = table.joint.floor[last, "held_out"]
    noise = (
        "Noise floor: unknown; it takes at least two seeds whose joint run did not diverge."
        if math.isnan(floor)
        else f"Noise floor: two sets of {table.seeds} joint runs differ by up to {floor:.1f} by "
        f"chance ({BUDGETS[last]}, held-out). A difference is called better or worse only if it is "
        f"outside both this floor and its own interval. Of {len(table.rows)} rows, up to one in "
        "twenty is so by chance."
    )
    notes = [
        "Δm: gain over single-task training on held-out data; the mean over the seeds and its 95% "
        "interval. Higher is better.",
        noise,
        "Time and memory: per batch, relative to GD. Time is processor seconds on one thread; "
        "memory is the most bytes that tensors take.",
    ]
    if table.budgets != ["batches"]:
        notes.append(
            f"Equal time: as many batches as take the time of {table.reference}. Single-task "
            "training, to which Δm refers, always has the batches and the rate of the recipe."
        )
    if "tuned" in table.budgets:
        notes.append(
            f"Best rate: equal time, at the one of {len(table.rates)} learning rates with the best "
            "held-out Δm over other seeds, for encoder and heads alike; the rate is in brackets."
        )
    batches = table.seeds * table.recipe.batches
    notes += [
        f"{row.variant.title} found no weights for {row.skipped} of {batches} batches, and took no "
        "step on them."
        for row in table.rows
        if row.skipped > 0
    ]
    return notes + [f"{title} is left out: {reason}" for title, reason in table.refused.items()]


def _shown(delta: Estimate, diverged: int = 0) -> str:
    """The mean and its interval, and how many runs diverged."""
    if delta.n == 0:
        return "diverged" if diverged else ""
    shown = f"{delta.mean:+.1f}"
    if not math.isnan(delta.half):
        shown += f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{delta.half:.1f}"
    return shown + (f" ({diverged} diverged)" if diverged else "")


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}x"
