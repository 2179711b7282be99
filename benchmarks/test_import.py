"""The time that ``import taskgroup`` adds to ``import torch``, in new processes.

The peer imports every public name, also those that the loop does without.
"""

import os
import subprocess
import sys

from benchmarks.clocks import Measured
from benchmarks.record import Seconds

ADDED = """
import sys, time
import torch
known = set(sys.modules)
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
print(*{{name.partition(".")[0] for name in set(sys.modules) - known}})
"""
STATEMENTS = {
    "import taskgroup": "import taskgroup",
    "every public name": "from taskgroup import *",
}
ROUNDS = 7
GOAL = 20  # ms


def test_import(record, tmp_path):
    # Compile to byte code first, as pip does when it installs a package.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    rounds = {name: [] for name in STATEMENTS}
    for _ in range(1 + ROUNDS):
        for name, statement in STATEMENTS.items():
            command = [sys.executable, "-c", ADDED.format(statement=statement)]
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            time, packages = done.stdout.splitlines()
            rounds[name].append(Measured(float(time)))
            assert set(packages.split()) <= {"taskgroup", "numpy"}
    ours, whole = (Seconds.of(every[1:]) for every in rounds.values())
    record.add("import", 1, ours, {"every public name": whole})
    first = 1e3 * rounds["import taskgroup"][0].seconds
    record.remark(
        f"goal: {GOAL} ms, here {1e3 * ours:.1f} ms (median {1e3 * ours.median:.1f} ms); the first "
        f"import, which compiles to byte code: {first:.0f} ms"
    )
