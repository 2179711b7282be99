"""One thread: the tests are small, and two processes of two threads on two cores stand in line.

What holds for any rounding is run with more as well: TEST_THREADS=2, `-m learned`.
"""

import os

import pytest
import torch

from tests.backends import INTERPRETED

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# `make gpu` runs these, and its dry run does on the CPU (TEST_GPU=cpu); what they test runs on the
# host in the other tests.
collect_ignore = [] if torch.cuda.is_available() or "TEST_GPU" in os.environ else ["gpu"]
# What is about the compiler, and what starts the interpreter.
collect_ignore_glob = ["ops/test_triton_*.py"] if INTERPRETED else []


def pytest_configure(config):
    if INTERPRETED:  # kernels run in NumPy, which warns of what propagates
        config.addinivalue_line(
            "filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter"
        )


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, pytest.DoctestItem):  # of which some learn, and all print numbers
            item.add_marker("learned")


@pytest.fixture
def accelerate():
    """Accelerate, whose state would outlive the test."""
    import accelerate

    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture(scope="session")
def minis(tmp_path_factory):
    """A folder with a small tree of each data set; not to be changed."""
    from taskgroup.lab.data import DATASETS
    from taskgroup.lab.data.mini import write_mini

    folder = tmp_path_factory.mktemp("mini")
    for name in DATASETS:
        write_mini(name, folder / name)
    return folder
