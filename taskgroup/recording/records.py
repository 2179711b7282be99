"""Writes the records of a run; nothing that goes wrong stops the training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from taskgroup.recording.lock import FolderInUseError
from taskgroup.recording.run_files import (
    HEADER,
    RECORDS,
    Header,
    Line,
    RunFolder,
    read_header,
    read_lines,
)

__all__ = ["Records"]

_RECORDS = 400  # most records of affinity and seconds of a run: a picture shows no more
_NUMBERS = 20_000_000  # most numbers in these records: with 1000 tasks, 20 matrices
#: What a line of metrics.jsonl holds only if it is not that of the line before.
_RARE = ("partition", "lr")


class Records:
    """The records of a run, in a folder that is opened when the first one is written.

    If the folder holds another run, the next free one of ``run-2``, ``run-3``, ... is taken; if it
    cannot be written to, nothing is recorded. A warning says each of these once.

    Args:
        folder: the folder.
        header: of the run.
        every: batches from one whose affinity and seconds are recorded to the next; None doubles
            this distance whenever there are too many records, which are then thinned.

    Attributes:
        folder: the folder that was taken.
        every: the distance at the moment.
        last_conflicts: the batch of the last line of ``conflicts.jsonl``; 0 if there is none.
    """

    def __init__(self, folder: Path, header: Header, every: int | None) -> None:
        squared = len(header["tasks"]) ** 2
        self.folder = folder
        self.every = max(1, squared // 10_000) if every is None else every
        self._thins = every is None
        self._most = max(20, min(_RECORDS, _NUMBERS // squared))
        self.last_conflicts = 0
        self._timed = 0  # lines of seconds.jsonl
        self._last: dict[str, Any] = {}  # the entries of metrics.jsonl in _RARE
        self._header = header
        self._run: RunFolder | None = None
        self._resumed: dict[str, int] | None = None  # the last batch of each file to go on from
        self._over = False  # closed, or given up

    @property
    def id(self) -> str:
        """By which a resumed run knows its folder."""
        return self._header["id"]

    def resume(self, run_id: str, batch: int, every: int, last_conflicts: int) -> None:
        """Go on with this run after this batch, if the folder still holds it."""
        self._header["id"] = run_id
        # Conflicts are of the network before a batch, so those of the next one may be known.
        self._resumed = {**dict.fromkeys(RECORDS, batch), "conflicts.jsonl": last_conflicts}
        self.last_conflicts = last_conflicts
        if self._thins:
            self.every = every

    def is_open(self) -> bool:
        """Whether something was written."""
        return self._run is not None

    def due(self, batch: int) -> bool:
        """Whether affinity and seconds after this batch are recorded."""
        return batch % self.every == 0

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to one of the files."""
        # The lines after the batch of a loaded state stay while a network is only evaluated.
        if (run := self.open(cut=name != "evaluations.jsonl")) is not None:
            self._try(run.append, name, line)

    def append_batch(self, line: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``, without what has not changed since the last one."""
        self.open()
        for name in _RARE:
            value = line.pop(name)
            if value and self._last.get(name) != value:
                line[name] = self._last[name] = value
        self.append("metrics.jsonl", line)

    def append_affinity(self, batch: int, matrix: Tensor) -> None:
        """Append the affinity ``[K, K]`` after a batch."""
        if (run := self.open()) is not None:
            self._try(run.append_matrix, "affinity.jsonl", batch, matrix)

    def append_conflicts(self, batch: int, matrix: Tensor) -> None:
        """Append the cosines ``[K, K]`` before a batch."""
        if (run := self.open()) is not None:
            self._try(run.append_matrix, "conflicts.jsonl", batch, matrix)
            self.last_conflicts = batch

    def append_seconds(self, batch: int, seconds: Mapping[str, float]) -> None:
        """Append a line on the time so far; thin the records if there are too many."""
        self.append("seconds.jsonl", {"batch": batch, "seconds": seconds})
        self._timed += 1
        if self._thins and self._timed >= self._most:
            self.every *= 2
            self._timed //= 2
            if self._run is not None:
                self._try(self._run.thin, ("affinity.jsonl", "seconds.jsonl"), self.every)

    def open(self, cut: bool = True) -> RunFolder | None:
        """The open folder, or None if there is nothing to write to.

        With ``cut``, the lines after the batch of a loaded state are dropped.
        """
        if self._run is None and not self._over:
            self._try(self._open)
        if cut and self._run is not None and self._resumed is not None:
            self._try(self._run.cut, self._resumed)
            self._resumed = None
            self._timed = sum(1 for _ in self._lines("seconds.jsonl"))
            for line in self._lines("metrics.jsonl"):
                self._last |= {name: line[name] for name in _RARE if name in line}
        return None if self._over else self._run

    def close(self, ended: bool) -> None:
        """Write that the run has ended, or only let go of the folder."""
        if self._run is not None and not self._over:
            self._header["ended"] = ended
            self._try(self._run.write_header, self._header)
        if self._run is not None:
            self._run.close()
        self._run, self._over = None, True

    def _lines(self, name: str) -> Iterator[Line]:
        return read_lines(self.folder / name)

    def _open(self) -> None:
        if self._resumed is not None:
            held = not _is_run(self.folder) or _id_of(self.folder) == self.id
            wrong = "" if held else "does not hold the run whose state was loaded"
        else:
            wrong = "holds another run, which is kept" if _is_run(self.folder) else ""
        if not wrong:
            try:
                self._run = RunFolder(self.folder, self._header)
                return
            except FolderInUseError:
                wrong = "is being written to by another process"
        taken, self.folder = self.folder, _make_next(self.folder)
        warnings.warn(
            f"{taken} {wrong}, so this run is recorded in {self.folder}. To continue a run, load "
            "the state_dict() of its recorder before the first batch; for a new run, name another "
            "folder.",
            stacklevel=2,
        )
        self._resumed = None
        self._run = RunFolder(self.folder, self._header)

    def _try(self, write: Callable[..., object], *args: Any) -> None:
        try:
            write(*args)
        except (OSError, ValueError) as error:
            self._over = True
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            warnings.warn(
                f"{self.folder} cannot be written to ({reason}), so the run is not recorded any "
                "further; the training goes on. Make room or name another folder, and resume from "
                "a checkpoint to record again. This is said once.",
                stacklevel=2,
            )


def _is_run(folder: Path) -> bool:
    return (folder / HEADER).exists()


def _id_of(folder: Path) -> str | None:
    try:
        return read_header(folder)["id"]
    except (ValueError, OSError):
        return None


def _make_next(folder: Path) -> Path:
    """Make the next folder of -2, -3, ... that does not exist; no other process gets it."""
    for n in count(2):
        found = folder.with_name(f"{folder.name}-{n}")
        try:
            found.mkdir()
        except FileExistsError:
            continue
        return found
    raise AssertionError
