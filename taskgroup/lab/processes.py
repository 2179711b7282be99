"""Worker processes for what takes long: reading files, matching edges, and training many runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "alone",
    "begin_worker",
    "hold_interrupts",
    "in_processes",
    "process_pool",
    "terminate",
    "visible_gpus",
]

A = TypeVar("A")
B = TypeVar("B")

_ONE_AT_A_TIME = threading.Lock()


def begin_worker(worker: int) -> None:
    """Set up a worker of a ``DataLoader``: one thread, since there are many, and no signals.

    Ctrl-C, and a scheduler's SIGTERM, go to all processes. The parent ends its workers when it has
    saved; a worker whose parent is gone ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def in_processes(function: Callable[[A], B], items: list[A], workers: int) -> Iterator[B]:
    """``map(function, items)`` in worker processes, or in this one if there are 0 workers."""
    loader: DataLoader[B] = DataLoader(
        cast(Dataset[B], items),
        batch_size=None,
        num_workers=min(workers, len(items)),
        # Called in the workers; without batches, with one item.
        collate_fn=function,  # type: ignore[arg-type]
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # so that the global one is left alone
    )
    with torch.device("cpu"):  # the iterator draws from that generator, whatever the default device
        results = iter(loader)
    yield from results


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread of this process train at a time, with one thread of torch.

    A process has one global generator of random numbers, one profiler, and one count of the GPU
    memory in use. Two runs that shared them would change each other's results. Executors whose
    processes have several threads (dask, ``ThreadPoolExecutor``) therefore train one run at a time
    in each process. One thread of torch, because the other cores have processes of their own, and
    because sums would otherwise be rounded differently from machine to machine.
    """
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def visible_gpus() -> list[str]:
    """The GPUs that torch finds, each as ``CUDA_VISIBLE_DEVICES`` names it."""
    found = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:found] if named else [str(index) for index in range(found)]


def process_pool(jobs: int, gpus: Sequence[str] = ()) -> ProcessPoolExecutor:
    """A pool of processes with one thread each, which end with this process.

    Args:
        jobs: the number of processes.
        gpus: names as from :func:`visible_gpus`. Each process sees one of them, in turn; without
            any, every process sees what this one does.
    """
    # Spawned: a forked process would inherit the threads of torch in an unknown state.
    context = multiprocessing.get_context("spawn")
    taken: SimpleQueue[str] = context.SimpleQueue()
    for job in range(jobs if gpus else 0):
        taken.put(gpus[job % len(gpus)])
    return ProcessPoolExecutor(jobs, context, _prepare, (taken if gpus else None,))


def terminate(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool, in the middle of what they do."""
    # Python 3.14 has a public method.
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()


def _prepare(gpus: SimpleQueue[str] | None) -> None:
    """Set up a process of a pool: one thread, because other processes use the other cores.

    The process also ends with its parent: while it waits for a call, it would not notice that the
    parent was killed.
    """
    if gpus is not None:  # before torch asks CUDA for its devices
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # A Ctrl-C at the terminal goes to all processes; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold back a Ctrl-C until the end of the block, in this process and in those it starts there.

    A terminal sends Ctrl-C to all processes. One that is still importing would answer with a
    traceback, so it starts with the signal blocked, and its parent ends it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
