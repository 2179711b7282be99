"""Measures how much memory a call takes at its peak."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's allocator at the peak of one call, above what was held before.

    On the CPU they are counted by the profiler, to which the allocator reports every allocation and
    release. Unlike the resident size of the process, the count is exact and the same from run to
    run. It leaves out what other libraries allocate (scratch memory of oneDNN, small arrays of the
    solvers).

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000), torch.device("cpu"))
        4000
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _no_collection(),
        _no_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
    ):
        function()
    assert trace.profiler is not None
    events = list(_flat(trace.profiler.kineto_results.experimental_event_tree()))
    live = set()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.name != "[memory]":
            continue
        n_bytes, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        if n_bytes > 0:
            live.add(address)
        elif address in live:
            live.remove(address)
        else:  # of a block that is older than the call, with whatever size an earlier profile noted
            continue
        held += n_bytes
        peak = max(peak, held)
    return peak


def _flat(events: Iterable[Any]) -> Iterator[Any]:
    """The profiler's events and those inside them, in order."""
    for event in events:
        yield event
        yield from _flat(event.children)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Leave Python's garbage where it is: when it is collected depends on earlier calls."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Silence the profiler, whose C++ code writes to stderr when it starts and stops."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
