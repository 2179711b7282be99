"""The matrices of the HTML report: affinity and conflicts over the batches, with the groups."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.report.affinities import largest, normalised, relative
from taskgroup.lab.report.colours import HARMS, INK, SERVES, ZERO
from taskgroup.lab.report.groups import blocks
from taskgroup.lab.report.plotly_parts import (
    FEW,
    Card,
    Shown,
    colorbar,
    go,
    heatmap,
    letters,
    room_for,
    row_height,
    task_axis,
)
from taskgroup.lab.report.run_data import Recorded
from taskgroup.lab.report.thinning import evenly

__all__ = ["affinity", "conflicts"]

_ENTRIES = 500_000  # of all matrices of a slider: 3 MB
_MATRICES = 200  # on a slider
_SCALE = [(0, HARMS), (0.5, ZERO), (1, SERVES)]


def affinity(run: Shown) -> Card:
    """The matrix that tasks are grouped by, over the batches."""
    recorded, title = _with_room(run.data.affinity, run.name)
    effects = relative(recorded.values)
    measured = ~np.isnan(recorded.values)
    measured |= measured.swapaxes(1, 2)
    unmeasured = np.where(measured, "no positive self-affinity yet", "never measured")
    matrices = recorded._replace(values=normalised(recorded.values))
    return _matrices(run, title, matrices, "normalised affinity", effects, unmeasured)


def conflicts(run: Shown) -> Card:
    """Cosines between gradients over the batches."""
    recorded, title = _with_room(run.data.conflicts, run.name)
    itself = np.eye(len(run.tasks), dtype=bool)
    values = np.where(itself, np.float32(np.nan), recorded.values)
    return _matrices(run, title, recorded._replace(values=values), "cosine")


def _with_room(recorded: Recorded, name: str) -> tuple[Recorded, str]:
    """As many matrices as a slider has room for, and the title of their figure."""
    batches, values = recorded
    most = min(_MATRICES, _ENTRIES // (2 * values[0].size))
    chosen = evenly(len(values), max(3, most))
    if len(batches) == 1:
        name = f"{name}, batch {batches[0]}"
    elif len(chosen) < len(batches):
        name = f"{name} ({len(chosen)} of {len(batches)} recorded matrices)"
    return Recorded(batches[chosen], values[chosen]), name


def _matrices(
    run: Shown,
    title: str,
    recorded: Recorded,
    meaning: str,
    effects: NDArray[np.float32] | None = None,
    unmeasured: NDArray[np.str_] | None = None,
) -> Card:
    """Symmetric matrices with the groups framed; the last one is shown first.

    The pointer shows a value and, if there are ``effects``, the effect of the row on the column;
    where the value is NaN, the text in ``unmeasured``.
    """
    tasks = run.tasks
    order = np.ix_(run.order, run.order)
    grouped = run.data.method == "selective" and len(tasks) > 1
    frames = []
    for n, batch in enumerate(recorded.batches):
        matrix = recorded.values[n][order] + np.float32(0)  # turns -0.0 into 0.0
        trace = {"z": matrix, "hovertemplate": f"%{{y}}, %{{x}}<br>{meaning}: %{{z:.3f}}"}
        if effects is not None and unmeasured is not None:
            trace |= _at_the_pointer(matrix, meaning, effects[n][order], unmeasured[n][order])
        trace["hovertemplate"] += "<extra></extra>"
        framed = _group_frames(run, int(batch)) if grouped else []
        frames.append(
            go.Frame(
                name=str(batch), data=[{"type": "heatmap", **trace}], layout={"shapes": framed}
            )
        )
    cell, few = row_height(len(tasks)), len(tasks) <= FEW
    end = largest(recorded.values[-1])
    beyond = np.abs(recorded.values[np.isfinite(recorded.values)]).max(initial=0) > 1.005 * end
    least, most = ("≤ ", "≥ ") if beyond else ("", "")  # the colours end before the values do
    digits = 1 if end >= 0.5 else 2
    number = 17 + 6 * digits  # pixels, with a sign
    figure = heatmap(
        tasks,
        cell,
        {
            "x": tasks,
            **trace,
            "zmin": -end,
            "zmax": end,
            "colorscale": _SCALE,
            "xgap": 1 if few else 0,
            "ygap": 1 if few else 0,
            "hoverongaps": unmeasured is not None,
            "texttemplate": f"%{{z:.{digits}f}}" if few else None,
            "textfont": {"size": 10, "color": INK},
            "colorbar": colorbar(
                meaning,
                tickvals=[-end, 0, end],
                ticktext=[f"{least}−{end:.2g}", "0", f"{most}{end:.2g}"],
            ),
        },
        {"r": 10, "t": 60, "b": room_for(tasks, cell) if few else 14},
        frames,
        xaxis=task_axis(
            tasks,
            cell,
            tickangle=-90,
            tickfont={"size": max(1, min(letters(cell), 250 / len(tasks)))},
            showticklabels=few,
            showline=False,
        ),
        shapes=framed,
    )
    figure.update_yaxes(showline=False)
    sides = room_for(tasks, cell) + 10
    return Card(
        title,
        figure,
        sides + max(260, round(min(cell, number) * len(tasks))),
        widest=sides + max(400, round(1.7 * cell * len(tasks))),
        numbers=sides + number * len(tasks),
    )


def _at_the_pointer(
    matrix: NDArray[np.float32],
    meaning: str,
    effects: NDArray[np.float32],
    unmeasured: NDArray[np.str_],
) -> dict[str, Any]:
    """The text at the pointer; words take more room than numbers."""
    pair = np.isnan(matrix) & ~np.eye(len(matrix), dtype=bool)
    effect = "<br>effect of %{y} on %{x}: "
    if not (pair | np.isnan(effects)).any():
        numbers = f"%{{y}}, %{{x}}<br>{meaning}: %{{z:.3f}}{effect}%{{customdata:.3f}}"
        return {"customdata": effects, "hovertemplate": numbers, "hoverongaps": False}
    value = np.where(np.isnan(matrix), unmeasured, np.char.mod("%.3f", matrix))
    value[np.diag_indices(len(matrix))] = "the task itself"
    there = np.where(np.isnan(effects), "not known", np.char.mod("%.3f", effects))
    words = f"%{{y}}, %{{x}}<br>{meaning}: %{{customdata[0]}}{effect}%{{customdata[1]}}"
    return {"customdata": np.stack([value, there], 2), "hovertemplate": words, "hoverongaps": True}


def _group_frames(run: Shown, batch: int) -> list[dict[str, Any]]:
    """A frame around the pairs of tasks that share a group after a batch, seen on any colour."""
    data = run.data
    n = min(int(np.searchsorted(data.batches, batch)), len(data.batches) - 1)
    path = "".join(
        f"M{left - 0.5},{top - 0.5}H{right - 0.5}V{bottom - 0.5}H{left - 0.5}Z"
        for top, bottom, left, right in blocks(data.groups[n][run.order])
    )
    lines = ({"color": "#ffffff", "width": 4}, {"color": INK, "width": 2})
    return [{"type": "path", "path": path, "line": line} for line in lines]
