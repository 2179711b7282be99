"""The files that a run writes: records that it appends to, one JSON line at a time, and texts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import taskgroup as tg

__all__ = ["RECORDS", "append_line", "append_matrix", "cut_records", "write_text"]

#: The files of a run that hold lines about its batches.
RECORDS = (
    *("metrics.jsonl", "affinity.jsonl", "seconds.jsonl", "conflicts.jsonl"),
    "evaluations.jsonl",
)


def write_text(path: Path, text: str) -> None:
    """Write a file; if the process crashes meanwhile, the old file stays."""
    tg.checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def append_line(path: Path, line: dict[str, Any]) -> None:
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


def cut_records(run: Path, batch: int) -> dict[str, int]:
    """Drop the lines on batches after one, and lines that were cut short.

    Returns:
        ``{file: batch of its last line}``, 0 for a file without lines.
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
