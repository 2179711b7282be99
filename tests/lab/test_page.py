"""The report shows the numbers of the runs, and works in a browser."""

import base64
import json
import re
import sys

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.report import timing
from taskgroup.lab.report.groups import group_colours
from taskgroup.lab.report.page import write_report
from taskgroup.lab.report.run_data import load_run_data, load_runs
from taskgroup.lab.report.thinning import evenly, thin
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
    return out.read_text("utf-8"), notes


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


def test_affinity_is_in_units_of_the_self_affinity_at_every_recorded_batch(tmp_path):
    recorded = [(1, np.zeros((3, 3))), (2, matrix(ab=1.0)), (4, matrix(ab=-1.0, ba=0.25))]
    run = write_run(tmp_path / "run", [ALONE, *[PAIR] * 3], recorded)
    page, _ = report(tmp_path / "page.html", run)
    (figure,) = figures(page)["Affinity over time"]
    assert [frame["name"] for frame in figure["frames"]] == ["1", "2", "4"]
    steps = figure["layout"]["sliders"][0]["steps"]
    assert [step["args"][0] for step in steps] == [["1"], ["2"], ["4"]]
    (trace,) = figure["data"]
    assert trace["x"] == trace["y"]
    a, b = trace["x"].index("a"), trace["x"].index("b")
    first, second, last = (frame["data"][0]["z"] for frame in figure["frames"])
    assert np.isnan(first).all()  # nothing is measured
    assert second[a, b] == 0.5  # a step on a, seen at b: 1 of 2
    assert last[a, b] == -0.5
    assert last[b, a] == 0.25
    np.testing.assert_array_equal(trace["z"], last)
    np.testing.assert_array_equal(last.diagonal(), 1)
    assert abs(trace["x"].index("a") - trace["x"].index("c")) == 1  # they share a group


def test_affinity_that_was_never_measured_is_blank(tmp_path):
    """Entries of two tasks that never shared a batch; null in the record."""
    apart = matrix(ab=1.0)
    apart[[0, 1], [2, 2]] = apart[2, [0, 1]] = np.nan
    met = matrix(ab=1.0) + 0.0
    recorded = [(1, np.full((3, 3), np.nan)), (2, apart), (3, met)]
    run = write_run(tmp_path / "run", [ALONE, *[PAIR] * 2], recorded)
    lines = (run / "affinity.jsonl").read_text().replace("NaN", "null")
    (run / "affinity.jsonl").write_text(lines)
    page, _ = report(tmp_path / "page.html", run)
    (figure,) = figures(page)["Affinity over time"]
    (trace,) = figure["data"]
    a, b, c = (trace["x"].index(task) for task in "abc")
    nothing, some, everything = (frame["data"][0] for frame in figure["frames"])
    assert np.isnan(nothing["z"]).all()
    assert set(np.ravel(nothing["customdata"])) == {"never measured"}
    assert [some["z"][a, b], some["z"][b, a]] == [0.5, 0.0]  # measured, and without an effect
    for i, k in ((a, c), (c, a), (b, c), (c, b)):
        assert np.isnan(some["z"][i, k])
        assert some["customdata"][i][k] == "never measured"
    assert some["customdata"][a][b] == "0.500"
    assert "%{customdata}" in some["hovertemplate"]
    assert not np.isnan(everything["z"]).any()
    assert "customdata" not in everything
    assert "%{z:.3f}" in everything["hovertemplate"]


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
    for labels, colours in zip(groups, group_colours(groups), strict=True):
        for label in range(labels.max() + 1):
            members = labels == label
            assert len(set(colours[members])) == 1
            if members.sum() == 1:
                assert colours[members] == -1
            else:
                assert not np.isin(colours[~members], colours[members]).any()


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


def test_losses_that_are_not_positive_have_a_linear_axis(tmp_path):
    losses = [{"a": 1.0, "b": -1.0, "c": 0.0}] * 2
    run = write_run(tmp_path / "run", [ALL] * 2, losses=losses, method="joint")
    cards = figures(report(tmp_path / "page.html", run)[0])["Losses"]
    assert [card["layout"]["yaxis"].get("type") for card in cards] == ["log", None, None]


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
    np.testing.assert_array_equal(cards[0]["data"][0]["z"], cosines.astype(np.float32))
    assert "<td>b</td><td>RMSE ↓</td><td>0.2500</td><td><b>0.1250</b></td>" in page


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
    assert re.search(r"[ ;](t0, t1|t1, t0)[;.]", page)  # today's groups, to be copied


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


def test_names_are_text_wherever_they_stand(tmp_path):
    hostile = '</script><script>document.title = "x"</script>'
    task = "a</script><b>.$plotly & ü"
    run = write_run(tmp_path / "run", [[[task], ["b"]]] * 3, [(1, np.eye(2))])
    data = load_run_data(run)
    object.__setattr__(data, "name", hostile)
    write_report([data], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert hostile not in page
    assert "a</script>" not in page
    (trace,) = figures(page)["Affinity over time"][0]["data"]
    assert set(trace["x"]) == {task, "b"}
    with chromium() as browser:
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
    for module in ("page", "plotly_figures"):
        monkeypatch.delitem(sys.modules, f"taskgroup.lab.report.{module}")
    monkeypatch.setitem(sys.modules, "plotly", None)
    result = invoke(runs[0])
    assert result.exit_code == 2
    assert "pip install 'taskgroup[report]'" in result.output


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


def test_in_a_browser(tmp_path):
    runs = [many(tmp_path / f"run-{n}", 11, 100) for n in range(2)]
    page, _ = report(tmp_path / "page.html", *runs)
    matrices = [frame["data"][0]["z"] for frame in figures(page)["Affinity over time"][0]["frames"]]
    with chromium() as browser:
        browser.get((tmp_path / "page.html").as_uri())
        wait_for_plots(browser)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".plot")) == 2 + 2 + 1 + 11 + 2
        plot = browser.find_element(By.CSS_SELECTOR, ".plot")
        browser.execute_script("arguments[0].scrollIntoView()", plot)

        def numbers():
            """As they stand in the picture, row by row."""
            texts = browser.execute_script(
                "return [...arguments[0].querySelectorAll('.heatmap-label')].map("
                "label => label.textContent)",
                plot,
            )
            return np.array([float(text.replace("−", "-")) for text in texts])

        def shows(matrix):
            found = numbers()
            return len(found) == matrix.size and np.allclose(found, matrix.ravel(), atol=0.0501)

        assert shows(matrices[-1])
        picture = plot.find_element(By.CSS_SELECTOR, ".hm image").get_attribute("href")
        # The left end of the slider, with the mouse.
        rail = plot.find_element(By.CSS_SELECTOR, ".slider-rail-touch-rect")
        left = -int(rail.rect["width"] / 2) + 2
        ActionChains(browser).move_to_element_with_offset(rail, left, 0).click().perform()
        WebDriverWait(browser, 20).until(lambda _: shows(matrices[0]))
        assert plot.find_element(By.CSS_SELECTOR, ".hm image").get_attribute("href") != picture
        assert "batch 1" in plot.find_element(By.CSS_SELECTOR, ".slider-container").text
        assert not shows(matrices[-1])
        # The button moves it on.
        plot.find_element(By.CSS_SELECTOR, ".updatemenu-button").click()
        WebDriverWait(browser, 30).until(lambda _: shows(matrices[-1]))

        # Nothing is fetched, and nothing is wider than a narrow window.
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        browser.set_window_size(500, 900)
        width = "return document.documentElement.scrollWidth - innerWidth"
        WebDriverWait(browser, 20).until(lambda _: browser.execute_script(width) <= 0)


def test_few_tasks_of_many_runs_in_a_browser(tmp_path):
    three = [(batch, matrix(ab=0.1 * batch)) for batch in range(1, 31)]
    runs = [write_run(tmp_path / f"{n}", [ALONE, *[PAIR] * 29], three) for n in range(4)]
    runs.append(write_run(tmp_path / "one", [[["a"]]] * 3, [(1, [[1.0]])]))
    report(tmp_path / "page.html", *runs)
    with chromium(1000) as browser:
        browser.get((tmp_path / "page.html").as_uri())
        wait_for_plots(browser)
        rails = browser.find_elements(By.CSS_SELECTOR, ".slider-rail-rect")
        assert len(rails) == 4
        assert all(rail.rect["width"] > 80 for rail in rails)
        buttons = browser.find_elements(By.CSS_SELECTOR, ".modebar-btn")
        titles = {button.get_attribute("data-title") or "" for button in buttons}
        assert "Zoom in" in titles
        assert not [title for title in titles if re.search("share|cloud|edit", title, re.I)]


def test_a_hundred_tasks_and_many_batches_in_a_browser(tmp_path):
    run = many(tmp_path / "run", 100, 2000)
    page, _ = report(tmp_path / "page.html", run)
    (partition,) = figures(page)["Groups over time"]
    assert len(partition["data"][0]["x"]) == 800
    assert "800 of 2,000 are shown" in partition["layout"]["xaxis"]["title"]["text"]
    assert len(page) < 16_000_000
    with chromium() as browser:
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
