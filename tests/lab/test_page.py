"""The report shows the numbers of the runs, and works in a browser."""

import base64
import hashlib
import json
import re
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.report import affinities, colours, groups, timing
from taskgroup.lab.report.groups import group_colours
from taskgroup.lab.report.labels import differences, titles
from taskgroup.lab.report.page import plotly_program, write_report
from taskgroup.lab.report.run_data import load_run_data, load_runs
from taskgroup.lab.report.thinning import evenly, thin
from taskgroup.ops.normalised_affinity import normalised_affinity
from tests.browser import chromium
from tests.lab.written_runs import put, write_run

ALONE = [["a"], ["b"], ["c"]]
PAIR = [["a", "c"], ["b"]]
ALL = [["a", "b", "c"]]


def matrix(ab=0.0, ba=0.0, scale=1.0):
    """Self-affinities of 1, 2 and 4 times the scale."""
    found = np.diag([1.0, 2.0, 4.0]) * scale
    found[0, 1], found[1, 0] = ab, ba
    return found


def report(out, *folders):
    """The page and the notes."""
    notes = write_report([load_run_data(folder) for folder in folders], out)
    return re.sub(' data-column="[^"]*"', "", out.read_text("utf-8")), notes


def figures(page):
    """``{heading: [figure]}``, typed arrays decoded."""
    found = {}
    parts = re.split(r"<h2>(.*?)</h2>", page)
    for heading, part in zip(parts[1::2], parts[2::2], strict=True):
        numbers = re.findall(r'data-figure="(figure-\d+)"', part)
        scripts = [re.search(rf'id="{number}">(.*?)</script>', page)[1] for number in numbers]
        found[heading] = [json.loads(script, object_hook=decoded) for script in scripts]
    return found


def decoded(value):
    if "bdata" not in value:
        return value
    flat = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
    return flat.reshape([int(n) for n in value.get("shape", str(flat.size)).split(",")])


def test_plotly_program_is_the_published_one():
    """Its checksum is that of the file in version 4.1.1 on npm."""
    checksum = hashlib.sha1(plotly_program().encode(), usedforsecurity=False).hexdigest()
    assert checksum == "314567f76adf20299246f5ca8c684ce356b07af3"
    assert "v4.1.1\n" in plotly_program()[:80]


def test_affinity_is_the_matrix_that_tasks_are_grouped_by_at_every_recorded_batch(tmp_path):
    recorded = [(1, np.zeros((3, 3))), (2, matrix(ab=1.0)), (4, matrix(ab=-1.0, ba=0.25))]
    run = write_run(tmp_path / "run", [ALONE, *[PAIR] * 3], recorded)
    page, _ = report(tmp_path / "page.html", run)
    (figure,) = figures(page)["Affinity over time"]
    assert [frame["name"] for frame in figure["frames"]] == ["1", "2", "4"]
    (trace,) = figure["data"]
    assert trace["x"] == trace["y"]
    a, b, c = (trace["x"].index(task) for task in "abc")
    first, second, last = (frame["data"][0] for frame in figure["frames"])
    assert np.isnan(first["z"]).all()  # no task has a self-affinity
    assert second["z"][a, b] == second["z"][b, a] == 0.25  # half of 1 of 2, and of nothing
    assert last["z"][a, b] == last["z"][b, a] == (-0.5 + 0.25) / 2
    assert last["z"][a, c] == 0
    assert np.isnan(last["z"].diagonal()).all()
    np.testing.assert_array_equal(trace["z"], last["z"])
    # The pointer is told the directions.
    assert [last["customdata"][a, b], last["customdata"][b, a]] == [-0.5, 0.25]
    assert "effect of %{y} on %{x}: %{customdata:.3f}" in last["hovertemplate"]
    assert (trace["zmin"], trace["zmax"]) == (-0.125, 0.125)  # zero is in the middle
    assert abs(a - c) == 1  # they share a group


@pytest.mark.parametrize("unmeasured", [False, True])
def test_affinity_is_normalised_as_for_the_grouping(unmeasured):
    random = np.random.RandomState(0)
    matrix = random.randn(6, 6)
    matrix[np.diag_indices(6)] = [1.0, 0.5, -0.1, 2.0, 0.3, 0.0]
    if unmeasured:
        matrix[[0, 1], [1, 0]] = np.nan
        matrix[0, 3] = np.nan
    tasks, similarity, _ = normalised_affinity(matrix)
    expected = np.full((6, 6), np.nan)
    expected[np.ix_(tasks, tasks)] = similarity
    expected[np.diag_indices(6)] = np.nan
    if unmeasured:
        expected[[0, 1], [1, 0]] = np.nan
    np.testing.assert_allclose(affinities.normalised(matrix[None])[0], expected)


def test_one_outlier_does_not_make_all_other_colours_pale():
    matrix = np.full((20, 20), 0.25)
    matrix[np.diag_indices(20)] = 9.0
    matrix[0, 1] = matrix[1, 0] = -5.0
    assert affinities.largest(matrix) == 0.25
    assert affinities.largest(matrix[:2, :2]) == 5.0
    assert affinities.largest(np.full((2, 2), np.nan)) == 1.0


def test_affinity_that_was_never_measured_is_empty(tmp_path):
    """Entries of two tasks that never shared a batch; null in the record."""
    apart = matrix(ab=1.0)
    apart[[0, 1], [2, 2]] = apart[2, [0, 1]] = np.nan
    one_way = matrix(ab=1.0)
    one_way[1, 0] = np.nan
    recorded = [(1, np.full((3, 3), np.nan)), (2, apart), (3, one_way), (4, matrix(ab=1.0))]
    run = write_run(tmp_path / "run", [ALONE, *[PAIR] * 3], recorded)
    lines = (run / "affinity.jsonl").read_text().replace("NaN", "null")
    (run / "affinity.jsonl").write_text(lines)
    page, _ = report(tmp_path / "page.html", run)
    (figure,) = figures(page)["Affinity over time"]
    a, b, c = (figure["data"][0]["x"].index(task) for task in "abc")
    nothing, some, half, everything = (frame["data"][0] for frame in figure["frames"])
    assert np.isnan(nothing["z"]).all()
    assert nothing["customdata"][a][b] == ["never measured", "not known"]
    assert some["z"][a, b] == some["z"][b, a] == 0.25
    for i, k in ((a, c), (c, a), (b, c), (c, b)):
        assert np.isnan(some["z"][i, k])
        assert some["customdata"][i][k] == ["never measured", "not known"]
    assert some["customdata"][a][b] == ["0.250", "0.500"]
    assert some["customdata"][a][a][0] == "the task itself"
    assert "%{customdata[0]}" in some["hovertemplate"]
    assert half["customdata"][b][a] == ["0.250", "not known"]
    assert some["hoverongaps"]
    assert not everything["hoverongaps"]
    assert "%{z:.3f}" in everything["hovertemplate"]


def test_groups_are_framed_as_they_were_at_each_moment(tmp_path):
    """Where the order, that of the last groups, does not have a group's tasks side by side, too."""
    alone, crossed, last = "a b c d", "ac bd", "ab cd"
    partitions = [[list(group) for group in row.split()] for row in (alone, crossed, last)]
    run = write_run(tmp_path / "run", partitions, [(b, np.eye(4)) for b in (1, 2, 3)])
    (figure,) = figures(report(tmp_path / "page.html", run)[0])["Affinity over time"]
    tasks = figure["data"][0]["x"]
    assert abs(tasks.index("a") - tasks.index("b")) == 1
    framed = []
    for frame in figure["frames"]:
        below, above = frame["layout"]["shapes"]  # white, and ink on it
        assert below["path"] == above["path"]
        blocks = re.findall(r"M([\d.-]+),([\d.-]+)H([\d.-]+)V([\d.-]+)", above["path"])
        cells = set()
        for left, top, right, bottom in np.array(blocks, float) + 0.5:
            cells |= {
                frozenset((tasks[i], tasks[k]))
                for i in range(int(top), int(bottom))
                for k in range(int(left), int(right))
            }
        framed.append({"".join(sorted(pair)) for pair in cells})
    assert framed == [{*"abcd"}, {*"abcd", "ac", "bd"}, {*"abcd", "ab", "cd"}]
    assert figure["layout"]["shapes"] == figure["frames"][-1]["layout"]["shapes"]


def test_joint_training_has_no_groups_to_frame(tmp_path):
    cosines = [(1, np.eye(3))]
    run = write_run(tmp_path / "run", [ALL], method="joint", conflicts=cosines)
    (figure,) = figures(report(tmp_path / "page.html", run)[0])["Gradient conflicts"]
    assert "shapes" not in figure["layout"]


def test_order_of_tasks_has_groups_side_by_side():
    """Even where they are no neighbours by the share of the batches."""
    tasks, rows = tuple("abcd"), [[0, 0, 1, 1]] * 5 + [[0, 1, 0, 1]]
    run = fake(tasks, rows)
    order = groups.task_order(run, [run])
    assert sorted(order) == [0, 1, 2, 3]
    assert [len(part) for part in groups.blocks(run.groups[-1][order])] == [4, 4]
    # The tasks of another run in another order, and a run without groups of its own.
    joint = fake(tasks[::-1], [[0] * 4], "joint")
    assert [joint.tasks[k] for k in groups.task_order(joint, [run, joint])][:1] in (["a"], ["d"])


def fake(tasks, rows, method="selective"):
    """A run of these groups."""
    return SimpleNamespace(
        tasks=tasks,
        method=method,
        warmup=0,
        batches=np.arange(1, len(rows) + 1),
        groups=np.array(rows, np.int16),
    )


def test_colours_of_runs_and_groups_differ_for_all_readers():
    apart = distances(colours.RUNS, colours.GROUPS)
    assert apart.min() > 7
    for palette in (colours.RUNS, colours.GROUPS[:8]):
        assert len(set(palette)) == len(palette)
        for sight in ([], PROTAN, DEUTAN):
            apart = distances(palette, palette, sight)
            assert apart[~np.eye(len(palette), dtype=bool)].min() > 5
    for run in colours.RUNS:
        for ground in ("#ffffff", "#161b22"):  # of cards, in light and in dark mode
            assert contrast(run, ground) > 2.7


# Machado et al., "A physiologically-based model for simulation of color vision deficiency", 2009.
PROTAN = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]
DEUTAN = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]


def linear(colour):
    """The light of ``"#rrggbb"``."""
    values = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def distances(some, others, sight=()):
    """Between colours, in hundredths of the lightness from black to white (Oklab)."""
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]

    def lab(colour):
        light = linear(colour)
        if len(sight):
            light = np.clip(np.array(sight) @ light, 0, 1)
        return 100 * np.array(to_lab) @ np.cbrt(np.array(to_cones) @ light)

    return np.array([[np.linalg.norm(lab(one) - lab(other)) for other in others] for one in some])


def contrast(one, other):
    """Of WCAG, from 1 to 21."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_tasks_have_the_names_that_the_terminal_shows(tmp_path):
    recipe = read_recipe("motorcycle")
    shown = make_problem(recipe).titles
    partition = [["normal", "reshading"], ["keypoints2d"]]
    run = write_run(
        tmp_path / "run",
        [partition] * 3,
        [(1, np.eye(3))],
        data="motorcycle",
        titles=shown,
        metrics={"normal": 0.5},
        conflicts=[(1, np.eye(3))],
    )
    page, _ = report(tmp_path / "page.html", run)
    expected = {shown[task] for group in partition for task in group}
    found = figures(page)
    for heading in ("Affinity over time", "Groups over time", "Gradient conflicts"):
        assert set(found[heading][0]["data"][0]["y"]) == expected
    assert {title for title in expected if f"<h3>{title}</h3>" in page} == expected
    assert f"<td>{shown['normal']}</td>" in page
    for task in shown:
        assert f">{task}<" not in page
    assert titles(load_run_data(run)) == {task: shown[task] for g in partition for task in g}


def test_tasks_that_share_a_title_keep_their_names():
    shared = {"a": "Depth", "b": "Depth", "c": "Edges"}
    run = SimpleNamespace(tasks=("a", "b", "c", "d"), titles=shared)
    assert titles(run) == {"a": "a", "b": "b", "c": "Edges", "d": "d"}


def test_a_run_that_has_no_settings_but_its_method(tmp_path):
    """As one recorded in a loop of the user's own."""
    recorded = [(1, matrix()), (2, matrix(ab=1.0))]
    data = load_run_data(write_run(tmp_path / "run", [ALONE, PAIR], recorded, seconds={
        "everything": 1.0
    }))  # fmt: skip
    object.__setattr__(data, "settings", {"method": "selective"})
    write_report([data], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert 'data-column="method">selective<' in page
    assert 'data-column="batches">2<' in page
    (course,) = affinities.affinity_courses([data], ("a", "b"))
    assert course.label == "affinity"


def test_a_run_in_which_nothing_was_measured_has_no_picture_of_it(tmp_path):
    run = write_run(tmp_path / "run", [ALONE, PAIR], [(1, np.full((3, 3), np.nan))])
    page, _ = report(tmp_path / "page.html", run)
    assert "Affinity over time" not in figures(page)


def test_partition_keeps_the_colours_of_groups(tmp_path):
    swapped = [["b"], ["a", "c"]]  # the same groups, named the other way round
    run = write_run(tmp_path / "run", [ALONE, PAIR, swapped, ALL, PAIR], [(1, matrix())])
    (figure,) = figures(report(tmp_path / "page.html", run)[0])["Groups over time"]
    (trace,) = figure["data"]
    z = {task: row.tolist() for task, row in zip(trace["y"], trace["z"], strict=True)}
    assert z == {"a": [0, 1, 1, 1, 1], "b": [0, 0, 0, 1, 0], "c": [0, 1, 1, 1, 1]}
    assert trace["x"].tolist() == [1, 2, 3, 4, 5]
    in_group, groups = trace["customdata"][trace["y"].index("a")].T.tolist()
    assert in_group == [1, 2, 2, 3, 2]
    assert groups == [3, 2, 2, 1, 2]
    (line,) = figure["layout"]["shapes"]
    assert line["x0"] == 1.5  # the end of the warm-up


def test_two_groups_of_one_batch_never_share_a_colour():
    random = np.random.RandomState(0)
    groups = random.randint(5, size=(60, 20)).astype(np.int16)
    groups = np.stack([np.unique(row, return_inverse=True)[1] for row in groups]).astype(np.int16)
    for of_batch, found in zip(groups, group_colours(groups), strict=True):
        for label in range(of_batch.max() + 1):
            members = of_batch == label
            assert len(set(found[members])) == 1
            if members.sum() == 1:
                assert found[members] == -1
            else:
                assert not np.isin(found[~members], found[members]).any()


def test_a_group_of_new_company_takes_no_colour_that_was_just_in_use():
    groups = np.array([[0, 0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 1, 2]], np.int16)
    alone = -1
    assert group_colours(groups).tolist() == [
        [0, 0, alone, alone],
        [alone, alone, 1, 1],
        [alone] * 4,
        [alone, 0, 0, alone],  # of either
    ]


def test_losses_groups_and_time_of_two_runs(tmp_path):
    losses = [{"a": 1.0 / b, "b": 2.0, **({"c": 3.0} if b % 2 else {})} for b in range(1, 5)]
    seconds = {"forward": 1.0, "backward": 2.0, "everything": 4.0}
    groups = [ALONE, PAIR, PAIR, ALL]
    one = write_run(tmp_path / "one", groups, [(4, matrix())], seconds, losses=losses)
    two = write_run(tmp_path / "two", [ALL] * 2, None, {"everything": 1.0}, method="joint")
    page, notes = report(tmp_path / "page.html", one, two)
    found = figures(page)
    (count,) = found["Number of groups"]
    (line,) = count["data"]  # joint training has no groups
    assert line["y"].tolist() == [3, 2, 2, 1]
    assert [card["data"][0]["name"] for card in found["Losses"]] == ["one"] * 3
    of_a, _, of_c = ([trace["y"] for trace in card["data"]] for card in found["Losses"])
    np.testing.assert_allclose(of_a[0], [1, 1 / 2, 1 / 3, 1 / 4], rtol=1e-6)
    assert of_a[1].tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(of_c[0], [3, np.nan, 3, np.nan])  # not looked at
    (bars,) = found["Time per batch"]
    assert {trace["name"] for trace in bars["data"]} >= {"forward", "backward", "other"}
    assert "Affinity over time" in found
    assert "Gradient conflicts" not in found
    assert any("conflicts_every" in note for note in notes)
    assert "conflicts_every" in page
    for words in ("selective, affinity-propagation", "joint", "400 ms", "100 ms", "finished"):
        assert f">{words}<" in page


def test_weights_inside_groups_are_named(tmp_path):
    run = write_run(tmp_path / "run", [ALL] * 2, group_weights="uw")
    page, _ = report(tmp_path / "page.html", run)
    assert ">selective, affinity-propagation, uw inside<" in page


def test_losses_that_are_not_positive_have_a_linear_axis(tmp_path):
    losses = [{"a": 1.0, "b": -1.0, "c": 0.0}] * 2
    run = write_run(tmp_path / "run", [ALL] * 2, losses=losses, method="joint")
    cards = figures(report(tmp_path / "page.html", run)[0])["Losses"]
    assert not any("type" in card["layout"]["yaxis"] for card in cards)


def test_log_axes_say_so(tmp_path):
    losses = [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.09, "b": 0.11, "c": -0.1}]
    run = write_run(tmp_path / "run", [ALL] * 2, losses=losses, method="joint")
    cards = figures(report(tmp_path / "page.html", run)[0])["Losses"]
    axes = [card["layout"]["yaxis"] for card in cards]
    assert [axis.get("type") for axis in axes] == ["log", None, None]
    assert [axis["title"]["text"] for axis in axes] == ["loss (log scale)", "loss", "loss"]


def test_conflicts_and_metrics(tmp_path):
    cosines = np.array([[1, -0.5, 0], [-0.5, 1, 0.25], [0, 0.25, 1]])
    runs = [
        write_run(
            tmp_path / f"{method}",
            [ALL] * 2,
            method=method,
            conflicts=[(1, cosines)],
            metrics={"a": 0.5, "b": error, "c": 3.0},
        )
        for method, error in (("joint", 0.25), ("uw", 0.125))
    ]
    page, _ = report(tmp_path / "page.html", *runs)
    cards = figures(page)["Gradient conflicts"]
    assert len(cards) == 2
    z = cards[0]["data"][0]["z"]
    apart = ~np.eye(3, dtype=bool)
    np.testing.assert_array_equal(z[apart], cosines[apart].astype(np.float32))
    assert np.isnan(z.diagonal()).all()
    assert "<td>b</td><td>RMSE ↓</td><td>0.2500</td><td><b>0.1250</b></td>" in page


def test_the_best_run_is_not_marked_without_a_direction(tmp_path):
    runs = [write_run(tmp_path / name, [ALL] * 2) for name in ("one", "two")]
    for run, value in zip(runs, (0.25, 0.5), strict=True):
        header = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**header, "ended": True}))
        metrics = {"a": value, "mean": 2 * value}
        put(run / "evaluations.jsonl", [{"batch": 1, "metrics": metrics, "better": {"a": "lower"}}])
    page, _ = report(tmp_path / "page.html", *runs)
    assert "<td>a</td><td>↓</td><td><b>0.2500</b></td><td>0.5000</td>" in page
    assert "<td>mean</td><td></td><td>0.5000</td><td>1.0000</td>" in page


def test_metrics_recorded_a_few_tasks_at_a_time_are_one_evaluation(tmp_path):
    run = write_run(tmp_path / "run", [ALL] * 2)
    found = [(0, {"a": 1.0}), (2, {"a": 0.5, "b": 4.0}), (2, {"b": 0.25}), (2, {"c": None})]
    put(run / "evaluations.jsonl", [{"batch": n, "metrics": values} for n, values in found])
    put(run / "conflicts.jsonl", [{"batch": 1, "matrix": np.eye(3).tolist()}] * 2)
    data = load_run_data(run)
    assert data.evaluations.batches.tolist() == [0, 2]
    np.testing.assert_array_equal(
        data.evaluations.values, np.float32([[1, np.nan, np.nan], [0.5, 0.25, np.nan]])
    )
    assert data.conflicts.values.shape == (1, 3, 3)


def test_more_tasks_than_letters_fit(tmp_path):
    page, _ = report(tmp_path / "page.html", many(tmp_path / "run", 260, 2))
    (card,) = figures(page)["Affinity over time"]
    assert not card["layout"]["xaxis"]["showticklabels"]


def test_metrics_of_other_data_are_no_rivals(tmp_path):
    runs = [
        write_run(tmp_path / "diverged", [ALL] * 2, metrics={"a": float("nan")}),
        write_run(tmp_path / "rooms", [ALL] * 2, metrics={"a": 0.5}, baseline="there", delta_m=1.5),
        write_run(tmp_path / "people", [ALL] * 2, metrics={"a": 0.1}, data="pascal-context"),
        write_run(
            tmp_path / "houses",
            [ALL] * 2,
            metrics={"a": 50.0},
            lower_is_better=False,
            data="taskonomy",
            lr=0.5,
        ),
    ]
    page, _ = report(tmp_path / "page.html", *runs)
    for metric, cells in (
        ("↓", ["nan", "<b>0.5000</b>", "", ""]),
        ("↓", ["", "", "0.1000", ""]),
        ("↑", ["", "", "", "50.0000"]),
    ):
        assert f"<td>RMSE {metric}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert "<td>+1.50 % against there</td>" in page
    assert "<td>data taskonomy, lr 0.5</td>" in page
    assert "<td>data nyud-v2, lr 0.001</td>" in page


def test_metrics_over_time(tmp_path):
    run, other_run = (write_run(tmp_path / name, [ALL] * 4) for name in ("run", "other"))
    put(other_run / "evaluations.jsonl", [{"batch": 2, "metrics": {"b": 2.0}}])
    lines = [{"batch": 2, "metrics": {"a": 0.5}}, {"batch": 4, "metrics": {"a": 0.25, "b": 1.0}}]
    put(run / "evaluations.jsonl", lines)
    cards = figures(report(tmp_path / "page.html", run, other_run)[0])["Held-out data over time"]
    assert len(cards) == 2  # nobody has evaluated c
    line, other = (card["data"][0] for card in cards)
    np.testing.assert_array_equal(cards[0]["data"][1]["y"], [np.nan])
    assert cards[1]["data"][1]["y"].tolist() == [2.0]
    assert line["x"].tolist() == [2, 4]
    assert line["y"].tolist() == [0.5, 0.25]
    np.testing.assert_array_equal(other["y"], [np.nan, 1.0])


def test_the_last_evaluation_is_the_end_of_the_line(tmp_path):
    """A point for each evaluation; the direction stands where it is not turned."""
    run = write_run(tmp_path / "run", [ALL] * 10, metrics={"a": 0.25, "b": 1.0, "c": 2.0})
    put(run / "evaluations.jsonl", [{"batch": 4, "metrics": {"a": 0.5, "b": 1.5}}])
    page, _ = report(tmp_path / "page.html", run)
    cards = figures(page)["Held-out data over time"]
    (line,) = cards[0]["data"]
    assert line["x"].tolist() == [4, 10]
    assert line["y"].tolist() == [0.5, 0.25]
    assert "markers" in line["mode"]
    assert "<h3>a, RMSE ↓</h3>" in page
    assert [card["layout"]["yaxis"]["title"]["text"] for card in cards] == ["RMSE"] * 3


@pytest.mark.parametrize("direction", ["lower", "higher", None])
def test_nothing_is_the_best_if_its_direction_is_not_known(tmp_path, direction):
    runs = []
    for value in (0.25, 0.5):
        run = write_run(tmp_path / f"{value}", [ALL] * 2)
        line = {"batch": 2, "metrics": {"a": value}}
        put(run / "evaluations.jsonl", [line | ({"better": {"a": direction}} if direction else {})])
        header = json.loads((run / "run.json").read_text("utf-8"))
        (run / "run.json").write_text(json.dumps({**header, "ended": True}), "utf-8")
        runs.append(run)
    page, _ = report(tmp_path / "page.html", *runs)
    best = {"lower": ["0.2500"], "higher": ["0.5000"], None: []}[direction]
    assert re.findall("<td><b>(.*?)</b></td>", page) == best


def test_settings_are_compared_among_runs_that_have_them(tmp_path):
    """A method without groups has no decay "by default"; settings as a recorder writes them."""
    settings = (
        {"method": "selective", "decay": 0.01, "warmup": 5, "lr": 0.1},
        {"method": "selective", "decay": 0.1, "warmup": 5, "lr": 0.1},
        {"method": "UW", "lr": 0.2, "trick": 1},
    )
    runs = []
    for n, of_run in enumerate(settings):
        run = write_run(tmp_path / f"{n}", [ALL] * 2)
        header = json.loads((run / "run.json").read_text("utf-8"))
        (run / "run.json").write_text(json.dumps({**header, "settings": of_run}), "utf-8")
        runs.append(load_run_data(run))
    assert differences(runs) == ["lr 0.1, decay 0.01", "lr 0.1, decay 0.1", "lr 0.2, trick 1"]


def test_tasks_that_are_alone_share_an_entry_of_the_key(tmp_path):
    page, _ = report(tmp_path / "page.html", write_run(tmp_path / "run", [PAIR, ALONE]))
    assert re.search(r"</i>alone: a, [bc], [bc]</span>", page)
    page, _ = report(tmp_path / "page.html", write_run(tmp_path / "other", [ALONE, PAIR]))
    assert re.search(r"</i>(a, c|c, a)</span>", page)
    assert "</i>alone: b</span>" in page


@pytest.mark.parametrize("largest", [0.2, 0.9])
def test_a_colour_bar_that_ends_before_the_values_says_so(tmp_path, largest):
    tasks = [f"t{k:02d}" for k in range(15)]
    cosines = np.full((15, 15), 0.2)
    cosines[0, 1] = cosines[1, 0] = largest
    run = write_run(tmp_path / "run", [[[t] for t in tasks]] * 2, conflicts=[(1, cosines)])
    (figure,) = figures(report(tmp_path / "page.html", run)[0])["Gradient conflicts"]
    ends = ["−0.2", "0", "0.2"] if largest == 0.2 else ["≤ −0.2", "0", "≥ 0.2"]
    assert figure["data"][0]["colorbar"]["ticktext"] == ends


def test_bars_of_one_name_stand_apart(tmp_path):
    fours = [["a", "b", "c", "d"]], [["a", "b", "c", "e"]]
    runs = [
        write_run(tmp_path / f"{n}", [four], None, {"everything": 1.0 + n}, method="joint")
        for n, four in enumerate(fours)
    ]
    (figure,) = figures(report(tmp_path / "page.html", *runs)[0])["Time per batch"]
    (trace,) = figure["data"]
    assert trace["y"] == [0, 1]
    assert trace["customdata"] == ["joint, 4 tasks"] * 2  # what the pointer is told
    assert sorted(trace["x"]) == [100.0, 200.0]


def test_runs_that_take_different_time_are_not_averaged(tmp_path):
    runs = [
        write_run(tmp_path / f"{n}", [ALL], None, {"everything": 1.0 + n}, **settings)
        for n, settings in enumerate([{}, {"seed": 1}, {"warmup": 9}, {"preference": -1.0}])
    ]
    bars, _ = timing.seconds_per_batch([load_run_data(run) for run in runs])
    assert sorted(bar.totals for bar in bars) == [[0.1, 0.2], [0.3], [0.4]]


def test_more_groups_than_colours_are_told(tmp_path):
    tasks = [f"t{k}" for k in range(100)]
    pairs = [tasks[k : k + 2] for k in range(0, 100, 2)]
    run = write_run(tmp_path / "run", [[[task] for task in tasks], *[pairs] * 3])
    page, _ = report(tmp_path / "page.html", run)
    assert re.search(r"50 groups share \d+ colours, so some look alike", page)
    assert re.search(r"</i>(t0, t1|t1, t0)</span>", page)  # today's groups, to be copied


def test_runs_that_cannot_be_read(tmp_path):
    good = write_run(tmp_path / "good", [ALONE, PAIR])
    old = write_run(tmp_path / "old", [ALL], metrics={"a": 1.0})
    summary = json.loads((old / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps({**summary, "metric": "error"}))
    with pytest.raises(ValueError, match=r"old cannot be read .* another version of taskgroup"):
        load_run_data(old)
    cut = write_run(tmp_path / "cut", [ALL], metrics={"a": 1.0})
    (cut / "summary.json").write_text('{"batches": 1')
    with pytest.raises(ValueError, match=r"cut/summary.json cannot be read; delete it"):
        load_run_data(cut)
    odd = write_run(tmp_path / "odd", [ALL])
    header = json.loads((odd / "run.json").read_text())
    (odd / "run.json").write_text(json.dumps({**header, "format": 2, "taskgroup": "0.9"}))
    runs, notes = load_runs([old, good, cut, odd, tmp_path / "none"])
    assert [run.name for run in runs] == [str(good)]
    assert len(notes) == 4
    assert "odd has format 2, and this taskgroup reads format 1" in notes[2]
    assert write_report(runs, tmp_path / "page.html", notes)[:4] == notes
    with pytest.raises(ValueError, match="none is not a run"):
        load_runs([tmp_path / "none"])


def test_before_the_first_batch_there_may_be_conflicts(tmp_path):
    run = write_run(tmp_path / "run", [PAIR], groups_per_batch=1)
    put(run / "metrics.jsonl", [])
    line = {"batch": 1, "matrix": np.eye(3).tolist()}
    put(run / "conflicts.jsonl", [line])
    data = load_run_data(run)
    assert data.tasks == ("a", "b", "c")
    assert len(data.batches) == 0


def test_many_batches_are_thinned_to_means_and_bounds():
    values = np.arange(40_000.0)
    values[7::8] = np.nan
    points = thin(np.arange(1, 40_001), values, border=100, points=200)
    assert points.width == 200
    assert len(points.batches) == 201  # none on both sides of the warm-up
    assert points.low[1] == 100
    assert points.high[0] == 99
    part = values[100:300]
    assert points.mean[1] == pytest.approx(np.nanmean(part))
    assert evenly(400, 50)[[0, -1]].tolist() == [0, 399]
    assert len(evenly(400, 50)) == 50


def test_names_are_text_wherever_they_stand(tmp_path, browser):
    hostile = '</script><script>document.title = "x"</script>'
    task = "a</script><b>.$plot & ü"
    run = write_run(tmp_path / "run", [[[task], ["b"]]] * 3, [(1, np.eye(2))])
    data = load_run_data(run)
    object.__setattr__(data, "name", hostile)
    write_report([data], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert hostile not in page
    assert "a</script>" not in page
    (trace,) = figures(page)["Affinity over time"][0]["data"]
    assert set(trace["x"]) == {task, "b"}
    browser.get((tmp_path / "page.html").as_uri())
    wait_for_plots(browser)
    shown = browser.find_elements(By.CSS_SELECTOR, ".ytick")
    assert task in {label.text for label in shown}
    assert browser.title.startswith("taskgroup: ")


def test_a_run_that_is_training_and_one_that_has_just_begun(tmp_path):
    running = write_run(tmp_path / "running", [ALONE, PAIR], [(1, matrix())], batches=8)
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 3, "los')
    begun = write_run(tmp_path / "begun")
    page, notes = report(tmp_path / "page.html", running, begun)
    assert "<td>2 of 8</td><td>25 %</td>" in page
    assert f"{begun} has not finished its first batch yet." in notes
    assert figures(page)["Groups over time"]
    with pytest.raises(ValueError, match="begun'] has not finished its first batch yet"):
        report(tmp_path / "none.html", begun)
    assert not (tmp_path / "none.html").exists()


def test_command_line(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / name, [ALONE, PAIR], [(1, matrix())]) for name in "xy"]

    def invoke(*arguments):
        return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "200"})

    monkeypatch.chdir(tmp_path)
    assert f"The report is {runs[0] / 'report.html'}" in invoke(runs[0]).output
    assert "The report is report.html" in invoke(*runs).output
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    invoke(*runs, "--out", "new/folder/page.html")
    assert (tmp_path / "new/folder/page.html").exists()
    for arguments, said in (
        ([runs[0], "--out", tmp_path], f"{tmp_path} is a folder; name the HTML file"),
        ([tmp_path / "none"], "none is not a run"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert said in result.output
        assert "Traceback" not in result.output
    for module in ("page", "plotly_figures", "plotly_matrices", "plotly_parts"):
        monkeypatch.delitem(sys.modules, f"taskgroup.lab.report.{module}")
    monkeypatch.setitem(sys.modules, "plotly", None)
    result = invoke(runs[0])
    assert result.exit_code == 2
    assert "pip install 'taskgroup[report]'" in result.output


@pytest.fixture(scope="module")
def chrome():
    with chromium() as driver:
        yield driver


@pytest.fixture
def browser(chrome):
    """A window of 1400 pixels, in light mode."""
    chrome.set_window_size(1400, 900)
    emulate(chrome, "light")
    return chrome


def emulate(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for_plots(browser):
    """Scroll through the page until every figure is drawn."""
    for plot in browser.find_elements(By.CSS_SELECTOR, ".plot"):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
        WebDriverWait(browser, 20).until(
            lambda _, plot=plot: plot.find_elements(By.CSS_SELECTOR, ".main-svg")
        )


def many(folder, n_tasks, n_batches):
    """A run of so many tasks, with groups of five."""
    tasks = [f"a task of number {k:03d}" for k in range(n_tasks)]
    fives = [tasks[start : start + 5] for start in range(0, n_tasks, 5)]
    random = np.random.RandomState(0)
    recorded = [
        (batch, np.eye(n_tasks) + 0.3 * random.randn(n_tasks, n_tasks).round(3))
        for batch in np.linspace(1, n_batches, 20).astype(int).tolist()
    ]
    return write_run(
        folder,
        [[[task] for task in tasks], *[fives] * (n_batches - 1)],
        recorded,
        conflicts=[(batch, m / np.abs(m).max()) for batch, m in recorded[::5]],
        batches=n_batches,
    )


def test_in_a_browser(tmp_path, browser):
    runs = [many(tmp_path / f"run-{n}", 11, 100) for n in range(2)]
    page, _ = report(tmp_path / "page.html", *runs)
    matrices = [frame["data"][0]["z"] for frame in figures(page)["Affinity over time"][0]["frames"]]
    browser.get((tmp_path / "page.html").as_uri())
    wait_for_plots(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".plot")) == 2 + 2 + 1 + 11 + 2
    card = browser.find_element(By.CSS_SELECTOR, ".card")
    browser.execute_script("arguments[0].scrollIntoView()", card)

    def shows(matrix):
        """Whether the numbers in the picture are those of a matrix, row by row."""
        texts = browser.execute_script(
            "return [...arguments[0].querySelectorAll('.heatmap-label')].map("
            "label => label.textContent)",
            card,
        )
        found = np.array([float(text.replace("−", "-")) for text in texts])
        known = matrix[~np.isnan(matrix)]
        return len(found) == len(known) == 110 and np.allclose(found, known, atol=0.0501)

    def framed():
        """The rectangles of the frames, in cells."""
        found = browser.execute_script(
            "const at = element => { const { x, y, width, height } ="
            "  element.getBoundingClientRect(); return [x, y, x + width, y + height]; };"
            "return [at(arguments[0].querySelector('.hm image')),"
            "  arguments[0].querySelector('.shapelayer path').getAttribute('d'),"
            "  at(arguments[0].querySelector('.shapelayer path'))]",
            card,
        )
        (left, _, right, _), path, outer = found
        assert np.allclose(outer, found[0], atol=4)  # from the first cell to the last
        sides = re.findall(r"M([\d.]+),([\d.]+)H([\d.]+)", path)
        return [round(11 * (float(end) - float(begin)) / (right - left)) for begin, _, end in sides]

    assert shows(matrices[-1])
    assert sorted(framed()) == [1, 5, 5]
    slider, button, output = (
        card.find_element(By.CSS_SELECTOR, f".player {name}")
        for name in ("input", "button", "output")
    )
    assert output.text == "batch 100"
    # The left end of the slider, with the mouse.
    left = -int(slider.rect["width"] / 2) + 2
    ActionChains(browser).move_to_element_with_offset(slider, left, 0).click().perform()
    WebDriverWait(browser, 20).until(lambda _: shows(matrices[0]))
    assert output.text == "batch 1"
    assert framed() == [1] * 11  # the warm-up
    assert not shows(matrices[-1])
    # The button moves it on, to the end.
    button.click()
    assert button.text == "Pause"
    WebDriverWait(browser, 30).until(lambda _: shows(matrices[-1]))
    WebDriverWait(browser, 30).until(lambda _: button.text == "Play")
    # Nothing is fetched.
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def names_and_losses(folder):
    """Runs with much that could overlap: long names, losses over decades, settings that differ."""
    tasks = [f"{'a long name of a task, ' if k % 3 else ''}number {k:02d}" for k in range(14)]
    random = np.random.RandomState(0)
    halves = [tasks[:9], tasks[9:]]
    runs = []
    for n in range(3):
        matrix = np.eye(14) - 0.4 * random.rand(14, 14)
        losses = [
            {task: 10.0 ** (-b * k / 40) for k, task in enumerate(tasks)} for b in range(1, 30)
        ]
        run = write_run(
            folder / f"a-run-with-a-name-that-is-long-{n}",
            [[[task] for task in tasks], *[halves] * 28],
            [(b, matrix * b) for b in (1, 10, 29)],
            {"forward": 1.0, "backward": 2.0, "everything": 4.0},
            losses=losses,
            conflicts=[(1, matrix)],
            metrics=dict.fromkeys(tasks, 0.5),
            batches=30,
            lr=0.1 * (n + 1),
            warmup=n,
        )
        put(run / "evaluations.jsonl", [{"batch": b, "metrics": losses[b - 1]} for b in (5, 9, 29)])
        runs.append(run)
    return runs


def test_nothing_is_cut_off_and_nothing_overlaps(tmp_path, browser):
    report(tmp_path / "page.html", *names_and_losses(tmp_path))
    browser.get((tmp_path / "page.html").as_uri())
    wait_for_plots(browser)
    for width in (1400, 500):
        browser.set_window_size(width, 900)
        fits = "return [...document.querySelectorAll('.plot')].every(plot => Math.abs("
        fits += "plot.clientWidth - plot.querySelector('.main-svg').clientWidth) < 2)"
        WebDriverWait(browser, 20).until(lambda _: browser.execute_script(fits))  # noqa: B023
        assert browser.execute_script(BEYOND) == [], f"in a window of {width} pixels"
        crowds = browser.execute_script(CROWDS)
        assert any(crowds)
        for _, places in crowds:
            for (name, one), (another, other) in combinations(places, 2):
                apart = max(
                    other[0] - one[2], one[0] - other[2], other[1] - one[3], one[1] - other[3]
                )
                assert apart > -2, f"{name} overlaps {another} in a window of {width} pixels"
        # The slider is above the figure, so its text is far from the names.
        assert browser.execute_script(
            "return [...document.querySelectorAll('.player')].every(player => "
            "player.getBoundingClientRect().bottom <= "
            "player.nextElementSibling.getBoundingClientRect().top)"
        )
    numbers = "return [...document.querySelectorAll('.heatmap-label')].some("
    numbers += "label => label.getBoundingClientRect().width)"
    assert not browser.execute_script(numbers)  # 14 of them have no room
    for scheme in ("light", "dark"):
        emulate(browser, scheme)
        ink, ground = browser.execute_script(
            "const of = (name, key) => getComputedStyle(document.querySelector(name))[key];"
            "return [['.xtick text', 'body', '.player output', 'button', '.colorbar text'].map("
            "name => of(name, name.endsWith('text') ? 'fill' : 'color')),"
            "of('.card', 'backgroundColor')]"
        )
        assert all(contrast(hexadecimal(colour), hexadecimal(ground)) > 7 for colour in ink)


def hexadecimal(rgb):
    """``"rgb(0, 0, 0)"`` as ``"#000000"``."""
    return "#" + "".join(f"{int(value):02x}" for value in re.findall(r"\d+", rgb)[:3])


# What reaches out of the window, or out of its figure, and tables that need a scrollbar.
BEYOND = """
const found = [], at = (element) => element.getBoundingClientRect();
for (const element of document.querySelectorAll("body > :not(#js-plotly-tester) *")) {
  const box = at(element);
  if (box.width && (box.left < -1 || box.right > innerWidth + 1)) {
    found.push(element.outerHTML.slice(0, 80));
  }
}
for (const plot of document.querySelectorAll(".plot")) {
  const room = at(plot);
  for (const text of plot.querySelectorAll("text")) {
    const box = at(text);
    if (box.width && (box.left < room.left - 1 || box.right > room.right + 1 ||
                      box.top < room.top - 1 || box.bottom > room.bottom + 1)) {
      found.push(text.textContent);
    }
  }
}
for (const table of document.querySelectorAll(".wide")) {
  if (table.scrollWidth > table.clientWidth + 1) found.push(table.textContent.slice(0, 80));
}
return found;
"""
# For each figure and axis: the texts of the ticks, and their places.
CROWDS = """
const found = [];
for (const plot of document.querySelectorAll(".plot")) {
  for (const axis of ["xtick", "ytick"]) {
    const places = [...plot.querySelectorAll(`.${axis} text`)].map((text) => {
      const { left, top, right, bottom } = text.getBoundingClientRect();
      return [text.textContent, [left, top, right, bottom]];
    });
    found.push([axis, places.filter(([, [left, top, right]]) => right > left)]);
  }
}
return found;
"""


def test_few_tasks_of_many_runs_in_a_browser(tmp_path, browser):
    three = [(batch, matrix(ab=0.1 * batch)) for batch in range(1, 31)]
    runs = [write_run(tmp_path / f"{n}", [ALONE, *[PAIR] * 29], three) for n in range(4)]
    runs.append(write_run(tmp_path / "one", [[["a"]]] * 3, [(1, [[1.0]])]))
    report(tmp_path / "page.html", *runs)
    browser.set_window_size(1000, 900)
    browser.get((tmp_path / "page.html").as_uri())
    wait_for_plots(browser)
    sliders = browser.find_elements(By.CSS_SELECTOR, ".player input")
    assert len(sliders) == 4
    assert all(slider.rect["width"] > 80 for slider in sliders)
    buttons = browser.find_elements(By.CSS_SELECTOR, ".modebar-btn")
    said = {button.get_attribute("data-title") or "" for button in buttons}
    assert "Zoom in" in said
    assert not [title for title in said if re.search("share|cloud|edit", title, re.I)]


def test_a_hundred_tasks_and_many_batches_in_a_browser(tmp_path, browser):
    run = many(tmp_path / "run", 100, 2000)
    page, _ = report(tmp_path / "page.html", run)
    (partition,) = figures(page)["Groups over time"]
    assert len(partition["data"][0]["x"]) == 800
    assert "800 of 2,000 are shown" in partition["layout"]["xaxis"]["title"]["text"]
    assert len(page) < 16_000_000
    browser.get((tmp_path / "page.html").as_uri())
    wait_for_plots(browser)
    maps = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => "
        "[...plot.querySelectorAll('.ytick text')].map(text => "
        "[parseFloat(getComputedStyle(text).fontSize), text.getBoundingClientRect().top]))"
    )
    named = [np.array(names) for names in maps if len(names) == 100]
    assert len(named) == 4  # all but the number of groups
    for names in named:
        assert names[:, 0].min() >= 8.5
        assert np.diff(np.sort(names[:, 1])).min() > 9  # pixels apart
