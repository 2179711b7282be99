"""The tables of a comparison."""

from __future__ import annotations

import math
import os

from rich.console import RenderableType
from rich.text import Text

from taskgroup.lab.studies.formats import TerminalTable, markdown_table, save_csv
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.results import BUDGETS, Table
from taskgroup.lab.words import listed

__all__ = ["markdown", "tables", "write_csv"]

Rows = tuple[list[str], list[list[str]]]  # header and rows


def tables(table: Table) -> list[RenderableType]:
    """The results for a terminal: Δm, the differences to joint training, and notes on them."""
    shown: list[RenderableType] = [Text(table.headline, style="bold")]
    for header, rows in (_gain_rows(table), _difference_rows(table)):
        short = [[cell.replace("\N{NO-BREAK SPACE}", "") for cell in row] for row in rows]
        shown.append(TerminalTable(header, short, bold="Selective"))
    return [*shown, *(Text(f"{note}\n", style="dim") for note in _notes(table))]


def markdown(table: Table, command: str | None = None) -> str:
    """The results as Markdown, with the command line that made them, if there was one."""
    names = {table.problem.metric_names[task] for task in table.tasks}
    metric = names.pop() if len(names) == 1 else "Metric"
    parts = [
        f"# {table.headline}",
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
            if task in metrics and single[task] <= 0:  # nothing can be divided by it
                cells[-1] = f"{metrics[task]:.4f}"
            elif task in metrics:
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
    if useless := [task for task, value in table.single["held_out"].items() if value <= 0]:
        notes.append(
            "Δm is unknown: it divides by the held-out metrics of single-task training, and those "
            f"of {listed(useless)} are not above zero."
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
    return delta.shown() + (f" ({diverged} diverged)" if diverged else "")


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}x"
