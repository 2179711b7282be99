"""What is run, what is not run again, and that the table says what the files hold."""

import itertools
import json
import math
import statistics

import pytest

import taskgroup as tg
from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import GROUP_WEIGHTS, Recipe, read_recipe
from taskgroup.lab.studies import cost, workers
from taskgroup.lab.studies.cell import Cell
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.presets import PRESETS, Variant, preset, variants_by_name
from taskgroup.lab.studies.results import Row
from taskgroup.lab.train.trainer import Trainer, task_names
from tests.lab.small import InThisProcess, yeast

GD = Variant("gd", "GD", {"method": "gd"})
UW = Variant("uw", "UW", {"method": "uw"})
SELECTIVE = Variant("selective", "Selective", {"method": "selective"})
WILD = Variant("wild", "Wild", {"method": "gd", "lr": 1e20})
TASKS = ["class1", "class2", "class3"]


def comparison(out, variants=(GD, SELECTIVE), seeds=2, budgets=("batches",), **options):
    return Comparison(yeast(), variants, seeds, out, budgets=budgets, **options)


def names(cells):
    return [(cell.name, cell.recipe.seed) for cell in cells]


def files(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}


# What is run.


def test_finished_runs_are_not_run_again(tmp_path, trained):
    first = comparison(tmp_path).run()
    # Two seeds of two variants and three single tasks.
    assert sorted(names(trained)) == sorted(
        (name, seed)
        for name in ("gd", "selective", *(f"single-{task}" for task in TASKS))
        for seed in (0, 1)
    )
    before = files(tmp_path)
    trained.clear()
    heard = []
    again = comparison(tmp_path).run(lambda *said: heard.append(said[1:3]))
    assert trained == []
    assert files(tmp_path) == before
    assert heard == [(n, 10) for n in range(1, 11)]
    assert again.rows == first.rows
    assert again.single == first.single


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty"])
def test_a_lost_result_is_run_again_alone(damage, tmp_path, trained):
    first = comparison(tmp_path).run()
    (lost,) = (tmp_path / "cells").glob("selective-1-*.json")
    text = lost.read_text()
    if damage == "delete":
        lost.unlink()
    else:
        lost.write_text(text[: len(text) // 2] if damage == "truncate" else "")
    trained.clear()
    again = comparison(tmp_path).run()
    assert names(trained) == [("selective", 1)]
    assert again.rows[1].delta == first.rows[1].delta  # from the seed, the same to the bit


def test_more_seeds_and_variants_add_what_is_missing(tmp_path, trained):
    comparison(tmp_path, seeds=1).run()
    trained.clear()
    comparison(tmp_path, seeds=2).run()
    assert set(names(trained)) == {
        *((f"single-{task}", 1) for task in TASKS),
        ("gd", 1),
        ("selective", 1),
    }
    trained.clear()
    table = comparison(tmp_path, variants=[GD, UW, SELECTIVE]).run()
    assert names(trained) == [("uw", 0), ("uw", 1)]
    assert [row.variant.name for row in table.rows] == ["gd", "uw", "selective"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    comparison(tmp_path / "mine")
    (tmp_path / "mine" / "cells" / "gd-0-0123456789ab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"runs with other settings \(dim: 4, batches: 4\)"):
        Comparison(yeast(dim=8, batches=6), [GD], 1, tmp_path / "mine", budgets=["batches"])
    # The seed is where the seeds start, and no setting of the folder.
    Comparison(yeast(seed=7), [GD], 1, tmp_path / "mine", budgets=["batches"])

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(
        ValueError, match="is not empty and holds no runs; name another folder with --out"
    ):
        comparison(tmp_path / "full")
    with pytest.raises(ValueError, match="is not empty and holds no runs"):
        comparison(tmp_path / "full" / "thesis.tex")
    with pytest.raises(ValueError, match=r"cannot be created .* name another folder with --out"):
        comparison(tmp_path / "full" / "thesis.tex" / "below")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_folder_without_a_result_takes_other_settings(tmp_path):
    comparison(tmp_path)  # and stopped before the first result
    Comparison(yeast(dim=8, batches=6), [GD], 1, tmp_path, budgets=["batches"])
    # Now it is of these settings.
    (tmp_path / "costs.yaml").write_text("gd: 1.0")
    with pytest.raises(ValueError, match=r"runs with other settings \(dim: 8, batches: 6\)"):
        comparison(tmp_path)


def test_a_diverged_run_is_kept_as_such(tmp_path, trained):
    table = comparison(tmp_path, variants=[GD, WILD, SELECTIVE]).run()
    wild = table.rows[1]
    assert wild.diverged == {"batches": 2}
    assert wild.delta["batches", "held_out"].n == 0
    assert wild.verdict("batches", "held_out") == ""
    assert table.rows[2].delta["batches", "held_out"].n == 2
    (file,) = (tmp_path / "cells").glob("wild-0-*.json")
    assert json.loads(file.read_text())["diverged"] in (1, 2)
    trained.clear()
    comparison(tmp_path, variants=[GD, WILD, SELECTIVE]).run()
    assert trained == []


def test_metrics_that_are_not_numbers_are_a_divergence(tmp_path, trained, monkeypatch):
    problem = type(make_problem(yeast()))
    evaluate = problem.evaluate

    def lose(self, model, split):
        return dict.fromkeys(evaluate(self, model, split), math.nan)

    monkeypatch.setattr(problem, "evaluate", lose)
    table = comparison(tmp_path).run()
    assert [row.diverged["batches"] for row in table.rows] == [2, 2]
    assert all(math.isnan(row.delta["batches", "held_out"].mean) for row in table.rows)


def test_a_run_that_raises_is_said_and_not_kept(tmp_path, trained, monkeypatch):
    train = workers.train_cell

    def fail(cell):
        if cell.name == "selective" and cell.recipe.seed == 0:
            raise ValueError("the solver gave up")
        return train(cell)

    monkeypatch.setattr(workers, "train_cell", fail)
    heard = []
    table = comparison(tmp_path).run(lambda *said: heard.append((said[3].name, said[4] is None)))
    assert table.failed == ["selective, seed 0: the solver gave up"]
    assert [row.delta["batches", "held_out"].n for row in table.rows] == [2, 1]
    assert len(heard) == 10
    assert [name for name, lost in heard if lost] == ["selective"]
    assert len(files(tmp_path)) == 9
    monkeypatch.setattr(workers, "train_cell", train)
    trained.clear()
    comparison(tmp_path).run()
    assert names(trained) == [("selective", 0)]


def test_as_many_processes_as_asked_for(tmp_path, trained):
    comparison(tmp_path, seeds=1).run(jobs=3)
    assert InThisProcess.jobs == 3


# What is refused, before anything is run.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seeds": 0}, "at least one seed, got 0"),
        ({"seeds": -1}, "at least one seed, got -1"),
        ({"variants": [SELECTIVE]}, "joint training to compare with: add 'gd'"),
        ({"variants": [GD, Variant("x", "X", {}, against="gd-8")]}, "add 'gd-8'"),
        ({"budgets": ["batches", "money"]}, "no budget money; take some of batches, time, tuned"),
        ({"budgets": ["tuned"]}, "give another one than that of the recipe"),
        ({"budgets": ["tuned"], "batch_sizes": [8]}, "give another one than that of the recipe"),
        ({"budgets": ["tuned"], "batch_sizes": [0]}, "batch_size must be greater .* 1, got 0"),
        ({"budgets": ["time"], "batch_sizes": [4]}, "'tuned' alone; add it to the budgets"),
        ({"budgets": ["time"], "tune": ["gd"]}, "'tuned' alone; add it to the budgets"),
        (
            {"budgets": ["tuned"], "rates": [1.0], "tune": ["uw"]},
            r"\['uw'\] cannot be tuned, .* has no such variant; it has gd, selective",
        ),
        ({"budgets": ["tuned"], "rates": [1e-2, -1.0]}, "lr must be greater .* to 0, got -1.0"),
        ({"budgets": ["tuned"], "rates": [math.nan]}, "lr must be greater .* to 0, got nan"),
        (
            {"variants": [GD, Variant("r", "Random", {"grouping": "random:9"})], "strict": True},
            "Random cannot be compared here: .*cannot fill 9 groups with 3 tasks",
        ),
    ],
)
def test_bad_arguments(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        comparison(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": "class1"}, "at least two tasks"),
        ({"tasks": "class1,clas2"}, "yeast has no task 'clas2'; its tasks are class1"),
        ({"batches": 1}, "at least two batches"),
    ],
)
def test_bad_recipes(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        Comparison(yeast(**changes), [GD], 1, tmp_path / "out", budgets=["batches"])
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_left_out_and_said(tmp_path):
    impossible = Variant("random-9", "Random", {"grouping": "random:9"})
    made = comparison(tmp_path, variants=[GD, impossible])
    assert [variant.name for variant in made.variants] == ["gd"]
    assert list(made.refused) == ["Random"]
    assert "cannot fill 9 groups with 3 tasks" in made.refused["Random"]


def test_weights_inside_groups_are_variants_of_their_own():
    variants = {variant.name: variant for variant in preset("methods", yeast(), TASKS)}
    assert GROUP_WEIGHTS == ("si", "rlw", "uw", "dwa", "famo", "imtl-l")
    for name in GROUP_WEIGHTS:
        made = yeast().replace(**variants[f"selective-{name}"].settings)
        assert (made.method, made.group_weights) == ("selective", name)
    assert variants["selective-uw"].title == "Selective, UW inside"
    weighed = yeast(group_weights="uw")  # of the recipe itself: joint methods have no groups
    for variant in preset("methods", weighed, TASKS):
        made = weighed.replace(**variant.settings)
        assert (made.group_weights is None) == (made.method != "selective")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_weights": "pcgrad"}, "one of si, rlw, uw, dwa, famo, imtl-l, .* got 'pcgrad'"),
        ({"group_weights": "gd"}, "got 'gd'"),
        ({"group_weights": "uw", "method": "joint"}, "method: joint has no groups"),
        ({"group_weights": "uw", "method": "uw"}, "method: uw has no groups"),
    ],
)
def test_group_weights_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**settings)


def test_unknown_names_list_the_known_ones_nearest_first():
    variants = preset("methods", yeast(), TASKS)
    with pytest.raises(ValueError, match="no method 'pc-grad' here; there are pcgrad, upgrad"):
        variants_by_name(["gd", "pc-grad"], variants)
    with pytest.raises(ValueError, match="no preset 'decays'; there are decay"):
        preset("decays", yeast(), TASKS)
    with pytest.raises(ValueError, match="no method 'cagard'; the methods are cagrad"):
        Recipe(method="cagard")


def test_chosen_variants_bring_what_they_are_measured_against():
    variants = preset("batch-size", yeast(), TASKS)
    chosen = variants_by_name(["gd", "selective-batch-16", "gd"], variants)
    assert [variant.name for variant in chosen] == ["gd", "gd-batch-16", "selective-batch-16"]


@pytest.mark.parametrize("data", ["yeast", "motorcycle", "motorcycle-small"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_valid_recipes(name, data):
    recipe = read_recipe(data)
    tasks = task_names(recipe, make_problem(recipe))
    variants = preset(name, recipe, tasks)
    by_name = {variant.name: variant for variant in variants}
    assert len(by_name) == len({variant.title for variant in variants}) == len(variants)
    assert {"gd", "selective"} <= set(by_name)
    made = {Recipe(**{**vars(recipe), **variant.settings}) for variant in variants}
    assert len(made) == len(variants)  # nothing is trained twice under two names
    for variant in variants:
        against = by_name[variant.against]
        assert against.settings["method"] == "gd"
        # A joint run of the same batches and tasks.
        for key in ("batch_size", "tasks"):
            assert against.settings.get(key) == variant.settings.get(key)


def test_three_tasks_are_spread_over_all():
    recipe = read_recipe("yeast")
    variants = preset("three-tasks", recipe, [f"class{k}" for k in range(1, 15)])
    three = [variant for variant in variants if "tasks" in variant.settings]
    assert {variant.settings["tasks"] for variant in three} == {("class1", "class5", "class10")}
    assert [variant.name for variant in three] == [
        "gd-three",
        "selective-three",
        "singletons-three",
    ]


def test_every_grouping_is_compared_with_both_optimizer_states():
    variants = preset("shared-state", yeast(), TASKS)
    pairs = {}
    for variant in variants[1:]:
        recipe = yeast().replace(**variant.settings)
        pairs.setdefault(recipe.grouping, []).append(recipe.shared_state)
    assert set(pairs) == {"affinity-propagation", "random:3", "heterogeneous", "singletons"}
    assert all(sorted(states) == ["all", "group"] for states in pairs.values())


def test_a_result_has_the_same_name_after_a_setting_was_added(tmp_path):
    """The name was written down when there were fewer settings than there may be now."""
    recipe = Recipe(data="yeast", method="gd", lr=3e-3, seed=4)
    name = "gd-4-157390e63a45.json"
    assert Cell("gd", recipe).file(tmp_path).name == name
    default = Recipe.model_fields["shared_state"].default
    assert Cell("gd", recipe.replace(shared_state=default)).file(tmp_path).name == name
    for changes in ({"lr": 1e-3}, {"shared_state": "group"}, {"head_depth": 1}):
        assert Cell("gd", recipe.replace(**changes)).file(tmp_path).name != name


# What is read.


def metrics(held_out, validation=0.5, tasks=TASKS):
    values = {"train": 0.9, "validation": validation, "held_out": held_out}
    return {"metrics": {split: dict.fromkeys(tasks, value) for split, value in values.items()}}


def test_delta_m_is_that_of_the_files_by_hand(tmp_path, trained):
    table = comparison(tmp_path, seeds=3).run()
    results = {path.name: json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()}

    def held_out(name, task):
        found = [r for file, r in sorted(results.items()) if file.startswith(f"{name}-")]
        return [result["metrics"]["held_out"][task] for result in found]

    single = {task: statistics.fmean(held_out(f"single-{task}", task)) for task in TASKS}
    assert table.single["held_out"] == pytest.approx(single)
    deltas = {}
    for name in ("gd", "selective"):
        by_task = {task: held_out(name, task) for task in TASKS}
        deltas[name] = [
            100 * statistics.fmean((by_task[t][s] - single[t]) / single[t] for t in TASKS)
            for s in range(3)
        ]
        assert deltas[name][0] == pytest.approx(
            tg.delta_m({t: by_task[t][0] for t in TASKS}, single, set())
        )
    gd, selective = table.rows
    key = ("batches", "held_out")
    assert gd.delta[key].mean == pytest.approx(statistics.fmean(deltas["gd"]))
    assert selective.delta[key].mean == pytest.approx(statistics.fmean(deltas["selective"]))
    differences = [b - a for a, b in zip(deltas["gd"], deltas["selective"], strict=True)]
    gain = selective.gain[key]
    assert gain.mean == pytest.approx(statistics.fmean(differences))
    t = 4.302653  # of two degrees of freedom
    assert gain.half == pytest.approx(t * statistics.stdev(differences) / 3**0.5, rel=1e-6)
    floor = t * statistics.stdev(deltas["gd"]) * (2 / 3) ** 0.5
    assert selective.floor[key] == pytest.approx(floor, rel=1e-6)
    assert selective.metrics[key] == pytest.approx(
        {task: statistics.fmean(held_out("selective", task)) for task in TASKS}
    )


def test_best_rate_is_that_of_other_seeds(tmp_path, made_up):
    # For the tuning seeds 0.01 is best; for the seeds compared 0.1 is.
    tuning = {0.003: 0.6, 0.01: 0.8, 0.1: 0.7}
    then = {0.003: 0.6, 0.01: 0.7, 0.1: 0.9}

    def make(cell):
        rate = cell.recipe.lr
        if cell.recipe.seed < 1000:
            return metrics(then[rate])
        if cell.name == "selective" and rate == 0.01 and cell.recipe.seed == 1001:
            return {**metrics(0.9), "diverged": 3}
        return metrics(tuning[rate])

    cells = made_up(make)
    compared = comparison(tmp_path, budgets=["tuned"], rates=[0.1, 0.01])
    compared.read()  # nothing yet, and nothing of that is kept
    table = compared.run()
    assert [row.rate for row in table.rows] == [0.01, 0.1]  # 0.01 diverged once
    assert compared.best(GD) == (0.01, 8)
    tuning = {(c.name, c.recipe.seed, c.recipe.lr) for c in cells if c.recipe.seed >= 1000}
    assert tuning == {
        (name, seed, rate)
        for name in ("gd", "selective")
        for seed in (1000, 1001, 1002)
        for rate in (0.003, 0.01, 0.1)
    }
    tuned = {(c.name, c.recipe.seed, c.recipe.lr) for c in cells if c.recipe.seed < 1000}
    assert {("gd", 0, 0.01), ("gd", 1, 0.01), ("selective", 0, 0.1)} <= tuned


def test_where_all_rates_diverge_the_recipes_is_kept(tmp_path, made_up):
    made_up(lambda cell: {**metrics(0.7), "diverged": 1 if cell.recipe.seed >= 1000 else None})
    table = comparison(tmp_path, budgets=["tuned"], rates=[0.1]).run()
    assert [row.rate for row in table.rows] == [0.003, 0.003]


# Of a step at batch size 8, 4 and 2; a step of selective updates on half a batch is no cheaper.
SECONDS = {
    "gd": 1.0,
    "gd, batch size 4": 0.5,
    "gd, batch size 2": 0.4,
    "selective": 2.0,
    "selective, batch size 4": 2.0,
    "selective, batch size 2": 1.6,
}


def sized(cell):
    """A smaller batch is better for joint training, and a larger one for selective updates."""
    steps = {"selective": 3.0}.get(cell.name, 1.0)
    sign = -1 if cell.name == "selective" else 1
    found = 0.7 - sign * 0.01 * cell.recipe.batch_size + (0.02 if cell.recipe.lr == 0.1 else 0)
    return {**metrics(found), "steps_per_batch": steps}


def test_the_best_pair_of_rate_and_batch_size_is_that_of_other_seeds(tmp_path, made_up):
    cells = made_up(sized, SECONDS)
    recipe = yeast(batches=40)
    options = {"budgets": ["tuned"], "rates": [0.1], "batch_sizes": [2, 4]}
    table = Comparison(recipe, [GD, SELECTIVE], 2, tmp_path, **options).run()
    assert [(row.rate, row.batch_size) for row in table.rows] == [(0.1, 2), (0.1, 8)]
    assert (table.rates, table.batch_sizes) == ([0.003, 0.1], [2, 4, 8])
    tuning = [cell for cell in cells if cell.recipe.seed >= 1000]
    assert len(tuning) == len({cell.file(tmp_path) for cell in tuning}) == 2 * 3 * 2 * 3
    # As many batches of each size as take the time of 40 batches of selective updates.
    assert {(c.name, c.recipe.batch_size, c.recipe.batches) for c in tuning} == {
        *(("gd", 8, 240), ("gd", 4, 480), ("gd", 2, 600)),
        *(("selective", 8, 40), ("selective", 4, 40), ("selective", 2, 50)),
    }
    then = [cell.recipe for cell in cells if cell.name == "gd" and cell.recipe.batch_size == 2]
    assert [r.batches for r in then if r.seed < 1000] == [600, 600]
    assert table.rows[0].batches == {"batches": 40, "tuned": 600}
    assert [row.tuned_time for row in table.rows] == [1.0, 1.0]
    key = ("tuned", "held_out")
    single = 0.7 - 0.01 * 8
    assert table.rows[0].delta[key].mean == pytest.approx(100 * (0.7 / single - 1))
    records = [r for r in table.records() if r["split"] == "held_out"]
    assert [(r["variant"], r["budget"], r["rate"], r["batch_size"]) for r in records] == [
        *(("gd", "batches", 0.003, 8), ("gd", "tuned", 0.1, 2)),
        *(("selective", "batches", 0.003, 8), ("selective", "tuned", 0.1, 8)),
        ("single-task", "batches", 0.003, 8),
    ]


def test_batch_sizes_that_are_added_keep_what_was_measured(tmp_path, made_up):
    cells = made_up(sized, SECONDS)
    recipe = yeast(batches=40)

    def run(**options):
        cells.clear()
        options = {"budgets": ["tuned"], "rates": [0.1], **options}
        return Comparison(recipe, [GD, SELECTIVE], 2, tmp_path, **options).run()

    run()
    assert {cell.recipe.batch_size for cell in cells} == {8}
    assert (tmp_path / "costs.yaml").read_text() == "gd: 1.0\nselective: 2.0\n"
    run(batch_sizes=[8])  # nothing but the recipe's: as without
    assert cells == []
    before = files(tmp_path)
    table = run(batch_sizes=[4])
    # The pairs with the new size, and joint training at the best of them.
    assert len([cell for cell in cells if cell.recipe.seed >= 1000]) == 2 * 2 * 3
    assert {cell.recipe.batch_size for cell in cells} == {4}
    assert names(cells)[-2:] == [("gd", 0), ("gd", 1)]
    assert [row.batch_size for row in table.rows] == [4, 8]
    assert files(tmp_path).items() > before.items()
    costs = (tmp_path / "costs.yaml").read_text()
    # On a machine on which batches of 4 have become slow.
    made_up(sized, {**SECONDS, "gd, batch size 4": 9.0})
    assert [row.batches["tuned"] for row in run(batch_sizes=[4]).rows] == [480, 40]
    assert cells == []
    assert (tmp_path / "costs.yaml").read_text() == costs


def test_batch_sizes_are_chosen_at_one_rate_too(tmp_path, made_up):
    made_up(sized, SECONDS)
    table = comparison(tmp_path, budgets=["tuned"], batch_sizes=[4]).run()
    assert [(row.rate, row.batch_size) for row in table.rows] == [(0.003, 4), (0.003, 8)]


def test_a_batch_size_whose_cost_is_unknown_is_not_tried(tmp_path, made_up):
    """Equal time could not be kept there."""
    cells = made_up(sized, {**SECONDS, "gd, batch size 2": math.nan})
    table = comparison(tmp_path, budgets=["tuned"], rates=[0.1], batch_sizes=[2, 4]).run()
    assert [row.batch_size for row in table.rows] == [4, 8]
    assert ("gd", 2) not in {(cell.name, cell.recipe.batch_size) for cell in cells}


def test_tuned_runs_that_take_other_steps_take_other_time(tmp_path, made_up):
    """The number of groups is that of equal batches until the runs are known."""

    def make(cell):
        small = cell.name == "selective" and cell.recipe.batch_size == 4
        return {**sized(cell), **metrics(0.9 if small else 0.5), "steps_per_batch": 3 + 3 * small}

    made_up(make, SECONDS)
    recipe = yeast(batches=40)
    options = {"budgets": ["tuned"], "batch_sizes": [4]}
    table = Comparison(recipe, [GD, SELECTIVE], 2, tmp_path, **options).run()
    assert [(row.batch_size, row.tuned_time) for row in table.rows] == [(4, 1.0), (4, 2.0)]


def test_variants_with_a_batch_size_of_their_own_keep_it(tmp_path, made_up):
    cells = made_up(lambda cell: metrics(0.5 + 0.01 * cell.recipe.batch_size))
    small = Variant("gd-batch-4", "GD, batch 4", {"method": "gd", "batch_size": 4}, "gd-batch-4")

    def run(**options):
        return comparison(tmp_path, [GD, small], budgets=["tuned"], rates=[0.1], **options).run()

    table = run()
    assert [row.batch_size for row in table.rows] == [8, 4]
    assert {c.recipe.batch_size for c in cells if c.name == "gd-batch-4"} == {4}
    assert {record["batch_size"] for record in table.records()} == {8, 4}
    assert (tmp_path / "costs.yaml").read_text() == "gd: 1.0\ngd-batch-4: 1.0\n"
    # Unless there are sizes to choose from.
    assert [row.batch_size for row in run(batch_sizes=[2]).rows] == [8, 8]
    assert [row.batch_size for row in run().rows] == [8, 4]


def test_some_variants_are_tuned(tmp_path, made_up):
    cells = made_up(sized, SECONDS)
    options = {"budgets": ["time", "tuned"], "rates": [0.1], "batch_sizes": [4]}
    made = comparison(tmp_path, [GD, UW, SELECTIVE], tune=["selective"], **options)
    table = made.run()
    assert {cell.name for cell in cells if cell.recipe.seed >= 1000} == {"gd", "selective"}
    _, uw, selective = table.rows
    assert [(row.rate, row.batch_size) for row in table.rows] == [(0.1, 4), (None, None), (0.1, 8)]
    assert uw.delta["tuned", "held_out"].n == 0
    assert uw.delta["time", "held_out"].n == selective.gain["tuned", "held_out"].n == 2
    assert ("uw", "tuned") not in {(r["variant"], r["budget"]) for r in table.records()}
    assert not any(key.startswith("uw,") for key in (tmp_path / "costs.yaml").read_text().split())


def test_the_rate_of_the_heads_goes_with_that_of_the_encoder(tmp_path, made_up):
    cells = made_up(lambda cell: metrics(0.7))
    recipe = yeast(lr=0.01, head_lr=0.02)
    Comparison(recipe, [GD], 1, tmp_path, budgets=["tuned"], rates=[0.1]).run()
    rates = {(c.recipe.lr, c.recipe.head_lr) for c in cells if c.recipe.seed >= 1000}
    assert rates == {(0.01, 0.02), (0.1, 0.2)}


def test_as_much_time_is_the_cost_of_the_reference(tmp_path, made_up):
    # Of a step; a batch of selective updates takes 1 or 2 or 3 of them, seed by seed.
    seconds = {"gd": 1.2, "uw": 4.0, "selective": 1.5}

    def make(cell):
        steps = 1 + cell.recipe.seed % 3 if cell.name == "selective" else 1
        return {**metrics(0.7), "steps_per_batch": steps}

    made_up(make, seconds)
    recipe = yeast(batches=40)

    def table(*variants, seeds=3):
        return Comparison(recipe, variants, seeds, tmp_path, budgets=["time"]).run()

    rows = table(GD, UW, SELECTIVE).rows
    assert [row.time for row in rows] == [1, pytest.approx(4 / 1.2), pytest.approx(3 / 1.2)]
    assert [row.batches for row in rows] == [
        {"batches": 40, "time": 100},  # 40 * 3 / 1.2
        {"batches": 40, "time": 30},
        {"batches": 40, "time": 40},
    ]
    # Opened again, with seeds on a machine that has become slower: the same.
    seconds["gd"] = 90.0
    rows = table(GD, UW, SELECTIVE, seeds=6).rows
    assert [row.batches["time"] for row in rows] == [100, 30, 40]


def test_without_selective_updates_the_time_is_that_of_gd(tmp_path, made_up):
    made_up(lambda cell: metrics(0.7), {"gd": 1.0, "uw": 2.0, "selective": 4.0})

    def batches(*variants):
        table = comparison(tmp_path, variants=variants, budgets=["time"]).run()
        return table.reference, [row.batches["time"] for row in table.rows]

    assert batches(GD, UW) == ("GD", [4, 2])
    # And another reference in the same folder has its own.
    assert batches(GD, UW, SELECTIVE) == ("Selective", [16, 8, 4])
    assert batches(GD, UW) == ("GD", [4, 2])


def test_costs_are_measured_in_turns_over_whole_runs(monkeypatch):
    """The clock goes on by a second at every step of GD and by ten at every one of the others."""
    now = 0.0
    turns = []

    class Counted(Trainer):
        def step(self):
            nonlocal now
            if self.recipe.method == "dwa":
                raise ValueError("the solver gave up")
            progress = super().step()
            now += sum(1.0 if self.recipe.method == "gd" else 10.0 for _ in progress.groups)
            turns.append(self.recipe.method)
            return progress

    monkeypatch.setattr(cost, "Trainer", Counted)
    monkeypatch.setattr(cost.time, "thread_time", lambda: now)
    recipes = {
        "joint": yeast(method="gd", batches=12),
        "groups": yeast(method="selective", grouping="singletons", batches=12),
        "lost": yeast(method="uw", lr=1e20, batches=12),
        "fails": yeast(method="dwa", batches=12),
    }
    found = cost.step_seconds(recipes)
    assert (found["joint"], found["groups"]) == (1.0, 10.0)
    assert math.isnan(found["lost"])
    assert math.isnan(found["fails"])
    assert turns.count("gd") == turns.count("selective") == 12
    # One to allocate, then by fives.
    lasting = [turn for turn in turns if turn != "uw"]
    assert [(turn, len(list(run))) for turn, run in itertools.groupby(lasting)] == [
        *(("gd", 1), ("selective", 1), ("gd", 5), ("selective", 5), ("gd", 5), ("selective", 5)),
        *(("gd", 1), ("selective", 1)),
    ]


def test_read_before_and_after_the_runs(tmp_path, made_up):
    made_up(lambda cell: metrics(0.6 if cell.name.startswith("single") else 0.75))
    made = comparison(tmp_path)
    assert math.isnan(made.read().single["held_out"]["class1"])
    assert made.run().rows[0].delta["batches", "held_out"].mean == pytest.approx(25)


def test_groups_and_changes(tmp_path, made_up):
    groups = {"groups": [3, 3, 3, 3, 2, 2, 1, 1], "changes": [4, 6, 7]}
    made_up(lambda cell: {**metrics(0.7), **groups} if cell.name == "selective" else metrics(0.7))
    recipe = yeast(batches=8)
    row = Comparison(recipe, [GD, SELECTIVE], 1, tmp_path, budgets=["batches"]).run().rows[1]
    assert row.groups == 1.5  # of the second half
    assert row.changes == 0.5  # in the batches 7 and 8
    assert math.isnan(row.agreement)


def test_agreement_of_the_seeds(tmp_path, made_up):
    found = iter([[["class1", "class2"], ["class3"]], [["class1"], ["class2", "class3"]]] * 2)

    def made(cell):
        own = {"partition": next(found)} if cell.name == "selective" else {}
        return {**metrics(0.7), **own}

    made_up(made)
    table = Comparison(yeast(), [GD, SELECTIVE], 4, tmp_path, budgets=["batches"]).run()
    # Two of the six pairs of seeds agree; the others agree less than by chance.
    assert table.rows[1].agreement == pytest.approx((2 * 1.0 + 4 * -0.5) / 6)


def row(gain, floor):
    unknown = (
        *("time", "memory", "steps", "groups", "changes", "agreement"),
        *("rate", "batch_size", "tuned_time"),
    )
    nothing = dict.fromkeys(unknown, None)
    key = ("batches", "held_out")
    return Row(
        variant=GD, batches={}, delta={}, metrics={}, diverged={}, skipped=0, **nothing,
        gain={key: gain}, floor={key: floor},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "floor", "verdict"),
    [
        (Estimate(2.0, 1.0, 5), 1.5, "better"),
        (Estimate(-2.0, 1.0, 5), 1.5, "worse"),
        (Estimate(2.0, 2.5, 5), 1.5, ""),  # the interval holds zero
        (Estimate(2.0, 1.0, 5), 2.5, ""),  # less than joint runs differ by
        (Estimate(-2.0, 1.0, 5), 2.5, ""),
        (Estimate(2.0, math.nan, 1), math.nan, ""),
        (Estimate(2.0, 1.0, 5), math.nan, ""),
        (Estimate(math.nan, math.nan, 0), 1.0, ""),
    ],
)
def test_verdict(gain, floor, verdict):
    assert row(gain, floor).verdict("batches", "held_out") == verdict
    assert row(gain, floor).verdict("time", "held_out") == ""
