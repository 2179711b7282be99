"""A problem of the user's own: what it may be, and what is said of it before it is trained."""

import pickle
import re
import subprocess
import sys
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import taskgroup as tg
from taskgroup.lab.cli import app
from taskgroup.lab.importing import name_of
from taskgroup.lab.problem import Problem, make_problem, measure
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.studies.cell import Cell, train_cell
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.presets import Variant
from taskgroup.lab.studies.probe import check_workers, probe
from taskgroup.lab.train.evaluation import load_summary
from taskgroup.lab.train.rehearsal import rehearse, rehearse_step
from taskgroup.lab.train.trainer import Trainer, make_model
from tests.fake_gpu import FakeGPU
from tests.lab.small import yeast

GD = Variant("gd", "GD", {"method": "gd"})
SMALL = {"batches": 4, "batch_size": 8, "warmup": 1}


def data(seed):
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :2] + x[:, 1:])


class Small(Problem):
    """Two tasks on three numbers."""

    tasks = ("first", "second")
    better = "lower"

    def model(self, tasks):
        return tg.MultiTaskModel(nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in tasks})

    def loader(self, batch_size):
        return DataLoader(data(0), batch_size, shuffle=True)

    def losses(self, outputs, batch):
        return {task: self.errors(outputs, batch[1])[task].square().mean() for task in outputs}

    def evaluate(self, model, split):
        x, y = data(1).tensors
        return {t: e.abs().mean() for t, e in self.errors(model(x), y).items()}

    def errors(self, outputs, y):
        place = {"first": 0, "second": 1}
        return {task: output[:, 0] - y[:, place[task]] for task, output in outputs.items()}


def recipe(problem, **changes):
    return read_recipe(name_of(problem)[0], {**SMALL, **changes})


def made(**attributes):
    return type("Mine", (Small,), {"__module__": __name__, **attributes})


# What it may be.


@pytest.mark.parametrize(
    "thing",
    [
        Small,
        Small(None),
        lambda settings: Small(settings),
        lambda: Small(None),
        made(__init__=lambda self: None),
    ],
    ids=["class", "object", "function of settings", "function", "class without settings"],
)
def test_a_problem_is_made_of(thing):
    problem = make_problem(recipe(thing))
    assert isinstance(problem, Small)
    assert problem.titles == {"first": "first", "second": "second"}
    assert problem.lower_is_better == {"first": True, "second": True}
    assert problem.metric_names == {"first": "metric", "second": "metric"}


def test_runs_of_a_process_share_the_data():
    """Whatever their method, rate, seed and tasks: a problem may load gigabytes."""
    made_with = []
    mine = made(__init__=lambda self, settings: made_with.append(settings))
    for changes in ({}, {"method": "uw", "lr": 1.0, "seed": 3}, {"tasks": ("first",)}):
        Trainer(recipe(mine, **changes))
    assert [settings.tasks for settings in made_with] == [None]
    assert not hasattr(made_with[0], "lr")
    make_problem(recipe(mine, dim=3, root="here"))
    assert (made_with[1].dim, made_with[1].root) == (3, "here")


def test_names_and_directions_by_task():
    problem = make_problem(
        recipe(
            made(
                tasks={"first": "First", "second": "Second"},
                better={"first": "lower", "second": "higher"},
                metrics={"second": "R"},
            )
        )
    )
    assert problem.titles == {"first": "First", "second": "Second"}
    assert problem.lower_is_better == {"first": True, "second": False}
    assert problem.metric_names == {"first": "metric", "second": "R"}


class Plain(nn.Module):
    """A module that knows no groups, with heads under names of its own and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        features = self.body(x)
        return {"first": self.one(features), "second": self.two(features)}


def plain(self, tasks):
    return Plain()


def heads_of_plain(self, model):
    return {"first": model.one, "second": list(model.two.parameters())}


def same_as_plain(self, tasks):
    model = Plain()
    return tg.MultiTaskModel(model.body, {"first": model.one, "second": model.two})


@pytest.mark.parametrize("method", ["selective", "gd", "uw"])
def test_any_module_with_heads_trains_as_a_multi_task_model(method):
    """Running statistics move once per batch, and heads outside the group stay."""
    settings = {"method": method, "batches": 6, "warmup": 2}
    ours = Trainer(recipe(made(model=plain, heads=heads_of_plain), **settings))
    other = Trainer(recipe(made(model=same_as_plain), **settings))
    assert [ours.step() for _ in range(6)] == [other.step() for _ in range(6)]
    # The names of their tensors differ.
    one, two = (list(t.model.state_dict().values()) for t in (ours, other))
    assert len(one) == len(two)
    assert all(map(torch.equal, one, two))


def test_a_network_of_all_tasks_is_trained_on_one():
    trainer = Trainer(
        recipe(made(model=plain, heads=heads_of_plain), tasks=("second",), method="gd")
    )
    before = [p.detach().clone() for p in trainer.model.one.parameters()]
    progress = trainer.step()
    assert list(progress.losses) == ["second"]
    assert list(trainer.evaluate("held_out")) == ["second"]
    assert all(map(torch.equal, before, trainer.model.one.parameters()))


def as_dicts(samples):
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    return {"x": x, "scale": torch.ones(1), "first": y[:, 0], "labels": y, "name": ["a"] * len(x)}


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, scale, x, name):
        assert name[0] == "a"
        return self.layer(x) * scale


def test_dict_batches_are_keyword_arguments_without_labels():
    mine = made(
        loader=lambda self, n: DataLoader(data(0), n, shuffle=True, collate_fn=as_dicts),
        model=lambda self, tasks: tg.MultiTaskModel(Named(), {t: nn.Linear(4, 1) for t in tasks}),
        losses=lambda self, outputs, batch: {
            t: e.square().mean() for t, e in self.errors(outputs, batch["labels"]).items()
        },
        evaluate=lambda self, model, split: {
            t: e.abs().mean()
            for t, e in self.errors(
                model(**self.inputs(as_dicts(list(data(1))))), data(1).tensors[1]
            ).items()
        },
    )
    rehearse(recipe(mine))
    trained = Trainer(recipe(mine, batches=30, lr=0.05))
    first = trained.step().losses
    for _ in range(29):
        last = trained.step().losses
    assert all(last[task] < first[task] for task in first)


def test_evaluating_is_without_a_graph_and_leaves_modes_and_random_state():
    seen = []

    def evaluate(self, model, split):
        seen.append((model.training, torch.is_grad_enabled(), torch.rand(())))
        return {"first": np.float32(1.0), "second": torch.tensor(2)}

    problem = make_problem(recipe(made(evaluate=evaluate)))
    model = make_model(problem, ["first", "second"], torch.device("cpu"))
    model.train()
    model.encoder.eval()  # frozen statistics
    before = torch.get_rng_state()
    found = measure(problem, model, ["first", "second"], "held_out")
    assert found == {"first": 1.0, "second": 2.0}
    assert all(type(value) is float for value in found.values())
    assert seen[0][:2] == (False, False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.training, model.encoder.training, model.heads.training) == (True, False, True)


# What is said of it before anything is trained.


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (type("Mine", (), {"__module__": __name__}), "must derive from taskgroup.lab.Problem"),
        (lambda settings: 3, "it returned an object of type int"),
        (lambda a, b: 3, "must take one argument, the settings of the run, or none"),
        (
            type("Mine", (Problem,), {"__module__": __name__, "model": Small.model}),
            r"lacks losses\(outputs, batch\), which .* evaluate\(.*loader\(batch_size\), which",
        ),
        (made(tasks=()), "lacks tasks, the names of its tasks"),
        (made(better=""), "lacks better, 'lower' or 'higher'"),
        (made(tasks="first"), "tasks of .* must be names, such as .*; got 'first'"),
        (made(tasks=("first", "first")), r"has \['first'\] more than once"),
        (made(tasks=("first", "a/b")), r"the tasks \['a/b'\]; .* cannot hold a slash or a comma"),
        (made(better={"first": "lower"}), r"better of .* lacks \['second'\]"),
        (made(better="down"), "must be 'lower' or 'higher', got 'down' for task 'first'"),
        (made(better={"first": "lower", "third": "lower"}), r"better of .* names \['third'\]"),
        (made(metrics={"third": "R"}), r"metrics of .* names \['third'\]; its tasks are"),
        (made(metrics=["R"]), "metrics of .* must be a word or {task: word}, got .* list"),
        (made(splits=("train",)), r"splits of .* must hold 'held_out'.*got \('train',\)"),
        (made(splits="held_out"), "splits of .* must hold 'held_out'"),
        (made(published={"uw": "3.5"}), "published of .* must be {method: Δm in percent}"),
        (made(published={"uw": np.nan}), "published of .* must be {method: Δm in percent}"),
        (made(published=[("uw", 3.5)]), "published of .* must be {method: Δm in percent}"),
    ],
)
def test_what_a_problem_lacks(thing, said):
    with pytest.raises(ValueError, match=said):
        make_problem(recipe(thing))


def drawn_anew(self, batch_size, seed, start=0):
    for _ in count(start):
        yield torch.randn(batch_size, 3), torch.randn(batch_size, 2)


def two_batches(self, batch_size, seed, start=0):
    yield from list(DataLoader(data(0), 12))[start:]


def detached(self, outputs, batch):
    return {task: loss.detach() for task, loss in Small.losses(self, outputs, batch).items()}


def shape_error(self, outputs, batch):
    return {"first": outputs["first"] @ batch[1]}


class Detached(nn.Linear):
    def forward(self, features):
        return super().forward(features.detach())


def one_shares_nothing(self, tasks):
    heads = {"first": nn.Linear(4, 1), "second": Detached(4, 1)}
    return tg.MultiTaskModel(nn.Linear(3, 4), heads)


class AllInHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({t: nn.Linear(3, 1) for t in ("first", "second")})


def answer(value):
    return lambda *_: value


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"loader": answer([1])}, r"loader\(\) of Mine must return .*DataLoader, got .*list"),
        ({"batches": drawn_anew}, r"batches\(\) of .* is not reproducible: .*loader\(batch_size"),
        ({"batches": lambda s, n, seed, start=0: iter([])}, "ends after 0 of its batches"),
        ({"batches": answer([1, 2])}, r"batches\(\) of .* must return an iterator, got .* list;"),
        (
            {"batches": lambda s, n, seed, start=0: iter([torch.ones(1, device="meta")] * 2)},
            "gives tensors on meta. Give them on the CPU",
        ),
        ({"model": answer(3)}, r"model\(\) of Mine must return a torch.nn.Module, got .* int"),
        ({"model": plain}, r"model\(\) of Mine returns a Plain without an attribute 'heads'"),
        (
            {"model": plain, "heads": lambda self, model: {"first": model.one}},
            r"no head of \['second'\]; it has heads of \['first'\]",
        ),
        ({"model": answer(AllInHeads())}, "has no shared parameters: all of them are in heads"),
        ({"inputs": lambda self, batch: batch[1]}, r"The network of .* fails.*mat1 and mat2 sh"),
        (
            {"model": lambda self, tasks: tg.MultiTaskModel(nn.Flatten(), AllInHeads().heads)},
            "no shared parameters",
        ),
        ({"losses": answer(torch.ones(2))}, r"must return \{task: loss\}, got a tensor \[2\]"),
        (
            {"losses": lambda s, o, b: {"first": Small.losses(s, o, b)["first"]}},
            r"must return a loss for each task of the outputs.*\['second'\] differ",
        ),
        (
            {"losses": lambda s, o, b: {t: e.square() for t, e in s.errors(o, b[1]).items()}},
            r"The loss of 'first' .* must be a scalar tensor, got a tensor \[8\]; take its mean",
        ),
        (
            {"losses": lambda s, o, b: {t: e.mean() / 0 for t, e in s.errors(o, b[1]).items()}},
            "The loss of 'first' .* is -?inf on the first batch; look for empty masks",
        ),
        ({"losses": answer({"first": 0.3, "second": 1.0})}, "scalar tensor, got .* type float\\.$"),
        ({"losses": detached}, "The loss of 'first' .* has no graph; compute it from outputs"),
        ({"losses": shape_error}, r"losses\(\) of .* fails: RuntimeError: .*test_own_problem.py,"),
        ({"model": one_shares_nothing}, "The loss of 'second' .* not depend on the shared param"),
        ({"evaluate": answer(0.3)}, r"evaluate\(\) of Mine must return \{task: metric\}, got"),
        ({"evaluate": answer({"first": 0.3})}, r"returns no metric of \['second'\]"),
        ({"evaluate": answer({"third": 0.3})}, r"names \['third'\]; its tasks are"),
        (
            {"evaluate": answer({"first": torch.ones(2), "second": 1.0})},
            r"must return one number for each task, got a tensor \[2\] for 'first'",
        ),
        ({"evaluate": answer({"first": 0.1, "second": float("nan")})}, "returns nan for 'second'"),
        (
            {"losses": lambda s, o, b: {t: s.errors(o, b[1])[t].mean() for t in s.tasks}},
            "trained on 'first' alone, fails: KeyError: 'second'",
        ),
    ],
)  # fmt: skip
def test_what_one_batch_shows(attributes, said):
    with pytest.raises(ValueError, match=said):
        rehearse(recipe(made(**attributes)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", r"SyntaxError: .*\(faulty.py, line 1\)\.$"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(faulty.py, line 1\)\.$"),
        (
            "from taskgroup import lab\n\n\ndef Mine():\n    return open('nowhere')\n",
            r"FileNotFoundError: .*: 'nowhere' \(faulty.py, line 5\)\.$",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "compare", "affinity-gain"])
def test_an_error_of_the_file_names_its_line(command, text, said, folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    (folder / "faulty.py").write_text(text)
    words = invoke(command, "faulty.py:Mine", status=2).splitlines()[-1]
    assert re.search(f"faulty.py:Mine cannot be set up: {said}", words), words


def test_an_error_is_one_sentence_with_its_cause():
    with pytest.raises(ValueError, match="fails") as caught:
        rehearse(recipe(made(losses=shape_error)))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


class StuckError(Exception):
    """Pickled, but not unpickled: pickle passes one argument."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_an_error_of_a_run_reaches_other_processes():
    """One that cannot be unpickled would break the pool, as if a process had died."""

    def get_stuck(self, outputs, batch):
        raise StuckError("one", "two")

    with pytest.raises(ValueError, match=r"fails: StuckError: one and two \(test_") as caught:
        train_cell(Cell("gd", recipe(made(losses=get_stuck), method="gd")))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


class OnGPUAlone(nn.Linear):
    """As a network with kernels for the GPU alone."""

    def forward(self, x):
        if x.device.type != "cuda":
            raise NotImplementedError("there is no kernel for the CPU")
        return super().forward(x)


def evaluate_on_device(self, model, split):
    x, y = (tensor.to(next(model.parameters()).device) for tensor in data(1).tensors)
    return {t: e.abs().mean() for t, e in self.errors(model(x), y).items()}


def test_a_network_for_the_gpu_alone(tmp_path):
    def network(self, tasks):
        return tg.MultiTaskModel(OnGPUAlone(3, 4), {task: nn.Linear(4, 1) for task in tasks})

    mine = made(model=network, evaluate=evaluate_on_device)
    with pytest.raises(
        ValueError, match=r"no kernel for the CPU \(test_own_problem.py, line \d+\)\.$"
    ):
        rehearse(recipe(mine))
    on_gpu = recipe(mine, device="auto")
    with pytest.raises(ValueError, match="tried on the CPU, because this machine has no GPU"):
        rehearse(on_gpu)
    with FakeGPU():
        assert rehearse(on_gpu) == "cuda"
        uw = Variant("uw", "UW", {"method": "uw"})
        compared = Comparison(on_gpu, [GD, uw], 1, tmp_path / "out", budgets=["batches"])
        assert compared.refused == {}
        assert rehearse(recipe(made(evaluate=evaluate_on_device), device="auto")) == "cpu"


def test_metrics_below_zero_cannot_be_compared():
    mine = made(evaluate=answer({"first": 0.1, "second": -0.2}))
    rehearse(recipe(mine))
    with pytest.raises(ValueError, match=r"returns -0.2 for 'second', and a comparison needs"):
        rehearse(recipe(mine), relative=True)


def test_whole_problems_pass(minis):
    rehearse(recipe(Small), relative=True)
    rehearse(yeast(), relative=True)
    settings = {"dim": 16, "attention_heads": 2, "batch_size": 2}
    photograph = {**settings, "size": 64, "tasks": "normal,reshading"}
    rehearse(read_recipe("motorcycle", photograph), relative=True)
    benchmark = {"size": (32, 48), "backbone": "tiny", "root": str(minis / "nyud-v2")}
    rehearse(read_recipe("nyud-v2", {**settings, **benchmark}), relative=True)


def test_a_method_that_fails_on_the_first_batch(tmp_path, monkeypatch):
    def fail(self, losses):
        raise RuntimeError("the solver gave up")

    monkeypatch.setattr(tg.methods.METHODS["mgda"], "backward", fail)
    with pytest.raises(ValueError, match=r"MGDA fails on the first batch of .*: RuntimeError: the"):
        rehearse_step(Trainer(recipe(Small, method="mgda")), "MGDA")
    mgda = Variant("mgda", "MGDA", {"method": "mgda"})
    compared = Comparison(recipe(Small), [GD, mgda], 1, tmp_path / "some", budgets=["batches"])
    assert "the solver gave up" in compared.refused["MGDA"]
    with pytest.raises(ValueError, match=r"MGDA cannot be compared here: .*the solver gave up"):
        Comparison(recipe(Small), [GD, mgda], 1, tmp_path / "all", budgets=["batches"], strict=True)
    assert not (tmp_path / "all").exists()


def test_a_comparison_checks_the_problem_before_it_makes_a_folder(tmp_path):
    with pytest.raises(ValueError, match="has no graph"):
        Comparison(recipe(made(losses=detached)), [GD], 1, tmp_path / "out", budgets=["batches"])
    assert not (tmp_path / "out").exists()


# In files of the current folder: the page, and the command line.


def test_a_comparison_tries_every_batch_size_before_it_makes_a_folder(tmp_path):
    def loader(self, batch_size):
        return DataLoader(data(0), batch_size, shuffle=True, drop_last=True)  # of 24 samples

    mine = made(loader=loader)
    options = {"budgets": ["tuned"], "batch_sizes": [4, 32]}
    with pytest.raises(ValueError, match="Batch size 32 cannot be tried here: The loader has no"):
        Comparison(recipe(mine), [GD], 1, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_page(folder, trained):
    page = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text("utf-8")
    module, *programs = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (folder / "my_problem.py").write_text(module)
    names = {}
    for program in programs:
        exec(program, names)
    assert len(programs) == 2
    assert {record["variant"] for record in names["records"]} == {"gd", "selective", "single-task"}
    assert "# my_problem:Numbers: 2 tasks, 10 batches of 32, 2 seeds" in names["text"]
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (folder / "mine.yaml").write_text(recipe)
    assert read_recipe("mine.yaml").data == "storms.py:YourProblem"


def invoke(*words, status=0):
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def template(folder):
    """The template, under a name of its own."""
    invoke("new", "problem", "storms.py")
    return folder / "storms.py"


def test_the_template_trains_resumes_and_is_reported(template, monkeypatch):
    said = invoke("train", "storms.py:YourProblem", "--batches", 4, "--set", "warmup=1")
    assert "RMSE ↓" in said
    run = template.parent / "runs" / "storms-YourProblem-selective-0"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["data"] == "storms.py:YourProblem"
    assert set(load_summary(run)["metrics"]) == {"wind", "rain", "heat", "smoke"}
    assert "RMSE" in invoke("evaluate", run)
    invoke("report", run)
    (run / "summary.json").unlink()
    invoke("train", "--resume", run)
    assert set(load_summary(run)["metrics"]) == {"wind", "rain", "heat", "smoke"}
    monkeypatch.chdir(run)  # from elsewhere
    assert "There is no file storms.py" in invoke("train", "--resume", run, status=2)


def test_a_run_whose_source_changed(template):
    """It may go on, since a mistake may have been mended, but not without a word."""
    invoke("train", "storms.py:YourProblem", "--batches", 3, "--set", "warmup=1", "--out", "run")
    text = template.read_text()
    template.write_text(f"# a comment\n{text}")
    for words in (["train", "--resume", "run"], ["evaluate", "run"]):
        del sys.modules["storms"]  # a new process
        invoke(*words)  # a warning would be an error
    template.write_text(text.replace("0.3 *", "0.9 *"))
    del sys.modules["storms"]
    with pytest.warns(UserWarning, match=r"\['storms.py'\] changed since run was trained; the net"):
        invoke("evaluate", "run")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        invoke("evaluate", "run")
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"\['storms.py'\] changed since run was last trained. Th"):
        invoke("train", "--resume", "run")
    invoke("train", "--resume", "run")  # it is told once
    template.write_text(text.replace("32", "16"))
    del sys.modules["storms"]
    for words in (["train", "--resume", "run"], ["evaluate", "run"]):
        said = invoke(*words, status=2)
        assert (
            "run/checkpoint.pt does not fit the settings in run/config.yaml (Error(s) in " in said
        )
        assert "['storms.py'] changed since; put back the version that it was trained with" in said


@pytest.mark.learned
def test_the_groups_of_the_template_are_found(template):
    for seed in range(3):
        settings = {"seed": seed, "batches": 300}
        trainer = Trainer(read_recipe("storms.py:YourProblem", settings))
        for _ in range(60):
            progress = trainer.step()
        assert progress.partition == [("wind", "rain"), ("heat", "smoke")]


def test_the_template_is_clean_and_is_not_overwritten(template):
    assert "taskgroup train storms.py:YourProblem" in template.read_text()
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--line-length=100", str(template)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    template.write_text("mine")
    assert "storms.py exists, and is not overwritten" in invoke(
        "new", "problem", template, status=2
    )
    assert template.read_text() == "mine"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("storms", "storms is no name for a Python module"),
        ("my-storms.py", "my-storms.py is no name for a Python module"),
        ("torch.py", "torch is the name of an installed module, which torch.py would hide"),
        ("none/storms.py", "There is no folder none to write storms.py to"),
    ],
)
def test_files_that_are_not_written(file, said, folder):
    assert said in invoke("new", "problem", file, status=2)
    assert not list(folder.iterdir())


def test_a_recipe_names_a_problem(template, trained):
    (template.parent / "mine.yaml").write_text("data: storms:YourProblem\nwarmup: 1\nbatches: 3\n")
    arguments = ["--methods", "selective", "--seeds", 1, "--budgets", "batches", "--out", "out"]
    said = invoke("compare", "mine.yaml", *arguments)
    assert "storms:YourProblem: 4 tasks, 3 batches of 8, 1 seed" in said
    assert "training data" not in said
    assert {cell.recipe.data for cell in trained} == {"storms:YourProblem"}


def test_results_of_another_version_are_not_mixed(template, trained):
    arguments = ["compare", "storms:YourProblem", "--methods", "selective", "--seeds", 1]
    arguments += ["--batches", 3, "--budgets", "batches", "--out", "out"]
    invoke(*arguments)
    n_runs = len(trained)
    text = template.read_text()
    template.write_text(text.replace("0.3 *", "0.3  *  # noise\n    "))
    invoke(*arguments)
    assert len(trained) == n_runs  # all of them are kept
    template.write_text(text.replace("0.3 *", "0.9 *"))
    said = invoke(*arguments, status=2)
    assert "['storms.py'] changed after this process imported storms:YourProblem" in said
    del sys.modules["storms"]  # a new process
    said = invoke(*arguments, status=2)
    assert (
        "out holds results of another version of storms:YourProblem: ['storms.py'] changed" in said
    )
    assert "delete out/source.yaml, and they are used" in said
    (template.parent / "out" / "source.yaml").unlink()
    invoke(*arguments)
    assert len(trained) == n_runs


def test_workers_with_another_version_are_refused(template):
    chosen = read_recipe("storms:YourProblem")
    here = probe(chosen)
    assert list(here["source"]) == ["storms.py"]
    check_workers(chosen, {"a": here})
    with pytest.raises(
        RuntimeError, match=r"b has another version of storms:YourProblem .*\['storm"
    ):
        check_workers(chosen, {"a": here, "b": {**here, "source": {"storms.py": "0"}}})


def test_worker_processes_import_a_problem_of_the_current_folder(template):
    """A program of pip's does not have that folder on its path, and neither do its processes."""
    arguments = ["--methods", "selective", "--seeds", 1, "--batches", 2, "--budgets", "batches"]
    invoke("compare", "storms.py:YourProblem", *arguments, "--jobs", 1, "--set", "warmup=1")
    results = template.parent / "runs" / "compare-storms-YourProblem"
    assert len(list((results / "cells").glob("*.json"))) == 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("strms.py:YourProblem", "There is no file strms.py"),
        ("strms:YourProblem", "no module 'strms' in the current folder, .*Did you mean storms"),
        ("storms:YuorProblem", "storms has no 'YuorProblem'; it has YourProblem, make_data\\."),
        ("storms:make_data", "storms:make_data.* must take one argument"),
        (
            "storms:TASKS:",
            "There is no recipe 'storms:TASKS:'; .* a problem of your own as MODULE:N",
        ),
        ("storms", "There is no recipe 'storms'"),
        ("storms.py", "storms.py is a Python file; name the problem in it as well: storms.py:Your"),
    ],
)
def test_names_that_are_wrong(name, said, template):
    for command in ("train", "compare"):
        assert re.search(said, invoke(command, name, status=2))
    assert [path.name for path in template.parent.iterdir() if path.is_dir()] in (
        [],
        ["__pycache__"],
    )
