"""Which numbers and pictures of a training go to trackers, under which names, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from taskgroup.recording.batches import BatchRecord
from taskgroup.recording.heat_map import heat_map
from taskgroup.recording.trackers import Tracker, tracker

__all__ = ["Logs"]

_FIRST_IMAGE = 100  # the batch of it; drawing one takes as long as a small step
_LONGER = 2  # times as many batches until the next one


class Logs:
    """Hands what was recorded to the trackers.

    Args:
        tasks: the K tasks.
        log: the trackers, as :func:`tracker` takes them; None is none.
        pairs: of tasks whose affinity is a scalar.
        every: batches from one whose scalars are handed on to the next.

    Raises:
        TypeError: if ``log`` is no tracker.
        ValueError: if ``pairs`` are not pairs of tasks.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        log: object,
        pairs: Iterable[tuple[str, str]],
        every: int,
    ) -> None:
        self._tasks = tasks
        self._trackers: list[Tracker] = []
        self._every = every
        self._next_image = _FIRST_IMAGE
        place = {task: k for k, task in enumerate(tasks)}
        self._pairs: dict[str, tuple[int, int]] = {}
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2 or not all(task in place for task in pair):
                raise ValueError(
                    f"pairs must hold pairs of tasks, such as [({tasks[0]!r}, {tasks[-1]!r})], got "
                    f"{pair!r}."
                )
            self._pairs[f"affinity/{pair[0]}->{pair[1]}"] = place[pair[0]], place[pair[1]]
        self.add(log)

    def add(self, log: object) -> None:
        """Hand everything to these trackers as well."""
        if log is not None:
            self._trackers.append(tracker(log))

    def end(self) -> None:
        """Hand on nothing from now on."""
        self._trackers.clear()

    def wants_affinity(self, batch: int) -> bool:
        """Whether the affinity after this batch is shown."""
        if not self._trackers:
            return False
        return batch >= self._next_image or bool(self._pairs and batch % self._every == 0)

    def batch(
        self,
        record: BatchRecord,
        losses: Mapping[str, float],
        partition: Sequence[Sequence[str]],
        matrix: Tensor | None,
    ) -> None:
        """Hand on a batch, if it is its turn."""
        batch = record.batch
        if not self._trackers:
            return
        if batch % self._every == 0:
            values = {f"loss/{task}": loss for task, loss in losses.items()}
            values["groups"] = float(len(partition))
            values |= {f"lr/{n}": rate for n, rate in enumerate(record.lr)}
            if matrix is not None:
                values |= self._affinities(matrix)
            self.scalars(values, batch)
        if matrix is not None and batch >= self._next_image:
            self._next_image = _LONGER * batch
            self.image(matrix, partition, batch)

    def scalars(self, values: Mapping[str, float], batch: int) -> None:
        """Hand on scalars at once."""
        for one in self._trackers:
            one.scalars(values, batch)

    def image(self, matrix: Tensor, partition: Sequence[Sequence[str]], batch: int) -> None:
        """Hand on the heat map of an affinity ``[K, K]``, ordered by group."""
        if not self._trackers:
            return
        place = {task: k for k, task in enumerate(self._tasks)}
        order = [place[task] for group in partition for task in group]
        affinity = np.array(matrix.tolist(), np.float64)
        pixels = heat_map(affinity, order, [len(group) for group in partition])
        for one in self._trackers:
            one.image("affinity", pixels, batch)

    def _affinities(self, matrix: Tensor) -> dict[str, float]:
        """The affinity of the chosen pairs, relative to the self-affinity of the second task."""
        found = {}
        for name, (i, k) in self._pairs.items():
            value, own = float(matrix[i, k]), float(matrix[k, k])
            if value == value and own > 0:  # neither is unknown
                found[name] = value / own
        return found
