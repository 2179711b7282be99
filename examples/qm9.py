"""Joint and selective training on the molecules of QM9, side by side: ``make demo-qm9``.

Trains the same network with heavy heads three times for the same number of batches: jointly,
jointly with the weights of UW, and selectively, observed in every tenth batch. Then it prints a
table and writes a report.
"""

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import taskgroup as tg
from taskgroup.lab.commands.tables import groups_line
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.report.live import Display
from taskgroup.lab.report.matplotlib_figures import draw_run
from taskgroup.lab.report.page import write_report
from taskgroup.lab.report.run_data import load_run_data
from taskgroup.lab.train.run import Run

RUNS = {
    "joint": {"method": "joint"},
    "joint-uw": {"method": "uw"},
    "selective": {"method": "selective"},
}


def train(out, settings, console):
    run = Run(read_recipe("qm9-heavy", settings), out)
    titles = dict(run.trainer.problem.titles)
    with Display(out.name, titles, console) as display:
        summary = run.train(display.update)
    draw_run(run)
    return summary, titles


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--data", help="folder of the CSV files, if they are not those of qm9pack")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-qm9"))
    options = parser.parse_args(arguments)
    console = Console()
    if options.out.exists():
        shutil.rmtree(options.out)
    console.print("Learning eleven properties of molecules, three times.\n", style="bold")
    runs = {}
    for name, settings in RUNS.items():
        common = {"batches": options.batches, "root": options.data}
        try:
            runs[name], titles = train(options.out / name, {**settings, **common}, console)
        except (ImportError, ValueError) as error:  # qm9pack, or its files, are not there
            raise SystemExit(str(error)) from None

    joint = runs["joint"]
    table = Table(title="\nHeld-out error of each task (lower is better)", title_justify="left")
    table.add_column()
    for name in RUNS:
        table.add_column(name, justify="right")
    for task, title in titles.items():
        values = [run["metrics"][task] for run in runs.values()]
        shown = [f"{value:.4g}" for value in values]
        shown[values.index(min(values))] = f"[bold green]{min(values):.4g}[/]"
        table.add_row(f"{title}, {joint['metric'][task]}", *shown)
    table.add_section()
    gains = [tg.delta_m(run["metrics"], joint["metrics"], set(titles)) for run in runs.values()]
    table.add_row("Mean gain over joint training", *(f"{gain:+.1f} %" for gain in gains))
    table.add_row("Optimizer steps", *(f"{run['steps']:,}" for run in runs.values()))
    table.add_row(
        "Seconds per batch", *(f"{run['seconds_per_batch']:.3f}" for run in runs.values())
    )
    console.print(table)
    partition = runs["selective"]["partition"]
    console.print(f"Groups at the end: {groups_line(partition, titles)}.")
    times = runs["selective"]["seconds_per_batch"] / joint["seconds_per_batch"]
    console.print(
        f"A selective batch took {times:.1f} times as long as a joint one: in the same time, joint "
        f"training does {times * options.batches:,.0f} batches. This is one seed; another gives "
        "other numbers."
    )
    write_report([load_run_data(options.out / name) for name in RUNS], options.out / "report.html")
    console.print(f"\nReport on the three runs, for a browser: {options.out / 'report.html'}")


if __name__ == "__main__":
    main()
