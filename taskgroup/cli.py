"""The command line: ``taskgroup train``."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, Any

try:
    import rich
    import typer
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"The command line of taskgroup needs {error.name}; "
        "install it with: pip install 'taskgroup[train]'"
    ) from None

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Selective task group updates for multi-task learning.",
)


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
    method: Annotated[str | None, typer.Option(help="selective or joint.")] = None,
    grouping: Annotated[
        str | None,
        typer.Option(help="affinity-propagation, heterogeneous, singletons, together or random:M."),
    ] = None,
    batches: Annotated[int | None, typer.Option(help="Length of the run.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the weights, the crops and the order of groups.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of the run; new or empty.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN", help="A finished run to compute Δm against.")
    ] = None,
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
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    try:
        if resume is not None and (given or set_ or out or recipe != "motorcycle"):
            raise ValueError(
                "--resume goes on with the settings of the run; give no other option with it."
            )
        _train(recipe, given, set_ or [], out, resume)
    except (ValueError, OSError) as error:
        # Escaped: what stands in brackets, as in taskgroup[train], is no markup.
        rich.get_console().print(f"[bold red]taskgroup:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _train(
    recipe: str, options: dict[str, Any], changes: list[str], out: Path | None, resume: Path | None
) -> None:
    from taskgroup.report.live import Display
    from taskgroup.report.tables import summary_table
    from taskgroup.vision.recipe import parse_changes, read_recipe
    from taskgroup.vision.tasks import TASKONOMY
    from taskgroup.vision.train import Interrupted, Run

    console = rich.get_console()
    if resume is not None:
        run = Run.resume(resume)
    else:
        settings = read_recipe(recipe, {**parse_changes(changes), **options})
        name = f"{Path(recipe).stem}-{settings.method}-{settings.seed}"
        run = Run(settings, out or _free(Path("runs") / name))
    titles = {task.name: task.title for task in TASKONOMY.values()}
    try:
        with Display(str(run.out), titles, console) as display:
            summary = run.train(display.update)
    except Interrupted as stopped:
        console.print(str(stopped), soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    console.print(summary_table(summary, titles))
    console.print(
        f"Pictures and numbers are in {run.out}", soft_wrap=True, highlight=False, markup=False
    )


def _free(folder: Path) -> Path:
    """The folder, or with the first number behind its name that is not taken."""
    if not folder.exists():
        return folder
    return next(numbered for n in count(2) if not (numbered := Path(f"{folder}-{n}")).exists())


if __name__ == "__main__":
    app()
