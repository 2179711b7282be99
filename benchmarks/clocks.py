"""Measure how long a call takes: with the wall clock on the CPU, between two events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]

LONGEST_WAIT = 0.1  # seconds to delay the GPU; it queues at most about a thousand launches


class Measured(NamedTuple):
    """Seconds of one call."""

    seconds: float
    host: float | None = None  # until the call returned, on an idle GPU; None on the CPU


Clock = Callable[[Call, int], Measured]


def clock_of(device: torch.device) -> Clock:
    """The clock that measures calls on a device."""
    return CudaClock() if device.type == "cuda" else wall


def wall(function: Call, calls: int) -> Measured:
    """The mean wall-clock time of consecutive calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return Measured((time.perf_counter() - start) / calls)


def cuda_seconds(function: Call, calls: int) -> float:
    """The seconds between an event before the calls and one after them, on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class CudaClock:
    """Measures the times of the GPU and of the host separately, each as a mean over calls.

    A kernel that waits delays the GPU for longer than the host needs to queue the calls. All calls
    are therefore queued when the GPU reaches the first event, and the time between the events is
    the time of the GPU alone. If the calls themselves wait for the GPU, it includes the host.
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
        return Measured(cuda_seconds(function, calls) / calls, host)

    def _calibrate(self) -> None:
        cycles = 10_000_000  # a few milliseconds
        torch.cuda._sleep(cycles)  # warm up: the clock of an idle GPU is slower
        seconds = cuda_seconds(lambda: torch.cuda._sleep(cycles), 1)
        self._cycles_per_second = cycles / seconds
