"""How much memory a call takes at its peak, above what was held before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of torch's allocator at the peak of one call.

    On the CPU from the profiler, to which the allocator reports every piece it hands out and takes
    back: unlike the resident size of the process it is exact and the same from run to run. What a
    library allocates by itself (scratch of oneDNN, the solvers' small arrays) is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = trace.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        held += n_bytes
        peak = max(peak, held)
    return peak
