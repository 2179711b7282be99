"""QM9 by the command line, on made-up molecules: train, resume, evaluate; and the demo."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.data.qm9 import TASKS
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.report import matplotlib_figures
from taskgroup.lab.train.evaluation import load_summary
from taskgroup.lab.train.run import Interrupted, Run
from tests.lab.tiny_qm9 import write_qm9
from tests.lab.written_runs import load_metrics

RECIPES = ["qm9", "qm9-heavy", "qm9-message-passing"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qm9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKGROUP_CACHE", str(folder / "cache"))
        write_qm9(folder / "data")
        yield folder / "data"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(matplotlib_figures, "_draw_groups", lambda *_: None)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


SETTINGS = {"dim": 8, "batch_size": 16, "batches": 6, "warmup": 2, "checkpoint_every": 3}


@pytest.mark.parametrize("name", RECIPES)
def test_train_and_resume_exactly(name, root, tmp_path):
    options = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    out, again = tmp_path / "run", tmp_path / "again"
    result = invoke("train", name, "--data", root, *options, "--out", out)
    assert result.exit_code == 0, result.output
    for title, unit, _ in TASKS.values():
        assert f"{title}, MAE in {unit} ↓" in result.output
    summary = load_summary(out)
    assert set(summary["metrics"]) == set(TASKS)

    def stop(progress):
        if progress.batch == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        Run(read_recipe(out / "config.yaml"), again).train(stop)
    resumed = invoke("train", "--resume", again)
    assert resumed.exit_code == 0, resumed.output
    assert load_metrics(out) == load_metrics(again)
    assert load_summary(again)["metrics"] == summary["metrics"]
    affinity = [(run / "affinity.jsonl").read_text() for run in (out, again)]
    assert affinity[0] == affinity[1]

    found = invoke("evaluate", out, "--split", "validation", "--save", tmp_path / "found.yaml")
    assert found.exit_code == 0, found.output
    assert set(yaml.safe_load((tmp_path / "found.yaml").read_text())) == set(TASKS)


@pytest.fixture
def demo():
    file = Path(__file__).parents[2] / "examples" / "qm9.py"
    spec = importlib.util.spec_from_file_location("qm9_demo", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_the_demo_compares_three_runs(demo, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "demo"
    demo.main(["--data", str(root), "--batches", "4", "--out", str(out)])
    said = capsys.readouterr().out
    metrics = {name: load_summary(out / name)["metrics"] for name in demo.RUNS}
    for task, (title, unit, _) in TASKS.items():
        (line,) = [line for line in said.splitlines() if f" {title}, MAE in {unit} " in line]
        assert all(f"{metrics[name][task]:.4g}" in line for name in demo.RUNS)
    assert "Groups at the end" in said
    assert (out / "report.html").stat().st_size > 100_000


def test_the_demo_says_that_qm9pack_is_missing(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qm9pack", None)
    with pytest.raises(SystemExit, match=r"not installed: pip install 'taskgroup\[qm9\]'"):
        demo.main(["--out", str(tmp_path / "demo")])
