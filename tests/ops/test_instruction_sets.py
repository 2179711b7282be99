"""The C++ ops on every instruction set that this processor has.

A process keeps to one, so each has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taskgroup as tg
from taskgroup.ops import _backend
from tests import random_gradients
from tests.backends import INSTRUCTION_SETS, instruction_sets
from tests.ops import test_combine, test_gram_affinity_update, test_task_gram
from tests.random_gradients import DTYPES, gram_error

ROOT = Path(__file__).parents[2]
LAYOUTS = ["contiguous", "transposed", "sliced", "offset"]


def in_a_process(code, isa):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TASKGROUP_CPU_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_sums():
    """Sums of products, in float32 mostly: to the tolerances that every backend keeps."""
    for dtype in DTYPES:
        for n_tasks in (1, 3, 4, 5, 11):
            shapes = [(700,), (3, 11), (2, 3, 5), ()]
            missing = {(0, 1), (n_tasks - 1, 2)}
            for layouts in (["contiguous"], LAYOUTS):
                gradients = random_gradients.make(
                    n_tasks, shapes, [dtype] * 4, layouts, missing, n_tasks
                )
                assert gram_error(tg.task_gram(gradients), gradients) <= test_task_gram.TOLERANCE
                weights = torch.linspace(-1, 1, n_tasks) + 0.1
                test_combine.check(tg.combine(gradients, weights), gradients, weights.tolist())
    for dtype in DTYPES:
        for layouts in (["contiguous"], LAYOUTS):
            shapes = [(2300,), (3, 11), (2, 3, 5), ()]
            gradients = random_gradients.make(65, shapes, [dtype] * 4, layouts, {(2, 0)}, 0)
            assert gram_error(tg.task_gram(gradients), gradients) <= test_task_gram.TOLERANCE
    gradients = random_gradients.make(5, [(600,), (7,)], DTYPES[:2], LAYOUTS, {(1, 0)}, 0)
    losses = torch.rand(5) + 0.5
    updated = tg.gram_affinity_update_(torch.ones(5, 5), gradients, losses, 0.1, 1e-3)
    expected, _ = test_gram_affinity_update.expected_update(
        torch.ones(5, 5), gradients, losses, 0.1, 1e-3
    )
    torch.testing.assert_close(updated.double(), expected, rtol=2e-6, atol=2e-6)


def check_bits():
    """On any number of threads, and again: the same bits."""
    shapes = [(100_003,), (300, 7)]
    gradients = random_gradients.make(3, shapes, DTYPES[:2], ["contiguous"], set(), 0)
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append([tg.task_gram(gradients), *tg.combine(gradients, [0.3, 0.2, -0.1])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def promised():
    """What is the same on every instruction set: float64 without fused multiply-add."""
    generator = torch.Generator().manual_seed(0)
    matrix = 2 * torch.rand(40, 40, generator=generator) - 1
    before, after = torch.rand(2, 40, generator=generator) + 0.5
    tg.affinity_update_(matrix, before, after, torch.arange(40) % 3 == 0, 0.1)
    labels = [
        None if found is None else found.tolist()
        for found in (
            tg.affinity_propagation(matrix[:n, :n].round(decimals=1), preference=preference)
            for n in (3, 8, 17, 40)
            for preference in (None, -1.0)
        )
    ]
    return [matrix.tolist(), labels]


CHECK = """
import json
import torch
from tests.ops import test_instruction_sets as test
test.check_sums()
test.check_bits()
print(json.dumps([torch.ops.taskgroup.cpu_instruction_set(), *test.promised()]))
"""


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_ops(isa):
    used, matrix, labels = in_a_process(CHECK, isa)
    assert used == isa
    assert [matrix, labels] == promised()
    assert len({max(found) for found in labels if found is not None}) > 2


def test_the_best_is_chosen():
    chosen = os.environ.get("TASKGROUP_CPU_ISA") or instruction_sets()[-1]
    assert torch.ops.taskgroup.cpu_instruction_set() == chosen
    assert _backend.native.host.cpu_instruction_set() == chosen


REFUSED = """
import json
import os
import torch
import taskgroup
import taskgroup as tg

os.environ["TASKGROUP_CPU_ISA"] = "portable"  # too late
gradients = [[torch.ones(2)]]
said = []
for call in (
    lambda: tg.task_gram(gradients),
    lambda: tg.affinity_propagation(torch.eye(2)),
    lambda: tg.ops.use_backend("cpp"),
):
    try:
        call()
    except RuntimeError as error:
        said.append(str(error))
with tg.ops.use_backend("reference"):
    assert tg.task_gram(gradients).tolist() == [[2.0]]
print(json.dumps([*said, tg.ops.backends()["cpp"]]))
"""


LACKING = [isa for isa in INSTRUCTION_SETS if isa not in instruction_sets()]


@pytest.mark.parametrize("isa", ["neon", *LACKING])
def test_what_there_is_not(isa):
    """Is refused at the first use, and never tried."""
    said = in_a_process(REFUSED, isa)
    assert len(said) == 4
    for sentence in said:
        assert f"TASKGROUP_CPU_ISA={isa} names " in sentence
        assert f"one that this processor has ({', '.join(instruction_sets())})" in sentence
