"""``taskgroup train``: the files a run leaves, stopping and going on, and what bad input says."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import taskgroup as tg
from taskgroup import checkpoint
from taskgroup.lab import cli
from taskgroup.lab.cli import app
from taskgroup.lab.data.motorcycle import Motorcycle
from taskgroup.lab.recipe import (
    DataSettings,
    GroupSettings,
    NetworkSettings,
    OptimizerSettings,
    Recipe,
    read_recipe,
)
from taskgroup.lab.report import matplotlib_figures
from taskgroup.lab.report.run_data import load_run_data
from taskgroup.lab.train.evaluation import load_trained
from taskgroup.lab.train.run import Interrupted, Run
from taskgroup.lab.train.trainer import Trainer
from taskgroup.lab.vision import TASKONOMY, criterion, predictions, vit
from taskgroup.recording import LOCK
from taskgroup.recording.run_files import RunFolder
from tests.lab.written_runs import load_metrics
from tests.processes import PROCESSES

SMALL = {
    "size": 32,
    "dim": 16,
    "attention_heads": 2,
    "batch_size": 2,
    "batches": 8,
    "warmup": 2,
    "checkpoint_every": 3,
    "dropout": 0.1,
}
PICTURES = ("affinity.png", "groups.png", "cogrouping.png", "predictions.png")


def small(**changes):
    return read_recipe("motorcycle", {**SMALL, **changes})


def invoke(*arguments):
    options = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    return CliRunner().invoke(app, ["train", *options, *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    run = Run(small(), out)
    summary = run.train()
    matplotlib_figures.draw_run(run)
    return run, summary


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They take nine tenths of a small run; `finished`, made before this, has them."""
    monkeypatch.setattr(matplotlib_figures, "_draw_groups", lambda *_: None)
    monkeypatch.setattr(predictions, "draw", lambda *_: None)


def test_run_leaves_what_it_promises(finished):
    run, summary = finished
    left = {file.name for file in run.out.iterdir() if not file.name.startswith("events.")}
    assert left == {
        "config.yaml", "run.json", "metrics.jsonl", "affinity.jsonl", "seconds.jsonl",
        "conflicts.jsonl", "summary.json", "checkpoint.pt", *PICTURES,
    }  # fmt: skip
    assert any(file.name.startswith("events.out.tfevents") for file in run.out.iterdir())
    for picture in PICTURES:
        assert (run.out / picture).read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((run.out / "config.yaml").read_text())["dim"] == 16
    assert json.loads((run.out / "summary.json").read_text()) == summary
    assert set(summary["metrics"]) == set(TASKONOMY)
    assert all(value > 0 for value in summary["metrics"].values())
    assert sorted(t for group in summary["partition"] for t in group) == sorted(TASKONOMY)
    assert summary["delta_m"] is None
    assert 0 < summary["share_outside_model"] < 1
    lines = load_metrics(run.out)
    assert [line["batch"] for line in lines] == list(range(1, 9))
    assert [line["steps"] for line in lines[:2]] == [11, 11]
    assert [line.get("warmup", False) for line in lines] == [True] * 2 + [False] * 6
    assert summary["steps"] == sum(line["steps"] for line in lines)
    assert all(set(line["losses"]) == set(TASKONOMY) for line in lines)


def test_affinity_is_recorded_as_null_where_it_was_never_observed(finished):
    out = finished[0].out
    first, *_, last = (out / "affinity.jsonl").read_text().splitlines()
    # The last step of a batch is not observed, and every task has been stepped on once.
    rows = dict(zip(TASKONOMY, json.loads(first)["matrix"], strict=True))
    (unobserved,) = [task for task, row in rows.items() if row == [None] * len(TASKONOMY)]
    recorded = load_run_data(out).affinity.values
    assert np.isnan(recorded[0][list(TASKONOMY).index(unobserved)]).all()
    assert np.isfinite(recorded[-1]).sum() > np.isfinite(recorded[0]).sum()
    known = finished[0].trainer.groups.affinity.observed > 0
    assert np.array_equal(np.isfinite(np.array(json.loads(last)["matrix"], float)), known)


def test_joint_run_is_the_plain_loop(tmp_path):
    run = Run(small(method="joint"), tmp_path / "joint")
    run.train()
    recipe = run.recipe

    torch.manual_seed(recipe.seed)
    scene = Motorcycle(recipe.size)
    model = vit(size=32, patch=8, dim=16, depth=4, attention_heads=2, dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6, fused=True)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, recipe.batches, 0.9)
    crops = torch.Generator().manual_seed(recipe.seed)
    for line in load_metrics(run.out):
        images, labels, masks = scene.sample(recipe.batch_size, crops)
        losses = criterion(model(images), labels, masks)
        assert line["losses"] == {task: loss.item() for task, loss in losses.items()}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        scheduler.step()


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(out, other):
    for name in ("metrics.jsonl", "affinity.jsonl", "conflicts.jsonl"):
        assert (out / name).read_text() == (other / name).read_text()
    ours, theirs = state_of(out)["trainer"], state_of(other)["trainer"]
    for name in ("model", "groups", "drawn", "torch", "batch", "optimizer", "scheduler"):
        assert str(ours[name]) == str(theirs[name])
    for name, parameter in ours["model"].items():
        assert torch.equal(parameter, theirs["model"][name]), name
    assert torch.equal(ours["groups"]["affinity"]["matrix"], theirs["groups"]["affinity"]["matrix"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_run_is_the_one_that_was_not(finished, tmp_path, number):
    run = Run(small(), tmp_path / "run")

    def stop(progress):
        if progress.batch == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match="Stopped after batch 5 of 8; to continue: taskgroup train"
    ):
        run.train(stop)
    assert signal.getsignal(number) is before
    assert len(load_metrics(run.out)) == 5
    Run.resume(run.out).train()
    assert_same_run(run.out, finished[0].out)


def test_crashed_run_goes_on_from_its_last_checkpoint(finished, tmp_path):
    run = Run(small(), tmp_path / "run")

    def crash(progress):
        if progress.batch == 5:  # two batches after the last checkpoint
            raise MemoryError

    with pytest.raises(MemoryError):
        run.train(crash)
    with (run.out / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 6, "los')  # a line cut short
    resumed = Run.resume(run.out)
    assert resumed.batch == 3
    resumed.train()
    assert_same_run(run.out, finished[0].out)


def start_or_go_on(out):
    torch.set_num_threads(1)
    run = Run.resume(out) if (out / "config.yaml").exists() else Run(small(), out)
    run.train()


def test_run_killed_at_random_goes_on(finished, tmp_path):
    """SIGKILL, at a moment drawn at random; tests/test_faults.py kills more often."""
    out = tmp_path / "run"
    process = PROCESSES.Process(target=start_or_go_on, args=(out,), daemon=True)
    process.start()
    until = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < until, "it never began"
        time.sleep(0.002)
    time.sleep(0.6 * torch.rand(()).item())
    process.kill()
    process.join()
    start_or_go_on(out)
    assert_same_run(out, finished[0].out)


def test_run_killed_before_its_first_batch_is_done_starts_again(finished, tmp_path):
    run = Run(small(), tmp_path / "run")
    (run.out / "metrics.jsonl").write_text('{"batch": 1}\n')
    Run.resume(run.out).train()
    assert_same_run(run.out, finished[0].out)


def test_run_killed_while_it_was_set_up_starts_again(tmp_path):
    run = Run(small(batches=1), tmp_path / "run")
    (run.out / "checkpoint.pt").unlink()
    (run.out / "metrics.jsonl").write_text("")
    assert Run.resume(run.out).batch == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resumed(out, *arguments):
    return CliRunner().invoke(app, ["train", "--resume", str(out), *arguments])


def assert_refused(out, said, *arguments):
    """With a sentence, and nothing in the folder has changed."""
    before = contents(out)
    result = resumed(out, *arguments)
    assert result.exit_code == 2, result.output
    assert re.search(said, result.output), result.output
    assert contents(out) == before


def test_records_without_their_checkpoint_are_kept(finished, tmp_path):
    out = shutil.copytree(finished[0].out, tmp_path / "run")
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").unlink()
    said = (
        r"has no checkpoint.pt to go on from, but \['metrics.jsonl', .*'summary.json'\] of a train"
    )
    # Nor are the settings changed.
    assert_refused(out, said, "--set", "checkpoint_every=7")
    (out / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert_refused(out, r"checkpoint.pt cannot be read as a checkpoint", "--set", "workers=0")
    other = Run(small(dim=8), tmp_path / "other").out
    (out / "checkpoint.pt").write_bytes((other / "checkpoint.pt").read_bytes())
    assert_refused(
        out, r"does not fit the settings in .*config.yaml \(.*\); put back the two files"
    )
    (out / "checkpoint.pt").unlink()
    for name in ("metrics.jsonl", "summary.json"):
        (out / name).unlink()
    assert_refused(
        out, r"but \['affinity.jsonl', 'seconds.jsonl', 'conflicts.jsonl'\] of a training"
    )
    before = contents(out)
    result = invoke("--out", out)
    assert result.exit_code == 2
    assert "is not empty" in result.output
    assert contents(out) == before


def test_resume_of_a_finished_run_rewrites_no_record(finished, tmp_path):
    out = shutil.copytree(finished[0].out, tmp_path / "run")
    (out / "metrics.jsonl").chmod(0o444)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert resumed(out).exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")} == times


def test_a_line_cut_short_is_not_read(finished, tmp_path):
    lines = (finished[0].out / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines[:-5])
    assert len(load_metrics(tmp_path)) == 7


def test_two_processes_do_not_train_one_run(tmp_path):
    run = Run(small(batches=2), tmp_path / "run")
    before = contents(run.out)
    command = [
        sys.executable,
        "-c",
        "from taskgroup.lab.cli import app; app()",
        "train",
        "--resume",
    ]
    done = subprocess.run([*command, run.out], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"{run.out} is in use by process {os.getpid()} on" in done.stdout
    assert contents(run.out) == before
    run.train()
    assert not (run.out / LOCK).exists()


def test_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = Run(small(), tmp_path / "run")
    run.save()
    before = (run.out / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"checkpoint.pt could not be written \(.*No space left"):
        run.save()
    assert (run.out / "checkpoint.pt").read_bytes() == before
    assert not list(run.out.glob("*.partial"))


def test_command_line_trains_resumes_and_compares(tmp_path):
    first = invoke("--out", tmp_path / "joint", "--method", "joint")
    assert first.exit_code == 0, first.output
    assert "Seconds per batch" in first.output
    second = invoke(
        "--out", tmp_path / "random", "--grouping", "random:3", "--seed", 7, "--batches", 4,
        "--baseline", tmp_path / "joint",
    )  # fmt: skip
    assert second.exit_code == 0, second.output
    assert "Δm against" in second.output
    summary = json.loads((tmp_path / "random" / "summary.json").read_text())
    joint = json.loads((tmp_path / "joint" / "summary.json").read_text())
    expected = tg.delta_m(summary["metrics"], joint["metrics"], set(TASKONOMY))
    assert summary["delta_m"] == pytest.approx(expected)
    assert [line["steps"] for line in load_metrics(tmp_path / "random")] == [3] * 4
    # A finished run goes on to its end at once.
    third = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "random")])
    assert third.exit_code == 0, third.output


def test_stopped_command_says_how_to_go_on(tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = invoke("--out", tmp_path / "run")
    assert result.exit_code == 130, result.output
    assert "taskgroup train --resume" in result.output
    assert "taskgroup: " not in result.output


def test_stopped_in_its_evaluation_it_goes_on_to_it(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", interrupted)
        stopped = invoke("--out", tmp_path / "run")
    assert stopped.exit_code == 130, stopped.output
    assert "Stopped before the evaluation was done; to continue: taskgroup train --resume" in (
        stopped.output.replace("\n", "")
    )
    again = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    assert len(load_metrics(tmp_path / "run")) == 8


def test_a_full_disk_does_not_evaluate_for_ever(tmp_path, monkeypatch):
    evaluated, evaluate = [], Trainer.evaluate

    def counted(trainer, *args, **kwargs):
        evaluated.append(trainer.batch)
        assert len(evaluated) < 9
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluate", counted)
    append = RunFolder.append

    def full(run, name, line):
        if name == "evaluations.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        append(run, name, line)

    monkeypatch.setattr(RunFolder, "append", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        result = invoke("--out", tmp_path / "run", "--set", "evaluate_every=3")
    assert result.exit_code == 0, result.output
    assert evaluated == [3, 6, 8]


def test_diverged_run_says_so(tmp_path):
    result = invoke("--out", tmp_path / "run", "--method", "gd", "--set", "lr=1e30")
    assert result.exit_code == 2
    assert re.search(r"The loss of .* is not finite after batch \d", result.output)
    assert isinstance(result.exception, SystemExit)


def test_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert invoke("--batches", 1).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "motorcycle-selective-0",
        "motorcycle-selective-0-2",
    ]


# As runs wrote it when all settings were fields of one class.
FLAT = """\
data: motorcycle
root: null
subset: tiny
tasks: null
size:
- 32
- 32
batch_size: 2
bad: stop
workers: 0
backbone: tiny
patch: 8
dim: 16
depth: 4
attention_heads: 2
dropout: 0.1
weights: null
decoder: linear
drop_path: 0.0
device: cpu
precision: float32
batches: 8
lr: 0.001
head_lr: null
head_lr_times: '1'
weight_decay: 1.0e-06
poly_power: 0.9
method: selective
grouping: affinity-propagation
affinity: proximal
preference: null
credit: step
outside: coast
decay: 0.05
warmup: 2
regroup_every: 1
groups_per_batch: null
observe_every: 1
seed: 0
checkpoint_every: 3
evaluate_every: null
conflicts_every: 25
baseline: null
"""


def test_settings_written_by_an_earlier_version_are_read_and_written_alike(finished, tmp_path):
    run = Run(small(), tmp_path / "run")

    def stop(progress):
        if progress.batch == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run.train(stop)
    config = run.out / "config.yaml"

    def without_newer_settings():
        flat = yaml.safe_load(config.read_text())
        return {key: value for key, value in flat.items() if key in earlier}

    earlier = yaml.safe_load(FLAT)
    assert without_newer_settings() == earlier
    config.write_text(FLAT)
    resumed = Run.resume(run.out)
    assert without_newer_settings() == earlier
    resumed.train()
    assert_same_run(run.out, finished[0].out)
    assert load_trained(run.out).recipe == small()
    assert load_run_data(run.out).settings["head_lr_times"] == "1"


def test_wrong_settings_of_a_file_name_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: fast\ndimm: 3\n")
    said = "mine.yaml: lr must be a valid number, got 'fast'. Unknown setting 'dimm'; did you mean"
    with pytest.raises(ValueError, match=said):
        read_recipe(file)
    file.write_text("1: 2\n")
    with pytest.raises(
        ValueError, match=r"mine.yaml: Unknown setting '1'; the settings are data, "
    ):
        read_recipe(file)
    file.write_text("lr: 1e-4\n")
    with pytest.raises(ValueError, match=r"^lr must be greater than or equal to 0, got -1\.$"):
        read_recipe(file, {"lr": -1})  # the file is not wrong
    file.write_text("lr: fast\nroot: there\n")  # what is wrong with it is overridden
    assert read_recipe(file, {"lr": "1e-4", "data": "nyud-v2"}).root == "there"


def test_the_keys_of_all_sections_are_told_apart():
    sections = [DataSettings, NetworkSettings, OptimizerSettings, GroupSettings]
    names = [name for section in sections for name in section.model_fields]
    assert len(names) == len(set(names))
    assert names == list(Recipe.model_fields)[: len(names)]


def test_recipe_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-4\nbatches: 3\n")
    recipe = read_recipe(file)
    assert (recipe.lr, recipe.batches, recipe.seed) == (1e-4, 3, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nyud"], "no recipe 'nyud'.*motorcycle"),
        (["[train]"], r"no recipe '\[train\]'"),
        (["--set", "leraning_rate=1"], "Unknown setting 'leraning_rate'"),
        (["--set", "head_rl=1"], "did you mean 'head_lr'"),
        (["--set", "lr"], "key=value"),
        (["--set", "lr=fast"], "lr must be a valid number, got 'fast'"),
        (["--set", "lr=-1"], "lr must be greater than or equal to 0, got -1"),
        (["--set", "lr=true"], "lr must be a valid number, got True"),
        (["--set", "lr=.inf"], "lr must be a finite number, got inf"),
        (["--set", "batches=1.5"], "batches must be a valid integer, got "),
        (["--set", "batches=true"], "batches must be a valid integer, got "),
        (["--set", "outside=freeze"], "'hold' or 'coast', got 'freeze'"),
        (["--set", "decay=2"], r"decay must be in \(0, 1\]"),
        (["--batches", "0"], "batches must be greater than or equal to 1, got 0"),
        (["--set", "attention_heads=0"], "attention_heads must be greater than or equal to 1"),
        (["--set", "dropout=1.5"], "dropout must be less than or equal to 1, got 1.5"),
        (["--seed", "-1"], "seed must be greater than or equal to 0, got -1"),
        (["--seed", "99999999999999999999"], "seed must be less than 4611686018427387904"),
        (["--method", "jiont"], "no method 'jiont'; the methods are joint, "),
        (["--grouping", "kmeans"], "affinity-propagation, .*kmeans:M.* groups, got 'kmeans'"),
        (["--set", "tasks=[1, 2]"], r"tasks must be a list of words, got \[1, 2\]"),
        (["--set", "tasks=[]"], r"tasks must be a list of words, got \[\]"),
        (
            ["--set", "lr=fast", "--set", "dimm=1"],
            "lr must be a valid number, got 'fast'. Unknown setting 'dimm'; did you mean 'dim'",
        ),
        (["--set", "tasks=normal,edges"], "motorcycle has no task 'edges'; its tasks are depth_"),
        (
            ["--set", "data=nyud"],
            "data must be 'motorcycle', .*, 'taskonomy' or a problem of your own, .*; got 'nyud'",
        ),
        (["--grouping", "random:12"], "cannot fill 12 groups with 11 tasks"),
        (["--baseline", "nowhere"], "nowhere has no summary.json"),
    ],
)
def test_bad_settings_are_one_sentence(arguments, said, tmp_path):
    result = invoke("--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert re.search(said, result.output), result.output
    assert not (tmp_path / "run").exists()


def test_bad_folders(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    result = invoke("--out", tmp_path / "full")
    assert result.exit_code == 2
    assert "is not empty" in result.output

    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "full")])
    assert result.exit_code == 2
    assert "is not a run" in result.output

    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path), "--seed", "1"])
    assert result.exit_code == 2
    assert "no other option" in result.output


def test_bad_checkpoints(tmp_path):
    run = Run(small(), tmp_path / "run")
    run.save()
    whole = (run.out / "checkpoint.pt").read_bytes()
    (run.out / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint.pt cannot be read as a checkpoint"):
        Run.resume(run.out)
    torch.save({"version": 99}, run.out / "checkpoint.pt")
    with pytest.raises(ValueError, match="has version 99"):
        Run.resume(run.out)


def test_warnings_are_sentences_while_a_command_runs():
    usual = warnings.formatwarning
    with cli._errors_in_words():
        assert warnings.formatwarning("It is late.", UserWarning, "run.py", 3) == (
            "Warning: It is late.\n"
        )
    assert warnings.formatwarning is usual
