"""Settings and fixtures of all tests.

Tests run on one thread: they are small, and two processes with two threads each would compete for
two cores. Tests whose result must hold for any rounding also run with more: TEST_THREADS=2,
`-m learned`.
"""

import os
import threading

import pytest
import torch

from tests.backends import INTERPRETED

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# `make gpu` runs the tests in gpu/, and its dry run runs them on the CPU (TEST_GPU=cpu). The other
# tests run the same code on the host.
collect_ignore = [] if torch.cuda.is_available() or "TEST_GPU" in os.environ else ["gpu"]
# In the interpreter, skip the tests of Triton's compiler and those that start the interpreter.
collect_ignore_glob = ["ops/test_triton_*.py"] if INTERPRETED else []


def pytest_configure(config):
    if INTERPRETED:  # kernels run in NumPy, which warns of NaN and infinity
        config.addinivalue_line(
            "filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter"
        )


def pytest_collection_modifyitems(items):
    for item in items:
        if isinstance(item, pytest.DoctestItem):  # all print numbers, and some train
            item.add_marker("learned")


@pytest.fixture
def accelerate():
    """Accelerate, with its global state reset after the test."""
    import accelerate

    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """W&B in offline mode, writing to tmp_path; its process ends after the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    threads = set(threading.enumerate())
    import wandb

    yield wandb
    wandb.finish()
    wandb.teardown()
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with files in tmp_path (mlflow-skinny has no database)."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    yield mlflow
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def minis(tmp_path_factory):
    """A folder with a mini version of each data set. Do not change it: all tests share it."""
    from taskgroup.lab.data import DATASETS
    from taskgroup.lab.data.mini import write_mini

    folder = tmp_path_factory.mktemp("mini")
    for name in DATASETS:
        write_mini(name, folder / name)
    return folder
