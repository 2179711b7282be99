"""The three benchmarks by the command line, on mini trees: train, resume, evaluate, predict."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
import yaml
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.data import DATASETS
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.report import matplotlib_figures
from taskgroup.lab.train.evaluation import load_summary, load_trained
from taskgroup.lab.train.run import Interrupted, Run
from taskgroup.lab.train.trainer import Trainer
from taskgroup.lab.vision import predictions
from tests.lab.written_runs import load_metrics

SMALL = ["--backbone", "tiny", "--size", "32x48"]
SETTINGS = {
    "batches": 6, "batch_size": 2, "dim": 16, "attention_heads": 2, "warmup": 2, "workers": 0,
    "lr": 1e-3, "checkpoint_every": 3, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def no_pictures(monkeypatch):
    draw_nothing(monkeypatch)


def draw_nothing(monkeypatch):
    monkeypatch.setattr(matplotlib_figures, "_draw_groups", lambda *_: None)
    monkeypatch.setattr(predictions, "draw", lambda *_: None)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def settings(**changes):
    given = {**SETTINGS, **changes}
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


def tree(root):
    return {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize("name", DATASETS)
def test_train_resume_evaluate_predict(name, minis, tmp_path, monkeypatch):
    root = minis / name
    before = tree(root)
    out = tmp_path / "run"
    first = invoke(
        "train",
        name,
        "--data",
        root,
        *SMALL,
        *settings(evaluate_every=2, conflicts_every=2),
        "--out",
        out,
    )
    assert first.exit_code == 0, first.output
    tasks = DATASETS[name].TASKS
    summary = load_summary(out)
    assert set(summary["metrics"]) == set(tasks)
    for task in tasks.values():
        arrow = "↓" if task.lower_is_better else "↑"
        assert f"{task.title}, {task.metric_name} {arrow}" in first.output
    assert (out / "predictions.png").stat().st_size > 10_000

    draw_nothing(monkeypatch)
    # Stopped in the middle, it ends as the one that was not.
    recipe = read_recipe(out / "config.yaml")
    again = Run(recipe, tmp_path / "again")

    def stop(progress):
        if progress.batch == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        again.train(stop)
    resumed = invoke("train", "--resume", tmp_path / "again")
    assert resumed.exit_code == 0, resumed.output
    assert load_metrics(out) == load_metrics(tmp_path / "again")
    for file, n_lines in (("affinity.jsonl", 6), ("conflicts.jsonl", 3)):
        recorded = [(p / file).read_text() for p in (out, tmp_path / "again")]
        assert recorded[0] == recorded[1]
        assert len(recorded[0].splitlines()) == n_lines
    lines = (tmp_path / "again/seconds.jsonl").read_text().splitlines()
    spent = [json.loads(line) for line in lines]
    assert [line["batch"] for line in spent] == [1, 2, 3, 4, 5, 6]
    assert spent[-1]["seconds"] == load_summary(tmp_path / "again")["seconds"]
    assert load_summary(tmp_path / "again")["metrics"] == summary["metrics"]
    lines = [(p / "evaluations.jsonl").read_text() for p in (out, tmp_path / "again")]
    assert lines[0] == lines[1]
    evaluations = [json.loads(line) for line in lines[0].splitlines()]
    assert [line["batch"] for line in evaluations] == [2, 4]
    assert all(set(line["metrics"]) == set(tasks) - {"edge"} for line in evaluations)

    found = invoke("evaluate", out, "--save", tmp_path / "found.yaml")
    assert found.exit_code == 0, found.output
    assert yaml.safe_load((tmp_path / "found.yaml").read_text()) == pytest.approx(
        summary["metrics"], rel=1e-6
    )
    image = next(root.rglob("left_1.*g"), None) or next(root.rglob("*/left/point_1*rgb.png"))
    panels = invoke("predict", out, image, "--out", tmp_path / "panels")
    assert panels.exit_code == 0, panels.output
    (panel,) = (tmp_path / "panels").iterdir()
    assert panel.read_bytes().startswith(b"\x89PNG")
    assert tree(root) == before  # nothing is written there


def test_looking_at_conflicts_moves_no_running_statistics(minis):
    changes = {**SETTINGS, "root": str(minis / "nyud-v2"), "size": "32x48", "decoder": "conv"}
    trainer = Trainer(read_recipe("nyud-v2", {**changes, "backbone": "tiny"}))
    before = [buffer.clone() for buffer in trainer.model.buffers()]
    assert before
    with trainer.losses_ahead():
        pass
    assert all(map(torch.equal, before, trainer.model.buffers()))


def train(minis, out, *arguments, name="nyud-v2", **changes):
    result = invoke(
        "train",
        name,
        "--data",
        minis / name,
        *SMALL,
        *settings(**changes),
        "--out",
        out,
        *arguments,
    )
    assert result.exit_code == 0, result.output
    return result


def test_single_task_runs_make_a_baseline(minis, tmp_path, no_pictures):
    runs = []
    for task in ("depth", "normals"):
        runs.append(tmp_path / task)
        train(minis, runs[-1], tasks=task, batches=2)
    baseline = tmp_path / "single.yaml"
    saved = invoke("evaluate", *runs, "--save", baseline)
    assert saved.exit_code == 0, saved.output
    single = {run.name: load_summary(run)["metrics"][run.name] for run in runs}
    assert yaml.safe_load(baseline.read_text()) == pytest.approx(single)

    both = train(
        minis, tmp_path / "both", "--baseline", baseline, "--method", "joint", batches=3,
        tasks="depth,normals",
    )  # fmt: skip
    assert "Δm against" in both.output
    metrics = load_summary(tmp_path / "both")["metrics"]
    expected = 50 * sum(1 - metrics[task] / single[task] for task in single)
    assert load_summary(tmp_path / "both")["delta_m"] == pytest.approx(expected)
    late = invoke("evaluate", tmp_path / "both", "--baseline", baseline)
    assert f"{expected:+.2f} %" in late.output

    twice = invoke("evaluate", runs[0], runs[0], "--save", tmp_path / "twice.yaml")
    assert twice.exit_code == 2
    assert "has a metric of depth, and so has" in twice.output
    lacking = invoke(
        "train", "nyud-v2", "--data", minis / "nyud-v2", *SMALL, "--baseline", baseline, "--out",
        tmp_path / "never",
    )  # fmt: skip
    assert lacking.exit_code == 2
    assert "has no metric of ['semseg', 'edge']; it has ['depth', 'normals']" in lacking.output
    baseline.write_text("- depth\n")
    wrong = invoke("evaluate", tmp_path / "both", "--baseline", baseline)
    assert wrong.exit_code == 2
    assert "must hold lines 'task: metric'" in wrong.output


def test_workers_bfloat16_and_decoders(minis, tmp_path, no_pictures):
    train(minis, tmp_path / "alone", batches=3, decoder="conv", tasks="semseg,depth")
    train(minis, tmp_path / "helped", batches=3, decoder="conv", tasks="semseg,depth", workers=1)
    assert load_metrics(tmp_path / "alone") == load_metrics(tmp_path / "helped")
    metrics = [load_summary(tmp_path / run)["metrics"] for run in ("alone", "helped")]
    assert metrics[0] == metrics[1]
    train(
        minis, tmp_path / "half", batches=3, decoder="conv", tasks="semseg,depth",
        precision="bfloat16",
    )  # fmt: skip
    full, half = (load_metrics(tmp_path / run)[0]["losses"] for run in ("alone", "half"))
    assert half != full
    assert half == pytest.approx(full, rel=0.02)
    heads = load_trained(tmp_path / "alone").model.heads
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in heads.modules())


@pytest.mark.filterwarnings("ignore:A sample is left out:UserWarning")
def test_bad_samples_stop_a_run_or_are_skipped(minis, tmp_path, no_pictures):
    root = shutil.copytree(minis / "nyud-v2", tmp_path / "nyud")
    (root / "edge" / "right_3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    common = ["train", "nyud-v2", "--data", root, *SMALL, *settings(batches=5)]
    stopped = invoke(*common, "--out", tmp_path / "stopped")
    assert stopped.exit_code == 2
    assert f"{root / 'edge' / 'right_3.png'} cannot be read" in stopped.output
    went_on = invoke(*common, "--out", tmp_path / "skipped", "--set", "bad=skip")
    assert went_on.exit_code == 0, went_on.output
    assert len(load_metrics(tmp_path / "skipped")) == 5
    (root / "edge" / "held_out_1.png").unlink()  # in the other split: found before the training
    early = invoke(*common, "--out", tmp_path / "early")
    assert early.exit_code == 2
    assert "held_out_1.png is missing; see taskgroup data check" in early.output
    assert not (tmp_path / "early").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["train", "taskonomy"],
            "name it with --data DIR. A small one .* data mini taskonomy",
        ),
        (
            ["train", "nyud-v2", "--data", "nowhere"],
            "nowhere is not a folder; name the folder that",
        ),
        (["train", "nyud-v2", "--size", "450"], "patches of 7 pixels do not tile"),
        (["train", "nyud-v2", "--size", "tall"], "size must be a number of pixels or HxW, as 448x"),
        (["train", "nyud-v2", "--set", "bad=fix"], "bad must be 'stop' or 'skip', got 'fix'"),
        (
            ["train", "nyud-v2", "--set", "workers=-1"],
            "workers must be greater than or equal to 0",
        ),
        (["train", "nyud-v2", "--set", "drop_path=1"], "drop_path must be less than 1, got 1"),
        (
            ["train", "nyud-v2", "--set", "evaluate_every=0"],
            "evaluate_every must be greater .* 1, got 0",
        ),
        (
            ["train", "yeast", "--data", "nowhere"],
            "root is not a setting of yeast",
        ),
        (["train", "nyud-v2", "--set", "weights=there"], "weights are loaded into a backbone such"),
        (["evaluate", "nowhere"], "nowhere is not a run: it has no config.yaml"),
        (["predict", "nowhere", "a.png"], "nowhere is not a run: it has no config.yaml"),
    ],
)
def test_what_bad_input_says(minis, arguments, said, tmp_path):
    options = []
    if arguments[0] == "train":
        options = ["--backbone", "tiny", "--set", "patch=7", "--out", tmp_path / "run"]
        if not {"--data", "taskonomy"} & set(arguments):
            options += ["--data", minis / "nyud-v2"]
    result = invoke(*arguments, *options)
    assert result.exit_code == 2, result.output
    assert re.search(said, result.output), result.output
    assert not (tmp_path / "run").exists()


def test_the_recipes_are_the_papers():
    sizes = {"nyud-v2": (448, 576), "pascal-context": (512, 512), "taskonomy": (256, 256)}
    for name, size in sizes.items():
        recipe = read_recipe(name)
        assert recipe.data == name
        assert recipe.size == size
        assert recipe.decay == (1e-4 if name == "taskonomy" else 1e-3)
        assert (recipe.batches, recipe.batch_size, recipe.warmup) == (40_000, 8, 100)
        assert (recipe.lr, recipe.weight_decay, recipe.poly_power) == (2e-5, 1e-6, 0.9)
        # As high for joint training as for any other method.
        assert recipe.head_lr is None
        assert recipe.head_lr_times == "1"
        assert (recipe.backbone, recipe.drop_path, recipe.decoder) == ("vit-t", 0.15, "linear")
        assert recipe.evaluate_every == 5000
    assert read_recipe("taskonomy").subset == "tiny"


def test_predicting_needs_no_data_and_says_what_is_no_image(minis, tmp_path, no_pictures):
    from PIL import Image

    train(minis, tmp_path / "run", batches=2, tasks="depth,semseg")
    config = tmp_path / "run" / "config.yaml"
    moved = {**yaml.safe_load(config.read_text()), "root": "/moved/away"}
    config.write_text(yaml.safe_dump(moved))
    tall = tmp_path / "tall.png"  # of another shape, and with transparency
    Image.new("RGBA", (50, 301), (200, 100, 50, 128)).save(tall)
    assert invoke("predict", tmp_path / "run", tall).exit_code == 0
    assert (tmp_path / "run" / "predictions" / "tall.png").is_file()
    (tmp_path / "note.txt").write_text("no image")
    wrong = invoke("predict", tmp_path / "run", tmp_path / "note.txt")
    assert wrong.exit_code == 2
    assert "note.txt cannot be read: cannot identify image file" in wrong.output
    twins = invoke("predict", tmp_path / "run", tall, tmp_path / "tall.jpg")
    assert twins.exit_code == 2
    assert "would both be drawn to" in twins.output
    there = invoke("evaluate", tmp_path / "run", "--data", minis / "nyud-v2")
    assert there.exit_code == 0, there.output
    gone = invoke("evaluate", tmp_path / "run")
    assert gone.exit_code == 2
    assert "/moved/away is not a folder" in gone.output
    other = invoke("evaluate", tmp_path / "run", "--data", minis / "nyud-v2", "--split", "test")
    assert other.exit_code == 2
    assert "nyud-v2 has no split test; it has train, held_out" in other.output


def test_a_run_goes_on_where_its_data_has_moved_and_evaluates_what_it_had_not(
    minis, tmp_path, no_pictures, monkeypatch
):
    old = shutil.copytree(minis / "nyud-v2", tmp_path / "old")
    changes = {**SETTINGS, "evaluate_every": 4, "tasks": "depth", "size": "32x48"}
    recipe = read_recipe("nyud-v2", {**changes, "backbone": "tiny", "root": str(old)})
    run = Run(recipe, tmp_path / "run")

    def killed(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(run.trainer), "evaluate", killed)
        with pytest.raises(MemoryError):
            run.train()
    assert len(load_metrics(run.out)) == 4  # saved before the evaluation
    shutil.move(old, tmp_path / "new")
    gone = invoke("train", "--resume", run.out)
    assert gone.exit_code == 2
    assert "is not a folder; name the folder that holds NYUDv2" in gone.output
    result = invoke("train", "--resume", run.out, "--data", tmp_path / "new")
    assert result.exit_code == 0, result.output
    (line,) = (run.out / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line)["batch"] == 4
    assert read_recipe(run.out / "config.yaml").root == str(tmp_path / "new")


def test_a_pretrained_network_is_built_again_without_its_source(minis, tmp_path, no_pictures):
    """Of other sizes than those of its name would be, and its folder gone."""
    from transformers import ViTConfig, ViTModel

    source = tmp_path / "source"
    config = ViTConfig(
        image_size=96, patch_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, hidden_act="relu",
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(source)
    run = tmp_path / "run"
    result = invoke(
        "train", "nyud-v2", "--data", minis / "nyud-v2", "--backbone", source, "--size", "32x48",
        *settings(batches=4, tasks="depth,edge", drop_path=0.1), "--out", run,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    shutil.rmtree(source)
    found = invoke("evaluate", run, "--save", tmp_path / "found.yaml", "--set", "workers=1")
    assert found.exit_code == 0, found.output
    saved = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert saved == pytest.approx(load_summary(run)["metrics"])
    (run / "summary.json").unlink()
    again = invoke("train", "--resume", run)
    assert again.exit_code == 0, again.output
    assert load_summary(run)["metrics"] == pytest.approx(saved)


def test_what_may_change_when_a_run_goes_on(minis, tmp_path, no_pictures):
    root = shutil.copytree(minis / "nyud-v2", tmp_path / "nyud")
    bad = root / "depth" / "held_out_1.npy"
    bad.write_bytes(bad.read_bytes()[:300])
    run = tmp_path / "run"
    command = ["train", "nyud-v2", "--data", root, *SMALL, *settings(tasks="depth"), "--out", run]
    stopped = invoke(*command)
    assert stopped.exit_code == 2
    assert "held_out_1.npy cannot be read" in stopped.output
    other = invoke("train", "--resume", run, "--set", "lr=1")
    assert other.exit_code == 2
    assert "A run keeps the lr that it was started with; the settings that may" in other.output
    misspelled = invoke("train", "--resume", run, "--set", "wrokers=1")
    assert misspelled.exit_code == 2
    assert "Unknown setting 'wrokers'; did you mean 'workers'?" in misspelled.output
    with pytest.warns(UserWarning, match="A sample is left out"):
        went_on = invoke("train", "--resume", run, "--set", "bad=skip")
    assert went_on.exit_code == 0, went_on.output
    assert load_summary(run)["metrics"]["depth"] > 0


def test_baselines_that_nothing_can_be_divided_by(minis, tmp_path):
    baseline = tmp_path / "single.yaml"
    baseline.write_text("depth: 0.0\nedge: .nan\n")
    result = invoke(
        "train", "nyud-v2", "--data", minis / "nyud-v2", *SMALL, *settings(tasks="depth,edge"),
        "--baseline", baseline, "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "['depth', 'edge'] is not a positive number" in result.output
    assert not (tmp_path / "run").exists()
