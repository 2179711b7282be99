"""The tables of a comparison."""

from __future__ import annotations

import math
import os

from rich.console import RenderableType
from rich.text import Text

from taskgroup.lab.studies.formats import TerminalTable, markdown_table, save_csv
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.results import Row, Table
from taskgroup.lab.words import listed

__all__ = ["markdown", "tables", "write_csv"]

_OFF = 0.1  # share of the time, from which on tuned runs took more or less than equal time

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
            f"## {metric} of each task, {table.title(budget)}",
            "Mean over the seeds. In brackets: the gain over single-task training, in percent.",
        ]
        for split, title in (("held_out", "Held-out data"), ("train", "Fixed training data")):
            if split not in table.problem.splits:
                continue
            parts += [f"{title}:", markdown_table(*_task_rows(table, budget, split))]
    groups = [
        [row.variant.title, f"{row.groups:.1f}", f"{100 * row.changes:.0f} %", _agreement(row)]
        for row in table.rows
        if row.variant.settings.get("method") == "selective"
    ]
    parts += [
        "## Groups",
        "Mean number of groups over the second half of a run; the share of the batches in the last "
        "quarter that changed the partition; and the agreement of the partitions at the end: the "
        "mean adjusted Rand index of two seeds, 1 for equal partitions and 0 for random ones.",
        markdown_table(["", "groups", "batches with a change", "agreement"], groups),
    ]
    return "\n\n".join(parts) + "\n"


def write_csv(table: Table, path: str | os.PathLike[str]) -> None:
    """Write all numbers, a line per variant, budget and split."""
    lines = table.records()
    header = list(lines[0])
    save_csv(path, header, ([line.get(column, "") for column in header] for line in lines))


def _agreement(row: Row) -> str:
    return "" if math.isnan(row.agreement) else f"{row.agreement:.2f}"


def _gain_rows(table: Table) -> Rows:
    published = _published(table)
    header = ["Δm, %", "time", "memory", *(table.title(budget) for budget in table.budgets)]
    if published:
        header.insert(4, "published")  # after equal batches
    rows = []
    for row in table.rows:
        cells = [row.variant.title, _times(row.time), _times(row.memory)]
        for budget in table.budgets:
            cells.append(_shown(row.delta[budget, "held_out"], row.diverged[budget]))
            if budget == "tuned":
                cells[-1] += _tuned(table, row)
        if published:
            cells.insert(4, published.get(row.variant.name, ""))
        rows.append(cells)
    return header, rows


def _published(table: Table) -> dict[str, str]:
    """``{name of a variant: published Δm}``, with the sign that Δm has here."""
    known = table.problem.published
    names = [row.variant.name for row in table.rows]
    return {name: f"{0 - known[name]:+.1f}" for name in names if name in known}


def _tuned(table: Table, row: Row) -> str:
    """The best rate and batch size, of those of which there was a choice."""
    if row.rate is None:
        return ""
    shown = [f"{row.rate:.2g}"] if len(table.rates) > 1 else []
    if len(table.batch_sizes) > 1:
        shown.append(str(row.batch_size))
    return f" ({', '.join(shown)})"


def _difference_rows(table: Table) -> Rows:
    last = table.budgets[-1]
    keys = [(budget, "held_out") for budget in table.budgets]
    columns = [f"held-out, {table.title(budget)}" for budget in table.budgets]
    if "train" in table.problem.splits:
        keys.append((last, "train"))
        columns.append(f"training data, {table.title(last)}")
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
        f"chance ({table.title(last)}, held-out). A difference is called better or worse only if "
        "it is outside both this floor and its own interval. Of "
        f"{len(table.rows)} rows, up to one in twenty is so by chance."
    )
    notes = [
        "Δm: gain over single-task training on held-out data; the mean over the seeds and its 95% "
        "interval. Higher is better.",
        noise,
        "Time and memory: per batch, relative to GD. Time is processor seconds on one thread; "
        "memory is the most bytes that tensors take.",
    ]
    if _published(table):
        note = (
            "Published: the Δm of publications, whose sign is turned: they print positive numbers "
            f"for what is worse than single-task training. {table.problem.published_note}"
        )
        notes.append(note.rstrip())
    if table.budgets != ["batches"]:
        notes.append(
            f"Equal time: as many batches as take the time of {table.reference}. Single-task "
            "training, to which Δm refers, always has the batches, the batch size and the rate of "
            "the recipe."
        )
    if "tuned" in table.budgets:
        notes += _notes_on_tuning(table)
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


def _notes_on_tuning(table: Table) -> list[str]:
    rates, sizes = len(table.rates), len(table.batch_sizes)
    title = table.title("tuned").capitalize()
    if sizes == 1:
        return [
            f"{title}: equal time, at the one of {rates} learning rates with the best held-out Δm "
            "over other seeds, for encoder and heads alike; the rate is in brackets."
        ]
    tried = f"{sizes} batch sizes ({', '.join(map(str, table.batch_sizes))})"
    tried = (
        tried
        if rates == 1
        else f"{rates} learning rates, for encoder and heads alike, times {tried}"
    )
    notes = [
        f"{title}: equal time, at the best of {tried}, by held-out Δm over other seeds; the best "
        f"{'is' if rates == 1 else 'pair is'} in brackets. The number of batches follows from the "
        "time of a step at the batch size. Warm-up and other settings that count batches stay as "
        "they are."
    ]
    return notes + [
        f"{row.variant.title} took {row.tuned_time:.2f} times as long as the others with its best "
        "rate and batch size, because its batches took another number of steps there than at equal "
        "batches."
        for row in table.rows
        if row.tuned_time is not None and abs(row.tuned_time - 1) > _OFF
    ]


def _shown(delta: Estimate, diverged: int = 0) -> str:
    """The mean and its interval, and how many runs diverged."""
    if delta.n == 0:
        return "diverged" if diverged else ""
    return delta.shown() + (f" ({diverged} diverged)" if diverged else "")


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}x"
