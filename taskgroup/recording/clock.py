"""Times the parts of a training without making a GPU wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from taskgroup.loop.host_copy import HostCopy, waits_for

__all__ = ["Clock", "HostTensors", "StepClock"]


class Clock:
    """Adds the time between laps to the named sections of ``seconds``.

    On a GPU, a lap is the time between two events on the GPU's stream, idle time included. The
    events are read once the GPU has passed them, so nothing waits for them: the laps of one batch
    are read during the next. On the host, ``now`` tells the time.

    Example:
        >>> seconds = {}
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
        self._since: float | torch.cuda.Event | None = None  # None while it is paused
        # Laps that are not read yet: the section, its beginning and its end.
        self._laps: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a lap."""
        self._since = self._mark()

    def lap(self, section: str) -> None:
        """End a lap, add it to a section, and begin the next lap; the first call only begins."""
        since, self._since = self._since, self._mark()
        if since is None:
            return
        if isinstance(since, float):
            assert isinstance(self._since, float)
            self._seconds[section] = self._seconds.get(section, 0.0) + self._since - since
        else:
            assert not isinstance(self._since, float)
            self._laps.append((section, since, self._since))

    def pause(self) -> None:
        """Leave out the time until the next lap begins."""
        self._since = None

    def read(self, wait: bool = False) -> None:
        """Add the laps whose end the GPU has reached; with ``wait``, wait for all of them."""
        if wait and self._laps:
            self._laps[-1][2].synchronize()
        while self._laps and self._laps[0][2].query():
            section, start, end = self._laps.popleft()
            lap = start.elapsed_time(end) / 1e3
            self._seconds[section] = self._seconds.get(section, 0.0) + lap

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StepClock:
    """Divides the time of a training among its sections, by what a loop tells.

    The sections are ``"forward"``, with the losses; ``"backward"``; ``"optimizer"``; ``"between
    batches"``, such as loading the next batch; and ``"other"``, such as choosing the groups. The
    device is known with the first losses; on a GPU, events tell the time from there on.

    Attributes:
        seconds: ``{section: seconds}`` so far; on a GPU, those that have been read.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = Clock(self.seconds, torch.device("cpu"), now)
        self._device: torch.device | None = None
        self._in_step = False
        self._has_loss = False  # the step at hand
        self._stepped = False  # an optimizer, on the step at hand

    def begin_batch(self, until_now: str = "between batches") -> None:
        """A batch begins; the time since the last one was that of this section."""
        self._end_step()
        self._clock.lap(until_now)
        self._clock.read()

    def begin_step(self) -> None:
        """A forward pass begins."""
        self._end_step()
        self._clock.lap("other")
        self._in_step = True

    def begin_loss(self) -> None:
        """A forward pass is over, if it is known when it began."""
        self._clock.lap("forward" if self._in_step else "other")
        self._in_step = True

    def on(self, device: torch.device) -> None:
        """The device of the loop."""
        if device == self._device:
            return
        self._device = device
        if waits_for(device):
            self._clock.read(wait=True)
            self._clock = Clock(self.seconds, device)

    def end_loss(self) -> None:
        """A backward pass begins."""
        self._clock.lap("other")
        self._has_loss = True

    def begin_optimizer(self) -> bool:
        """An optimizer begins a step; returns whether it is one of the step at hand."""
        if not (self._in_step and self._has_loss):
            return False
        self._clock.lap("optimizer" if self._stepped else "backward")
        self._stepped = True
        return True

    def end_optimizer(self) -> None:
        """An optimizer has stepped."""
        if self._stepped:
            self._clock.lap("optimizer")

    def end_batch(self) -> None:
        """The loop over the groups has ended."""
        if self._has_loss:  # otherwise a trainer has dropped the iterator, and is about to step
            self._end_step()
            self._clock.lap("other")

    def pause(self) -> None:
        """Leave out the time until the next batch begins."""
        self._in_step = self._has_loss = self._stepped = False
        self._clock.pause()

    def read(self, wait: bool) -> dict[str, float]:
        """The seconds so far, with their sum as ``"everything"``; with ``wait``, all of them."""
        self._clock.read(wait)
        return {**self.seconds, "everything": sum(self.seconds.values())}

    def load(self, seconds: dict[str, float]) -> None:
        """Go on from the seconds that :meth:`read` returned."""
        self.seconds.clear()
        self.seconds.update(seconds)
        self.seconds.pop("everything", None)
        self._clock.pause()

    def _end_step(self) -> None:
        if self._has_loss and not self._stepped:
            self._clock.lap("backward")  # with the step, which nobody has seen
        self._in_step = self._has_loss = self._stepped = False


class HostTensors:
    """Tensors of one device that are on their way to the host, without waiting for it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._copy: HostCopy | None = None
        if tensors and waits_for(tensors[0].device):
            self._copy = HostCopy(tensors)
            self._tensors = []

    def ready(self) -> bool:
        """Whether they have arrived."""
        return self._copy is None or self._copy.ready()

    def wait(self) -> list[Tensor]:
        """The tensors on the host; waits for them."""
        return self._tensors if self._copy is None else self._copy.wait()
