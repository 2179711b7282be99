"""``taskgroup compare``, ``affinity-gain``, ``head-share``: many runs that answer one question."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import rich
import typer

from taskgroup.lab.commands import common

if TYPE_CHECKING:
    from taskgroup.lab.recipe import Recipe

__all__ = ["affinity_gain", "compare", "head_share"]

_Number = TypeVar("_Number", int, float)

Jobs = Annotated[
    int | None,
    typer.Option(
        help="Number of processes on this machine.", show_default="one per GPU, or else per core"
    ),
]
Dask = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|FILE",
        help="Train on a dask cluster instead: the address of its scheduler, or its scheduler "
        "file.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of the results; runs that it already holds are not repeated."
    ),
]


def compare(
    recipe: common.RecipeName = "motorcycle-small",
    preset: Annotated[
        str,
        typer.Option(
            help="What to compare: methods, or an ablation: grouping, heads, preference, decay, "
            "batch-size, warmup, cheap, shared-state, three-tasks."
        ),
    ] = "methods",
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Only these methods of the preset.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of runs of each method.")] = 5,
    batches: common.Batches = None,
    budgets: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Which comparisons to make: at equal batches, at equal time, and with a learning "
            "rate (and batch size) tuned for each method.",
        ),
    ] = "batches,time,tuned",
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Learning rates to choose from when tuning.",
            show_default="a third of the recipe's, the recipe's, 3 times the recipe's",
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Batch sizes to choose from when tuning, each with every rate, at equal time.",
            show_default="the recipe's alone",
        ),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Tune these methods and joint training alone.",
            show_default="all",
        ),
    ] = None,
    data: common.Data = None,
    backbone: common.Backbone = None,
    size: common.Size = None,
    set_: common.Changes = None,
    jobs: Jobs = None,
    dask: Dask = None,
    out: Out = None,
) -> None:
    """Compare methods over seeds, at equal batches and equal time; run it again to continue."""
    import taskgroup as tg
    from taskgroup.lab.problem import make_problem
    from taskgroup.lab.recipe import is_own
    from taskgroup.lab.studies import comparison_report as report
    from taskgroup.lab.studies.comparison import Comparison
    from taskgroup.lab.studies.comparison_display import ComparisonDisplay
    from taskgroup.lab.studies.comparison_plot import delta_m_plot
    from taskgroup.lab.studies.presets import JOINT, variants_by_name
    from taskgroup.lab.studies.presets import preset as variants_of
    from taskgroup.lab.train.trainer import task_names

    options = {"batches": batches, "root": data, "backbone": backbone, "size": size}
    chosen = common.settings(recipe, set_, **options)
    _check(chosen, jobs, dask)
    variants = variants_of(preset, chosen, task_names(chosen, make_problem(chosen)))
    if methods is not None:
        variants = variants_by_name([JOINT, *common.split(methods)], variants)
    numbers = _numbers("--rates takes numbers", rates, float)
    if is_own(chosen.data):
        common.say(f"Checking {chosen.data} on one batch of every method")
    comparison = Comparison(
        chosen,
        variants,
        seeds,
        out or Path("runs") / f"compare-{common.label(recipe)}",
        budgets=common.split(budgets),
        rates=numbers or [chosen.lr / 3, chosen.lr, 3 * chosen.lr],
        batch_sizes=_numbers("--batch-sizes takes whole numbers", batch_sizes, int),
        tune=None if tune is None else common.split(tune),
        strict=methods is not None,
    )
    console = rich.get_console()
    titles = {variant.name: variant.title for variant in comparison.variants}
    display = ComparisonDisplay(str(comparison.out), titles, console, comparison.delta)
    with _stoppable(), _executor(dask, chosen) as executor, display:
        table = comparison.run(display.update, jobs, executor)
    for shown in report.tables(table):
        console.print(shown)
    tg.recording.write_text(comparison.out / f"{preset}.md", report.markdown(table, _command()))
    report.write_csv(table, comparison.out / f"{preset}.csv")
    delta_m_plot(table, comparison.out / f"{preset}.png")
    common.say(f"Tables and picture ({preset}.md, .csv and .png) are in {comparison.out}")
    if table.failed:
        raise RuntimeError(
            f"{len(table.failed)} runs failed and are missing above; the same command runs them "
            f"again. The first error: {table.failed[0]}"
        )


def affinity_gain(
    recipe: common.RecipeName = "yeast",
    seeds: Annotated[
        int, typer.Option(help="Number of runs of each pair and of each affinity.")
    ] = 5,
    batches: common.Batches = None,
    data: common.Data = None,
    backbone: common.Backbone = None,
    size: common.Size = None,
    set_: common.Changes = None,
    jobs: Jobs = None,
    dask: Dask = None,
    out: Out = None,
) -> None:
    """Train every pair of tasks, and test whether affinities predict what the tasks gain."""
    import taskgroup as tg
    from taskgroup.lab.studies import affinity_gain_report as report
    from taskgroup.lab.studies.affinity_gain import AFFINITIES, AffinityGain
    from taskgroup.lab.studies.comparison_display import ComparisonDisplay

    options = {"batches": batches, "root": data, "backbone": backbone, "size": size}
    chosen = common.settings(recipe, set_, **options)
    _check(chosen, jobs, dask)
    measured = AffinityGain(
        chosen,
        seeds,
        out or Path("runs") / f"affinity-gain-{common.label(recipe)}",
    )
    console = rich.get_console()
    display = ComparisonDisplay(str(measured.out), AFFINITIES, console)
    with _stoppable(), _executor(dask, chosen) as executor, display:
        gains = measured.run(display.update, jobs, executor)
    for shown in report.tables(gains):
        console.print(shown)
    tg.recording.write_text(measured.out / "gains.md", report.markdown(gains, _command()))
    report.write_csv(gains, measured.out / "gains.csv")
    report.affinity_gain_plot(gains, measured.out / "gains.png")
    common.say(f"Tables and picture (gains.md, .csv and .png) are in {measured.out}")


def head_share(
    recipe: common.RecipeName = "qm9",
    seeds: Annotated[
        int, typer.Option(help="Number of runs of each kind of training at each point.")
    ] = 5,
    batches: common.Batches = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="A network to measure, by the settings that make its heads, such as "
            "head_depth=2,head_width=256; give two or more.",
            show_default="those that ship for the data set",
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="Folder of a finished study, to be shown beside this one."
        ),
    ] = None,
    data: common.Data = None,
    backbone: common.Backbone = None,
    size: common.Size = None,
    set_: common.Changes = None,
    jobs: Jobs = None,
    dask: Dask = None,
    out: Out = None,
) -> None:
    """Find out from which share of the heads on group steps gain at equal time."""
    import taskgroup as tg
    from taskgroup.lab.studies import head_share_report as report
    from taskgroup.lab.studies.comparison_display import ComparisonDisplay
    from taskgroup.lab.studies.head_share import HeadShare
    from taskgroup.lab.studies.head_share_points import parse_point
    from taskgroup.lab.words import counted

    options = {"batches": batches, "root": data, "backbone": backbone, "size": size}
    chosen = common.settings(recipe, set_, **options)
    _check(chosen, jobs, dask)
    others = [HeadShare.read_from(folder) for folder in beside or []]
    study = HeadShare(
        chosen,
        seeds,
        out or Path("runs") / f"head-share-{common.label(recipe)}",
        [parse_point(text) for text in point] if point else None,
    )
    if study.unmeasured:  # which takes minutes, before the display has anything to show
        points = counted(len(study.unmeasured), "point")
        common.say(f"Measuring what batches take at {points}")
    console = rich.get_console()
    titles = {kind.name: kind.title for kind in study.kinds}
    display = ComparisonDisplay(str(study.out), titles, console)
    with _stoppable(), _executor(dask, chosen) as executor, display:
        found = [study.run(display.update, jobs, executor), *others]
    for shares in found:
        for shown in report.tables(shares):
            console.print(shown)
    tg.recording.write_text(study.out / "shares.md", report.markdown(found, _command()))
    report.write_csv(found, study.out / "shares.csv")
    report.head_share_plot(found, study.out / "shares.png")
    common.say(f"Tables and picture (shares.md, .csv and .png) are in {study.out}")


def _numbers(takes: str, text: str | None, kind: Callable[[str], _Number]) -> list[_Number]:
    """The numbers of an option; ``takes`` begins the sentence on what are none."""
    given = common.split(text or "")
    try:
        return [kind(number) for number in given]
    except ValueError:
        raise ValueError(f"{takes}, got {', '.join(given)}.") from None


def _check(recipe: Recipe, jobs: int | None, dask: str | None) -> None:
    """Refuse what cannot be trained here, before a folder is made."""
    from taskgroup.lab.train.trainer import find_device

    if dask is None:
        find_device(recipe.device)
    elif jobs is not None:
        raise ValueError(
            "--jobs is the number of processes on this machine, and a dask cluster has its own "
            "workers; give one of --jobs and --dask."
        )


@contextmanager
def _executor(dask: str | None, recipe: Recipe) -> Iterator[Executor | None]:
    """The workers of a dask cluster; None stands for processes on this machine."""
    from taskgroup.lab.studies.dask_cluster import dask_cluster

    if dask is None:
        yield None
    else:
        with dask_cluster(dask, recipe, common.say) as executor:
            yield executor


@contextmanager
def _stoppable() -> Iterator[None]:
    """On Ctrl-C, say how to continue, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        common.stop("Stopped; finished runs are kept. Run the same command again to continue.")


def _command() -> str:
    """The command as it was typed."""
    return shlex.join(["taskgroup", *sys.argv[1:]])
