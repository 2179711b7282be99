"""Measures, prints and saves the results of a benchmark.

All sides of a comparison are called in turn, round after round, and the least time of each counts.
Other work on the machine can only add to a time, and it affects all sides alike.
"""

from __future__ import annotations

import csv
import gc
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import taskgroup as tg
from benchmarks.clocks import Call, Measured, clock_of
from benchmarks.limits import Rates

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ROOT = Path(__file__).parent
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", ROOT / "results"))
SHORTEST = 2e-4  # seconds; shorter calls are repeated within a measurement, to get above the noise
# Seconds after which a side gets no further rounds; less on a GPU, whose time is limited.
LONGEST = {"cpu": 10.0, "cuda": 1.0}
DEFAULT_ROOM = 3.5e9  # bytes


class Seconds(float):
    """The least time of a side, with the median and the maximum of its rounds."""

    median: float
    most: float
    host: float | None  # on a GPU, the time until the call returned; the median

    @classmethod
    def of(cls, rounds: list[Measured]) -> Seconds:
        every = [once.seconds for once in rounds]
        seconds = cls(min(every))
        seconds.median, seconds.most = statistics.median(every), max(every)
        host = [once.host for once in rounds if once.host is not None]
        seconds.host = statistics.median(host) if host else None
        return seconds


@dataclass(frozen=True)
class Row:
    """One line of a table of results; None if there is no number."""

    version: str
    commit: str
    torch: str
    device: str
    threads: int
    op: str
    K: int
    model: str | None
    dtype: str
    ours_us: float
    peer: str
    peer_us: float | None
    ratio: float | None  # peer_us / ours_us; above 1 ours is faster
    limit_us: float | None
    share_of_limit: float | None  # median over the rounds
    command: str
    backend: str | None = None  # of our side, if several are measured
    ours_median_us: float | None = None  # ours_us is the least
    ours_most_us: float | None = None
    host_us: float | None = None  # on a GPU, the time until our call returned
    share_of_copy: float | None = None  # share of the speed of a copy, median over the rounds
    copy_gb_s: float | None = None  # speed of the copy in this run, read and written
    product_tflop_s: float | None = None  # speed of the matrix product in this run
    launches: int | None = None  # number of kernels that our call starts on a GPU


class Record:
    """The results of one benchmark file.

    Args:
        name: the name of the benchmark.
        device: where it runs, ``"cpu"`` or ``"cuda"``.
        rounds: the least number of rounds.
        seconds: the least time of all rounds together.
        full: whether it may use most of the free memory.
        command: the command line.
        save: whether to append each row to a file as soon as it is added.
    """

    def __init__(
        self,
        name: str,
        device: str,
        rounds: int,
        seconds: float,
        full: bool,
        command: str,
        save: bool = False,
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.full = full
        self.path = results(self.device) / f"{name}.csv" if save else None
        self.clock = clock_of(self.device)
        self._rounds = rounds
        self._seconds = seconds
        self._command = command
        self._rows: list[Row] = []
        self._beside: list[tuple[float | None, float | None, str | None]] = []  # goals, reason
        self._remarks: list[str] = []
        # Of the last comparison: our side, and the seconds by side in every round.
        self.first_side: Call | None = None
        self._last_rounds: list[dict[str, float]] = []

    def room(self) -> float:
        """The bytes that a benchmark may use: most of the free memory, on the CPU only if full.

        Frees the memory of the last comparison.
        """
        self.first_side = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return 0.85 * torch.cuda.mem_get_info(self.device)[0]
        free = _free_memory()
        return 0.85 * free if self.full else min(0.85 * free, DEFAULT_ROOM)

    def room_for(self, n_bytes: float) -> float:
        """The bytes that a benchmark may use; skips it if these are fewer than it needs."""
        room = self.room()
        if n_bytes > room:
            pytest.skip(f"needs {n_bytes / 1e9:.0f} GB, and {room / 1e9:.0f} GB are free")
        return room

    def least_seconds(self, sides: Mapping[str, Call | str]) -> dict[str, Seconds | str]:
        """Measure the least time of each side, with the same number of rounds for all sides.

        A string instead of a function is the reason why a side is not run; it is returned as it is.
        """
        calls = {name: side for name, side in sides.items() if not isinstance(side, str)}
        ours = next(iter(calls))
        self.first_side = calls[ours]
        found: dict[str, Seconds | str] = {**sides}  # reasons stay; calls are replaced
        first = {}
        for name, call in calls.items():
            try:
                call()  # warm up: caches and buffers are made here
                first[name] = self.clock(call, 1)
            except torch.OutOfMemoryError:
                if name == ours:
                    raise
                found[name] = "out of memory"
                torch.cuda.empty_cache()
        repeats = {name: max(1, int(SHORTEST / once.seconds)) for name, once in first.items()}
        # The first call counts, unless calls are short, since one short call is mostly noise.
        rounds = [first] if max(repeats.values()) == 1 else []
        n_first = len(rounds)
        spent = dict.fromkeys(first, 0.0)
        collects = gc.isenabled()
        gc.disable()
        try:
            while len(rounds) < max(self._rounds, 1) or sum(spent.values()) < self._seconds:
                still = [name for name in spent if spent[name] < LONGEST[self.device.type]]
                if not still:
                    break
                rounds.append({name: self.clock(calls[name], repeats[name]) for name in still})
                for name, once in rounds[-1].items():
                    spent[name] += (once.seconds + (once.host or 0)) * repeats[name]
        finally:
            if collects:
                gc.enable()
        self._last_rounds = [
            {name: once.seconds for name, once in own.items()} for own in rounds[n_first:]
        ]
        for name in first:
            found[name] = Seconds.of([own[name] for own in rounds if name in own])
        return found

    def share(self, ours: str, limit: Callable[[Mapping[str, float]], float]) -> float | None:
        """The limit over our time: the median over the rounds of the last comparison.

        The memory of a shared machine is faster at some times than at others, so one lucky copy
        would set a limit that nothing else in the run could reach.

        Args:
            ours: the name of our side.
            limit: computes the least possible seconds from the seconds of all sides in a round.
        """
        found = [limit(seconds) / seconds[ours] for seconds in self._last_rounds if ours in seconds]
        return statistics.median(found) if found else None

    def add(
        self,
        op: str,
        n_tasks: int,
        ours: float,
        peers: Mapping[str, float | str],
        *,
        model: str | None = None,
        dtype: torch.dtype = torch.float32,
        limit: float | None = None,
        share: float | None = None,
        share_of_copy: float | None = None,
        rates: Rates | None = None,
        backend: str | None = None,
        launches: int | None = None,
        goals: Mapping[str, float] | None = None,
        limit_goal: float | None = None,
    ) -> None:
        """Add a result: our seconds, and the seconds of each peer or why it was not run.

        Goals are printed beside the numbers and never asserted. ``goals`` are how many times as
        fast as each peer we want to be. ``limit_goal`` is the share of the limit, on a GPU of the
        speed of a copy.
        """
        goals = goals or {}
        host = getattr(ours, "host", None)
        for peer, theirs in peers.items():
            reason = theirs if isinstance(theirs, str) else None
            seconds = None if isinstance(theirs, str) else theirs
            row = Row(
                **origin(self.device),
                op=op,
                K=n_tasks,
                model=model,
                dtype=str(dtype).removeprefix("torch."),
                ours_us=ours * 1e6,
                peer=peer,
                peer_us=seconds and seconds * 1e6,
                ratio=seconds and seconds / ours,
                limit_us=limit and limit * 1e6,
                share_of_limit=share,
                command=self._command,
                backend=backend,
                ours_median_us=getattr(ours, "median", ours) * 1e6,
                ours_most_us=getattr(ours, "most", ours) * 1e6,
                host_us=host and host * 1e6,
                share_of_copy=share_of_copy,
                copy_gb_s=rates and rates.bytes_per_second * 1e-9,
                product_tflop_s=rates and rates.flops_per_second * 1e-12,
                launches=launches,
            )
            self._rows.append(row)
            self._beside.append((goals.get(peer), limit_goal, reason))
            if self.path is not None:
                append(self.path, row)

    def remark(self, text: str) -> None:
        """Print a text below the table."""
        self._remarks.append(text)

    def print(self) -> None:
        """Print two tables, ours and the peers, that fit a terminal of 100 columns."""
        ours, peers = [], []
        last: tuple[object, ...] = ()
        for row, (goal, limit_goal, reason) in zip(self._rows, self._beside, strict=True):
            case = {
                "op": row.op,
                "K": str(row.K),
                "model": row.model,
                "dtype": row.dtype,
                "ours": row.backend,
            }
            first = tuple(case.values()) != last  # the first peer of a case
            last = tuple(case.values())
            if first:
                ours.append(
                    {
                        **case,
                        "µs": _number(row.ours_us),
                        "median": _number(row.ours_median_us),
                        "most": _number(row.ours_most_us),
                        "host µs": _number(row.host_us),
                        "kernels": row.launches and str(row.launches),
                        "of limit": _number(row.share_of_limit, 2),
                        "of copy": _number(row.share_of_copy, 2),
                        "goal": _number(limit_goal, 2),
                    }
                )
            peers.append(
                {
                    **(case if first else dict.fromkeys(case)),
                    "peer": row.peer,
                    "peer µs": reason or _number(row.peer_us),
                    "times as fast": _number(row.ratio, 1 if (row.ratio or 0) >= 2 else 2),
                    "goal": _number(goal, 1 if (goal or 0) >= 2 else 2),
                }
            )
        threads = torch.get_num_threads()
        title = (
            f"{self.name}: {machine(self.device)}, torch {torch.__version__}, "
            f"{threads} thread{'s' * (threads > 1)}"
        )
        width = max(shutil.get_terminal_size((200, 24)).columns, 100)
        console = Console(file=sys.stdout, width=width, highlight=False)
        console.print()
        for lines in (ours, peers):
            console.print(_table(title, lines))
            title = ""
        for remark in dict.fromkeys(self._remarks):
            console.print(f"  {remark}", markup=False, soft_wrap=True)

    def __bool__(self) -> bool:
        return bool(self._rows)


def append(path: Path, row: DataclassInstance) -> None:
    """Append a row to a CSV file with a header, and write it at once, so that it cannot be lost.

    The file may have other columns. Columns that it lacks are added and stay empty in its older
    rows. Columns that only the file has stay empty in the new row.
    """
    values = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in asdict(row).items()
    }
    old: list[dict[str, str]] = []
    names: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names, old = list(reader.fieldnames or []), list(reader)
    missing = [name for name in values if name not in names]
    names += missing
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new") if missing else path
    with new.open("w" if missing else "a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if missing:
            writer.writeheader()
            writer.writerows(old)
        writer.writerow(values)
    new.replace(path)


def results(device: torch.device) -> Path:
    """The folder with the results of this machine."""
    return RESULTS / machine(device)


def machine(device: torch.device) -> str:
    """The model of the processor or GPU of the benchmark, as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def device_name(device: torch.device) -> str:
    """The model of the processor or GPU, as it names itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def _free_memory() -> float:
    available = _proc("meminfo", "MemAvailable")  # such as "24000000 kB"
    return int(available.split()[0]) * 1024 if available else DEFAULT_ROOM


def _proc(file: str, name: str) -> str:
    """An entry of a file under /proc, or an empty string."""
    path = Path("/proc") / file
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _table(title: str, lines: list[dict[str, str | None]]) -> Table:
    """A table of the columns that are not empty; it wraps long text if the terminal is narrow."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in lines[0]:
        cells = [line[name] or "" for line in lines]
        if any(cells):
            width = None if name in ("op", "peer") else max(map(len, cells))
            justify = "left" if name in ("op", "model", "dtype", "ours", "peer") else "right"
            table.add_column(name, justify=justify, min_width=width, overflow="fold")
    names = [str(column.header) for column in table.columns]
    for line in lines:
        table.add_row(*(line[name] for name in names))
    return table


def _number(value: float | None, digits: int | None = None) -> str | None:
    if value is None:
        return None
    if digits is None:
        digits = 1 if value < 100 else 0
    return f"{value:,.{digits}f}".replace(",", " ")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def origin(device: torch.device) -> dict[str, Any]:
    """The columns that say where a row comes from."""
    return {
        "version": tg.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


@cache
def _commit() -> str:
    """The commit, read once per run, so that results written meanwhile do not make it dirty.

    ``BENCHMARK_COMMIT`` sets it if the files were copied without their git history.
    """
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{commit}-dirty" if commit and changed else commit
