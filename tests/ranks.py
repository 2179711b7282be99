"""Runs a function on several ranks, for tests of what happens between them."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.processes import PROCESSES

TIMEOUT = 60  # seconds, after which a collective gives up


def on_ranks(
    function: Callable[..., Any], *args: Any, world: int = 2, backend: str = "gloo"
) -> list[Any]:
    """What ``function(rank, *args)`` returns on each of the ranks.

    Raises:
        ProcessRaisedException: with the traceback of the first rank that raised.
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
    dist.destroy_process_group()
