"""Draw the results of test_figure2.py on GPUs into the docs: ``python -m benchmarks.figure2``.

Reads results/<machine>/figure2.csv, draws a picture for each set of tasks into docs/images, and
writes pictures and tables between two marks in docs/reproduce.md. Rows that were measured on a CPU,
with a tiny backbone, are ignored. If there are no rows of a GPU, the page says so.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/reproduce.md"
BEGIN = "<!-- written by python -m benchmarks.figure2 -->"
END = "<!-- end -->"
NOTHING = "**Not yet measured on a GPU.**"
JOINT = "joint training"
NOT_INSTALLED, OUT_OF_MEMORY = "not installed", "out of memory"  # reasons of rows without numbers
MODELS = ["tiny", "vit-t", "vit-s", "vit-b", "vit-l"]
# The colours of joint training, selective updates and the other methods; darker in float32.
COLOURS = {
    "float32": ("#222222", "#b2182b", "#2166ac"),
    "bfloat16": ("#9a9a9a", "#f4a582", "#92c5de"),
}

Row = dict[str, str]


def latest(path: Path) -> list[Row]:
    """The rows of a file: the last row of each method on each case."""
    with path.open(newline="") as file:
        rows = {
            (row["data"], row["model"], row["dtype"], _method(row)): row
            for row in csv.DictReader(file)
        }
    return list(rows.values())


def _method(row: Row) -> str:
    return f"{row['method']}, M = {row['M']}" if row["M"] else row["method"]


def _size(model: str) -> int:
    return MODELS.index(model)


def draw(rows: list[Row], path: Path) -> None:
    """Draw bars of time and memory relative to joint training, as in the paper's Figure 2.

    For each dtype it shows the backbone on which the most methods were measured; among equals, the
    largest. The picture has a white background and is narrow, because the page may be dark and the
    screen small.

    Args:
        rows: the rows of one set of tasks.
        path: the path of the PNG.
    """
    shown: dict[str, dict[str, Row]] = {}
    models = {}
    for dtype in COLOURS:
        of_model: dict[str, dict[str, Row]] = {}
        for row in rows:
            # A method that does not fit into memory gets a label instead of a bar.
            if row["dtype"] == dtype and (row["relative"] or row["reason"] == OUT_OF_MEMORY):
                of_model.setdefault(row["model"], {})[_method(row)] = row
        known = {
            model: own for model, own in of_model.items() if own.get(JOINT, {}).get("relative")
        }
        if known:
            models[dtype] = max(known, key=lambda model: (len(known[model]), _size(model)))
            shown[dtype] = known[models[dtype]]
    if not shown:
        return
    first = next(iter(shown.values()))
    names = list(dict.fromkeys(name for of_dtype in shown.values() for name in of_dtype))

    def place(name: str) -> tuple[bool, float]:
        row = first.get(name)
        return name != JOINT, float(row["relative"]) if row and row["relative"] else float("inf")

    names.sort(key=place)
    figure = Figure(figsize=(5.4, 1.0 + 0.3 * len(names)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    for axes, column, title in (
        (time, "relative", "time per batch"),
        (memory, "relative_peak", "peak memory"),
    ):
        _bars(axes, names, shown, column)
        axes.set_title(title, fontsize=9, loc="left")
    time.set_yticks(range(len(names)), names, fontsize=8)
    time.set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel("times joint training", fontsize=9)
    handles = [
        Patch(color=COLOURS[dtype][0], label=f"{dtype}, {_backbone(model)}")
        for dtype, model in models.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor="white")


def _bars(axes: Axes, names: list[str], shown: dict[str, dict[str, Row]], column: str) -> None:
    thick = 0.8 / len(shown)
    longest = 1.0
    for k, (dtype, of_dtype) in enumerate(shown.items()):
        own = [name for name in names if name in of_dtype]
        values = [float(of_dtype[name][column] or 0) for name in own]
        longest = max(longest, *values)
        bars = axes.barh(
            [names.index(name) + (k - (len(shown) - 1) / 2) * thick for name in own],
            values,
            thick,
            color=[COLOURS[dtype][_kind(name)] for name in own],
        )
        labels = [
            f"{value:.2f}" if of_dtype[name][column] else of_dtype[name]["reason"]
            for name, value in zip(own, values, strict=True)
        ]
        axes.bar_label(bars, labels, padding=2, fontsize=6.5)
    axes.axvline(1, color="#888888", linewidth=0.8, linestyle=":", zorder=3)
    axes.set_xlim(0, 1.22 * longest)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _kind(name: str) -> int:
    return 0 if name == JOINT else 1 if ", M = " in name else 2


def _backbone(model: str) -> str:
    return model if model == "tiny" else f"ViT-{model[-1].upper()}"


def table(rows: list[Row]) -> list[str]:
    """A table in Markdown: one row for each method, one column for each backbone and dtype."""
    cases = sorted({(row["model"], row["dtype"]) for row in rows}, key=lambda c: (_size(c[0]), c))
    cells = {(_method(row), row["model"], row["dtype"]): _cell(row) for row in rows}
    by_method = {
        name: [cells.get((name, *case), "") for case in cases]
        for name in dict.fromkeys(_method(row) for row in rows)
    }
    absent = [name for name, own in by_method.items() if {*own} <= {NOT_INSTALLED, ""}]
    heads = [f"{_backbone(model)} {dtype}" for model, dtype in cases]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(cases)}"]
    lines += [f"| {n} | {' | '.join(own)} |" for n, own in by_method.items() if n not in absent]
    if absent:
        lines += ["", f"Not installed there: {', '.join(absent)}."]
    return lines


def _cell(row: Row) -> str:
    if row["reason"]:
        return row["reason"]
    if row["method"] == JOINT or not row["relative"]:
        return f"{float(row['ms']):.3g} ms, {float(row['peak_gb']):.3g} GB"
    return f"{float(row['relative']):.2f}, {float(row['relative_peak']):.2f}"


def section(root: Path, draws: bool = True) -> str:
    """The text between the marks, with the results of all GPUs.

    Args:
        root: the root of the repository.
        draws: whether to draw the pictures too.
    """
    parts: list[str] = []
    for path in sorted((root / "benchmarks/results").glob("*/figure2.csv")):
        rows = [row for row in latest(path) if row["device"] == "cuda"]
        if any(row["relative"] for row in rows):
            parts += _of_machine(rows, path.parent.name, root, draws)
    return "\n".join(parts).strip() or NOTHING


def _of_machine(rows: list[Row], machine: str, root: Path, draws: bool) -> Iterable[str]:
    last = rows[-1]
    yield (
        f"Measured on one {last['machine']} with torch {last['torch']}, taskgroup at "
        f"`{last['commit']}` ([rows](../benchmarks/results/{machine}/figure2.csv)). The tables "
        "show milliseconds per batch and gigabytes for joint training, and time and memory "
        "relative to it for the other methods. An empty cell was not measured."
    )
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        images, height, width = own[-1]["images"].split("x")
        name = f"figure2-{machine}-{data.lower()}.png"
        if draws:
            draw(own, root / "docs/images" / name)
        title = f"{data}, {own[-1]['K']} tasks, batches of {images} images of {height} x {width}"
        yield from ("", f"**{title}**", "")
        if any(row["method"] == JOINT and row["relative"] for row in own):
            yield f"![{title}: time and memory relative to joint training](images/{name})"
            yield ""
        yield from table(own)
    yield ""


def write(root: Path) -> None:
    """Write the section into the page."""
    page = root / PAGE
    before, _, rest = page.read_text("utf-8").partition(f"{BEGIN}\n")
    _, mark, after = rest.partition(f"\n{END}")
    if not mark:
        raise SystemExit(f"{page} lacks the marks between which the figure goes: {BEGIN}, {END}.")
    page.write_text(f"{before}{BEGIN}\n{section(root)}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    write(ROOT)
