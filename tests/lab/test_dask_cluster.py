"""Comparisons on a dask cluster: a real one of two processes, one of which is killed."""

import logging
import os
import pickle
import signal
import sys
import time

import dask
import pytest
from distributed import LocalCluster
from distributed.utils import get_mp_context
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.studies import dask_cluster
from taskgroup.lab.studies.cell import Cell
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.comparison_display import ComparisonDisplay
from taskgroup.lab.studies.presets import Variant
from tests.lab.small import InThisProcess, options, yeast

GD, SELECTIVE = (Variant(name, name, {"method": name}) for name in ("gd", "selective"))
QUIET = {"dashboard_address": ":0", "silence_logs": logging.CRITICAL}


@pytest.fixture(scope="module")
def cluster():
    # Workers that are forked from a process that has imported what they need start at once, also
    # the one that replaces the worker that is killed.
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(
            [
                *("distributed", "taskgroup.lab.studies.workers", "taskgroup.lab.data.yeast"),
                "torch._dynamo",  # which the first step of an optimizer imports
            ]
        )
        with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **QUIET) as cluster:
            yield cluster


def comparison(out, **changes):
    return Comparison(yeast(**changes), [GD, SELECTIVE], 2, out, budgets=["batches"])


def written(out):
    return {path.name: path.read_bytes() for path in (out / "cells").iterdir()}


def invoke(command, cluster, *arguments, **changes):
    address = cluster if isinstance(cluster, str) else cluster.scheduler_address
    words = [command, "yeast", *options(**changes), "--seeds", 1, "--dask", address, *arguments]
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "100"})


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def test_runs_of_a_worker_that_is_killed_are_run_elsewhere(cluster, tmp_path, monkeypatch):
    changes = {"batches": 12, "dropout": 0.5}
    comparison(tmp_path / "here", **changes).run(executor=InThisProcess())
    writes = []
    write = Cell.write

    def note(cell, folder, result):
        writes.append(cell)
        write(cell, folder, result)

    monkeypatch.setattr(Cell, "write", note)
    killed = []
    heard = []

    def listen(stage, done, total, cell, result):
        heard.append((done, total, result is not None))
        if not killed:
            busy = [w for w in cluster.scheduler.workers.values() if w.processing]
            (nanny,) = [n for n in cluster.workers.values() if n.worker_address == busy[0].address]
            killed.append(nanny.pid)
            os.kill(nanny.pid, signal.SIGKILL)

    said = []
    compared = comparison(tmp_path / "there", **changes)
    with dask_cluster.dask_cluster(
        cluster.scheduler_address, compared.recipe, said.append
    ) as executor:
        table = compared.run(listen, executor=executor)
    assert said == [f"Training on 2 workers at {cluster.scheduler_address}."]
    assert table.failed == []
    assert heard == [(n, 10, True) for n in range(1, 11)]
    assert len(writes) == len(set(writes)) == 10
    # The same to the bit, from whatever process.
    assert written(tmp_path / "there") == written(tmp_path / "here")
    wait_for(lambda: killed[0] not in [nanny.pid for nanny in cluster.workers.values()])
    wait_for(lambda: len(cluster.scheduler.workers) == 2)


def test_commands_take_a_cluster(cluster, tmp_path):
    compare = ["--methods", "selective", "--budgets", "batches", "--out", tmp_path / "compare"]
    result = invoke("compare", cluster, *compare)
    assert result.exit_code == 0, result.output
    assert "Training on 2 workers at tcp://" in result.output
    assert len(written(tmp_path / "compare")) == 5
    result = invoke("affinity-gain", cluster, "--out", tmp_path / "gain")
    assert result.exit_code == 0, result.output
    assert len(written(tmp_path / "gain")) == 9


def test_ctrl_c_cancels_what_the_cluster_has_not_done(cluster, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ComparisonDisplay, "update", stop)
    result = invoke("compare", cluster, "--methods", "selective", "--out", tmp_path, batches=40)
    assert result.exit_code == 130, result.output
    assert "finished runs are kept" in result.output
    assert 1 <= len(written(tmp_path)) < 5
    wait_for(lambda: not cluster.scheduler.tasks)


def test_workers_that_cannot_train_are_one_sentence(cluster, tmp_path):
    result = invoke("compare", cluster, "--out", tmp_path, device="cuda")
    assert result.exit_code == 2
    assert "The worker tcp://" in result.output
    assert "cannot train yeast: device: cuda needs a GPU" in result.output
    assert written(tmp_path) == {}


def test_no_scheduler_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(dask_cluster, "_TIMEOUT", "100ms")
    for address in ("tcp://127.0.0.1:1", "nowhere"):
        result = invoke("compare", address, "--out", tmp_path)
        assert result.exit_code == 2
        assert f"No dask scheduler answers at {address}" in result.output
        assert "dask scheduler` prints" in result.output


def test_without_dask_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    result = invoke("compare", "tcp://127.0.0.1:1", "--out", tmp_path)
    assert result.exit_code == 2
    assert "pip install 'taskgroup[dask]'" in result.output


def test_workers_with_threads_train_one_run_at_a_time(tmp_path):
    comparison(tmp_path / "here", dropout=0.5).run(executor=InThisProcess())
    said = []
    compared = comparison(tmp_path / "there", dropout=0.5)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, **QUIET) as threads,
        dask_cluster.dask_cluster(
            threads.scheduler_address, compared.recipe, said.append
        ) as executor,
    ):
        compared.run(executor=executor)
    assert "Some workers have several threads" in said[1]
    assert written(tmp_path / "there") == written(tmp_path / "here")


def test_the_scheduler_passes_on_bytes(tmp_path):
    """It would import taskgroup and torch, and a worker without them would close."""
    sent = []

    class Recording(InThisProcess):
        def submit(self, function, /, *arguments):
            sent.append((function, arguments))
            return super().submit(function, *arguments)

    executor = dask_cluster._SentAsBytes(Recording())
    assert executor.submit(divmod, 7, 2).result() == (3, 1)
    assert executor.submit(int, "ff", base=16).result() == 255
    assert {function for function, _ in sent} == {pickle.loads}
    assert all(type(argument) is bytes for _, (argument,) in sent)
