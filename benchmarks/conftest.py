"""Options, cases and fixtures of the benchmarks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.ours import WrongNumberError
from benchmarks.record import Record
from benchmarks.shapes import WIDTHS

ROUNDS_TO_SAVE = 20
WITHOUT_PLUGIN = {
    "benchmark_min_rounds": 5,
    "benchmark_max_time": 1.0,
    "benchmark_disable": False,
}


class Case(NamedTuple):
    """Gradients to benchmark on."""

    model: str
    n_tasks: int
    dtype: torch.dtype


DEFAULT = [
    Case("ViT-T", 11, torch.float32),
    Case("ViT-T", 64, torch.float32),
    Case("ViT-T", 11, torch.bfloat16),
]
TINY = [Case("ViT-T", 3, torch.float32), Case("ViT-T", 2, torch.bfloat16)]
# On a GPU: first the cases that the memory bandwidth limits, then those that the host limits.
GPU = [
    *(Case("ViT-B", n_tasks, torch.float32) for n_tasks in (11, 64, 2, 5, 16, 26)),
    *(Case("ViT-B", n_tasks, torch.bfloat16) for n_tasks in (11, 64)),
    *(Case("ViT-T", n_tasks, torch.float32) for n_tasks in (11, 64)),
]
DTYPES = (torch.float32, torch.bfloat16)
FULL = [Case(*case) for case in itertools.product(WIDTHS, (2, 5, 11, 16, 26, 64), DTYPES)]


def pytest_addoption(parser):
    group = parser.getgroup("taskgroup")
    group.addoption("--full", action="store_true", help="run every size, however long it takes")
    group.addoption("--save", action="store_true", help="append to the files in results/")
    group.addoption("--tiny", action="store_true", help="run one small case of each, once")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = GPU if option("device") == "cuda" else DEFAULT
        cases = TINY if option("tiny") else FULL if option("full") else cases
        ids = [f"{c.model}-{c.n_tasks}-{str(c.dtype).removeprefix('torch.')}" for c in cases]
        metafunc.parametrize("case", cases, ids=ids)


def pytest_collection_modifyitems(config, items):
    if config.getoption("full"):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))
    if config.getoption("tiny"):  # the first case of each test, and all cases that are small
        first = {}
        for item in items:
            first.setdefault((item.path, item.originalname), item)
        chosen = [i for i in items if i in first.values() or "case" in i.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what does not fit into memory, and stop the session if a kernel gives a wrong number."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit into the memory of the GPU: {str(error).splitlines()[0]}")
    except WrongNumberError as error:
        item.session.shouldfail = f"{item.nodeid}: {error}"
        raise


@pytest.fixture(scope="module")
def record(request):
    """Records the results of a file: saves each at once, and prints all when the file is done.

    pytest-benchmark's options set the rounds: ``--benchmark-min-rounds``, ``--benchmark-max-time``.
    With ``--benchmark-disable`` everything runs twice and nothing is printed.
    """

    def option(name):
        # pytest-benchmark need not be installed.
        return request.config.getoption(name, WITHOUT_PLUGIN.get(name))

    rounds, seconds = option("benchmark_min_rounds"), option("benchmark_max_time")
    if option("save"):
        rounds = max(rounds, ROUNDS_TO_SAVE)
    if option("benchmark_disable") or option("tiny"):
        rounds, seconds = 0, 0
    save = option("save") and not option("benchmark_disable")
    command = " ".join(["pytest", *map(str, request.config.invocation_params.args)])
    name = Path(request.path).stem.removeprefix("test_")
    record = Record(name, option("device"), rounds, float(seconds), option("full"), command, save)
    yield record
    if not record or option("benchmark_disable"):
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        record.print()
        if record.path is not None:
            print(f"  saved to {record.path}")


@pytest.fixture(autouse=True)
def _pytest_benchmark(request):
    """Run our side again under pytest-benchmark if it is to save or compare its times."""
    asked = ("benchmark_json", "benchmark_save", "benchmark_autosave", "benchmark_compare")
    if not any(request.config.getoption(name, None) for name in asked):
        yield
        return
    benchmark = request.getfixturevalue("benchmark")
    record = request.getfixturevalue("record")
    yield
    if record.first_side is not None:
        benchmark.pedantic(record.first_side, rounds=ROUNDS_TO_SAVE)


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("device"))
