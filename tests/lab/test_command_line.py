"""``taskgroup compare`` and ``affinity-gain``: what they leave and say, and being stopped."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.studies import intervals, workers
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.presets import Variant
from tests.lab.small import options, yeast


def invoke(command, *arguments, **changes):
    words = [command, "yeast", *options(**changes), *map(str, arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "100"})


def left(folder):
    return {path.name for path in folder.iterdir()}


def test_compare_leaves_tables_and_a_picture(tmp_path, trained):
    out = tmp_path / "[out]"  # no markup
    arguments = ["--preset", "cheap", "--methods", "selective", "--seeds", 2, "--out", out]
    result = invoke("compare", *arguments, "--budgets", "batches,time")
    assert result.exit_code == 0, result.output
    assert left(out) == {
        *("base.yaml", "batches.yaml", "costs.yaml", "cells"),
        *("cheap.md", "cheap.csv", "cheap.png"),
    }
    assert (out / "cheap.png").read_bytes().startswith(b"\x89PNG")
    assert "# yeast: 3 tasks, 4 batches of 8, 2 seeds" in (out / "cheap.md").read_text("utf-8")
    assert re.search(r"Selective +\d\.\d\dx", result.output)
    assert f"{out}: equal batches, run 10 of 10" in result.output
    assert "Best rate" not in result.output
    trained.clear()
    # A preset more, in the same folder.
    arguments = ["--preset", "warmup", "--methods", "warmup-2", "--seeds", 2, "--out", out]
    result = invoke("compare", *arguments, "--budgets", "batches")
    assert result.exit_code == 0, result.output
    assert {cell.name for cell in trained} == {"warmup-2"}
    assert {"cheap.md", "warmup.md"} <= left(out)


def test_compare_tries_rates_and_batch_sizes(tmp_path, made_up):
    splits = ("train", "validation", "held_out")
    tasks = ("class1", "class2", "class3")
    made_up(
        lambda cell: {
            "metrics": {s: dict.fromkeys(tasks, 1 / cell.recipe.batch_size) for s in splits}
        }
    )
    arguments = ["--methods", "uw,dwa", "--seeds", 1, "--out", tmp_path / "out"]
    tuned = ["--rates", "0.1", "--batch-sizes", "4, 16", "--tune", "uw"]
    result = invoke("compare", *arguments, *tuned)
    assert result.exit_code == 0, result.output
    assert "choosing the best rate and batch size, run 36 of 36" in result.output
    text = (tmp_path / "out" / "methods.md").read_text("utf-8")
    assert "2 learning rates, for encoder and heads alike, times 3 batch sizes (4, 8, 16)" in text
    shown = [line.split("|")[-2].strip() for line in text.splitlines() if "| +" in line]
    assert shown[:3] == ["+100.0 (0.003, 4)", "+100.0 (0.003, 4)", ""]


def test_affinity_gain_leaves_tables_and_a_picture(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(intervals, "_RESAMPLES", 50)
    result = invoke("affinity-gain", "--seeds", 1, "--out", tmp_path / "out", batches=6)
    assert result.exit_code == 0, result.output
    assert left(tmp_path / "out") == {"base.yaml", "cells", "gains.md", "gains.csv", "gains.png"}
    assert "Proximal" in result.output
    assert "measuring affinities, run 3 of 3" in result.output


def test_a_gpu_that_is_missing_leaves_no_folder(tmp_path, trained):
    result = invoke("compare", "--out", tmp_path / "out", device="cuda")
    assert result.exit_code == 2
    assert "device: cuda needs a GPU" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "dimm=3"], "Unknown setting 'dimm'; did you mean 'dim'"),
        (["--set", "tasks=class1,klass2"], "yeast has no task 'klass2'; its tasks are class1"),
        (["--set", "tasks=class1"], "at least two tasks"),
        (["--preset", "grupping"], "no preset 'grupping'; there are grouping"),
        (["--methods", "uw,famous"], "no method 'famous' here; there are famo"),
        (["--methods", "uw;famo"], "no method 'uw;famo' here"),
        (["--budgets", "time,money"], "no budget money"),
        (["--rates", "fast"], "--rates takes numbers, got fast"),
        (["--rates", "-1,1"], "lr must be greater than or equal to 0, got -1.0"),
        (["--rates", "inf"], "lr must be a finite number, got inf"),
        (["--batch-sizes", "8.5"], "--batch-sizes takes whole numbers, got 8.5"),
        (["--batch-sizes", "8,0"], "batch_size must be greater than or equal to 1, got 0"),
        (["--batch-sizes", "4", "--budgets", "time"], "add it to the budgets"),
        (["--tune", "uw,famous"], r"\['famous'\] cannot be tuned"),
        (["--seeds", "0"], "at least one seed"),
        (["--batches", "1"], "at least two batches"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--jobs", "-2"], "jobs must be at least 1, got -2"),
        (["--jobs", "2", "--dask", "tcp://127.0.0.1:1"], "give one of --jobs and --dask"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, trained):
    result = invoke("compare", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    assert re.search(said, result.output), result.output
    assert trained == []


def test_a_folder_that_cannot_be_written(tmp_path, trained, monkeypatch):
    from taskgroup import checkpoint

    (tmp_path / "file").write_text("")
    result = invoke("compare", "--out", tmp_path / "file" / "out")
    assert result.exit_code == 2
    assert "cannot be created (Not a directory); name another folder with --out" in result.output

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    result = invoke("compare", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "could not be written" in result.output


def test_failed_runs_are_one_sentence(tmp_path, trained, monkeypatch):
    def fail(cell):
        raise ValueError("the solver gave up")

    monkeypatch.setattr(workers, "train_cell", fail)
    result = invoke("compare", "--methods", "uw", "--seeds", 1, "--out", tmp_path)
    assert result.exit_code == 2
    assert "runs failed and are missing above; the same command runs them again" in result.output
    assert "the solver gave up" in result.output


def test_all_runs_diverge(tmp_path, trained):
    arguments = ["--methods", "uw,dtp,selective", "--seeds", 2, "--out", tmp_path]
    result = invoke("compare", *arguments, lr=1e20)
    assert result.exit_code == 0, result.output
    assert result.output.count("diverged") >= 12
    assert "nan" not in result.output.replace("Nan", "")
    assert (tmp_path / "methods.png").is_file()


def test_ctrl_c_keeps_what_is_finished(tmp_path, trained, monkeypatch):
    train = workers.train_cell

    def stop(cell):
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(cell)

    monkeypatch.setattr(workers, "train_cell", stop)
    arguments = ["--methods", "uw", "--budgets", "batches", "--seeds", 1, "--out", tmp_path]
    result = invoke("compare", *arguments)
    assert result.exit_code == 130, result.output
    assert (
        "Stopped; finished runs are kept. Run the same command again to continue." in result.output
    )
    assert len(list((tmp_path / "cells").iterdir())) == 3
    monkeypatch.setattr(workers, "train_cell", train)
    assert invoke("compare", *arguments).exit_code == 0
    assert len(trained) == 5


# Through real processes.

PROGRAM = "from taskgroup.lab.cli import app; app()"


def start(out, **changes):
    words = ["compare", "yeast", *options(**changes), "--methods", "selective", "--seeds", "4"]
    words += ["--budgets", "batches", "--jobs", "1", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cells(out):
    return {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


def state(pid):
    """Its state and its parent, as /proc has them; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def children(pid):
    """Its workers: the processes that were spawned, but not the one that tracks resources."""
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    found = [child for child in found if (known := state(child)) and known[1] == pid]
    return [p for p in found if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def gone(pid):
    known = state(pid)
    return known is None or known[0] == "Z"


def wait_for(condition, seconds=180):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_is_killed_another_is_refused_and_killed_itself_it_goes_on(tmp_path, trained):
    running = start(tmp_path, batches=20)
    try:
        wait_for(lambda: (tmp_path / "cells").is_dir() and cells(tmp_path))
        (first,) = children(running.pid)
        os.kill(first, signal.SIGKILL)
        # Another process takes its place.
        wait_for(lambda: set(children(running.pid)) - {first})
        spawned = set(children(running.pid)) - {first}
        running.send_signal(signal.SIGSTOP)  # it has the folder all the same
        other = start(tmp_path, batches=20)
        said = other.communicate(timeout=120)[0]
        assert other.returncode == 2
        assert f"{tmp_path} is in use by process {running.pid} on" in said
        there = cells(tmp_path)
        running.send_signal(signal.SIGCONT)
        wait_for(lambda: cells(tmp_path).keys() > there.keys())
    finally:
        running.send_signal(signal.SIGKILL)
        said = running.communicate()[0]
    assert "A worker process died" in said
    # Its workers end with it, and do not train on.
    wait_for(lambda: all(gone(pid) for pid in spawned))
    before = cells(tmp_path)
    assert len(before) < 20

    compared = Comparison(
        yeast(batches=20),
        [Variant(name, name, {"method": name}) for name in ("gd", "selective")],
        4,
        tmp_path,
        budgets=["batches"],
    )
    table = compared.run()
    assert len(trained) == 20 - len(before)
    after = cells(tmp_path)
    assert len(after) == 20
    assert {path: after[path] for path in before} == before
    assert [row.delta["batches", "held_out"].n for row in table.rows] == [4, 4]
