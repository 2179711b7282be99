"""Worker processes for what takes long: reading files, and matching edges."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["begin_worker", "hold_interrupts", "in_processes"]

A = TypeVar("A")
B = TypeVar("B")


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
