"""The picture of a comparison shows its numbers where they are, and in words where it cannot."""

import dataclasses
import math

import numpy as np
import pytest

from taskgroup.lab.studies import comparison_plot
from taskgroup.lab.studies.comparison_plot import delta_m_plot
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.limits import limits
from taskgroup.lab.studies.presets import Variant
from taskgroup.lab.studies.results import BUDGETS
from tests.lab.fabricated import fabricated, variants

KINDS = {"selective updates", "joint training (GD)", "other methods"}


@pytest.fixture
def draw(monkeypatch):
    """Draw a table, and return the figure, which is not written."""
    figures = []
    monkeypatch.setattr(comparison_plot, "save", lambda figure, path: figures.append(figure))

    def drawn(table):
        delta_m_plot(table, "a.png")
        return figures.pop()

    return drawn


def test_a_picture_is_written(tmp_path):
    delta_m_plot(fabricated(variants()), tmp_path / "a.png")  # a warning would be an error
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def with_delta(table, means, half=0.4):
    """The table with other Δm, ``{name of the variant: mean}``, for all budgets."""
    rows = [
        dataclasses.replace(
            row,
            delta={
                key: Estimate(means.get(row.variant.name, e.mean), half, e.n)
                for key, e in row.delta.items()
            },
        )
        for row in table.rows
    ]
    return dataclasses.replace(table, rows=rows)


def places(figure):
    """``{title of the variant: its height in the picture}``."""
    axes = figure.axes[0]
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    return dict(zip(names, axes.get_yticks(), strict=True))


def markers(axes):
    """``{height: x}`` of all markers."""
    found = {}
    for line in axes.lines:
        if line.get_label() in KINDS:
            ((x,), (y,)) = line.get_data()
            assert y not in found
            found[y] = x
    return found


def said(axes):
    """``{height: what is written there}``."""
    return {text.xy[1]: text.get_text() for text in axes.texts if text.get_text()}


def intervals(axes):
    """``{height: (low, high)}`` of the intervals; both halves have the colour of the variant."""
    found = {}
    for line in axes.lines:
        if line.get_label().startswith("95% interval"):
            xs, (y, _) = line.get_data()
            low, high = found.get(y, (math.inf, -math.inf))
            found[y] = min(low, *xs), max(high, *xs)
    return found


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def check(figure, table):
    """Every number of the table is drawn at its place or written."""
    rows = {row.variant.title: row for row in table.rows}
    heights = places(figure)
    assert set(heights) == set(rows)
    *panels, times = figure.axes
    assert len(panels) == len(table.budgets)
    for axes, budget in zip(panels, table.budgets, strict=True):
        assert axes.get_title("left") == BUDGETS[budget].capitalize()
        assert "better →" in axes.get_xlabel()
        drawn, written, lines = markers(axes), said(axes), intervals(axes)
        low, high = axes.get_xlim()
        for title, y in heights.items():
            delta = rows[title].delta[budget, "held_out"]
            if y in drawn:
                assert drawn[y] == delta.mean
                assert low < delta.mean < high
                if math.isnan(delta.half):
                    assert y not in lines
                else:
                    ends = (max(low, delta.mean - delta.half), min(high, delta.mean + delta.half))
                    assert lines[y] == pytest.approx(ends)
            elif delta.n:
                assert delta.shown() in written[y]
                assert written[y][0] == "◂" if delta.mean < low else written[y][-1] == "▸"
            else:
                assert written[y] == "diverged"
            if rows[title].diverged[budget]:
                assert "diverged" in written[y]
    known = {y: rows[title].time for title, y in heights.items()}
    assert markers(times) == {y: time for y, time in known.items() if math.isfinite(time)}
    assert "faster" in times.get_xlabel()


def check_room(figure):
    """Nothing is cut off, and no names or titles overlap."""
    figure.draw_without_rendering()
    whole = figure.bbox
    titles = [axes._left_title.get_window_extent() for axes in figure.axes]
    names = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    ticks = [
        [label.get_window_extent() for label in axes.get_xticklabels()] for axes in figure.axes
    ]
    words = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    words += [*titles, *names, figure._suptitle.get_window_extent()]
    words.append(figure.legends[0].get_window_extent())
    for box in words:
        assert min(box.x0, box.y0, whole.x1 - box.x1, whole.y1 - box.y1) >= -1, box
    for boxes in (titles, names, *ticks):
        for k, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def scattered(names, around=0.0):
    draws = np.random.default_rng(0)
    return {name: around + draws.normal() for name in names}


NAMES = [variant.name for variant in variants()]
FAR = {"uw": -812.3, "gd": 1.2e9}
MANY = [*variants(), *(Variant(f"x{n}", f"Variant {n}", {"method": "uw"}) for n in range(22))]
LONG = [
    dataclasses.replace(v, title=f"{v.title} with what was set in a recipe of somebody, at length")
    for v in variants()
]
TABLES = {
    "eighteen": lambda: fabricated(variants()),
    "negative": lambda: with_delta(fabricated(variants()), scattered(NAMES, -40)),
    "far": lambda: with_delta(fabricated(variants()), {**scattered(NAMES), **FAR}),
    "wide": lambda: with_delta(fabricated(variants()), scattered(NAMES), half=90.0),
    "equal": lambda: with_delta(fabricated(variants()), dict.fromkeys(NAMES, 0.0), half=0.0),
    "one seed": lambda: fabricated(variants(), seeds=1),
    "some diverged": lambda: fabricated(variants(), diverged=["uw", "selective"]),
    "joint diverged": lambda: fabricated(variants(), diverged=["gd"]),
    "all diverged": lambda: fabricated(variants(), diverged=NAMES),
    "forty": lambda: fabricated(MANY),
    "long names": lambda: fabricated(LONG),
    "two": lambda: fabricated(variants()[:2]),
}


@pytest.mark.parametrize("name", TABLES)
def test_numbers_stand_where_they_are(name, draw):
    table = TABLES[name]()
    check(draw(table), table)


@pytest.mark.parametrize("name", ["far", "forty", "long names", "two"])
def test_nothing_is_cut_off(name, draw):
    check_room(draw(TABLES[name]()))


def test_one_budget(draw):
    table = dataclasses.replace(fabricated(variants("cheap")), budgets=["batches"])
    check(draw(table), table)


@pytest.mark.parametrize("time", [0.2, 1.0, 1.001, 40.0, 3000.0])
def test_methods_that_cost_alike_or_not(time, draw):
    table = fabricated(variants()[:2])
    table.rows[1] = dataclasses.replace(table.rows[1], time=time)
    figure = draw(table)
    check(figure, table)
    check_room(figure)


def test_some_runs_diverged(draw):
    table = fabricated(variants())
    table.rows[2].diverged["time"] = 2
    figure = draw(table)
    check(figure, table)
    y = places(figure)[table.rows[2].variant.title]
    assert [said(axes).get(y) for axes in figure.axes] == [None, "2 diverged", None, None]


def test_far_values_do_not_press_the_others_together(draw):
    means = {**scattered(NAMES), "uw": -812.3, "dtp": -640.0}
    figure = draw(with_delta(fabricated(variants()), means))
    for axes in figure.axes[:-1]:
        assert len(markers(axes)) == len(NAMES) - 2
        low, high = axes.get_xlim()
        assert high - low < 10
    # As long as they leave room for the others, they are drawn.
    figure = draw(with_delta(fabricated(variants()), {**scattered(NAMES), "uw": -6.0}))
    assert len(markers(figure.axes[0])) == len(NAMES)


def test_best_of_the_last_budget_stands_at_the_top(draw):
    table = with_delta(fabricated(variants()), {**scattered(NAMES), "uw": 30.0, "dtp": -30.0})
    heights = places(draw(table))
    order = sorted(heights, key=heights.get)
    assert (order[0], order[-1]) == ("UW", "DTP")


def test_what_is_not_drawn_is_not_in_the_legend(draw):
    floor = "noise floor around GD"
    table = fabricated(variants())
    figure = draw(table)
    assert legend(figure) == [
        *("selective updates", "joint training (GD)", "other methods"),
        *(floor, "single-task training", "95% interval over 5 seeds"),
    ]
    for axes, budget in zip(figure.axes, table.budgets, strict=False):
        (shaded,) = axes.patches
        mean, width = table.joint.delta[budget, "held_out"].mean, 1.25
        assert shaded.get_x() == pytest.approx(mean - width)
        assert shaded.get_width() == pytest.approx(2 * width)
    assert "single-task training" not in legend(draw(with_delta(table, scattered(NAMES, -40))))
    assert "noise" not in str(legend(draw(fabricated(variants(), seeds=1))))
    assert "interval" not in str(legend(draw(fabricated(variants(), seeds=1))))
    assert floor not in legend(draw(fabricated(variants(), diverged=["gd"])))
    far = with_delta(table, {**scattered(NAMES), "gd": -800.0})
    assert floor not in legend(draw(far))  # it is outside, like GD


def test_kinds_differ_in_shape_as_well_as_in_colour(draw):
    lines = [
        line for line in draw(fabricated(variants())).axes[0].lines if line.get_label() in KINDS
    ]
    shapes = {line.get_label(): line.get_marker() for line in lines}
    assert len(set(shapes.values())) == len(KINDS)


def test_limits():
    draws = np.random.default_rng(1).normal(size=200)
    low, high = limits(draws.tolist())
    assert low < draws.min()
    assert draws.max() < high
    assert limits([*draws.tolist(), math.nan, math.inf]) == (low, high)
    assert limits([*draws.tolist(), 1e6, -1e9]) == pytest.approx((low, high), rel=0.1)
    assert limits([]) == limits([math.nan]) == (-1, 1)
    low, high = limits([2.0])
    assert low < 2 < high
    low, high = limits([0.0, 0.0, 0.0, 1.0])  # most are equal
    assert low < 0 < high


def test_values_within_their_intervals_are_not_far():
    # As far apart as their intervals are wide, whatever their order.
    means = [-1.4, 0.40, 0.37, 0.15, 0.18, 0.40]
    low, high = limits(means, [0.8, *[0.6] * 5])
    assert low < -1.4 - 0.8
    assert high > 0.4 + 0.6
