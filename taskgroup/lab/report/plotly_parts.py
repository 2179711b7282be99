"""What the figures of the HTML report have in common: runs, cards, axes and heat maps."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from taskgroup.lab.report.colours import INK
from taskgroup.lab.report.labels import short
from taskgroup.lab.report.run_data import RunData

try:  # The modules of the figures import plotly from here, so that one message says what to do.
    from plotly import colors
    from plotly import graph_objects as go
    from plotly.io.json import to_json_plotly
except ImportError as error:
    raise ImportError(
        f"The report needs {error.name}; install it with: pip install 'taskgroup[report]'"
    ) from None

__all__ = [
    "FEW",
    "LETTER",
    "Card",
    "Shown",
    "batch_axis",
    "colorbar",
    "colors",
    "escaped",
    "go",
    "heatmap",
    "layout",
    "letters",
    "room_for",
    "row_height",
    "task_axis",
]

FEW = 24  # tasks that have a figure each, names at their columns, and numbers in their matrices
LETTER = 6.7  # pixels, of a name
_NAME = 24  # letters of a task's name beside a row; the pointer shows all of it
_FAINT = "rgba(128,128,128,0.22)"  # lines, on white and on black
_CLEAR = "rgba(0,0,0,0)"


class Shown(NamedTuple):
    """A run on the page, with its name there, in plain text, and its number, which is its colour.

    ``order`` holds the positions of its tasks in the order in which figures show them, and
    ``titles`` is ``{task: name as shown}``.
    """

    data: RunData
    name: str
    order: list[int]
    number: int
    titles: Mapping[str, str]

    @property
    def tasks(self) -> list[str]:
        """Its tasks in the order in which figures show them, as they are shown."""
        return [self.titles[self.data.tasks[k]] for k in self.order]


class Card(NamedTuple):
    """A figure on the page, drawn when it comes into view; the texts are plain.

    Cards stand side by side where each has ``width`` pixels; up to ``widest`` pixels they look
    well. In a card that is narrower than ``numbers`` pixels the numbers in the cells are hidden.
    The key below the figure has a colour and a text for each of its entries. The frames of the
    figure, if there are several, are moments, from which the reader chooses.
    """

    title: str
    figure: go.Figure
    width: int
    widest: int | None = None
    numbers: int = 0
    key: Sequence[tuple[str, str]] = ()

    def json(self) -> str:
        """The figure for a script of the page, in which a "<" must not end the element."""
        return str(to_json_plotly(self.figure)).replace("<", "\\u003c")


def heatmap(
    tasks: list[str],
    cell: float,
    trace: dict[str, Any],
    margin: dict[str, float],
    frames: Sequence[go.Frame] = (),
    **more: Any,
) -> go.Figure:
    """Rows of tasks from top to bottom, each ``cell`` pixels high."""
    return go.Figure(
        {"type": "heatmap", "y": tasks, **trace},
        layout(
            round(cell * len(tasks)) + margin["t"] + margin["b"],
            margin={"l": room_for(tasks, cell), **margin},
            yaxis=task_axis(tasks, cell, autorange="reversed"),
            **more,
        ),
        frames,
    )


def layout(height: float, **more: Any) -> dict[str, Any]:
    """The layout of a figure of this height in pixels, with ``more`` of plotly's settings."""
    axis = {"gridcolor": _FAINT, "zeroline": False, "linecolor": _FAINT, "ticks": ""}
    found = {
        "template": "none",
        "height": height,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "showlegend": False,
        "hoverlabel": {"font": {"size": 12, "color": "#ffffff"}, "bgcolor": INK},
        "modebar": {"bgcolor": _CLEAR, "color": "#8c959f", "activecolor": "#57606a"},
        **more,
    }
    return {**found, **{name: {**axis, **more.get(name, {})} for name in ("xaxis", "yaxis")}}


def row_height(n_tasks: int, most: float = 34) -> float:
    """Pixels of a row, which has room for a name with up to 150 tasks."""
    return max(min(most, 1100 / n_tasks), 11.0 if n_tasks <= 150 else 1600 / n_tasks)


def letters(cell: float) -> float:
    """The size in pixels of the names beside rows of ``cell`` pixels."""
    return max(8.5, min(12.0, cell - 2))


def room_for(names: Iterable[str], cell: float) -> int:
    """Pixels that the longest name takes."""
    longest = max(len(short(name, _NAME)) for name in names)
    return round(12 + LETTER * letters(cell) / 12 * longest)


def task_axis(names: Sequence[str], cell: float, **more: Any) -> dict[str, Any]:
    """An axis of tasks; names for which there is no room are left out."""
    named = range(0, len(names), -(-11 // max(1, round(cell))))
    return {
        "type": "category",
        "showgrid": False,
        "tickfont": {"size": letters(cell)},
        "tickvals": list(named),
        "ticktext": [escaped(names[k], _NAME) for k in named],
        **more,
    }


def colorbar(title: str, **more: Any) -> dict[str, Any]:
    """A short one above the figure, beside plotly's buttons, so that it takes no width."""
    return {
        "orientation": "h",
        "title": {"text": title, "side": "top", "font": {"size": 12}},
        "thickness": 9,
        "lenmode": "pixels",
        "len": 170,
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        "y": 1,
        "yanchor": "bottom",
        "ypad": 6,
        "outlinewidth": 0,
        "tickfont": {"size": 10.5},
        **more,
    }


def batch_axis(note: str, **more: Any) -> dict[str, Any]:
    """An axis of batches, with a note on them in its title."""
    text = f"batch ({note})" if note else "batch"
    return {"title": {"text": text, "standoff": 6}, "nticks": 8, **more}


def escaped(name: str, longest: int = 40) -> str:
    """A name, shortened, for a text that plotly reads as markup."""
    return html.escape(short(name, longest), quote=False)
