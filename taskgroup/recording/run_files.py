"""The files of a run: a header, and records that grow by one JSON line at a time.

The page "The files of a run" of the documentation describes them.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from taskgroup.checkpoint import write_atomically
from taskgroup.recording.lock import hold

__all__ = [
    "FORMAT",
    "HEADER",
    "RECORDS",
    "Header",
    "Line",
    "RunFolder",
    "read_header",
    "read_lines",
    "write_text",
]

#: The version of the format; a reader refuses other ones.
FORMAT = 1
#: The file that makes a folder a run.
HEADER = "run.json"
#: The files of a run that hold lines about its batches.
RECORDS = (
    *("metrics.jsonl", "affinity.jsonl", "seconds.jsonl", "conflicts.jsonl"),
    "evaluations.jsonl",
)

Line = dict[str, Any]  # of a JSON file


class Header(TypedDict):
    """What ``run.json`` holds."""

    format: int
    taskgroup: str  # the version that wrote the run
    id: str  # by which a resumed run knows its folder
    tasks: list[str]  # in the order of all matrices
    titles: dict[str, str]  # names as shown, of the tasks that have one
    settings: dict[str, Any]  # "method" is always there
    ended: bool  # whether the recorder was closed


class RunFolder:
    """An open folder of a run, which no other process writes to.

    Args:
        path: the folder, which is made if it is missing.
        header: of the run.

    Raises:
        ValueError: if another process writes to the folder.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, path: Path, header: Header) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._hold = hold(path)
        # Descriptors without a buffer: the system has a line as soon as it is written, so a process
        # that is killed loses none, and a forked one repeats none.
        self._files: dict[str, int] = {}
        self._close_files = weakref.finalize(self, _close, self._files)
        self.write_header(header)

    def write_header(self, header: Header) -> None:
        """Write ``run.json`` again."""
        write_text(self.path / HEADER, json.dumps(header, indent=2, default=str))

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a file; it is whole in the file, or the last one."""
        self._append(name, json.dumps(line))

    def append_matrix(self, name: str, batch: int, matrix: Tensor) -> None:
        """Append a matrix ``[K, K]`` with five digits; NaN and infinity are null."""
        # One format for a row: a million numbers take a fifth of a second.
        row = f"[{', '.join(['%.5g'] * matrix.shape[1])}]"
        rows = ", ".join(row % tuple(numbers) for numbers in matrix.tolist())
        for unknown in ("nan", "-inf", "inf"):  # which JSON does not have
            rows = rows.replace(unknown, "null")
        self._append(name, f'{{"batch": {batch}, "matrix": [{rows}]}}')

    def cut(self, last: Mapping[str, int]) -> None:
        """Drop the lines of each file on batches after the last one, and lines cut short."""
        for name, batch in last.items():
            self._keep(name, partial(_is_until, batch))

    def thin(self, names: Sequence[str], every: int) -> None:
        """Drop the lines of these files on batches that are not a multiple of ``every``."""
        for name in names:
            self._keep(name, lambda of: of is not None and of % every == 0)

    def close(self) -> None:
        """Close the files, and let other processes write to the folder."""
        self._close_files()
        del self._hold

    def _keep(self, name: str, wanted: Callable[[int | None], bool]) -> None:
        """Keep the lines of a file on the batches that are wanted."""
        if name in self._files:
            os.close(self._files.pop(name))
        path = self.path / name
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if wanted(_batch_of(line))]
        if len(kept) < len(lines):
            write_atomically(path, lambda file: file.writelines(kept))

    def _append(self, name: str, line: str) -> None:
        if name not in self._files:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._files[name] = os.open(self.path / name, flags, 0o666)
        left = memoryview(f"{line}\n".encode())
        while left:
            left = left[os.write(self._files[name], left) :]


def _close(files: dict[str, int]) -> None:
    for file in files.values():
        os.close(file)
    files.clear()


def write_text(path: Path, text: str) -> None:
    """Write a file; if the process crashes meanwhile, the old file stays."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read_header(run: Path) -> Header:
    """The header of a run.

    Raises:
        ValueError: if the folder is not a run, or one of another format.
    """
    path = run / HEADER
    if not path.is_file():
        raise ValueError(
            f"{run} is not a run: it has no {HEADER}; name a folder that tg.Recorder or taskgroup "
            "train has written."
        )
    try:
        header: Header = json.loads(path.read_text("utf-8"))
        found = header["format"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} cannot be read; leave the run out.") from None
    if found != FORMAT:
        raise ValueError(
            f"{run} has format {found}, and this taskgroup reads format {FORMAT}; use the "
            f"taskgroup that wrote it ({header.get('taskgroup', 'unknown')})."
        )
    return header


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a JSON file, without an incomplete last one; none if there is no file.

    Raises:
        ValueError: if another line cannot be read.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise ValueError(
                    f"{path} cannot be read at line {number}. Leave the run out, or continue it, "
                    "which drops the line."
                ) from None


def _batch_of(line: bytes) -> int | None:
    """The batch that a line is about, 0 before the first one; None if it cannot be read."""
    try:
        return int(json.loads(line)["batch"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_until(last: int, batch: int | None) -> bool:
    return batch is not None and batch <= last
