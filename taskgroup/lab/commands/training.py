"""``taskgroup train``, ``evaluate`` and ``predict``: train a network, and use what was trained."""

from __future__ import annotations

import shlex
from itertools import count
from pathlib import Path
from typing import Annotated

import rich
import typer

import taskgroup as tg
from taskgroup.lab.commands import common

__all__ = ["evaluate", "predict", "train"]

_DEFAULT = "motorcycle"


def train(
    recipe: common.RecipeName = _DEFAULT,
    set_: common.Changes = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"Training method: selective, joint, {', '.join(tg.methods.METHODS)}."),
    ] = None,
    grouping: Annotated[
        str | None,
        typer.Option(
            help="How groups are formed: affinity-propagation, graph-coloring, heterogeneous, "
            "random:M, ..."
        ),
    ] = None,
    batches: common.Batches = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the weights, the crops and the order of the groups.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run; it must be new or empty.")
    ] = None,
    baseline: common.Baseline = None,
    data: common.Data = None,
    backbone: common.Backbone = None,
    size: common.Size = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Continue a run that was stopped.")
    ] = None,
) -> None:
    """Train a network on a recipe; Ctrl-C saves a checkpoint from which --resume continues."""
    options = common.given(
        method=method, grouping=grouping, batches=batches, seed=seed, baseline=baseline, root=data,
        backbone=backbone, size=size,
    )  # fmt: skip
    if resume is not None and (out or recipe != _DEFAULT or options.keys() - {"root", "baseline"}):
        raise ValueError(
            "--resume continues with the settings of the run; give no other option with it but "
            "--data, if the data moved, --baseline, and --set for settings that do not change the "
            "training."
        )
    from taskgroup.lab.commands.tables import summary_table
    from taskgroup.lab.recipe import is_own, parse_changes
    from taskgroup.lab.report.live import Display
    from taskgroup.lab.report.matplotlib_figures import draw_run
    from taskgroup.lab.train.rehearsal import rehearse
    from taskgroup.lab.train.run import Interrupted, Run

    if resume is not None:
        run = Run.resume(resume, {**parse_changes(set_ or []), **options})
    else:
        chosen = common.settings(recipe, set_, **options)
        if is_own(chosen.data):
            common.say(f"Checking {chosen.data} on one batch")
            rehearse(chosen)
        name = f"{common.label(recipe)}-{chosen.method}-{chosen.seed}"
        run = Run(chosen, out or _free(Path("runs") / name))
    console = rich.get_console()
    titles = dict(run.trainer.problem.titles)
    try:
        with Display(str(run.out), titles, console) as display:
            summary = run.train(display.update)
    except Interrupted as stopped:
        common.stop(str(stopped))
    draw_run(run)
    console.print(summary_table(summary, titles))
    common.say(f"Pictures and numbers are in {run.out}")
    common.say(f"For a page to open in a browser: taskgroup report {shlex.quote(str(run.out))}")


def evaluate(
    runs: common.RunFolders,
    split: Annotated[
        str, typer.Option(help="held_out, validation, or train (some of its images).")
    ] = "held_out",
    data: common.Data = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting for the evaluation: device=cpu, bad=skip, workers=4, ...",
        ),
    ] = None,
    baseline: common.Baseline = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all metrics to a YAML file, for --baseline."),
    ] = None,
) -> None:
    """Evaluate the last checkpoint of each run, whether the run is finished or not."""
    import yaml

    import taskgroup as tg
    from taskgroup.lab.commands.tables import evaluation_table
    from taskgroup.lab.problem import measure
    from taskgroup.lab.recipe import parse_changes
    from taskgroup.lab.train.evaluation import delta_m, load_trained, read_baseline
    from taskgroup.lab.train.trainer import task_names

    changes = parse_changes(set_ or []) | common.given(root=data)
    against: dict[Path, dict[str, float]] = {}
    of_run: dict[str, Path] = {}
    for run in runs:  # report all mistakes before the first evaluation, which may take long
        trained = load_trained(run, changes)
        if split not in trained.problem.splits:
            raise ValueError(
                f"{trained.recipe.data} has no split {split}; it has "
                f"{', '.join(trained.problem.splits)}."
            )
        tasks = task_names(trained.recipe, trained.problem)
        if baseline is not None:
            against[run] = read_baseline(baseline, tasks)
        if save is not None and (twice := [task for task in tasks if task in of_run]):
            raise ValueError(
                f"{run} has a metric of {', '.join(twice)}, and so has {of_run[twice[0]]}; --save "
                "takes one metric per task, as single-task runs give."
            )
        of_run |= dict.fromkeys(tasks, run)
    if save is not None and not save.parent.is_dir():
        raise ValueError(f"There is no folder {save.parent} to write {save.name} to.")
    saved: dict[str, float] = {}
    for run in runs:
        trained = load_trained(run, changes)
        problem = trained.problem
        tasks = task_names(trained.recipe, problem)
        metrics = measure(problem, trained.model, tasks, split)
        delta = delta_m(metrics, against[run], problem) if run in against else None
        saved |= metrics
        title = f"{run}, {trained.batch} batches, {split}"
        rich.get_console().print(evaluation_table(title, metrics, problem, baseline, delta))
        if save is not None:
            tg.recording.write_text(save, yaml.safe_dump(saved, sort_keys=False))
    if save is not None:
        common.say(f"The metrics are in {save}")


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files of any size.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder for the pictures.", show_default="RUN/predictions"
        ),
    ] = None,
) -> None:
    """Draw what a run predicts for images: one picture per image, with a panel per task."""
    from taskgroup.lab.train.evaluation import load_trained

    trained = load_trained(run, {"device": "auto"})  # which need not be what it was trained on
    out = out or run / "predictions"
    out.mkdir(parents=True, exist_ok=True)
    taken: dict[str, Path] = {}
    for image in images:
        name = f"{image.stem}.png"
        if name in taken:
            raise ValueError(f"{image} and {taken[name]} would both be drawn to {out / name}.")
        taken[name] = image
    for name, image in taken.items():
        trained.problem.predict(trained.model, image, out / name)
    common.say(f"Panels of all tasks are in {out}")


def _free(folder: Path) -> Path:
    """The folder, with the first free number from 2 behind its name if it exists."""
    if not folder.exists():
        return folder
    return next(numbered for n in count(2) if not (numbered := Path(f"{folder}-{n}")).exists())
