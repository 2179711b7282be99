"""Run a function on several ranks, for tests of distributed training."""

from __future__ import annotations

import gc
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from tests.processes import PROCESSES

TIMEOUT = 60  # seconds, after which a collective gives up


def on_ranks(
    function: Callable[..., Any], *args: Any, world: int = 2, backend: str = "gloo"
) -> list[Any]:
    """The result of ``function(rank, *args)`` on each rank; gloo's threads must end.

    Raises:
        ProcessRaisedException: if a rank raises; it has the traceback of the first one.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, backend, folder, function, args)
        mp.start_processes(_on_rank, arguments, world, start_method=PROCESSES.get_start_method())
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]


def _on_rank(rank, world, backend, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        store=dist.FileStore(f"{folder}/store", world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank, *args)))
    gc.collect()  # trainers keep their DistributedDataParallel in reference cycles
    # torch's caches keep every DeviceMesh, which keeps its process group. That is harmless here:
    # processes of multiprocessing end with os._exit(), which gloo's threads cannot disturb.
    kept = any(type(one) is DeviceMesh for one in gc.get_objects())
    dist.destroy_process_group()
    assert kept or gloo_threads() == []


def gloo_threads():
    """The names of gloo's threads in this process; empty except on Linux.

    They end with the last reference to the process group. A thread that is still running when
    Python ends may abort the process.
    """
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    return [name for name in names if "gloo" in name]
