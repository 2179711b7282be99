"""Measures how much memory a call takes at its peak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    assert trace.profiler is not None
    events = trace.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        held += n_bytes
        peak = max(peak, held)
    return peak


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
