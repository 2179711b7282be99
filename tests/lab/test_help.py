"""The help of every command shows all words that are written in it."""

import re
from typing import Annotated, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from taskgroup.lab.cli import _Verbatim, app


def pages(app, path=()):
    """``{words of a command: [what its --help must show]}`` of an app and all that is below it."""
    found = {path: [app.info.help]}
    for command in app.registered_commands:
        function = command.callback
        name = command.name or function.__name__.replace("_", "-")
        hints = get_type_hints(function, include_extras=True)
        options = [hints[parameter].__metadata__[0].help for parameter in hints.keys() - {"return"}]
        found[(*path, name)] = [function.__doc__, *options]
        found[path].append(function.__doc__)
    for group in app.registered_groups:
        found |= pages(group.typer_instance, (*path, group.name))
        found[path].append(group.typer_instance.info.help)
    return found


def shown(app, path, columns):
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


PAGES = pages(app)


def test_every_command_is_looked_at():
    assert {("train",), ("compare",), ("data", "check"), ("data",), ()} < PAGES.keys()
    assert all(text for texts in PAGES.values() for text in texts)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("path", PAGES, ids=" ".join)
def test_no_word_is_lost(path, columns):
    text = shown(app, path, columns)
    for written in PAGES[path]:
        assert " ".join(written.split()) in text


def test_what_looks_like_markup_is_shown():
    strange = typer.Typer(cls=_Verbatim, help="Of [red]all[/red] colours.")
    below = typer.Typer(cls=_Verbatim, help="Below [it].")
    strange.add_typer(below, name="below")

    @strange.command()
    def plain(
        place: Annotated[str, typer.Argument(help="Where [here].")] = "x",
        size: Annotated[int, typer.Option(help="Of [a, b] or [/c], \\[d].")] = 1,
    ) -> None:
        """Take [one per core] and [bold]."""

    @below.command()
    def more() -> None:
        """Take [more]."""

    found = pages(strange)
    assert len(found) == 4 - 1 + 1  # strange, plain, below, more
    for path in [(), ("plain",), ("below", "more")]:
        text = shown(strange, path, 100)
        for written in found[path]:
            assert written in text
