"""What group steps gain over the heads' share: worked out from made-up results and times."""

import csv
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

import taskgroup as tg
from taskgroup.lab.cli import app
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.studies import cost, head_share
from taskgroup.lab.studies import head_share_report as report
from taskgroup.lab.studies.cost import Course
from taskgroup.lab.studies.head_share import HeadShare
from taskgroup.lab.studies.head_share_points import Point, kinds, parse_point, shipped_points
from taskgroup.lab.train.batches import Batches
from tests.lab.small import options, yeast

LIGHT = Point("light", {"head_depth": 0})
HEAVY = Point("heavy", {"head_depth": 2, "head_width": 8})
KINDS = [
    *("gd", "gd-batch-4", "gd-batch-2", "learned-1", "random-1", "singletons-1"),
    *("learned-10", "random-10", "singletons-10", "repeated"),
]
# Seconds of a batch in the warm-up and after it; steps of a batch after it.
COURSES = {
    "gd": Course(0, 2.0, 2.0, 1.0),
    "gd-batch-4": Course(0, 1.0, 1.0, 1.0),
    "gd-batch-2": Course(0, 0.8, 0.8, 1.0),
    "learned-1": Course(4, 6.0, 4.0, 2.0),
    "learned-10": Course(4, 5.0, 2.5, 2.0),
}
OTHER = Course(0, 4.0, 4.0, 2.0)
ERRORS = {  # of every task, by kind and seed
    "gd": (0.40, 0.42, 0.44),
    "gd-batch-4": (0.31, 0.32, 0.33),
    "gd-batch-2": (0.50, 0.50, 0.50),
    "learned-10": (0.24, 0.25, 0.27),
    "singletons-1": (0.60, 0.66, 0.66),
}


@pytest.fixture
def measured(monkeypatch):
    """The points that are measured, with times that are made up."""
    points = []

    def share(recipe):
        points.append((recipe.method, recipe.head_depth))
        return 0.9 if recipe.head_depth else 0.2

    def courses(recipes, batches):
        return {name: COURSES.get(name, OTHER) for name in recipes}

    monkeypatch.setattr(head_share, "head_share", share)
    monkeypatch.setattr(head_share, "courses", courses)
    return points


def make(cell):
    seed = cell.recipe.seed
    error = ERRORS.get(cell.name, (0.34, 0.34, 0.34))[seed]
    if cell.recipe.head_depth:  # heavy heads: other numbers, the same differences in percent
        error *= 2
    values = dict.fromkeys(("class1", "class2", "class3"), error)
    steps = {"learned-1": 2.4, "learned-10": 2.2, "gd": 1.0}.get(cell.name, 2.0)
    return {
        "metrics": dict.fromkeys(("train", "validation", "held_out"), values),
        "steps_per_batch": steps,
    }


@pytest.fixture
def lower(monkeypatch):
    """The metrics of yeast as if they were errors."""
    problem = type(make_problem(yeast()))
    monkeypatch.setattr(problem, "better", "lower")


def study(out, seeds=3, points=(LIGHT, HEAVY), **changes):
    return HeadShare(yeast(**{"batches": 20, "warmup": 4, **changes}), seeds, out, points)


def row_of(shares, title, name):
    (point,) = (row for row in shares.points if row.point.title == title)
    (kind,) = (kind for kind in point.kinds if kind.variant.name == name)
    return point, kind


def test_differences_at_equal_time_by_hand(tmp_path, made_up, measured, lower):
    cells = made_up(make)
    shares = study(tmp_path).run()
    assert [row.point.title for row in shares.points] == ["light", "heavy"]
    assert [row.share for row in shares.points] == [0.2, 0.9]
    for title in ("light", "heavy"):
        point, learned = row_of(shares, title, "learned-10")
        assert [kind.variant.name for kind in point.kinds] == KINDS
        # The best joint training: half of the batch size, 0.32 in the mean.
        assert point.joint.name == "gd-batch-4"
        joint = np.array([0.31, 0.32, 0.33])
        deltas = -100 * (joint - 0.32) / 0.32
        quantile = stats.t.ppf(0.975, 2)
        assert point.floor == pytest.approx(quantile * deltas.std(ddof=1) * math.sqrt(2 / 3))
        gains = 100 * (joint - np.array([0.24, 0.25, 0.27])) / 0.32  # seed by seed
        assert learned.gain.mean == pytest.approx(gains.mean())
        assert learned.gain.half == pytest.approx(quantile * gains.std(ddof=1) / math.sqrt(3))
        assert learned.verdict == "better"
        assert row_of(shares, title, "singletons-1")[1].verdict == "worse"
        assert row_of(shares, title, "gd-batch-4")[1].gain[:2] == (0, 0)
        assert row_of(shares, title, "random-1")[1].verdict == ""  # within the noise floor

    # 20 joint batches take 40 seconds: 4 of the warm-up, and the others after it.
    batches = {name: row_of(shares, "light", name)[1].batches for name in KINDS}
    assert batches["gd"] == 20
    assert batches["gd-batch-4"] == 40
    assert batches["gd-batch-2"] == 50
    assert batches["learned-1"] == 4 + 4  # (40 - 4 * 6) / 4
    assert batches["learned-10"] == 4 + 8  # (40 - 4 * 5) / 2.5
    assert batches["random-1"] == batches["repeated"] == 10
    assert {(c.name, c.recipe.batches) for c in cells} == set(batches.items())
    # learned-1 took 8 * 2.4 steps: 4 * 3 in the warm-up, and 7.2 at 4 / 2 seconds each.
    assert row_of(shares, "light", "learned-1")[1].time == pytest.approx((24 + 7.2 * 2) / 40)
    assert row_of(shares, "light", "gd")[1].time == pytest.approx(1)


def test_every_kind_trains_as_it_says(tmp_path, made_up, measured):
    cells = made_up(make)
    study(tmp_path, seeds=2).run()
    assert len(cells) == 2 * 2 * len(KINDS)
    recipes = {c.name: c.recipe for c in cells if c.recipe.seed == 1 and c.recipe.head_depth == 2}
    assert {recipe.head_width for recipe in recipes.values()} == {8}
    joint = [recipes[name] for name in ("gd", "gd-batch-4", "gd-batch-2", "repeated")]
    assert [recipe.batch_size for recipe in joint] == [8, 4, 2, 8]
    assert [recipe.batch_repeats for recipe in joint] == [1, 1, 1, 3]
    assert {recipe.method for recipe in joint} == {"gd"}
    for every in (1, 10):
        groups = [recipes[f"{name}-{every}"] for name in ("learned", "random", "singletons")]
        assert {(r.method, r.observe_every) for r in groups} == {("selective", every)}
        assert [r.grouping for r in groups] == ["affinity-propagation", "random:2", "singletons"]


def test_a_study_continues(tmp_path, made_up, measured):
    cells = made_up(make)
    study(tmp_path, seeds=2, points=(LIGHT, HEAVY)).run()
    assert measured == [("gd", 0), ("gd", 2)]
    measured.clear()
    cells.clear()
    middle = Point("middle", {"head_depth": 1})
    shares = study(tmp_path, seeds=3, points=(LIGHT, middle, HEAVY)).run()
    assert measured == [("gd", 1)]
    # A seed more of two points, and all of the new one.
    assert len(cells) == len(KINDS) * (2 + 3)
    assert len(shares.points) == 3

    read = HeadShare.read_from(tmp_path)
    assert [row.kinds for row in read.points] == [row.kinds for row in shares.points]
    assert read.seeds == 3

    there = "holds another point 'light', with {'head_depth': 0}"
    with pytest.raises(ValueError, match=there):
        study(tmp_path, points=(Point("light", {"head_depth": 3}), HEAVY))


def test_a_first_seed_of_ones_own_is_read_again(tmp_path, made_up, measured):
    def at_seven(cell):
        assert cell.recipe.seed in (7, 8)
        return {"metrics": {"held_out": dict.fromkeys(("class1", "class2", "class3"), 0.5)}}

    made_up(at_seven)
    study(tmp_path, seeds=2, seed=7).run()
    assert HeadShare.read_from(tmp_path).recipe.seed == 7


def test_what_diverges_is_left_out(tmp_path, made_up, measured, lower):
    def lose(cell):
        lost = cell.name == "repeated" or (cell.name == "gd-batch-4" and cell.recipe.seed == 1)
        return {**make(cell), **({"metrics": {}, "diverged": 3} if lost else {})}

    made_up(lose)
    shares = study(tmp_path).run()
    point, repeated = row_of(shares, "heavy", "repeated")
    assert point.joint.name == "gd"  # the better size lost a run
    assert (repeated.gain.n, repeated.diverged, repeated.verdict) == (0, 3, "")
    text = report.markdown([shares], "x")
    assert "| Joint, each batch 3 times | diverged | diverged |" in text
    assert "nan" not in text


def test_a_kind_that_cannot_be_measured_still_has_a_run(tmp_path, made_up, measured, monkeypatch):
    cells = made_up(make)
    nan = math.nan
    monkeypatch.setitem(COURSES, "repeated", Course(0, nan, nan, nan))
    study(tmp_path, seeds=1).run()
    assert {c.recipe.batches for c in cells if c.name == "repeated"} == {2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 0}, "at least one seed, got 0"),
        ({"batches": 1}, "at least two batches"),
        ({"tasks": "class1,class2"}, "three tasks or more, got 2"),
        ({"grouping": "singletons"}, "'singletons' learns no groups to compare"),
        ({"points": (LIGHT,)}, "Two points at least make a line, got 1"),
        ({"points": (LIGHT, Point("fast", {"lr": 1.0}))}, "lr is no setting of it"),
        ({"points": (LIGHT, Point("odd", {"head_depth": -1}))}, "head_depth must be greater"),
        ({"points": (LIGHT, Point("same", {}))}, "'light' and 'same' are the same network"),
        ({"points": (LIGHT, Point("image", {"decoder": "conv"}))}, "not a setting of yeast"),
    ],
)
def test_bad_arguments(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        study(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_problem_of_ones_own_needs_points(tmp_path):
    recipe = read_recipe("tests.lab.test_own_problem:Mine")
    with pytest.raises(ValueError, match="say which settings make its heads light and heavy"):
        HeadShare(recipe, 1, tmp_path / "out")


def test_folders_of_something_else(tmp_path, made_up, measured):
    with pytest.raises(ValueError, match="holds no study of taskgroup head-share"):
        HeadShare.read_from(tmp_path)
    made_up(make)
    study(tmp_path, seeds=1).run()
    next((tmp_path / "cells").glob("repeated-*")).unlink()
    with pytest.raises(ValueError, match="is not finished; start the command that began it again"):
        HeadShare.read_from(tmp_path)


@pytest.mark.parametrize("name", ["qm9", "qm9-heavy", "yeast", "motorcycle-small", "nyud-v2"])
def test_shipped_points_are_different_networks(name):
    recipe = read_recipe(name)
    points = shipped_points(recipe)
    networks = [recipe.replace(**point.settings) for point in points]
    assert len(set(networks)) == len(points) >= 4
    assert all(a.title != b.title for a in points for b in points if a is not b)
    light = [point.settings for point in points if point.title.startswith("linear")]
    key = "decoder" if "decoder" in light[0] else "head_depth"
    assert {settings[key] for settings in light} <= {"linear", 0}


def test_a_tiny_batch_has_no_quarter():
    sizes = [kind.settings.get("batch_size") for kind in kinds(yeast(batch_size=3), "abc")[:3]]
    assert sizes == [None, 1, None]


def test_points_are_parsed():
    assert parse_point("head_depth=1,head_width=8").settings == {"head_depth": 1, "head_width": 8}
    with pytest.raises(ValueError, match="takes key=value, got 'head_depth'"):
        parse_point("head_depth")


# What is measured.


@pytest.mark.parametrize("every", [1, 10])
def test_courses_tell_the_warm_up_from_the_rest(every):
    base = yeast(batches=30, warmup=3, observe_every=every)
    found = cost.courses(
        {
            "gd": base.replace(method="gd"),
            "learned": base,
            "singletons": base.replace(grouping="singletons"),
            "random": base.replace(grouping="random:2"),
            "short": base.replace(batches=2),
        },
        10,
    )
    assert [found[name].warmup for name in found] == [0, 3, 0, 0, 3]
    assert found["gd"].steps == 1
    assert found["singletons"].steps == 3
    assert found["random"].steps == 2
    assert found["short"].steps == 3  # it ends within its warm-up
    assert 1 <= found["learned"].steps <= 3
    for course in found.values():
        assert 0 < course.later < 60
        assert course.batches(course.seconds(20)) == pytest.approx(20)
        assert course.batches(course.seconds(2)) == pytest.approx(2)


def test_a_method_that_fails_has_no_course():
    found = cost.courses({"gd": yeast(method="gd"), "lost": yeast(method="gd", lr=1e30)}, 3)
    assert math.isfinite(found["gd"].later)
    assert not math.isfinite(found["lost"].batches(1.0)) or found["lost"].steps == 1


def test_the_share_is_that_of_step_costs(monkeypatch):
    asked = []

    def costs(model, inputs, losses, optimizer, heads):
        outputs = model(inputs)
        found = losses(outputs)
        assert set(found) == set(heads) == {"class1", "class2", "class3"}
        assert all(loss.requires_grad for loss in found.values())
        assert losses({"class2": outputs["class2"]}).keys() == {"class2"}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        assert model.training
        asked.append(len(inputs))
        return tg.StepCosts(1.0, 1.0, 2.0, 3)

    monkeypatch.setattr(tg, "step_costs", costs)
    assert cost.head_share(yeast()) == 0.75
    assert asked == [8]


# Batches that come several times.


@pytest.mark.parametrize("drawn", range(5))
def test_repeated_batches(drawn):
    recipe = yeast(batch_repeats=3)
    problem = make_problem(recipe)
    stream = problem.batches(recipe.batch_size, recipe.seed)
    expected = [batch for batch in (next(stream), next(stream), next(stream)) for _ in range(3)]
    batches = Batches(problem, recipe, torch.device("cpu"), drawn)
    for batch in expected[drawn:]:
        peeked = batches.peek()
        found = next(batches)
        assert all(map(torch.equal, found, batch))
        assert found is peeked
    assert batches.drawn == 9


# What is reported.


def test_report_holds_the_numbers(tmp_path, made_up, measured, lower):
    made_up(make)
    shares = study(tmp_path / "out").run()
    text = report.markdown([shares, shares], "taskgroup head-share yeast")
    assert text.count("# yeast: when group steps pay, 3 tasks, the time of 20 joint batches") == 2
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    by_title = {}
    for line in lines:
        by_title.setdefault(line[0], line[1:])
    assert by_title["Share of a joint step"] == ["20%", "90%"]
    assert by_title["Joint, batch size 4"] == ["best", "best"]
    gain = row_of(shares, "light", "learned-10")[1].gain
    assert by_title["Learned groups, observed every 10th batch"][0] == f"**{gain.shown()}**"
    assert "4 (0.83)" not in text
    assert "learned groups, observed every batch took 0.96" not in text.lower()

    path = tmp_path / "shares.csv"
    report.write_csv([shares], path)
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * len(KINDS)
    (line,) = (f for f in found if (f["point"], f["kind"]) == ("heavy", "learned-10"))
    assert float(line["gain"]) == pytest.approx(gain.mean, rel=1e-5)
    assert float(line["joint_batches_per_batch"]) == pytest.approx(20 / 12, rel=1e-5)
    assert (line["verdict"], line["best_joint"], line["head_share"]) == (
        "better",
        "gd-batch-4",
        "0.9",
    )


def test_a_time_that_differs_is_told(tmp_path, made_up, measured):
    def more(cell):
        return {**make(cell), **({"steps_per_batch": 3.0} if cell.name == "learned-1" else {})}

    made_up(more)
    text = report.markdown([study(tmp_path, seeds=1).run()], "x")
    # 4 * 6 seconds, and 12 steps of 2 seconds, instead of 40 seconds.
    assert "light: Learned groups, observed every batch took 1.20 times the time" in text


def test_the_picture_has_a_line_for_each_kind(tmp_path, made_up, measured, lower, monkeypatch):
    made_up(make)
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    shares = study(tmp_path).run()
    report.head_share_plot([shares, shares], "a.png")
    (figure,) = figures
    assert len(figure.axes) == 2
    for axes in figure.axes:
        drawn = {container.get_label(): container for container in axes.containers}
        for name in ("learned-10", "random-1", "singletons-10", "repeated", "gd"):
            points = [row_of(shares, title, name) for title in ("light", "heavy")]
            title = points[0][1].variant.title if name != "gd" else report._RECIPE_SIZE
            line, _, (bars,) = drawn[title]
            np.testing.assert_allclose(
                line.get_ydata().astype(float), [k.gain.mean for _, k in points]
            )
            x = line.get_xdata().astype(float)
            np.testing.assert_allclose(x, [p.share for p, _ in points], atol=0.05)
            ends = [[k.gain.mean - k.gain.half, k.gain.mean + k.gain.half] for _, k in points]
            np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], ends)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels))
    assert "noise floor of joint training" in labels
    # A group per task is too far below to be drawn, and is written at the edge.
    bottom = figure.axes[0].get_ylim()[0]
    _, far = row_of(shares, "light", "singletons-1")
    assert far.gain.mean < bottom
    assert f"{far.gain.mean:.0f} ▾" in {text.get_text() for text in figure.axes[0].texts}


def test_the_command(tmp_path, trained, measured):
    def invoke(*words):
        small = options(batches=6, batch_size=2)
        arguments = ["head-share", "yeast", *small, *map(str, words)]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})

    points = ["--point", "head_depth=0", "--point", "head_depth=1,head_width=3"]
    first = invoke("--seeds", 1, "--out", tmp_path / "one", *points)
    assert first.exit_code == 0, first.output
    left = {path.name for path in (tmp_path / "one").iterdir()}
    made = {"shares.md", "shares.csv", "shares.png"}
    assert left == {"base.yaml", "cells", "study.yaml", *made}
    assert "Measuring what batches take at 2 points" in first.output
    assert "equal time, run 18 of 18" in first.output
    assert re.search(r"Share of a joint step +20% +90%", first.output)
    trained.clear()
    beside = ("--beside", tmp_path / "one")
    both = invoke("--seeds", 1, "--out", tmp_path / "one", *beside, *points)
    assert both.exit_code == 0, both.output
    assert trained == []
    assert "Measuring" not in both.output
    assert (tmp_path / "one" / "shares.md").read_text().count("# yeast: when group") == 2

    said = invoke("--point", "head_depth=0", "--out", tmp_path / "two")
    assert said.exit_code == 2
    assert "Two points at least" in said.output
    assert not (tmp_path / "two").exists()
