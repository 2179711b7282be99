"""``taskgroup data check`` and ``taskgroup data mini``: data sets on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import rich
import typer

from taskgroup.lab.commands import common

__all__ = ["check", "mini"]


def check(
    root: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of a data set; or qm9, the files of the package qm9pack."
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Only look for missing files; read no file.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of processes that read files.", show_default="one per core"),
    ] = None,
) -> None:
    """Check a data set for missing files and wrong sizes, types and values; exit with 1 if any."""
    from rich.progress import Progress, TaskID

    from taskgroup.lab.commands.tables import check_table
    from taskgroup.lab.data.check import check as check_data
    from taskgroup.lab.data.check import recognise
    from taskgroup.lab.data.qm9_files import csv_folder

    if root == Path("qm9") and not root.exists():
        root = csv_folder()
    console = rich.get_console()
    name = recognise(root)
    with Progress(console=console, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def watch(split: str, done: int, of: int) -> None:
            if split not in bars:
                bars[split] = progress.add_task(split, total=of)
            progress.update(bars[split], completed=done)

        cores = len(os.sched_getaffinity(0)) if workers is None else workers
        checked = list(check_data(root, quick=quick, workers=cores, watch=watch))
    problems = [problem for split in checked for problem in split.problems]
    for problem in problems:
        common.say(problem)
    console.print(check_table(f"{root}: {name}", checked))
    if problems:
        common.say(f"{len(problems)} problems, listed above.")
        raise typer.Exit(1)
    common.say("No listed file is missing." if quick else "All files are well.")
    if fewer := [s for s in checked if s.published is not None and s.listed != s.published]:
        counts = ", ".join(f"{s.split}: {s.listed:,} of {s.published:,}" for s in fewer)
        common.say(f"This is not the whole public release; it lists {counts}.")


def mini(
    name: Annotated[str, typer.Argument(help="nyud-v2, pascal-context or taskonomy.")],
    root: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write to; it must be new or empty.")
    ],
) -> None:
    """Write a tiny data set of one photograph in a public layout, to try a recipe with."""
    from taskgroup.lab.data.mini import write_mini

    write_mini(name, root)
    common.say(f"Twelve small images are in {root}")
    common.say(
        f"Train on them: taskgroup train {name} --data {root} --backbone tiny --size 64x64 "
        "--batches 50 --set lr=1e-3 --set warmup=5"
    )
