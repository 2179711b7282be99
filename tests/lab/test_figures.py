"""The paper's figures show the numbers of the runs, whatever state the runs are in."""

import json
from itertools import pairwise

import numpy as np
import pytest

from taskgroup.lab.report import affinities, groups, timing
from taskgroup.lab.report import matplotlib_figures as report
from taskgroup.lab.report.run_data import load_run_data
from tests.lab.written_runs import put, write_run

TASKS = ("a", "b", "c")
ALONE = [["a"], ["b"], ["c"]]
PAIR = [["a", "c"], ["b"]]
ALL = [["a", "b", "c"]]
SECONDS = {
    "forward": 1.0,
    "between batches": 0.5,
    "backward": 2.0,
    "optimizer": 0.25,
    "everything": 4.0,
}


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(report, "_DPI", 20)  # the same picture, sooner


@pytest.fixture
def write(tmp_path):
    """Writes the files of a run as training leaves them, and returns its folder."""

    return lambda name, *arguments, **settings: write_run(tmp_path / name, *arguments, **settings)


def matrix(**entries):
    """Zero but for ``ab=1``: the effect of a on b."""
    found = np.eye(3)
    for pair, value in entries.items():
        found[TASKS.index(pair[0]), TASKS.index(pair[1])] = value
    return found


def names(paths):
    return [path.name for path in paths]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_time_is_that_of_the_summaries(write):
    slow = {**SECONDS, "everything": 12.0}
    runs = [
        write("joint", [ALL], seconds=SECONDS, method="joint"),
        write("one", [ALONE], seconds={**SECONDS, "everything": 8.0}),
        write("two", [ALONE], seconds=slow, seed=1, decay=0.5),
        write("random", [ALONE], seconds=slow, grouping="random:2"),
    ]
    bars, notes = timing.seconds_per_batch([load_run_data(run) for run in runs])
    assert notes == []
    joint, learned, random = bars
    assert [bar.label for bar in bars] == [
        "joint",
        "selective, affinity-propagation",
        "selective, random:2",
    ]
    assert joint.sections == pytest.approx(
        {
            "forward": 0.1,
            "between batches": 0.05,
            "backward": 0.2,
            "optimizer": 0.025,
            "other": 0.025,
        }
    )
    assert joint.ratio == 1
    # Seeds are averaged, and the rest is what no section has.
    assert learned.totals == pytest.approx([0.8, 1.2])
    assert learned.sections["other"] == pytest.approx(1.0 - 0.375)
    assert learned.ratio == pytest.approx(2.5)
    assert random.ratio == pytest.approx(3.0)


def test_sections_add_up_to_the_whole_batch(write):
    """Runs record the rest of a batch, too."""
    seconds = {"forward": 2.0, "backward": 3.0, "other": 1.0, "everything": 6.5}
    (bar,), _ = timing.seconds_per_batch([load_run_data(write("run", [ALL], None, seconds))])
    assert bar.sections == pytest.approx({"forward": 0.2, "backward": 0.3, "other": 0.15})
    assert bar.seconds == pytest.approx(bar.totals[0])


def test_methods_that_were_recorded_have_the_names_of_the_command_line(write):
    """A recorder writes the names of classes."""
    folders = [write(name, [ALL], None, {"everything": 1.0}, method="joint") for name in "ab"]
    for folder, method in zip(folders, ("GD", "IMTLG"), strict=True):
        header = json.loads((folder / "run.json").read_text("utf-8"))
        header["settings"] |= {"method": method, "grouping": "AffinityPropagation"}
        header["settings"] |= {"group_weights": "IMTLL" if method == "GD" else None}
        (folder / "run.json").write_text(json.dumps(header), "utf-8")
    runs = [load_run_data(folder) for folder in folders]
    assert [run.method for run in runs] == ["gd", "imtl-g"]
    assert {run.settings["grouping"] for run in runs} == {"affinity-propagation"}
    assert [run.settings["group_weights"] for run in runs] == ["imtl-l", None]
    bars, notes = timing.seconds_per_batch(runs)
    assert [bar.ratio for bar in bars] == [1.0, 1.0]  # gd is joint training
    assert notes == []


def test_time_is_relative_to_joint_training_of_the_same_work(write):
    runs = [
        write("tiny", [ALL], seconds=SECONDS, method="gd"),
        write("tiny-s", [ALONE], seconds={**SECONDS, "everything": 8.0}),
        write("vit-s", [ALONE], seconds={**SECONDS, "everything": 8.0}, backbone="vit-s"),
        write("pair", [[["a"], ["b"]]], seconds=SECONDS),
    ]
    bars, (note,) = timing.seconds_per_batch([load_run_data(run) for run in runs])
    assert [bar.ratio for bar in bars] == [1, 2, None, None]
    assert "['selective, vit-s, a + b + c', 'selective, tiny, a + b']" in note
    assert "no joint run of the same tasks" in note


def test_the_label_of_a_loop_of_the_users_own_has_what_it_knows(write):
    runs = [write(name, [ALONE], seconds=SECONDS) for name in ("recipe", "own")]
    header = json.loads((runs[1] / "run.json").read_text())
    header["settings"] = {"method": "selective", "grouping": "KMeans", "groups_per_batch": 2}
    (runs[1] / "run.json").write_text(json.dumps(header))
    bars, _ = timing.seconds_per_batch([load_run_data(run) for run in runs])
    assert bars[1].label == "selective, kmeans, groups per batch 2, a + b + c"


def test_time_of_a_run_that_is_training(write):
    run = write("running", [ALL] * 3, method="joint")
    spent = [{"batch": b, "seconds": {**SECONDS, "everything": 4.0 * b}} for b in (1, 2)]
    put(run / "seconds.jsonl", spent)
    (bar,), _ = timing.seconds_per_batch([load_run_data(run)])
    assert bar.totals == [4.0]
    assert bar.sections["forward"] == 0.5


def test_summary_without_sections(write):
    run = write("old", [ALL], seconds=SECONDS, method="joint")
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    (run / "summary.json").write_text(json.dumps({**summary, "seconds_per_batch": 0.4}))
    (bar,), _ = timing.seconds_per_batch([load_run_data(run)])
    assert bar.sections == {"not divided": 0.4}


def test_share_is_counted_after_the_warm_up(write):
    run = load_run_data(write("one", [ALL, ALONE, PAIR, PAIR, ALL], warmup=1))
    share = groups.share(groups.learned(run))  # of four batches
    expected = [[1, 0.25, 0.75], [0.25, 1, 0.25], [0.75, 0.25, 1]]
    np.testing.assert_allclose(share, expected)
    assert groups.order_by_share(share) in ([0, 2, 1], [1, 0, 2])  # a beside c


def test_order_puts_groups_together():
    group = np.arange(100) * 37 % 10
    share = 0.1 + 0.8 * (group[:, None] == group) + 0.1 * np.eye(100)
    order = groups.order_by_share(share)
    assert sorted(order) == list(range(100))
    assert sum(group[i] != group[k] for i, k in pairwise(order)) == 9


def test_warm_up_counts_rounds_not_batches(write):
    # Two of three tasks a batch: a round takes two batches.
    run = load_run_data(
        write("cheap", [ALONE] * 5 + [PAIR], warmup=2, dealt=[2, 1, 2, 1, 2, 2], groups_per_batch=2)
    )
    assert run.warmup == 4
    fixed = load_run_data(write("fixed", [ALONE] * 3, warmup=2, grouping="singletons"))
    assert fixed.warmup == 0


def test_group_counts_are_means_of_batches_on_one_side_of_the_warm_up(write):
    many = [ALONE] * 101 + [PAIR, ALL] * 100
    counts = groups.group_counts(load_run_data(write("long", many, warmup=101)))
    assert len(counts.batches) < 80
    assert (np.diff(counts.batches) > 0).all()
    warm = counts.batches <= 101
    np.testing.assert_array_equal(counts.mean[warm], 3)
    # Six batches a point, half of them of one group: the last point has two.
    np.testing.assert_array_equal(counts.mean[~warm], 1.5)
    np.testing.assert_array_equal(counts.low[~warm], 1)
    np.testing.assert_array_equal(counts.high[~warm], 2)
    np.testing.assert_array_equal(counts.batches[~warm][[0, -1]], [104.5, 300.5])
    short = groups.group_counts(load_run_data(write("short", [ALONE, PAIR, ALL])))
    np.testing.assert_array_equal(short.mean, [3, 2, 1])
    np.testing.assert_array_equal(short.batches, [1, 2, 3])


def test_affinity_is_as_recorded_and_averaged_over_seeds(write):
    runs = [
        write("0", [ALONE], [(2, matrix(ab=1, ba=5)), (4, matrix(ab=3, ba=7))], decay=0.1),
        write(
            "1", [ALONE], [(2, matrix(ab=2)), (4, matrix(ab=6)), (6, matrix())], decay=0.1, seed=1
        ),
        write("2", [ALONE], [(2, matrix(ab=9))], decay=0.01),
    ]
    runs = [load_run_data(run) for run in runs]
    slow, fast = affinities.affinity_courses(runs, ("a", "b"))
    assert (slow.label, fast.label) == ("decay 0.01", "decay 0.1")
    np.testing.assert_array_equal(slow.mean, [[9, 0]])
    np.testing.assert_array_equal(fast.batches, [2, 4])  # as far as both go
    np.testing.assert_array_equal(fast.mean, [[1.5, 2.5], [4.5, 3.5]])
    np.testing.assert_array_equal(fast.runs[1][1], [[2, 0], [6, 0], [0, 0]])
    (turned,) = affinities.affinity_courses(runs[2:], ("b", "a"))
    np.testing.assert_array_equal(turned.mean, [[0, 9]])


def test_runs_that_differ_in_more_than_the_seed_are_courses_of_their_own(write):
    recorded = [(1, matrix(ab=1))]
    runs = [
        write("0", [ALONE], recorded),
        write("1", [ALONE], recorded, affinity="gradient"),
        write("2", [ALONE], recorded, seed=3, root="elsewhere"),
    ]
    courses = affinities.affinity_courses([load_run_data(run) for run in runs], ("a", "b"))
    assert [course.label for course in courses] == ["decay 0.001", "decay 0.001, affinity gradient"]
    assert [len(course.runs) for course in courses] == [2, 1]


def test_pair_is_the_one_that_changed_the_most(write):
    # c on b moves by 4 and is back at the end; a on b stands higher, but moves by 1.
    moved = [matrix(cb=-1, ab=8), matrix(cb=3, ab=9), matrix(cb=-1, ab=8)]
    still = write("still", [ALONE], [(1, matrix(ac=2)), (2, matrix(ac=-1))])
    run = write("run", [ALONE], list(enumerate(moved, start=1)))
    runs = [load_run_data(folder) for folder in (still, run)]
    assert affinities.changed_most(runs) == ("b", "c")
    assert affinities.changed_most(runs[:1]) == ("a", "c")


def test_entries_that_were_never_measured(write, tmp_path):
    nan = np.nan
    first = matrix(ab=nan, ba=nan, ac=nan, ca=nan, bc=0.0, cb=0.0)
    later = [matrix(ab=ab, ba=nan, ac=nan, ca=nan, bc=ab - 0.3, cb=0.0) for ab in (0.5, 0.4)]
    apart = write("apart", [ALONE] * 3, [(1, first), (2, later[0]), (3, later[1])])
    met = write("met", [ALONE] * 3, [(1, matrix(ac=0.5))], seed=1)
    runs = [load_run_data(run) for run in (apart, met)]
    # To be measured at last is no change.
    assert affinities.changed_most(runs[:1]) == ("b", "c")
    (course,) = affinities.affinity_courses(runs[:1], ("a", "b"))
    np.testing.assert_allclose(course.mean, [[nan, nan], [0.5, nan], [0.4, nan]], rtol=1e-6)
    said = "The affinity between a and c is not drawn: it was never measured."
    assert affinities.with_affinity(runs[:1], ("a", "c")) == ([], [said])
    drawn, notes = affinities.with_affinity(runs, ("a", "c"))
    assert drawn == runs[1:]
    assert len(notes) == 1
    assert notes[0].endswith("apart']: it was never measured between the two tasks.")
    nothing = load_run_data(write("nothing", [ALONE], [(1, np.full((3, 3), nan))]))
    assert not affinities.has_affinity(nothing)
    assert affinities.with_affinity([nothing], None)[0] == []
    drawn, _ = report.affinity_over_time(runs[:1], tmp_path / "course.png", ("a", "b"))
    assert drawn


def test_order_of_tasks_is_that_of_the_matrices(write):
    # Which groups, in whatever order, do not tell.
    run = load_run_data(write("grouped", [[["a", "c"], ["b"]]], [(1, matrix(ab=0.5))]))
    assert run.tasks == TASKS
    assert run.affinity.values[0, 0, 1] == 0.5
    assert run.groups.tolist() == [[0, 1, 0]]
    assert load_run_data(write("joint", [ALL], method="joint")).tasks == TASKS


def test_all_three_are_drawn(write, tmp_path):
    recorded = [(b, matrix(ab=b)) for b in range(1, 6)]
    runs = [write("joint", [ALL] * 5, seconds=SECONDS, method="joint")]
    runs += [
        write(f"{decay}/{seed}", [ALONE, *[PAIR] * 4], recorded, SECONDS, decay=decay, seed=seed)
        for decay in (0.1, 0.01)
        for seed in range(2)
    ]
    data = [load_run_data(run) for run in runs]
    written, notes = report.figures(data, tmp_path / "new" / "out", ("b", "c"))
    expected = ["time_per_batch.png", "grouping.png", "affinity_over_time.png"]
    assert names(written) == expected
    assert all(map(is_png, written))
    assert len(notes) == 2  # joint training has neither groups nor an affinity
    assert all(str(runs[0]) in note for note in notes)


def test_unfinished_runs_are_drawn_as_far_as_they_are(write, tmp_path):
    done = write("done", [ALONE, *[PAIR] * 5], [(2, matrix(ab=1)), (6, matrix())], SECONDS)
    running = write("running", [ALONE, PAIR], [(2, matrix(ab=3))], seed=1)
    begun = write("begun", [ALONE], seed=2)
    empty = write("empty", seed=3)
    (empty / "metrics.jsonl").unlink()
    data = [load_run_data(run) for run in (done, running, begun, empty)]
    written, notes = report.figures(data, tmp_path / "out")
    assert len(written) == 3
    assert notes[0].startswith("The time per batch figure leaves out")
    assert all(str(run) in notes[0] for run in (running, begun, empty))
    (early,) = [note for note in notes if "followed the warm-up" in note]
    assert str(begun) in early
    assert str(empty) in early
    assert str(running) not in early
    assert "The mean of decay 0.001 ends at batch 2, where its shortest run ends." in notes
    assert report.figures(data[3:], tmp_path / "none")[0] == []


def test_lines_cut_short_are_left_out(write):
    run = write("run", [ALONE, PAIR, PAIR], [(1, matrix(ab=1)), (2, matrix(ab=2))])
    for name in ("metrics.jsonl", "affinity.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text[:-9])
    data = load_run_data(run)
    np.testing.assert_array_equal(data.batches, [1, 2])
    np.testing.assert_array_equal(data.groups, [[0, 1, 2], [0, 1, 0]])
    np.testing.assert_array_equal(data.affinity.batches, [1])
    assert data.affinity.values[0, 0, 1] == 1


def test_broken_line_in_the_middle_is_named(write):
    run = write("run", [ALONE] * 3)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read at line 2"):
        load_run_data(run)


def test_joint_runs_alone(write, tmp_path):
    runs = [write(name, [ALL] * 3, seconds=SECONDS, method=name) for name in ("joint", "gd")]
    written, notes = report.figures([load_run_data(run) for run in runs], tmp_path / "out")
    assert names(written) == ["time_per_batch.png"]
    assert "no run is selective" in notes[0]
    assert "no run has recorded it" in notes[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names(written)


def test_single_task(write, tmp_path):
    run = write("one", [[["a"]]] * 3, [(1, [[1.0]])], SECONDS)
    written, _ = report.figures([load_run_data(run)], tmp_path / "out")
    assert names(written) == ["time_per_batch.png", "grouping.png"]


def test_runs_on_other_tasks_are_left_out_by_name(write, tmp_path):
    recorded = [(1, matrix(ab=1)), (2, matrix())]
    runs = [
        write("other", [[["a"], ["d"]]] * 3, [(1, np.ones((2, 2)))]),
        *(write(f"{seed}", [ALONE, PAIR, PAIR], recorded, seed=seed) for seed in range(2)),
    ]
    data = [load_run_data(run) for run in runs]
    for draw in (report.grouping, report.affinity_over_time):
        drawn, (note,) = draw(data, tmp_path / "picture.png")
        assert drawn
        assert f"leaves out ['{runs[0]}']: the tasks differ from those of most runs" in note
    drawn, (note,) = report.affinity_over_time(data, tmp_path / "picture.png", ("a", "d"))
    assert drawn
    assert f"leaves out ['{runs[1]}', '{runs[2]}']: one of the two tasks is not trained" in note


def test_wrong_pairs_and_no_runs_change_nothing(write, tmp_path):
    data = [load_run_data(write("run", [ALONE, PAIR, PAIR], [(1, matrix(ab=1))]))]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no task 'z'; their tasks are a, b, c"):
        report.figures(data, out, ("a", "z"))
    with pytest.raises(ValueError, match="between two tasks, got 'a' twice"):
        report.figures(data, out, ("a", "a"))
    with pytest.raises(ValueError, match="no runs to draw"):
        report.figures([], out)
    assert not out.exists()


def drawn_of(run, matrix, monkeypatch, tmp_path):
    """``{file: figure}`` of the pictures of a run, which are not written."""
    found = {}
    monkeypatch.setattr(report, "save", lambda figure, path: found.update({path.name: figure}))
    report._draw_groups(run, np.asarray(matrix), tmp_path)
    return found


SHOWN = {
    "depth_zbuffer": "Z-buffer depth",
    "keypoints2d": "2D keypoints",
    "normal": "Surface normals",
    "reshading": "Reshading",
}


def test_affinity_of_a_run_is_the_matrix_of_the_page(write, monkeypatch, tmp_path):
    """In the order of the last groups, which are framed; its tasks have titles."""
    partition = [["normal", "reshading"], ["keypoints2d", "depth_zbuffer"]]
    run = load_run_data(write("run", [partition] * 3, [(1, np.eye(4))], titles=SHOWN))
    assert run.tasks == ("depth_zbuffer", "keypoints2d", "normal", "reshading")
    random = np.random.RandomState(0)
    matrix = np.eye(4) + 0.2 * random.randn(4, 4) * (1 - np.eye(4))
    matrix[0, 3] = matrix[3, 0] = np.nan
    figure = drawn_of(run, matrix, monkeypatch, tmp_path)["affinity.png"]
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [label.get_text() for label in axes.get_xticklabels()]
    place = {name: names.index(name) for name in names}
    order = [
        place[name] for name in ("Z-buffer depth", "2D keypoints", "Surface normals", "Reshading")
    ]
    (image,) = axes.get_images()
    shown = np.ma.filled(image.get_array().astype(float), np.nan)[np.ix_(order, order)]
    np.testing.assert_allclose(shown, affinities.normalised(matrix))
    assert np.isnan(shown[0, 3])
    end = affinities.largest(shown)
    assert image.get_clim() == (-end, end)
    frames = {(box.get_xy(), box.get_width(), box.get_height()) for box in axes.patches}
    assert frames == {((-0.5, -0.5), 2, 2), ((1.5, 1.5), 2, 2)}
    assert abs(place["Surface normals"] - place["Reshading"]) == 1
    assert [text.get_text() for text in axes.texts].count("empty: not measured") == 1


def test_names_of_many_tasks_are_legible_and_whole(write, monkeypatch, tmp_path):
    tasks = [f"a-task-with-a-long-name-of-{k:03d}" for k in range(80)]
    run = load_run_data(write("run", [[[task] for task in tasks]] * 2))
    drawn = drawn_of(run, np.eye(80), monkeypatch, tmp_path)
    for figure in (drawn["affinity.png"], drawn["cogrouping.png"]):
        figure.draw_without_rendering()
        width, height = figure.get_size_inches() * figure.dpi
        labels = [*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()]
        for label in filter(lambda label: label.get_text(), labels):
            box = label.get_window_extent()
            assert box.x0 >= 0 <= box.y0
            assert box.x1 <= width
            assert box.y1 <= height
            assert label.get_fontsize() >= 8


def test_mean_of_the_groups_leaves_out_the_warm_up(write, monkeypatch, tmp_path):
    run = load_run_data(write("run", [ALONE] * 20 + [ALL] * 40, warmup=20))
    axes = drawn_of(run, np.eye(3), monkeypatch, tmp_path)["groups.png"].axes[0]
    (mean,) = [line for line in axes.lines if "mean" in line.get_label()]
    np.testing.assert_array_equal(mean.get_xdata(), np.arange(21, 61))
    np.testing.assert_allclose(mean.get_ydata(), 1)


def test_hundred_tasks(write, tmp_path):
    tasks = [f"a-task-with-a-long-name-of-{k:03d}" for k in range(100)]
    alone = [[task] for task in tasks]
    fives = [tasks[start : start + 5] for start in range(0, 100, 5)]
    recorded = [(b, np.full((100, 100), float(b))) for b in (1, 2)]
    data = [load_run_data(write("run", [alone, fives, fives], recorded))]
    assert data[0].tasks == tuple(tasks)
    share = groups.share(groups.learned(data[0]))
    np.testing.assert_array_equal(share, np.kron(np.eye(20), np.ones((5, 5))))
    assert report.grouping(data, tmp_path / "grouping.png") == (True, [])
    assert is_png(tmp_path / "grouping.png")
    assert report.affinity_over_time(data, tmp_path / "affinity.png") == (True, [])
    assert is_png(tmp_path / "affinity.png")


def test_many_names_below_a_matrix_are_upright(write, monkeypatch, tmp_path):
    """Slanted names touch each other where the cells are small."""
    tasks = [f"{k:03d}" for k in range(100)]
    run = load_run_data(write("run", [[[task] for task in tasks]] * 2))
    axes = drawn_of(run, np.eye(100), monkeypatch, tmp_path)["affinity.png"].axes[0]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {90}


@pytest.mark.parametrize("extreme", [0.1, 0.8])
def test_arrows_at_a_colour_bar_that_ends_before_the_values(write, monkeypatch, tmp_path, extreme):
    tasks = [f"{k:02d}" for k in range(15)]
    run = load_run_data(write("run", [[[task] for task in tasks]] * 2))
    matrix = np.where(np.eye(15) > 0, 1.0, 0.1)
    matrix[0, 1] = matrix[1, 0] = extreme
    figure = drawn_of(run, matrix, monkeypatch, tmp_path)["affinity.png"]
    (image,) = figure.axes[0].get_images()
    assert image.colorbar.extend == ("both" if extreme > 0.1 else "neither")
