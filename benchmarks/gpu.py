"""Build, test and measure everything that needs a GPU: `make gpu`.

Builds the package in place for the GPU of this machine, tests the kernels, measures them against
the limits of the GPU, and runs them under compute-sanitizer. The steps run one at a time, the most
important first, each with its own time limit, within nine minutes. A step that runs out of time is
interrupted as by Ctrl-C and keeps its rows. A step that fails does not stop the others. Rows are
written to benchmarks/results/<gpu>/ as soon as they are measured.

It needs no network, but these must be installed: torch with CUDA, nvcc, cmake, ninja, pybind11,
pytest, hypothesis, scikit-learn and rich. With pytest-xdist, tests run in parallel.

OUT=folder writes two files to the folder: gpu.log with everything that was printed, and
results.tar.gz with the results of this run. Both are updated after every step, so an interrupted
run loses neither.

`make gpu ARGS=--dry-run` runs the same steps on the CPU with the smallest sizes, builds nothing,
and writes to build/dry-run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parents[1]
ALL = 540.0  # seconds
GRACE = 15.0  # seconds that a step may take to end after an interrupt
ON_THE_CPU = 4  # factor of all limits in a dry run, so that a busy machine does not reach them
SHORTEST = 5.0  # seconds; a step with less time left is skipped
LOG_OF_A_STEP = 500_000  # characters
MOST_RESULTS = 15 * 2**20  # bytes
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Run setup.py without pyproject.toml: setuptools before 77 refuses its license field.
SETUP = [
    sys.executable,
    "-c",
    "import runpy; from setuptools.dist import Distribution as D; "
    "D.parse_config_files = lambda *_, **__: None; runpy.run_path('setup.py', run_name='__main__')",
]
SUMMARY = re.compile(  # of pytest
    r"^=*\s*((?:\d+ \w+,? ?)+) (?:in|collected in) [\d.]+s", re.MULTILINE
)
DRY_RUN = ROOT / "build" / "dry-run"
LAB = ("pydantic", "skimage", "torchmetrics", "transformers", "yaml")  # needed to read a recipe
WHOLE_BATCHES = ("cost", "many_tasks", "paper_sizes")
LIBRARIES = ROOT / "taskgroup"


class Step(NamedTuple):
    """A command with a time limit."""

    name: str
    command: list[str]
    seconds: float
    environment: Mapping[str, str] = MappingProxyType({})  # added to that of this process
    needs: tuple[str, ...] = ()  # packages; the step is skipped without them


class Result(NamedTuple):
    """How a step ended."""

    outcome: str
    good: bool
    seconds: float = 0.0


class GPU(NamedTuple):
    """What torch reports about the GPU."""

    name: str
    torch: str
    architecture: str  # compute capability, such as "90"


def pytest(*arguments: str, parallel: int = 1) -> list[str]:
    """A pytest command.

    Warnings are errors in the project's settings, but not here, because this machine may have other
    versions of the packages than the developers.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command += ["-o", "filterwarnings=default"]
    if parallel > 1 and find_spec("xdist"):
        command += ["-n", str(parallel)]
        if find_spec("pytest_timeout"):  # end a kernel that never returns, with its process
            command += ["--timeout=60", "--timeout-method=thread"]
    return [*command, *arguments]


def build(architecture: str, cuda: bool) -> Step:
    environment = {
        "TASKGROUP_CUDA": str(int(cuda)),
        "CUDAARCHS": architecture,
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    name = "build" if cuda else "build without CUDA"
    return Step(name, [*SETUP, "build_ext", "--inplace"], 150, environment)


def steps(dry: bool) -> list[Step]:
    """The steps after the build, the most important first."""
    side_by_side = 2 if dry else 4
    tests = {"TEST_GPU": "cpu"} if dry else {}
    options = ["--device", "cpu", "--tiny"] if dry else ["--device", "cuda"]

    def test(name: str, *files: str, seconds: float, needs: tuple[str, ...] = ()) -> Step:
        paths = [f"tests/gpu/test_{file}.py" for file in files]
        return Step(name, pytest(*paths, parallel=side_by_side), seconds, tests, needs)

    def benchmark(
        name: str, *files: str, seconds: float, small: bool = True, needs: tuple[str, ...] = ()
    ) -> Step:
        paths = [f"benchmarks/test_{file}.py" for file in files]
        # Benchmarks that take long on a CPU at any size are only collected in a dry run.
        more = ["--collect-only"] if dry and not small else []
        environment = {"FIGURE2_SECONDS": str(10 if dry else seconds - 15)}
        command = pytest("-s", "--save", *options, *more, *paths)
        return Step(name, command, seconds, environment, needs)

    return [
        Step("doctor", [sys.executable, "-m", "taskgroup"], 30),
        test("correctness", "kernels", "doctor", seconds=110),
        *(interpreter() if dry else []),
        benchmark("task_gram", "task_gram", seconds=75),
        benchmark("combine", "combine", seconds=70),
        benchmark("affinity_update_", "affinity_update", seconds=25),
        benchmark("host time", "host_time", seconds=20),
        test("loop, tests", "loop", "rows", seconds=70),
        benchmark("loop", "loop", seconds=60),
        benchmark("Figure 2", "figure2", seconds=120, needs=("transformers",)),
        *sanitizers(dry),
        test("distributed", "distributed", seconds=45),
        test("training runs", "training", seconds=45, needs=("pydantic", "yaml")),
        benchmark("methods", "methods", "rows", seconds=45),
        benchmark("whole batches", *WHOLE_BATCHES, seconds=60, small=False, needs=LAB),
        benchmark("scaling", "scaling", seconds=30, small=False),
    ]


def interpreter() -> list[Step]:
    """A few small cases of the Triton kernels in Triton's interpreter, which is slow."""
    if find_spec("triton") is None or tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        return []  # the interpreter of Triton 3.6 does not run with NumPy 2.4
    cases = [
        "TestTaskGram::test_layouts[triton-mixed-3]",
        "TestTaskGram::test_layouts[triton-offset-20]",
        "TestTaskGram::test_mixed_dtypes[triton]",
        "TestCombine::test_layouts[triton-mixed]",
        "TestAffinityUpdate::test_agrees_with_the_host[triton-11-torch.float32]",
        "TestGramAffinityUpdate::test_agrees_with_the_host[triton-2]",
    ]
    command = pytest(*(f"tests/gpu/test_kernels.py::{case}" for case in cases))
    environment = {"TEST_GPU": "cpu", "TRITON_INTERPRET": "1"}
    return [Step("Triton's interpreter", command, 60, environment)]


def sanitizers(dry: bool) -> list[Step]:
    script = [sys.executable, str(ROOT / "tests/gpu/sanitize.py")]
    if dry:
        return [Step("sanitizers' program", script, 60, {"TEST_GPU": "cpu"})]
    # Give every tensor its own memory, so that the sanitizer sees reads beyond its end.
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(tool, [SANITIZER, "--tool", tool, "--error-exitcode", "86", *script], 45, own)
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ]


class Run:
    """Runs steps one after the other and keeps their log and results.

    Args:
        results: the folder where the steps write their rows.
        out: the folder for the log and the results, or None.
        seconds: the time for all steps.
        factor: multiplies the time limit of each step.
    """

    def __init__(
        self, results: Path, out: Path | None, seconds: float = ALL, factor: float = 1
    ) -> None:
        self.done: dict[str, Result] = {}
        self._results = results
        self._out = out
        self._start = time.time()
        self._factor = factor
        self._end = time.monotonic() + seconds
        self._rows_before = {path: len(_rows(path)) for path in results.rglob("*.csv")}
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "gpu.log").write_text("")

    def say(self, text: str) -> None:
        """Print a text and write it to the log."""
        print(text, flush=True)
        if self._out is not None:
            with (self._out / "gpu.log").open("a") as log:
                log.write(text + "\n")

    def step(self, step: Step) -> Result:
        """Run a step to its end or its time limit, and keep its results so far."""
        self.say(f"\n=== {step.name}: {' '.join(step.command)}")
        limit = min(self._factor * step.seconds, self._end - time.monotonic() - GRACE)
        start = time.monotonic()
        absent = [package for package in step.needs if find_spec(package) is None]
        if absent:
            result = Result(f"left out: {', '.join(absent)} not installed", True)
        elif limit < min(SHORTEST, step.seconds):
            result = Result("left out: no time left", False)
        else:
            result = self._run(step, limit)
        result = result._replace(seconds=time.monotonic() - start)
        self.done[step.name] = result
        self.say(f"--- {step.name}: {result.outcome}")
        self._keep()
        return result

    def _run(self, step: Step, limit: float) -> Result:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "BENCHMARK_RESULTS": str(self._results),
            **step.environment,
        }
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # to end all of its processes together
            )
        except OSError as error:
            return Result(f"could not run: {step.command[0]}: {error.strerror}", False)
        last: deque[str] = deque(maxlen=400)
        reader = threading.Thread(target=self._read, args=(process.stdout, last), daemon=True)
        reader.start()
        over = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            over = True
            self.say(f"--- {step.name}: interrupted at its limit of {limit:.0f} s")
        finally:
            _end(process)
            reader.join(GRACE)
        lines = list(last.copy())  # a process that is still running may print meanwhile
        counts = SUMMARY.findall("\n".join(lines))
        summary = counts[-1] if counts else ""
        if over:
            return Result(f"stopped at its limit of {limit:.0f} s; {summary or 'no tests'}", False)
        if process.returncode == 0:
            return Result(summary or "fine", True)
        return Result(summary or _reason(step, lines, process.returncode), False)

    def _read(self, stream: TextIO, last: deque[str]) -> None:
        said = 0
        with stream:
            for line in stream:
                last.append(line.rstrip("\n"))
                said += len(line)
                if said < LOG_OF_A_STEP:
                    self.say(line.rstrip("\n"))
                elif said - len(line) < LOG_OF_A_STEP:
                    self.say(f"... more than {LOG_OF_A_STEP} characters: the rest is not shown")

    def _keep(self) -> None:
        """Write the results of this run into the folder, the smallest files first."""
        if self._out is None:
            return
        # Allow for one second, the resolution of file times on some file systems.
        files = [path for path in self._results.rglob("*") if path.is_file()]
        files = [path for path in files if path.stat().st_mtime > self._start - 1]
        room = MOST_RESULTS
        new = self._out / "results.tar.gz.new"
        with tarfile.open(new, mode="w:gz") as tar:
            for path in sorted(files, key=lambda path: path.stat().st_size):
                room -= path.stat().st_size
                if room < 0:
                    self.say(f"{path} is too large for results.tar.gz and stays where it is")
                    continue
                tar.add(path, path.relative_to(self._results))
        new.replace(self._out / "results.tar.gz")

    def summary(self) -> int:
        """Print the results of this run and how each step ended; return 1 if a step failed."""
        self.say("")
        try:
            for line in headlines(self._new_rows()):
                self.say(line)
        except Exception as error:  # print the table of steps in any case
            self.say(f"no results: {error!r}")
        self.say("")
        for name, result in self.done.items():
            mark = "ok  " if result.good else "FAIL"
            self.say(f"{mark} {name:<22} {result.seconds:6.1f} s  {result.outcome}")
        self._keep()
        return 0 if all(result.good for result in self.done.values()) else 1

    def _new_rows(self) -> dict[str, list[dict[str, str]]]:
        """The rows of this run, by benchmark."""
        found = {}
        for path in sorted(self._results.rglob("*.csv")):
            new = _rows(path)[self._rows_before.get(path, 0) :]
            if new:
                found[path.stem] = new
        return found


def _end(process: subprocess.Popen[str]) -> None:
    """End all processes of a step: first with SIGINT, as Ctrl-C does, then with SIGKILL."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE - 2)
    with suppress(ProcessLookupError, PermissionError):  # no process is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(step: Step, lines: list[str], code: int) -> str:
    """Why a program that ran no tests failed, in its own words."""
    said = [line.strip("= ") for line in lines if line.strip("= ")]
    telling = re.compile(r"not supported|Unable to|[Ee]rror\b.*: |^taskgroup: |^Broken: ")
    sentences = [line for line in said if telling.search(line)] or said
    sentence = f": {sentences[-1]}" if sentences else ""
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    if SANITIZER in step.command:
        if code == 86:
            summary = next((line for line in said if "SUMMARY" in line), "")
            return f"errors: {summary}"
        how = "could not run"
    return how + sentence


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def headlines(new: dict[str, list[dict[str, str]]]) -> list[str]:
    """One line per case of the most important benchmarks, and the number of rows of the others."""
    lines = []
    for name in sorted(new, key=lambda name: (name not in HEADLINES, name)):
        if name not in HEADLINES:
            lines.append(f"{name}: {len(new[name])} rows")
            continue
        cases: dict[tuple[str, ...], dict[str, str]] = {}
        for row in new[name]:  # the rows of a case have different peers; ours are the same
            case = tuple(row[column] for column in ("op", "K", "model", "dtype", "backend"))
            cases.setdefault(case, row)
        for (op, n_tasks, model, dtype, backend), row in cases.items():
            said = [f"{float(row['ours_median_us']):>9.1f} µs"]
            if row["host_us"]:
                said.append(f"host {float(row['host_us']):.0f} µs")
            if share := row["share_of_copy"]:
                said.append(f"{float(share):.2f} of a copy at {row['copy_gb_s']} GB/s")
            if row["launches"]:
                said.append(f"{row['launches']} launched")
            head = f"{op:<22} K = {n_tasks:<5} {model:<6} {dtype:<9} {backend:<7}"
            lines.append(head + ", ".join(said))
    return lines


HEADLINES = ("task_gram", "combine", "affinity_update")

# Runs in its own process, so that this process takes no memory of the GPU.
PROBE = """
import json, torch
torch.cuda.init()
torch.ones(1, device="cuda").sum().item()
major, minor = torch.cuda.get_device_capability()
print(json.dumps([torch.cuda.get_device_name(), torch.__version__, f"{major}{minor}"]))
"""


def find_gpu() -> GPU | str:
    """The GPU, or the reason why none can be used."""
    if find_spec("torch") is None:
        return f"make gpu needs torch with CUDA, and {sys.executable} has no torch"
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=90, check=False
        )
    except subprocess.TimeoutExpired:
        return "make gpu needs a GPU, and torch took more than 90 s to look for one"
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"make gpu needs a GPU, and torch cannot use one: {error}"
    return GPU(*json.loads(said[-1]))


def run_all(run: Run, gpu: GPU | None) -> int:
    """Run all steps; without a GPU, the steps of the dry run."""
    try:
        if gpu is None:
            run.step(Step("build", [*SETUP, "build_ext", "--help"], 30))
        elif not run.step(build(gpu.architecture, cuda=True)).good:
            run.say("No CUDA kernels: the steps continue with the Triton kernels and references.")
            if not run.step(build(gpu.architecture, cuda=False)).good:
                for library in [*LIBRARIES.glob("_ops*.so"), *LIBRARIES.glob("_host*.so")]:
                    library.unlink()  # an earlier build does not belong to this commit
        for step in steps(dry=gpu is None):
            run.step(step)
    except KeyboardInterrupt:
        run.say("\nInterrupted: the remaining steps did not run.")
        run.done["all"] = Result("interrupted", False)
    return run.summary()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU, small sizes")
    dry = parser.parse_args(arguments).dry_run
    # A shell lets processes in the background ignore SIGINT, but steps are ended with SIGINT. The
    # signals that end this process must also end its step.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    out = os.environ.get("OUT")
    if dry:
        shutil.rmtree(DRY_RUN, ignore_errors=True)
        out = out or str(DRY_RUN / "out")
        run = Run(DRY_RUN / "results", Path(out), ON_THE_CPU * ALL, ON_THE_CPU)
        run.say("Dry run on the CPU with the smallest sizes: its numbers mean nothing.")
        return run_all(run, None)
    gpu = find_gpu()
    if isinstance(gpu, str):
        print(
            f"{gpu}. Choose a Python whose torch finds a GPU with make gpu GPU_PYTHON=..., or run "
            "the steps on the CPU with make gpu ARGS=--dry-run."
        )
        return 2
    results = os.environ.get("BENCHMARK_RESULTS") or ROOT / "benchmarks" / "results"
    run = Run(Path(results), Path(out) if out else None)
    run.say(f"{gpu.name}, torch {gpu.torch}, Python {sys.version.split()[0]}, {time.ctime()}")
    return run_all(run, gpu)


if __name__ == "__main__":
    sys.exit(main())
