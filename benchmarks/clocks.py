"""How long a call takes: by the wall on the CPU, between two events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]

LONGEST_WAIT = 0.1  # seconds that a GPU is held up; a GPU queues a thousand launches, no more


class Measured(NamedTuple):
    """Seconds of one call."""

    seconds: float
    host: float | None = None  # until the call returned, on an idle GPU; None on the CPU


Clock = Callable[[Call, int], Measured]


def clock_of(device: torch.device) -> Clock:
    """What measures calls on a device."""
    return CudaClock() if device.type == "cuda" else wall


def wall(function: Call, calls: int) -> Measured:
    """The mean of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return Measured((time.perf_counter() - start) / calls)


class CudaClock:
    """Measures the GPU's time apart from the host's, each as the mean of so many calls in a row.

    The GPU is held up by a kernel that waits for longer than the host takes to queue the calls.
    So it finds all of them queued when it comes to the first event, and the time between the events
    is its own. Where the calls themselves wait for the GPU, it is that of host and GPU together.
    """

    def __init__(self) -> None:
        self._cycles_per_second = 0.0

    def __call__(self, function: Call, calls: int) -> Measured:
        torch.cuda.synchronize()
        host = wall(function, calls).seconds
        wait = min(2 * host * calls + 1e-4, LONGEST_WAIT)
        if not self._cycles_per_second:
            self._calibrate()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(wait * self._cycles_per_second))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return Measured(start.elapsed_time(end) * 1e-3 / calls, host)

    def _calibrate(self) -> None:
        cycles = 10_000_000  # some milliseconds
        torch.cuda._sleep(cycles)  # the clock of an idle GPU is slower
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        self._cycles_per_second = cycles / (start.elapsed_time(end) * 1e-3)
