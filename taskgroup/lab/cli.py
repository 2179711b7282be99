"""The command line: ``taskgroup train | compare | evaluate | report | data | new | ...``."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    import rich
    import typer
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"The command line of taskgroup needs {error.name}; "
        "install it with: pip install 'taskgroup[train]' (python -m taskgroup runs without)"
    ) from None

from taskgroup.lab.commands import common, comparing, data, new, reporting, training

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Selective task group updates for multi-task learning.",
)
data_app = typer.Typer(no_args_is_help=True, help="Check a data set, or write a tiny one.")
new_app = typer.Typer(no_args_is_help=True, help="Write a file to begin with.")


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """Print what went wrong as a sentence, not as a traceback, and exit with status 2."""
    usual, warnings.formatwarning = warnings.formatwarning, _warning_in_words
    try:
        yield
    except typer.Exit:  # which is a RuntimeError too
        raise
    except KeyboardInterrupt:  # where no command has said more
        common.stop("Stopped.")
    except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as error:
        # Escaped, since rich reads brackets, as in taskgroup[train], as markup.
        rich.get_console().print(f"[bold red]taskgroup:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        warnings.formatwarning = usual


def _warning_in_words(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning without the line of code that gave it, which is none of the user's."""
    return f"Warning: {message}\n"


def _add(group: typer.Typer, *commands: Callable[..., None]) -> None:
    for command in commands:
        group.command()(_errors_in_words()(command))


_add(app, training.train, comparing.compare, comparing.affinity_gain, comparing.head_share)
_add(app, training.evaluate, training.predict, reporting.figures, reporting.report)
_add(data_app, data.check, data.mini)
_add(new_app, new.problem)
app.add_typer(data_app, name="data")
app.add_typer(new_app, name="new")


@app.command()
def doctor() -> None:
    """Show what is installed, what runs here, and why the rest does not; exit with 1 if broken."""
    program = importlib.import_module("taskgroup.__main__")  # python -m taskgroup
    raise typer.Exit(program.main())


if __name__ == "__main__":
    app()
