"""Comparisons whose numbers are made up."""

import math

from taskgroup.lab.problem import make_problem
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.presets import preset
from taskgroup.lab.studies.results import BUDGETS, Row, Table

SPLITS = ("train", "validation", "held_out")


def fabricated(variants, seeds=5, diverged=(), batch_sizes=(32,)):
    """A table of numbers that are all different."""
    recipe = read_recipe("yeast")
    problem = make_problem(recipe)
    tasks = list(problem.titles)
    keys = [(budget, split) for budget in BUDGETS for split in SPLITS]
    nothing = Estimate(math.nan, math.nan, 0)
    rows = []
    for n, variant in enumerate(variants):
        lost = variant.name in diverged

        def about(scale, n=n, lost=lost):
            def one(k):
                half = math.nan if seeds == 1 else 0.11 * (k + 1)
                return nothing if lost else Estimate(scale * (n + 1) + k / 10, half, seeds)

            return {key: one(k) for k, key in enumerate(keys)}

        rows.append(
            Row(
                variant=variant,
                time=math.nan if lost else 1 + 0.71 * n,
                memory=math.nan if lost else 1 + 0.13 * n,
                steps=1.0 + n,
                groups=math.nan if lost else 2.0 + n,
                changes=math.nan if lost else 0.05,
                agreement=math.nan if lost else 0.25,
                rate=0.003,
                batch_size=32,
                tuned_time=1.0,
                batches={"batches": 300, "time": 280 + n, "tuned": 280 + n},
                delta=about(-1.3),
                gain=about(1.7),
                floor=dict.fromkeys(keys, math.nan if seeds == 1 else 1.25),
                metrics={} if lost else {k: dict.fromkeys(tasks, 0.7 + 0.001 * n) for k in keys},
                diverged=dict.fromkeys(BUDGETS, seeds if lost else 0),
                skipped=0,
            )
        )
    return Table(
        recipe=recipe,
        problem=problem,
        tasks=tasks,
        seeds=seeds,
        rates=[0.001, 0.003, 0.009],
        batch_sizes=[*batch_sizes],
        budgets=list(BUDGETS),
        reference="Selective",
        rows=rows,
        single={split: dict.fromkeys(tasks, 0.65) for split in SPLITS},
        refused={"DTP": "it needs a score"},
        failed=[],
    )


def variants(name="methods"):
    """The variants of a preset; those of "methods" begin with joint training, UW and DTP."""
    recipe = read_recipe("yeast")
    made = preset(name, recipe, list(make_problem(recipe).titles))
    first = ("gd", "uw", "dtp") if name == "methods" else ()
    by_name = {variant.name: variant for variant in made}
    return [*(by_name.pop(one) for one in first), *by_name.values()]
