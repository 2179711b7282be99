"""Everything that needs a GPU, in one go: `make gpu`.

Builds the package in place, runs the tests in tests/gpu, the kernels under compute-sanitizer, and
the benchmarks against the limits measured there; appends to benchmarks/results/<gpu>/. It needs no
network: torch with CUDA, nvcc, cmake, ninja, pybind11, pytest, hypothesis, scikit-learn and rich
are to be there already. Every step has a limit, and all together end within nine minutes; a short
table comes last.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ALL = 520.0  # seconds; what a step has not begun by then is left out
# Warnings are errors for the developers' versions of everything, not for the ones found here.
PYTEST = [
    *(sys.executable, "-m", "pytest", "-o", "addopts=--doctest-modules --import-mode=importlib"),
    *("-o", "filterwarnings=default", "-p", "no:cacheprovider", "-q"),
]
BENCHMARKS = [*PYTEST, "-s", "--device", "cuda", "--save"]
# Minutes: at the end.
WHOLE_BATCHES = [
    f"benchmarks/test_{name}.py" for name in ("paper_sizes", "loading", "cost", "many_tasks")
]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


class Step(NamedTuple):
    """A command with a limit."""

    name: str
    command: list[str]
    seconds: float


class Result(NamedTuple):
    """How a step ended."""

    outcome: str
    good: bool
    seconds: float
    output: str


def sanitizer(tool: str) -> Step:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "86", sys.executable]
    return Step(f"compute-sanitizer {tool}", [*command, str(ROOT / "tests/gpu/sanitize.py")], 60)


STEPS = [
    Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240),
    Step("tests", [*PYTEST, "tests/gpu"], 200),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    Step("benchmarks", [*BENCHMARKS, "benchmarks", *(f"--ignore={f}" for f in WHOLE_BATCHES)], 200),
    sanitizer("synccheck"),
    sanitizer("initcheck"),
    Step("benchmarks of whole batches", [*BENCHMARKS, *WHOLE_BATCHES], 150),
]


def run(step: Step, left: float) -> Result:
    """Runs a step, shows what it prints, and ends it at its limit."""
    limit = min(step.seconds, left)
    print(f"\n=== {step.name}: {' '.join(step.command)}", flush=True)
    if limit < 5:
        return Result("left out: no time left", False, 0, "")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if step.name == "build":
        environment["TASKGROUP_CUDA"] = "1"
    start = time.monotonic()
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            ["timeout", "--kill-after=5", f"{limit:.0f}", *step.command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        return Result(f"could not start: {error}", False, 0, "")
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    output = "".join(lines)
    seconds = time.monotonic() - start
    if step.name.startswith("compute-sanitizer") and re.search(
        r"not supported|No such file|failed to run command|Unable to", output
    ):
        return Result("does not work on this machine", True, seconds, output)
    counts = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+) in [\d.]+s", output, re.MULTILINE)
    summary = counts[-1] if counts else ""
    if code in (124, 137):
        return Result(f"stopped at its limit of {limit:.0f} s {summary}", False, seconds, output)
    outcome = summary or ("fine" if code == 0 else f"exit status {code}")
    return Result(outcome, code == 0, seconds, output)


def headlines() -> list[str]:
    """The figures that matter most, of the last run saved."""
    import torch

    sys.path.insert(0, str(ROOT))
    from benchmarks.record import machine

    folder = ROOT / "benchmarks/results" / machine(torch.device("cuda"))
    lines = [f"results in {folder.relative_to(ROOT)}"]
    for name in ("task_gram", "combine", "affinity_update", "scaling"):
        path = folder / f"{name}.csv"
        if not path.exists():
            continue
        rows = list(csv.DictReader(path.open()))
        latest: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in rows:
            case = (row["op"], row["K"], row["model"], row["dtype"])
            if latest.get(case) and any(r["peer"] == row["peer"] for r in latest[case]):
                latest[case] = []  # a later run
            latest.setdefault(case, []).append(row)
        for (op, k, model, dtype), of_case in latest.items():
            peers = ", ".join(
                f"{float(r['ratio']):.1f}x {r['peer']}" for r in of_case if r["ratio"]
            )
            share = of_case[0]["share_of_limit"]
            limit = f"{float(share):.2f} of the limit, " if share else ""
            lines.append(
                f"{op:<22} K = {k:<5} {model:<6} {dtype:<9} "
                f"{float(of_case[0]['ours_us']):>10.1f} µs  {limit}{peers}"
            )
    idle = folder / "idle.txt"
    if idle.exists():
        lines += idle.read_text().splitlines()
    return lines


def main() -> int:
    try:
        import torch
    except ImportError:
        print(
            f"make gpu needs torch with CUDA, and {sys.executable} has no torch. Name another "
            "Python with make gpu GPU_PYTHON=..."
        )
        return 2
    if not torch.cuda.is_available():
        print(
            f"make gpu needs a GPU: torch {torch.__version__} in {sys.executable} sees none. Name "
            "a Python whose torch does, with make gpu GPU_PYTHON=..."
        )
        return 2
    start = time.monotonic()
    results = {}
    for step in STEPS:
        results[step.name] = run(step, ALL - (time.monotonic() - start))
        if step.name == "build" and not results["build"].good:
            break
    print(f"\n=== {torch.cuda.get_device_name()}, torch {torch.__version__}")
    try:
        print("\n".join(headlines()))
    except Exception as error:  # the table of steps comes in any case
        print(f"no figures: {error!r}")
    print()
    for name, result in results.items():
        mark = "ok  " if result.good else "FAIL"
        print(f"{mark} {name:<28} {result.seconds:6.1f} s  {result.outcome}")
    return 0 if all(result.good for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
