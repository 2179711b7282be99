"""Times the parts of a training, and copies results from a GPU without making it wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Clock", "LateCopy"]


class Clock:
    """Adds the time between laps to the named sections of ``seconds``.

    On a GPU, a lap is the time between two events on the GPU's stream, idle time included. The
    events are read once the GPU has passed them, so nothing waits for them: the laps of one batch
    are read during the next. On the host, ``now`` tells the time.

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
        # Laps that are not read yet: the section, its beginning and its end.
        self._laps: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a lap."""
        self._since = self._mark()

    def lap(self, section: str) -> None:
        """End a lap, add it to a section, and begin the next lap."""
        since, self._since = self._since, self._mark()
        if isinstance(since, float):
            assert isinstance(self._since, float)
            self._seconds[section] += self._since - since
        else:
            assert not isinstance(self._since, float)
            self._laps.append((section, since, self._since))

    def read(self, wait: bool = False) -> None:
        """Add the laps whose end the GPU has reached; with ``wait``, wait for all of them."""
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
    """A copy of a tensor that is under way from a GPU to the host until :meth:`wait` returns it.

    A tensor that is on the host is not copied.
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
