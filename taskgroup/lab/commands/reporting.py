"""``taskgroup figures`` and ``report``: draw what runs recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taskgroup.lab.commands import common

__all__ = ["figures", "report"]


def figures(
    runs: common.RunFolders,
    pair: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="The two tasks whose affinity is drawn over time."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures.")] = Path(
        "figures"
    ),
) -> None:
    """Draw the paper's figures: time per batch, groups, and affinity over time."""
    from taskgroup.lab.report.matplotlib_figures import figures as draw
    from taskgroup.lab.report.run_data import load_runs

    tasks = None if pair is None else common.split(pair)
    if tasks is not None and len(tasks) != 2:
        raise ValueError(f"--pair takes two tasks, got {', '.join(tasks) or 'none'}.")
    found, left_out = load_runs(runs)
    written, notes = draw(found, out, None if tasks is None else (tasks[0], tasks[1]))
    for note in [*left_out, *notes]:
        common.say(note)
    common.say(f"{', '.join(path.name for path in written) or 'No pictures'} are in {out}")


def report(
    runs: common.RunFolders,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The HTML file to write.",
            show_default="RUN/report.html; for several runs ./report.html",
        ),
    ] = None,
) -> None:
    """Write an HTML page about runs, finished or not: affinity, groups, losses, time, ..."""
    from taskgroup.lab.report.page import write_report
    from taskgroup.lab.report.run_data import load_runs

    out = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the HTML file with --out.")
    found, left_out = load_runs(runs)
    for note in write_report(found, out, left_out):
        common.say(note)
    common.say(f"The report is {out}")
