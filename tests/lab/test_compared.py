"""``lab.compare``: the numbers of a comparison, without the command line."""

import importlib
import json
import math
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

import taskgroup as tg
from taskgroup import lab
from taskgroup.lab import processes
from taskgroup.lab.importing import find
from taskgroup.lab.studies import workers
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.presets import preset
from tests.lab.test_own_problem import Small

SETTINGS = {"batches": 4, "batch_size": 8, "warmup": 1}


def test_the_lab_imports_its_parts_when_they_are_used(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("taskgroup.lab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(tg, "lab", None, raising=False)  # the old one is put back afterwards
    fresh = importlib.import_module("taskgroup.lab")
    assert [name for name in sys.modules if name.startswith("taskgroup.lab")] == ["taskgroup.lab"]
    with pytest.raises(AttributeError, match=r"module 'taskgroup.lab' has no attribute 'compere'"):
        _ = fresh.compere


def test_all_names_of_the_lab_are_there():
    assert all(getattr(lab, name).__name__ == name for name in lab.__all__)


def test_the_records_are_those_of_the_comparison(tmp_path, trained):
    table = lab.compare(
        Small, ["selective", "uw"], seeds=2, budgets=["batches"], out=tmp_path / "out", **SETTINGS
    )
    assert [row.variant.name for row in table.rows] == ["gd", "selective", "uw"]
    records = table.records()
    assert [record["variant"] for record in records] == ["gd", "selective", "uw", "single-task"]
    assert all(set(record) <= set(records[0]) for record in records)
    for record, row in zip(records, table.rows, strict=False):
        assert (record["budget"], record["split"], record["runs"]) == ("batches", "held_out", 2)
        assert record["delta_m"] == row.delta["batches", "held_out"].mean
        assert record["metric first"] == row.metrics["batches", "held_out"]["first"]
    json.dumps(records)  # plain types
    assert "| Selective |" in table.markdown()
    assert "```" not in table.markdown()  # no command made it
    # The same call goes on from the folder.
    n_runs = len(trained)
    again = lab.compare(
        Small, ["selective", "uw"], seeds=2, budgets=["batches"], out=tmp_path / "out", **SETTINGS
    )
    assert len(trained) == n_runs
    assert again.records() == records


def test_variants_with_settings_of_their_own(trained):
    slow = lab.Variant("slow", "Slow", {"method": "selective", "decay": 1e-4})
    table = lab.compare(Small, [slow], seeds=1, budgets=["batches"], **SETTINGS)
    assert [row.variant.name for row in table.rows] == ["gd", "slow"]
    assert {cell.recipe.decay for cell in trained if cell.name == "slow"} == {1e-4}
    assert all(not math.isnan(row.delta["batches", "held_out"].mean) for row in table.rows)


def test_batch_sizes_of_the_methods_that_are_tuned(made_up):
    made_up(lambda cell: {"metrics": {"held_out": dict.fromkeys(("first", "second"), 0.5)}})
    options = {"budgets": ["tuned"], "batch_sizes": [4], "tune": ["uw"], **SETTINGS}
    table = lab.compare(Small, ["selective", "uw"], seeds=1, **options)
    assert table.batch_sizes == [4, 8]
    assert [row.batch_size for row in table.rows] == [4, None, 4]


def test_delta_m_of_a_metric_that_ends_at_zero_is_unknown(trained):
    class Perfect(Small):
        def evaluate(self, model, split):
            return {"first": 0.5, "second": 0.0}

    with pytest.warns(UserWarning, match="Other processes cannot import"):
        table = lab.compare(Perfect, ["selective"], seeds=1, budgets=["batches"], **SETTINGS)
    assert all(math.isnan(row.delta["batches", "held_out"].mean) for row in table.rows)
    assert "Δm is unknown" in table.markdown()
    assert "those of ['second'] are not above zero" in table.markdown()


def test_all_methods_that_work_are_compared(monkeypatch):
    chosen = []

    def stop(self, *_):
        chosen.extend(self.variants)
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        lab.compare(Small, **SETTINGS)
    names = [variant.name for variant in chosen]
    every = preset("methods", lab.read_recipe("yeast"), ["a", "b"])
    assert names == [variant.name for variant in every if variant.name != "dtp"]  # needs a score


def test_a_problem_of_a_function_is_trained_in_this_process(monkeypatch):
    class Local(Small):
        pass

    monkeypatch.setattr(processes, "ProcessPoolExecutor", None)
    with pytest.warns(UserWarning, match="Other processes cannot import .*:Local, so its runs are"):
        table = lab.compare(Local, ["selective"], seeds=1, budgets=["batches"], **SETTINGS)
    assert [row.delta["batches", "held_out"].n for row in table.rows] == [1, 1]
    with (
        ProcessPoolExecutor(1) as pool,
        pytest.raises(
            ValueError, match=r"Other processes cannot import .*; put the problem in a m"
        ),
    ):
        lab.compare(Local, ["selective"], seeds=1, executor=pool, **SETTINGS)


def test_an_object_does_not_stand_for_its_class_afterwards(trained):
    """Both have the name of the class."""
    with pytest.warns(UserWarning, match="Other processes cannot import .*:Small, so its runs are"):
        table = lab.compare(Small(None), ["uw"], seeds=1, budgets=["batches"], **SETTINGS)
    assert find(table.recipe.data) is Small


def test_runs_that_fail_are_told(trained, monkeypatch):
    train = workers.train_cell

    def fail(cell):
        if cell.name == "selective":
            raise ValueError("the solver gave up")
        return train(cell)

    monkeypatch.setattr(workers, "train_cell", fail)
    with pytest.warns(UserWarning, match="1 runs failed and are missing .*: the solver gave up"):
        table = lab.compare(Small, ["selective"], seeds=1, budgets=["batches"], **SETTINGS)
    assert len(table.failed) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"methods": "uw"}, r"methods takes a list of names, got 'uw'; write \['uw'\]"),
        ({"budgets": "time"}, r"budgets takes a list of names, got 'time'; write \['time'\]"),
        ({"tune": "uw"}, r"tune takes a list of names, got 'uw'; write \['uw'\]"),
        ({"methods": ["famous"]}, "no method 'famous' here; there are famo"),
        ({"methods": ["uw"], "dimm": 3}, "Unknown setting 'dimm'; did you mean 'dim'"),
        ({"methods": ["uw"], "seeds": 0}, "at least one seed"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        lab.compare(Small, **{**SETTINGS, **arguments})


def test_a_program_without_a_guard_is_told_about_it():
    """A process that imports the program would start processes of its own, and so on."""
    program = compile("lab.compare(problem, ['uw'])", "program.py", "exec")
    with pytest.raises(RuntimeError, match='put the call under: if __name__ == "__main__":'):
        exec(program, {"__name__": "__mp_main__", "lab": lab, "problem": Small})
