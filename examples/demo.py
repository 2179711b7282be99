"""Joint and selective training on the embedded photograph, side by side: ``make demo``.

Trains the same network on the same crops three times: jointly, selectively for the same number of
batches, and jointly for as many optimizer steps as the selective run took. Then it prints a table.
"""

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
from taskgroup.lab.vision import TASKONOMY

OUT = Path("runs/demo")
TITLES = {task.name: task.title for task in TASKONOMY.values()}
console = Console()


def train(name, **settings):
    run = Run(read_recipe("motorcycle", settings), OUT / name)
    with Display(name, TITLES, console) as display:
        summary = run.train(display.update)
    draw_run(run)
    return summary


def main():
    recipe = read_recipe("motorcycle")
    if OUT.exists():
        shutil.rmtree(OUT)
    console.print(
        "Learning all eleven Taskonomy tasks from one photograph, three times.\n", style="bold"
    )
    names = ("joint", "selective", "joint-as-many-steps")
    joint = train("joint", method="joint")
    # Found by `taskgroup compare motorcycle-small --preset heads`: docs/results/README.md.
    selective = train("selective", baseline=str(OUT / "joint"), head_lr_times="K")
    joint_long = train("joint-as-many-steps", method="joint", batches=selective["steps"])
    runs = {
        "joint,\nequal batches": joint,
        "selective": selective,
        "joint,\nequal steps": joint_long,
    }

    table = Table(title="\nHeld-out error of each task (lower is better)", title_justify="left")
    table.add_column()
    for name in runs:
        table.add_column(name, justify="right")
    for task, title in TITLES.items():
        values = [run["metrics"][task] for run in runs.values()]
        shown = [f"{value:.4f}" for value in values]
        shown[values.index(min(values))] = f"[bold green]{min(values):.4f}[/]"
        table.add_row(title, *shown)
    table.add_section()
    gains = [
        tg.delta_m(selective["metrics"], other["metrics"], set(TITLES))
        for other in (joint, joint_long)
    ]
    table.add_row("Δm of selective against it", f"{gains[0]:+.1f} %", "", f"{gains[1]:+.1f} %")
    table.add_row("Batches", *(str(run["batches"]) for run in runs.values()))
    table.add_row("Optimizer steps", *(str(run["steps"]) for run in runs.values()))
    table.add_row(
        "Seconds per batch", *(f"{run['seconds_per_batch']:.3f}" for run in runs.values())
    )
    table.add_row(
        "Time outside the model",
        *(f"{100 * run['share_outside_model']:.1f} %" for run in runs.values()),
    )
    console.print(table)
    console.print(f"Groups at the end: {groups_line(selective['partition'], TITLES)}.")
    console.print(
        f"The learning rate is {recipe.lr:g}; in the selective run it is {len(TITLES)} times that "
        f"for heads. Heads outside the group: {recipe.outside}. "
        "Both settings help selective updates, not joint training (see docs/results)."
    )
    console.print(
        "This is one seed on one scene. Another seed gives other numbers, maybe with another sign."
    )
    write_report([load_run_data(OUT / name) for name in names], OUT / "report.html")
    console.print(f"\nReport on the three runs, for a browser: {OUT / 'report.html'}")
    console.print(f"Pictures are in {OUT / 'selective'}")


if __name__ == "__main__":
    main()
