"""The files that a run writes: records that grow by one JSON line at a time, and texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import taskgroup as tg

__all__ = [
    "RECORDS",
    "Line",
    "append_line",
    "append_matrix",
    "cut_records",
    "read_lines",
    "write_text",
]

Line = dict[str, Any]  # of a JSON file

#: The files of a run that hold lines about its batches.
RECORDS = (
    *("metrics.jsonl", "affinity.jsonl", "seconds.jsonl", "conflicts.jsonl"),
    "evaluations.jsonl",
)


def write_text(path: Path, text: str) -> None:
    """Write a file; if the process crashes meanwhile, the old file stays."""
    tg.checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: Line) -> None:
    """Append a line to a file, which is made if it is not there."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def append_matrix(path: Path, batch: int, tasks: Sequence[str], matrix: Tensor) -> None:
    """Append a matrix ``[K, K]`` with five digits; NaN, which JSON does not have, becomes null."""
    rounded = [
        [None if math.isnan(value) else float(f"{value:.5g}") for value in row]
        for row in matrix.tolist()
    ]
    append_line(path, {"batch": batch, "tasks": tasks, "matrix": rounded})


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
                    f"{path} cannot be read at line {number}. Leave the run out, or continue it "
                    "with --resume, which drops the line."
                ) from None


def cut_records(run: Path, batch: int) -> dict[str, int]:
    """Drop lines on batches after one, and lines that were cut short.

    Returns ``{file: batch of its last line}``, 0 for a file without lines.
    """
    return {name: _cut(run / name, batch) for name in RECORDS}


def _cut(path: Path, batch: int) -> int:
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if 1 <= _batch_of(line) <= batch]
    if len(kept) < len(lines):
        tg.checkpoint.write_atomically(path, lambda file: file.writelines(kept))
    return _batch_of(kept[-1]) if kept else 0


def _batch_of(line: bytes) -> int:
    """The batch that a line is about; 0 if it cannot be read."""
    try:
        return int(json.loads(line)["batch"]) if line.endswith(b"\n") else 0
    except (ValueError, KeyError, TypeError):
        return 0
