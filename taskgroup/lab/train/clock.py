"""The time that parts of a training take, and numbers that a GPU sends while it works on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Clock", "LateCopy"]


class Clock:
    """Adds the time between laps to named sections.

    On a GPU that is the time between two events on its stream, idle time in between included. They
    are read once they have been reached, so that nobody waits for them: the laps of one batch while
    the next is under way.

    Args:
        seconds: ``{section: seconds}``, which laps add to.
        device: whose time.
        now: seconds of the host.

    Example:
        >>> seconds = {"forward": 0.0}
        >>> clock = Clock(seconds, torch.device("cpu"), now=iter([1.0, 3.5]).__next__)
        >>> clock.start()
        >>> clock.lap("forward")
        >>> seconds
        {'forward': 2.5}
    """

    def __init__(
        self,
        seconds: dict[str, float],
        device: torch.device,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._seconds = seconds
        self._on_gpu = device.type == "cuda"
        self._now = now
        self._since: float | torch.cuda.Event = 0.0
        # Laps to be read: the section, where it began and where it ended.
        self._laps: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """A lap begins."""
        self._since = self._mark()

    def lap(self, section: str) -> None:
        """A lap of a section ends, and the next one begins."""
        since, self._since = self._since, self._mark()
        if isinstance(since, float):
            assert isinstance(self._since, float)
            self._seconds[section] += self._since - since
        else:
            assert not isinstance(self._since, float)
            self._laps.append((section, since, self._since))

    def read(self, wait: bool = False) -> None:
        """Add the laps that the GPU has reached the end of; ``wait`` for the last of all."""
        if wait and self._laps:
            self._laps[-1][2].synchronize()
        while self._laps and self._laps[0][2].query():
            section, start, end = self._laps.popleft()
            self._seconds[section] += start.elapsed_time(end) / 1e3

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LateCopy:
    """A copy of a tensor on its way from a GPU to the host, which waits for it in :meth:`wait`.

    A tensor on the host is taken as it is.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._on_host = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._on_host = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._on_host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._on_host
