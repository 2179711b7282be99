"""`make gpu`, with programs that take a second instead of its steps."""

import csv
import sys
import tarfile
import time

import pytest

from benchmarks import gpu
from benchmarks.gpu import Run, Step

MEASURE = """
import os, time
from pathlib import Path
path = Path(os.environ["BENCHMARK_RESULTS"]) / "abacus" / "{name}.csv"
path.parent.mkdir(parents=True, exist_ok=True)
with path.open("a") as file:
    if not file.tell():
        file.write("n\\n")
    file.writelines(f"{{n}}\\n" for n in range({rows}))
print("measured", flush=True)
{then}
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = "import time; time.sleep(5); open({path!r}, 'w')"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""


def program(name, code, seconds=60.0):
    return Step(name, [sys.executable, "-c", code], seconds)


def measuring(name, rows=2, then="", seconds=60.0):
    return program(name, MEASURE.format(name=name, rows=rows, then=then), seconds)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "results", tmp_path / "out")


def packed(out):
    """The rows of each file in results.tar.gz."""
    with tarfile.open(out / "results.tar.gz") as tar:
        return {
            member.name: list(csv.DictReader(tar.extractfile(member).read().decode().splitlines()))
            for member in tar.getmembers()
        }


def test_a_step_that_runs_out_of_time_keeps_its_rows(run, tmp_path, capsys):
    """It is interrupted first, and reports its tests so far."""
    then = """
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("3 passed in 1.00s")
    raise
"""
    result = run.step(measuring("slow", rows=3, then=then, seconds=5))
    assert not result.good
    assert result.outcome == "stopped at its limit of 5 s; 3 passed"
    assert result.seconds < 5 + gpu.GRACE
    assert len(packed(tmp_path / "out")["abacus/slow.csv"]) == 3
    assert run.step(program("next", "print('4 passed in 1.00s')")).outcome == "4 passed"
    assert run.summary() == 1
    assert "slow: 3 rows" in capsys.readouterr().out


def test_a_step_that_does_not_listen_is_ended_with_all_its_processes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 3)
    alive = tmp_path / "alive"
    assert not run.step(program("deaf", DEAF.format(path=str(alive)), seconds=3)).good
    time.sleep(5)
    assert not alive.exists()


@pytest.mark.parametrize(
    "said", ["device not supported", "Unable to attach", "No such file", "3 passed in 1.00s"]
)
def test_a_step_that_fails_is_a_failure_whatever_it_says(run, said, monkeypatch):
    monkeypatch.setattr(gpu, "SANITIZER", sys.executable)
    result = run.step(program("memcheck", f"print({said!r}); raise SystemExit(1)"))
    assert not result.good
    assert said.removesuffix(" in 1.00s") in result.outcome
    assert run.summary() == 1


def test_a_sanitizer_that_finds_errors_is_told_from_one_that_cannot_run(run, monkeypatch):
    monkeypatch.setattr(gpu, "SANITIZER", sys.executable)
    found = "print('========= ERROR SUMMARY: 2 errors'); raise SystemExit(86)"
    assert run.step(program("memcheck", found)).outcome == "errors: ERROR SUMMARY: 2 errors"
    unable = "print('========= Error: Unable to attach to the process'); raise SystemExit(1)"
    outcome = run.step(program("racecheck", unable)).outcome
    assert outcome == "could not run: Error: Unable to attach to the process"
    absent = run.step(Step("synccheck", ["/nowhere/compute-sanitizer"], 5))
    assert absent.outcome == "could not run: /nowhere/compute-sanitizer: No such file or directory"
    assert not any(result.good for result in run.done.values())


def test_the_folder_holds_one_log_and_one_archive_after_every_step(run, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "results" / "abacus").mkdir(parents=True)
    for n in range(10):
        run.step(measuring(f"step{n}", rows=n + 1))
        assert sorted(path.name for path in out.iterdir()) == ["gpu.log", "results.tar.gz"]
        assert len(packed(out)) == n + 1
        assert (out / "gpu.log").read_text().count("\nmeasured\n") == n + 1
    assert run.summary() == 0
    assert (out / "gpu.log").read_text().rstrip().splitlines()[-1].startswith("ok   step9")


def test_what_is_too_large_for_the_folder_is_left_out_and_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "MOST_RESULTS", 1000)
    monkeypatch.setattr(gpu, "LOG_OF_A_STEP", 1000)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "trace.json").write_text("x" * 2000)
    run.step(measuring("small"))
    run.step(program("loud", "for n in range(1000): print('loud', n)"))
    assert list(packed(tmp_path / "out")) == ["abacus/small.csv"]
    assert "trace.json is too large for results.tar.gz" in capsys.readouterr().out
    assert (tmp_path / "out" / "gpu.log").stat().st_size < 5000


def test_only_what_this_run_measured_is_told(tmp_path, capsys):
    folder = tmp_path / "results" / "abacus"
    folder.mkdir(parents=True)
    (folder / "fruit.csv").write_text("n\n7\n8\n")
    run = Run(tmp_path / "results", None)
    run.step(measuring("fruit", rows=1))
    assert run.summary() == 0
    assert "fruit: 1 rows" in capsys.readouterr().out
    assert (folder / "fruit.csv").read_text() == "n\n7\n8\n0\n"


def test_steps_for_which_no_time_is_left_are_named(tmp_path):
    run = Run(tmp_path, None, seconds=gpu.GRACE + 1)
    assert run.step(program("late", "print('ran')")).outcome == "left out: no time left"
    assert run.summary() == 1


def test_a_step_whose_packages_are_not_installed_is_no_failure(run):
    step = program("peers", "raise SystemExit(1)")._replace(needs=("torch", "nowhere_to_be_found"))
    assert run.step(step).outcome == "left out: nowhere_to_be_found not installed"
    assert run.summary() == 0


def test_without_nvcc_the_other_steps_go_on(run, monkeypatch, tmp_path, capsys):
    """setup.py says what is missing; then the package is built without CUDA, and the steps run."""
    asked = []

    def build(architecture, cuda):
        asked.append((architecture, cuda))
        code = "" if cuda is False else "raise SystemExit('taskgroup: no nvcc was found')"
        return program(f"build {cuda}", code)

    monkeypatch.setattr(gpu, "build", build)
    monkeypatch.setattr(gpu, "LIBRARIES", tmp_path)
    monkeypatch.setattr(gpu, "steps", lambda dry: [measuring("task_gram_alone")])
    assert gpu.run_all(run, gpu.GPU("Abacus", "2.11", "90")) == 1
    assert asked == [("90", True), ("90", False)]
    assert run.done["build True"].outcome == "exit status 1: taskgroup: no nvcc was found"
    assert run.done["task_gram_alone"].good
    assert "task_gram_alone: 2 rows" in capsys.readouterr().out


def test_kernels_of_an_earlier_build_are_not_taken_for_those_of_one_that_failed(
    run, monkeypatch, tmp_path
):
    (tmp_path / "_ops.abi3.so").touch()
    monkeypatch.setattr(gpu, "build", lambda a, cuda: program(f"{cuda}", "raise SystemExit(1)"))
    monkeypatch.setattr(gpu, "LIBRARIES", tmp_path)
    monkeypatch.setattr(gpu, "steps", lambda dry: [program("next", "")])
    assert gpu.run_all(run, gpu.GPU("Abacus", "2.11", "90")) == 1
    assert not (tmp_path / "_ops.abi3.so").exists()
    assert run.done["next"].good


def test_where_no_gpu_is_a_sentence_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PROBE", "import sys; print('driver'); sys.exit('driver too old')")
    monkeypatch.setattr(gpu.signal, "signal", lambda number, handler: None)
    assert gpu.main([]) == 2
    said = capsys.readouterr().out
    assert "torch cannot use one: driver too old" in said
    assert "GPU_PYTHON" in said
    assert "--dry-run" in said


def test_the_figures_say_time_host_and_share_of_a_copy():
    row = {
        "op": "task_gram",
        "K": "11",
        "model": "ViT-B",
        "dtype": "float32",
        "backend": "cuda",
        "ours_median_us": "1301.0",
        "host_us": "180.4",
        "share_of_copy": "0.954",
        "copy_gb_s": "3012.0",
        "launches": "",
    }
    lines = gpu.headlines({"other": [row] * 3, "task_gram": [row, row]})
    assert len(lines) == 2
    assert "1301.0 µs, host 180 µs, 0.95 of a copy at 3012.0 GB/s" in lines[0]
    assert lines[1] == "other: 3 rows"


def test_every_step_of_a_gpu_is_in_the_dry_run():
    """In the dry run the sanitizers are one program, and the tests of Triton are a step."""
    tools = {"memcheck", "racecheck", "synccheck", "initcheck"}
    real = {step.name for step in gpu.steps(dry=False)}
    dry = {step.name for step in gpu.steps(dry=True)}
    assert tools < real
    assert real - tools == dry - {"sanitizers' program", "Triton's interpreter"}
    for step in gpu.steps(dry=False) + gpu.steps(dry=True):
        files = [part.partition("::")[0] for part in step.command if part.endswith(".py")]
        assert all((gpu.ROOT / file).exists() for file in files)
