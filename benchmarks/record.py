"""How every benchmark measures, prints and saves.

All sides of a comparison are called in turn, round after round, and the least time of each is kept:
whatever else the machine does only adds to a time, and falls on all sides alike.
"""

from __future__ import annotations

import csv
import gc
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import taskgroup as tg

ROOT = Path(__file__).parent
SHORTEST = 2e-4  # seconds; shorter calls are repeated within a measurement, which must not be noise
LONGEST = 10.0  # seconds after which a side gets no further rounds
DEFAULT_ROOM = 3.5e9  # bytes

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of a table of results; None where there is no number."""

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
    ratio: float | None  # peer_us / ours_us: times as fast
    limit_us: float | None
    share_of_limit: float | None  # median over the rounds
    command: str


class Record:
    """The results of one benchmark file.

    Args:
        name: of the benchmark.
        device: where it runs, ``"cpu"`` or ``"cuda"``.
        rounds: at least so many.
        seconds: go on for so long, after those.
        full: whether the memory may be filled.
        command: what was called.
    """

    def __init__(
        self, name: str, device: str, rounds: int, seconds: float, full: bool, command: str
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.full = full
        self._rounds = rounds
        self._seconds = seconds
        self._command = command
        self._rows: list[Row] = []
        self._beside: list[tuple[float | None, float | None, str | None]] = []  # goals, reason
        self._remarks: list[str] = []
        self.first_side: Call | None = None  # of the last comparison: ours
        self._last_rounds: list[dict[str, float]] = []  # of the last comparison: seconds by side

    def room(self) -> float:
        """Bytes that a benchmark may take: of a host's memory little by default, much if full."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return 0.85 * torch.cuda.mem_get_info(self.device)[0]
        free = _free_memory()
        return 0.85 * free if self.full else min(0.85 * free, DEFAULT_ROOM)

    def least_seconds(self, sides: Mapping[str, Call | str]) -> dict[str, float | str]:
        """The least time of each side; every side is measured as often as any other.

        A sentence in the place of a function is why the side is not run, and is returned as it is.
        """
        reasons = {name: reason for name, reason in sides.items() if isinstance(reason, str)}
        calls = {name: call for name, call in sides.items() if not isinstance(call, str)}
        return {**reasons, **self._least_seconds(calls)}

    def _least_seconds(self, sides: Mapping[str, Call]) -> dict[str, float]:
        self.first_side = next(iter(sides.values()))
        self._last_rounds = []
        clock = _cuda_seconds if self.device.type == "cuda" else _wall_seconds
        least = {}
        calls = {}
        for name, function in sides.items():
            function()  # what is made once is made here
            least[name] = clock(function, 1)
            calls[name] = max(1, int(SHORTEST / least[name]))
        rounds = 1
        if any(count > 1 for count in calls.values()):  # one short call is no measurement
            least = dict.fromkeys(sides, math.inf)
            rounds = 0
        spent = dict.fromkeys(sides, 0.0)
        collects = gc.isenabled()
        gc.disable()
        try:
            while rounds < max(self._rounds, 1) or sum(spent.values()) < self._seconds:
                still = [name for name in sides if spent[name] < LONGEST]
                if not still:
                    break
                seconds = {}
                for name in still:
                    once = seconds[name] = clock(sides[name], calls[name])
                    least[name] = min(least[name], once)
                    spent[name] += once * calls[name]
                self._last_rounds.append(seconds)
                rounds += 1
        finally:
            if collects:
                gc.enable()
        return least

    def share(self, ours: str, limit: Callable[[Mapping[str, float]], float]) -> float | None:
        """The limit over our time, round by round of the last comparison: the median.

        A shared machine's memory is faster at some times than at others, and a single lucky copy
        would set a limit that nothing else in the run had a chance to meet.

        Args:
            ours: the side.
            limit: from the seconds of all sides in a round to the least seconds possible.
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
        goals: Mapping[str, float] | None = None,
        limit_goal: float | None = None,
    ) -> None:
        """Note a result: our seconds and those of the peers, or why a peer was not run.

        Goals are printed beside the numbers, never asserted: times as fast as each peer, and the
        share of the limit.
        """
        goals = goals or {}
        for peer, theirs in peers.items():
            reason = theirs if isinstance(theirs, str) else None
            seconds = None if isinstance(theirs, str) else theirs
            self._rows.append(
                Row(
                    version=tg.__version__,
                    commit=_commit(),
                    torch=torch.__version__,
                    device=self.device.type,
                    threads=torch.get_num_threads(),
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
                )
            )
            self._beside.append((goals.get(peer), limit_goal, reason))

    def remark(self, text: str) -> None:
        """Something to be printed under the table."""
        self._remarks.append(text)

    def print(self) -> None:
        """One aligned table."""
        threads = torch.get_num_threads()
        lines = []
        last: tuple[object, ...] = ()
        for row, (goal, limit_goal, reason) in zip(self._rows, self._beside, strict=True):
            case = (row.op, row.K, row.model, row.dtype)
            first = case != last  # of the peers of a case
            last = case
            lines.append(
                {
                    "op": row.op if first else None,
                    "K": str(row.K) if first else None,
                    "model": row.model if first else None,
                    "dtype": row.dtype if first else None,
                    "ours µs": _number(row.ours_us) if first else None,
                    "limit µs": _number(row.limit_us) if first else None,
                    "of limit": _number(row.share_of_limit, 2) if first else None,
                    "goal": _number(limit_goal, 2) if first else None,
                    "peer": row.peer,
                    "peer µs": reason or _number(row.peer_us),
                    "times as fast": _number(row.ratio, 1 if (row.ratio or 0) >= 2 else 2),
                    "goal ": _number(goal, 1 if (goal or 0) >= 2 else 2),
                }
            )
        table = Table(
            title=f"{self.name}: {machine(self.device)}, torch {torch.__version__}, "
            f"{threads} thread{'s' * (threads > 1)}",
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        columns = [name for name in lines[0] if any(line[name] for line in lines)]
        for name in columns:
            text = name in ("op", "model", "dtype", "peer")
            table.add_column(name, justify="left" if text else "right", no_wrap=True)
        for line in lines:
            table.add_row(*(line[name] for name in columns))
        console = Console(file=sys.stdout, width=200, highlight=False)
        console.print()
        console.print(table)
        for remark in dict.fromkeys(self._remarks):
            console.print(f"  {remark}", markup=False, soft_wrap=True)

    def save(self) -> Path:
        """Append to ``results/<machine>/<benchmark>.csv``."""
        path = ROOT / "results" / machine(self.device) / f"{self.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(
                file, [field.name for field in fields(Row)], lineterminator="\n"
            )
            if new:
                writer.writeheader()
            for row in self._rows:
                writer.writerow(
                    {
                        name: float(f"{value:.4g}") if isinstance(value, float) else value
                        for name, value in asdict(row).items()
                    }
                )
        return path

    def __bool__(self) -> bool:
        return bool(self._rows)


def machine(device: torch.device) -> str:
    """The model of the processor that the benchmark runs on, fit for a file name."""
    cuda = device.type == "cuda"
    model = torch.cuda.get_device_name(device) if cuda else _cpu_model()
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


def _cpu_model() -> str:
    return _proc("cpuinfo", "model name") or platform.processor() or platform.machine()


def _free_memory() -> float:
    available = _proc("meminfo", "MemAvailable")  # such as "24000000 kB"
    return int(available.split()[0]) * 1024 if available else DEFAULT_ROOM


def _proc(file: str, name: str) -> str:
    """An entry of a file under /proc; empty where there is none."""
    path = Path("/proc") / file
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _wall_seconds(function: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _cuda_seconds(function: Call, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


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


_known_commit: list[str] = []


def _commit() -> str:
    """The commit, once for the whole run; results written meanwhile are no change of the code."""
    if not _known_commit:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
        commit = _git("rev-parse", "--short=12", "HEAD")
        _known_commit.append(f"{commit}-dirty" if commit and changed else commit)
    return _known_commit[0]
