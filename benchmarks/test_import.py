"""The time that ``import taskgroup`` adds to ``import torch``, in new processes."""

import os
import statistics
import subprocess
import sys

ADDED = """
import sys, time
import torch
known = set(sys.modules)
start = time.perf_counter()
import taskgroup
print(time.perf_counter() - start)
print(*{name.partition(".")[0] for name in set(sys.modules) - known})
"""
ROUNDS = 7
GOAL = 20  # ms


def test_import(capsys, tmp_path):
    # Compile to byte code first, as pip does when it installs a package.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(1 + ROUNDS):
        command = [sys.executable, "-c", ADDED]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        time, packages = done.stdout.splitlines()
        seconds.append(float(time))
        assert set(packages.split()) <= {"taskgroup", "numpy"}
    added = seconds[1:]
    with capsys.disabled():
        print(
            f"\nimport taskgroup adds {1e3 * min(added):.0f} ms to import torch "
            f"(median of {ROUNDS}: {1e3 * statistics.median(added):.0f} ms; goal {GOAL} ms; "
            f"compiling it at the first import: {1e3 * seconds[0]:.0f} ms)"
        )
