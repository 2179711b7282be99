"""Gains and correlations: against scipy, and worked out from made-up results."""

import dataclasses
import io
import itertools
import math
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from taskgroup.lab.studies import affinity_gain_report as report
from taskgroup.lab.studies import intervals
from taskgroup.lab.studies.affinity_gain import AffinityGain
from taskgroup.lab.studies.intervals import spearman
from tests.lab.small import yeast

TASKS = ["class1", "class2", "class3"]
ALONE = {"class1": 0.5, "class2": 0.8, "class3": 0.4}
# Of the first task when trained with the second; two seeds.
TOGETHER = {
    ("class1", "class2"): (0.55, 0.65),
    ("class2", "class1"): (0.76, 0.80),
    ("class1", "class3"): (0.50, 0.50),
    ("class3", "class1"): (0.42, 0.44),
    ("class2", "class3"): (0.84, 0.84),
    ("class3", "class2"): (0.30, 0.34),
}
AFFINITY = {
    "proximal": [[2.0, 1.0, 0.5], [-1.0, 4.0, 1.0], [0.0, 2.0, 0.5]],
    "gradient": [[1.0, 0.1, 0.2], [0.3, 1.0, 0.4], [0.5, 0.6, 0.0]],  # class3: none of its own
    "lookahead": [[1.0, math.nan, 0.2], [0.3, 1.0, 0.4], [0.5, 0.6, 1.0]],
}


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 100)


def off_diagonal(matrix):
    return matrix[~np.eye(len(matrix), dtype=bool)]


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties):
    draws = np.random.default_rng(0)
    first, second = draws.normal(size=(2, 6, 6))
    second += first
    if ties:
        first, second = first.round(), second.round()
    found = spearman(first, second)
    expected = stats.spearmanr(off_diagonal(first), off_diagonal(second)).statistic
    assert found.value == pytest.approx(expected)
    assert -1 <= found.low < found.value < found.high <= 1
    assert spearman(first, second) == found
    # The diagonal is not looked at, and of a symmetric matrix every pair counts once.
    np.fill_diagonal(first, 1e9)
    assert spearman(first, second) == found
    upper = np.triu_indices(6, 1)
    first, second = first + first.T, second + second.T
    expected = stats.spearmanr(first[upper], second[upper]).statistic
    assert spearman(first, second).value == pytest.approx(expected)


def test_spearman_leaves_out_what_is_not_finite():
    first, second = np.random.default_rng(1).normal(size=(2, 5, 5))
    first[0, 1], second[2, 3], first[4, 0] = np.nan, np.nan, np.inf
    kept = np.isfinite(first) & np.isfinite(second) & ~np.eye(5, dtype=bool)
    expected = stats.spearmanr(first[kept], second[kept]).statistic
    assert spearman(first, second).value == pytest.approx(expected)


@pytest.mark.parametrize("of", ["nothing", "constants"])
def test_spearman_of_nothing_is_nan(of):
    matrix = np.full((4, 4), np.nan if of == "nothing" else 1.0)
    found = spearman(matrix, np.arange(16.0).reshape(4, 4))
    assert all(math.isnan(value) for value in (found.value, found.low, found.high))


def test_interval_covers_the_correlation(monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 200)
    # Entries of one column share its shift, in both matrices: the interval must know of it. The
    # truth is that of many tasks. Of 25 draws 0.95 leave 24; fewer than 20 are 1 in 500.
    draws = np.random.default_rng(2)

    def pair(n_tasks):
        shift = draws.normal(size=n_tasks)
        return [shift + draws.normal(size=(n_tasks, n_tasks)) for _ in range(2)]

    first, second = pair(500)
    truth = stats.spearmanr(off_diagonal(first), off_diagonal(second)).statistic
    inside = 0
    for _ in range(25):
        found = spearman(*pair(10))
        inside += found.low <= truth <= found.high
    assert inside >= 20


def make(cell):
    if cell.name in AFFINITY:
        return {"affinity": AFFINITY[cell.name]}
    trained = cell.recipe.tasks
    if len(trained) == 1:
        values = {trained[0]: ALONE[trained[0]]}
    else:
        one, other = trained
        seed = cell.recipe.seed
        values = {one: TOGETHER[one, other][seed], other: TOGETHER[other, one][seed]}
    return {"metrics": dict.fromkeys(("train", "validation", "held_out"), values)}


def test_gains_by_hand(tmp_path, made_up):
    cells = made_up(make)
    gains = AffinityGain(yeast(), 2, tmp_path).run()
    # Row: trained with; column: whose gain. (0.6 - 0.5) / 0.5 for class1 with class2.
    nan = math.nan
    expected = [[nan, -2.5, 7.5], [20, nan, -20], [0, 5, nan]]
    np.testing.assert_allclose(gains.gain, expected, atol=1e-9)
    # Columns divided by the self-affinity.
    proximal = [[1, 0.25, 1], [-0.5, 1, 2], [0, 0.5, 1]]
    np.testing.assert_allclose(gains.affinity["proximal"], proximal)
    gradient = [[1, 0.1, nan], [0.3, 1, nan], [0.5, 0.6, nan]]
    np.testing.assert_allclose(gains.affinity["gradient"], gradient)
    assert gains.tasks == TASKS
    for kind, found in gains.affinity.items():
        x, y = off_diagonal(found), off_diagonal(gains.gain)
        kept = np.isfinite(x)
        directed = stats.spearmanr(x[kept], y[kept]).statistic
        assert gains.directed[kind].value == pytest.approx(directed)
    first, second = (
        [TOGETHER[k, i][seed] / ALONE[k] for i, k in itertools.permutations(TASKS, 2)]
        for seed in (0, 1)
    )
    assert gains.repeatable.value == pytest.approx(stats.spearmanr(first, second).statistic)

    # Three alone, three pairs, three affinities; two seeds. And never again.
    assert len(cells) == 18
    lookahead = [cell for cell in cells if cell.name == "lookahead"]
    assert {(c.recipe.method, c.lookahead_every) for c in lookahead} == {("gd", 1)}
    assert {c.recipe.affinity for c in cells if c.name == "gradient"} == {"gradient"}
    cells.clear()
    AffinityGain(yeast(), 2, tmp_path).run()
    assert cells == []


def test_tasks_stand_in_the_order_of_the_data(tmp_path, made_up):
    # As the affinity of a run does, whatever the order in the recipe.
    made_up(make)
    gains = AffinityGain(yeast(tasks="class3,class1,class2"), 2, tmp_path).run()
    assert gains.tasks == TASKS
    assert gains.gain[1, 0] == pytest.approx(20)


def test_diverged_runs_are_left_out(tmp_path, made_up):
    def lose(cell):
        trained = cell.recipe.tasks
        if trained in (("class1", "class2"), ("class3",)):
            lost = trained == ("class3",) or cell.recipe.seed == 0
            return {**make(cell), "metrics": {}, "diverged": 3} if lost else make(cell)
        return make(cell)

    made_up(lose)
    gains = AffinityGain(yeast(), 2, tmp_path).run()
    assert gains.gain[1, 0] == pytest.approx(30)  # of the second seed alone
    assert np.isnan(gains.gain[:, 2]).all()  # class3 alone diverged
    assert gains.gain[2, 0] == 0
    console = Console(width=80, file=io.StringIO())
    for shown in report.tables(gains):
        console.print(shown)
    assert "nan" not in console.file.getvalue() + report.markdown(gains, "x")


def test_one_seed_has_nothing_to_repeat(tmp_path, made_up):
    made_up(make)
    gains = AffinityGain(yeast(), 1, tmp_path).run()
    assert gains.repeatable is None
    assert "other seeds" not in report.markdown(gains, "x")


@pytest.mark.parametrize(
    ("changes", "seeds", "said"),
    [
        ({}, 0, "at least one seed, got 0"),
        ({"tasks": "class1,class2"}, 1, "at least three tasks"),
        ({"tasks": "class1,class2,depth"}, 1, "no task 'depth'"),
    ],
)
def test_bad_arguments(changes, seeds, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        AffinityGain(yeast(**changes), seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.learned
def test_affinities_of_real_runs(tmp_path, trained):
    gains = AffinityGain(yeast(batches=6, decay=0.3), 1, tmp_path).run()
    assert len(trained) == 9
    for kind, found in gains.affinity.items():
        own = found.diagonal()
        assert ((own == 1) | np.isnan(own)).all(), kind
        assert np.isfinite(off_diagonal(found)).any(), kind
    assert np.isfinite(off_diagonal(gains.gain)).all()
    assert np.isnan(gains.gain.diagonal()).all()


def test_report_holds_the_numbers(tmp_path, made_up):
    made_up(make)
    gains = AffinityGain(yeast(), 2, tmp_path / "out").run()
    text = report.markdown(gains, "taskgroup affinity-gain yeast")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[-3:] == [
        ["Class 1", "", "-2.5", "+7.5"],
        ["Class 2", "+20.0", "", "-20.0"],
        ["Class 3", "+0.0", "+5.0", ""],
    ]
    by_kind = {row[0]: row[1] for row in cells}
    assert float(by_kind["Proximal"].split("\N{NO-BREAK SPACE}")[0]) == pytest.approx(
        gains.directed["proximal"].value, abs=0.005
    )
    report.write_csv(gains, tmp_path / "gains.csv")
    lines = [line.split(",") for line in (tmp_path / "gains.csv").read_text().splitlines()]
    assert lines[0] == ["with", "task", "gain_percent", "proximal", "gradient", "lookahead"]
    assert lines[1][:4] == ["class1", "class2", "-2.5", "0.25"]
    assert lines[3][:3] == ["class2", "class1", "20"]
    assert len(lines) == 7
    report.affinity_gain_plot(gains, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_are_drawn_where_they_are_or_counted(tmp_path, made_up, monkeypatch):
    made_up(make)
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    gains = AffinityGain(yeast(), 2, tmp_path).run()
    names = [f"class{k}" for k in range(1, 7)]
    draws = np.random.default_rng(0)
    gain, *affinity = draws.normal(size=(4, 6, 6))
    affinity[0][1, 2], affinity[0][2, 1], gain[4, 3] = 812.0, -3000.0, -900.0
    affinity[1][:] = np.nan
    affinity = dict(zip(AFFINITY, affinity, strict=True))
    gains = dataclasses.replace(gains, tasks=names, gain=gain, affinity=affinity)
    report.affinity_gain_plot(gains, "a.png")
    (figure,) = figures
    assert figure._suptitle.get_text() == "yeast: affinity and gain, pairs of 6 tasks, 2 seeds"
    for axes, found in zip(figure.axes, affinity.values(), strict=True):
        (points,) = (line for line in axes.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(points.get_xdata(), off_diagonal(found))
        np.testing.assert_array_equal(points.get_ydata(), off_diagonal(gain))
        assert axes.get_xlim()[1] - axes.get_xlim()[0] < 20
        assert axes.get_ylim()[1] - axes.get_ylim()[0] < 20
    first, second, third = (axes.get_xlabel() for axes in figure.axes)
    assert "3 pairs outside: affinity -3e+03 to +812,\ngain -900 to" in first
    assert "outside" not in second
    assert f"1 pair outside: affinity {affinity['lookahead'][4, 3]:+.3g},\ngain -900 %" in third


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_table_is_whole(width, tmp_path, made_up):
    made_up(make)
    console = Console(width=width, file=io.StringIO())
    gains = AffinityGain(yeast(), 2, tmp_path).run()
    for shown in report.tables(gains):
        console.print(shown)
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for title, kind in (("Proximal", "proximal"), ("Lookahead", "lookahead")):
        lines = [line for line in text.splitlines() if line.strip().startswith(title)]
        numbers = []
        for of in (gains.directed, gains.symmetric):
            value, low, high = of[kind]
            numbers.append(f"{value:+.2f} ({low:+.2f} to {high:+.2f})")
        found = [cell for line in lines for cell in re.split("  +", line.strip())[1:]]
        assert found == numbers
