"""The command line: ``taskgroup train | evaluate | predict | data | compare | ...``."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any

try:
    import rich
    import typer
    from rich.markup import escape
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit(
        f"The command line of taskgroup needs {error.name}; "
        "install it with: pip install 'taskgroup[train]' (python -m taskgroup runs without)"
    ) from None

__all__ = ["app"]

# Options of several commands.
Data = Annotated[str | None, typer.Option(metavar="DIR", help="Where the data set is, if on disk.")]
Backbone = Annotated[
    str | None, typer.Option(help="vit-t to vit-l, ...; tiny: random and small, no download.")
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="What the network sees, pixels.")]


class _Verbatim(TyperGroup):
    """Commands whose help is shown as it is written: rich takes what is in brackets for markup."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # A group in this one has done its own already.
        commands = [c for c in self.commands.values() if not isinstance(c, TyperGroup)]
        for shown in [self, *commands]:
            shown.help, shown.short_help = _escaped(shown.help), _escaped(shown.short_help)
            for parameter in shown.params:
                parameter.help = _escaped(parameter.help)  # type: ignore[attr-defined]


def _escaped(text: str | None) -> str | None:
    return None if text is None else escape(text)


app = typer.Typer(
    cls=_Verbatim,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Selective task group updates for multi-task learning.",
)


data_app = typer.Typer(
    cls=_Verbatim, no_args_is_help=True, help="Check a data set, or write a tiny one."
)
app.add_typer(data_app, name="data")


@app.callback()
def main() -> None:
    """Selective task group updates for multi-task learning."""


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe that ships with taskgroup, or a YAML file.")
    ] = "motorcycle",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="selective, joint, or another by its name.")
    ] = None,
    grouping: Annotated[
        str | None,
        typer.Option(help="affinity-propagation, heterogeneous, random:M, graph-coloring, ..."),
    ] = None,
    batches: Annotated[int | None, typer.Option(help="Length of the run.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the weights, the crops and the order of groups.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run; new or empty.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="RUN|FILE", help="A finished run to compute Δm against, or YAML."),
    ] = None,
    data: Data = None,
    backbone: Backbone = None,
    size: Size = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")
    ] = None,
) -> None:
    """Train on a recipe; Ctrl-C leaves a checkpoint to go on from."""
    options = {
        "method": method,
        "grouping": grouping,
        "batches": batches,
        "seed": seed,
        "baseline": baseline,
        "root": _absolute(data),
        "backbone": backbone,
        "size": size,
    }
    given = _given(**options)
    with _errors_in_words():
        others = given.keys() - {"root", "baseline"}
        if resume is not None and (others or out or recipe != "motorcycle"):
            raise ValueError(
                "--resume goes on with the settings of the run; give no other option with it but "
                "--data, if the data moved, and --set for what does not change the training."
            )
        _train(recipe, given, set_ or [], out, resume)


@app.command()
def compare(
    recipe: Annotated[
        str, typer.Argument(help="A recipe that ships with taskgroup, or a YAML file.")
    ] = "motorcycle-small",
    preset: Annotated[
        str, typer.Option(help="What to compare: methods, or one of the ablations: grouping, ...")
    ] = "methods",
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Some of the preset's methods alone.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 5,
    batches: Annotated[int | None, typer.Option(help="Length of the runs.")] = None,
    budgets: Annotated[
        str, typer.Option(metavar="A,B,...", help="Of batches, time and tuned.")
    ] = "batches,time,tuned",
    rates: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="To choose the best of [recipe's, a third, 3 times]."),
    ] = None,
    data: Data = None,
    backbone: Backbone = None,
    size: Size = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes [one per core; GPU: 1].")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder; goes on with what it holds.")
    ] = None,
) -> None:
    """Compare methods over seeds, at equal batches and at equal time; stopped, it goes on."""
    given = _given(batches=batches, root=_absolute(data), backbone=backbone, size=size)
    with _errors_in_words():
        _compare(
            recipe, preset, _words(methods), seeds, given, _words(budgets) or [], _words(rates),
            set_ or [], jobs, out,
        )  # fmt: skip


@app.command()
def affinity_gain(
    recipe: Annotated[
        str, typer.Argument(help="A recipe that ships with taskgroup, or a YAML file.")
    ] = "yeast",
    seeds: Annotated[int, typer.Option(help="Runs of each pair, and of each affinity.")] = 5,
    batches: Annotated[int | None, typer.Option(help="Length of the runs.")] = None,
    data: Data = None,
    backbone: Backbone = None,
    size: Size = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes [one per core; GPU: 1].")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder; goes on with what it holds.")
    ] = None,
) -> None:
    """Train all pairs of tasks, and say whether affinities foretold what they gain."""
    given = _given(batches=batches, root=_absolute(data), backbone=backbone, size=size)
    with _errors_in_words():
        _affinity_gain(recipe, seeds, given, set_ or [], jobs, out)


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    split: Annotated[
        str, typer.Option(help="held_out, validation, or train, of which it is some images.")
    ] = "held_out",
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the data is now, if it moved.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As device=cpu, bad=skip, workers=4."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN|FILE", help="To compute Δm against.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all metrics as YAML, to be a baseline."),
    ] = None,
) -> None:
    """Evaluate what runs have trained, finished or not, from their last checkpoint."""
    with _errors_in_words():
        _evaluate(runs, split, _absolute(data), set_ or [], baseline, save)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Of any size.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the panels [RUN/predictions].")
    ] = None,
) -> None:
    """Draw what a run predicts for images: a panel of all tasks for each."""
    with _errors_in_words():
        _predict(run, images, out or run / "predictions")


@app.command()
def figures(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    pair: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks whose affinity is drawn.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the pictures.")] = Path(
        "figures"
    ),
) -> None:
    """Draw the paper's figures: time per batch, grouping, affinity over time."""
    with _errors_in_words():
        _figures(runs, _words(pair), out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The HTML file [RUN/report.html; of several here]."),
    ] = None,
) -> None:
    """Write an HTML page on runs, finished or training: affinity, groups, losses, time, ..."""
    with _errors_in_words():
        _report(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html")


@app.command()
def doctor() -> None:
    """Say what is installed, what runs here, and why the rest does not; status 1 if broken."""
    program = importlib.import_module("taskgroup.__main__")  # python -m taskgroup
    raise typer.Exit(program.main())


@data_app.command()
def check(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a data set.")],
    quick: Annotated[bool, typer.Option("--quick", help="Compare names, read nothing.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that read [one per core].")] = None,
) -> None:
    """Check a data set: missing files, wrong sizes, types and values; status 1 if any."""
    with _errors_in_words():
        _check(root, quick, workers)


@data_app.command()
def mini(
    name: Annotated[str, typer.Argument(help="nyud-v2, pascal-context or taskonomy.")],
    root: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty.")],
) -> None:
    """Write a tiny data set in a public layout, of the photograph, to try recipes with."""
    with _errors_in_words():
        from taskgroup.lab.data.mini import write_mini

        write_mini(name, root)
        _say_where("Twelve small images", root)
        command = (
            f"taskgroup train {name} --data {root} --backbone tiny --size 64x64 --batches 50 "
            "--set lr=1e-3 --set warmup=5"
        )
        rich.get_console().print(
            f"Train on them: {command}", soft_wrap=True, markup=False, highlight=False
        )


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """What went wrong as one sentence, and exit status 2."""
    try:
        yield
    except typer.Exit:  # a RuntimeError too
        raise
    except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
        # Escaped: what stands in brackets, as in taskgroup[train], is no markup.
        rich.get_console().print(f"[bold red]taskgroup:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _absolute(folder: str | None) -> str | None:
    """A folder as it is called from everywhere."""
    return None if folder is None else str(Path(folder).absolute())


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _train(
    recipe: str, options: dict[str, Any], changes: list[str], out: Path | None, resume: Path | None
) -> None:
    from taskgroup.lab.report.live import Display
    from taskgroup.lab.report.tables import summary_table
    from taskgroup.lab.train.recipe import parse_changes, read_recipe
    from taskgroup.lab.train.run import Interrupted, Run

    console = rich.get_console()
    if resume is not None:
        run = Run.resume(resume, {**parse_changes(changes), **options})
    else:
        settings = read_recipe(recipe, {**parse_changes(changes), **options})
        name = f"{Path(recipe).stem}-{settings.method}-{settings.seed}"
        run = Run(settings, out or _free(Path("runs") / name))
    titles = dict(run.trainer.problem.titles)
    try:
        with Display(str(run.out), titles, console) as display:
            summary = run.train(display.update)
    except Interrupted as stopped:
        console.print(str(stopped), soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    console.print(summary_table(summary, titles))
    _say_where("Pictures and numbers", run.out)
    page = f"As a page for a browser: taskgroup report {shlex.quote(str(run.out))}"
    console.print(page, soft_wrap=True, markup=False, highlight=False)


def _compare(
    recipe: str,
    preset_name: str,
    methods: list[str] | None,
    seeds: int,
    options: dict[str, Any],
    budgets: list[str],
    rates: list[str] | None,
    changes: list[str],
    jobs: int | None,
    out: Path | None,
) -> None:
    from taskgroup.lab.compare import comparison_report as report
    from taskgroup.lab.compare.comparison import Comparison
    from taskgroup.lab.compare.presets import JOINT, preset, variants_by_name
    from taskgroup.lab.compare.progress import ComparisonDisplay
    from taskgroup.lab.train.recipe import make_problem, parse_changes, read_recipe
    from taskgroup.lab.train.trainer import task_names

    console = rich.get_console()
    settings = read_recipe(recipe, {**parse_changes(changes), **options})
    variants = preset(preset_name, settings, task_names(settings, make_problem(settings)))
    if methods is not None:
        variants = variants_by_name([JOINT, *methods], variants)
    try:
        tried = [float(rate) for rate in rates or []]
    except ValueError:
        raise ValueError(f"--rates takes numbers, got {', '.join(rates or [])}.") from None
    comparison = Comparison(
        settings,
        variants,
        seeds,
        out or Path("runs") / f"compare-{Path(recipe).stem}",
        budgets=budgets,
        rates=tried or [settings.lr / 3, settings.lr, 3 * settings.lr],
        strict=methods is not None,
    )
    titles = {variant.name: variant.title for variant in comparison.variants}
    display = ComparisonDisplay(str(comparison.out), titles, console, comparison.delta)
    with _stoppable(), display:
        table = comparison.run(display.update, jobs)
    for shown in report.tables(table):
        console.print(shown)
    _write(comparison.out / f"{preset_name}.md", report.markdown(table, _command()))
    report.write_csv(table, comparison.out / f"{preset_name}.csv")
    report.delta_m_plot(table, comparison.out / f"{preset_name}.png")
    _say_where(f"Tables and picture ({preset_name}.md, .csv and .png)", comparison.out)
    if table.failed:
        raise RuntimeError(
            f"{len(table.failed)} runs failed and are missing above; the same command runs them "
            f"again. The first: {table.failed[0]}"
        )


def _affinity_gain(
    recipe: str,
    seeds: int,
    options: dict[str, Any],
    changes: list[str],
    jobs: int | None,
    out: Path | None,
) -> None:
    from taskgroup.lab.compare import affinity_gain_report as report
    from taskgroup.lab.compare.affinity_gain import AFFINITIES, AffinityGain
    from taskgroup.lab.compare.progress import ComparisonDisplay
    from taskgroup.lab.train.recipe import parse_changes, read_recipe

    console = rich.get_console()
    settings = read_recipe(recipe, {**parse_changes(changes), **options})
    measured = AffinityGain(
        settings, seeds, out or Path("runs") / f"affinity-gain-{Path(recipe).stem}"
    )
    with _stoppable(), ComparisonDisplay(str(measured.out), AFFINITIES, console) as display:
        gains = measured.run(display.update, jobs)
    for shown in report.tables(gains):
        console.print(shown)
    _write(measured.out / "gains.md", report.markdown(gains, _command()))
    report.write_csv(gains, measured.out / "gains.csv")
    report.affinity_gain_plot(gains, measured.out / "gains.png")
    _say_where("Tables and picture", measured.out)


def _evaluate(
    runs: list[Path],
    split: str,
    root: str | None,
    given: list[str],
    baseline: str | None,
    save: Path | None,
) -> None:
    import yaml

    from taskgroup.lab.report.tables import evaluation_table
    from taskgroup.lab.train.evaluation import delta_m, load_trained, read_baseline
    from taskgroup.lab.train.recipe import parse_changes

    console = rich.get_console()
    changes = parse_changes(given) | ({} if root is None else {"root": root})
    against: dict[Path, dict[str, float]] = {}
    of_run: dict[str, Path] = {}
    for run in runs:  # what is wrong is said before the first evaluation, which may take long
        trained = load_trained(run, changes)
        if split not in trained.problem.splits:
            raise ValueError(
                f"{trained.recipe.data} has no split {split}; it has "
                f"{', '.join(trained.problem.splits)}."
            )
        tasks = list(trained.model.heads)
        if baseline is not None:
            against[run] = read_baseline(baseline, tasks)
        if save is not None and (twice := [task for task in tasks if task in of_run]):
            raise ValueError(
                f"{run} has a metric of {', '.join(twice)}, and so has {of_run[twice[0]]}; --save "
                "takes one of each, as of single-task runs."
            )
        of_run |= dict.fromkeys(tasks, run)
    if save is not None and not save.parent.is_dir():
        raise ValueError(f"{save.parent} is no folder to write {save.name} to.")
    saved: dict[str, float] = {}
    for run in runs:
        trained = load_trained(run, changes)
        problem = trained.problem
        metrics = problem.evaluate(trained.model, split)
        delta = delta_m(metrics, against[run], problem) if run in against else None
        saved |= metrics
        title = f"{run}, {trained.batch} batches, {split}"
        console.print(evaluation_table(title, metrics, problem, baseline, delta))
        if save is not None:
            _write(save, yaml.safe_dump(saved, sort_keys=False))
    if save is not None:
        _say_where("The metrics", save)


def _predict(run: Path, images: list[Path], out: Path) -> None:
    from taskgroup.lab.train.evaluation import load_trained

    trained = load_trained(run, {"device": "auto"})  # which need not be what it was trained on
    out.mkdir(parents=True, exist_ok=True)
    taken: dict[str, Path] = {}
    for image in images:
        name = f"{image.stem}.png"
        if name in taken:
            raise ValueError(f"{image} and {taken[name]} would both be drawn to {out / name}.")
        taken[name] = image
    for name, image in taken.items():
        trained.problem.predict(trained.model, image, out / name)
    _say_where("Panels of all tasks", out)


def _figures(runs: list[Path], pair: list[str] | None, out: Path) -> None:
    from taskgroup.lab.report.matplotlib_figures import figures as draw
    from taskgroup.lab.report.run_data import load_runs

    if pair is not None and len(pair) != 2:
        raise ValueError(f"--pair takes two tasks, got {', '.join(pair) or 'none'}.")
    found, left_out = load_runs(runs)
    written, notes = draw(found, out, None if pair is None else (pair[0], pair[1]))
    for note in [*left_out, *notes]:
        rich.get_console().print(note, soft_wrap=True, markup=False, highlight=False)
    _say_where(", ".join(path.name for path in written) or "No pictures", out)


def _report(runs: list[Path], out: Path) -> None:
    from taskgroup.lab.report.page import write_report
    from taskgroup.lab.report.run_data import load_runs

    if out.is_dir():
        raise ValueError(f"{out} is a folder; name the HTML file with --out.")
    console = rich.get_console()
    found, left_out = load_runs(runs)
    for note in write_report(found, out, left_out):
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    console.print(f"The report is {out}", soft_wrap=True, markup=False, highlight=False)


def _check(root: Path, quick: bool, workers: int | None) -> None:
    import os

    from rich.progress import Progress

    from taskgroup.lab.data.check import check as check_data
    from taskgroup.lab.data.check import recognise
    from taskgroup.lab.report.tables import check_table

    console = rich.get_console()
    name = recognise(root)
    with Progress(console=console, transient=True) as progress:
        bars: dict[str, Any] = {}

        def watch(split: str, done: int, of: int) -> None:
            if split not in bars:
                bars[split] = progress.add_task(split, total=of)
            progress.update(bars[split], completed=done)

        cores = len(os.sched_getaffinity(0)) if workers is None else workers
        checked = list(check_data(root, quick=quick, workers=cores, watch=watch))
    for split in checked:
        for problem in split.problems:
            console.print(problem, soft_wrap=True, markup=False, highlight=False)
    console.print(check_table(f"{root}: {name}", checked))
    n_problems = sum(len(split.problems) for split in checked)
    if n_problems:
        console.print(f"{n_problems} problems, listed above.", highlight=False)
        raise typer.Exit(1)
    console.print("Every file that is listed is there." if quick else "All files are well.")
    if fewer := [s for s in checked if s.published is not None and s.listed != s.published]:
        counts = ", ".join(f"{s.split}: {s.listed:,} of {s.published:,}" for s in fewer)
        console.print(f"Not the public release: it lists {counts}.", highlight=False)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C ends with a word on how to go on, and exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        rich.get_console().print(
            "Stopped; finished runs are kept. The same command goes on.", soft_wrap=True
        )
        raise typer.Exit(130) from None


def _command() -> str:
    """What was typed."""
    return shlex.join(["taskgroup", *sys.argv[1:]])


def _write(path: Path, text: str) -> None:
    """Whole or not at all: what was there before may be of hours."""
    import taskgroup as tg

    tg.checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def _say_where(what: str, folder: Path) -> None:
    rich.get_console().print(
        f"{what} are in {folder}", soft_wrap=True, highlight=False, markup=False
    )


def _free(folder: Path) -> Path:
    """The folder, or with the first number behind its name that is not taken."""
    if not folder.exists():
        return folder
    return next(numbered for n in count(2) if not (numbered := Path(f"{folder}-{n}")).exists())


if __name__ == "__main__":
    app()
