"""The help of every command shows all words that are written in it."""

import re
from typing import get_type_hints

import pytest
from rich.markup import escape
from typer.testing import CliRunner

import taskgroup as tg
from taskgroup.lab.cli import app
from taskgroup.lab.recipe import recipe_names
from taskgroup.lab.studies.presets import PRESETS


def pages(app, path=()):
    """``{words of a command: [what its --help must show]}`` of an app and all that is below it."""
    found = {path: [app.info.help]}
    for command in app.registered_commands:
        function = command.callback
        name = command.name or function.__name__.replace("_", "-")
        hints = get_type_hints(function, include_extras=True)
        options = [hints[parameter].__metadata__[0] for parameter in hints.keys() - {"return"}]
        defaults = [o.show_default for o in options if isinstance(o.show_default, str)]
        found[(*path, name)] = [function.__doc__, *(o.help for o in options), *defaults]
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


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("train", recipe_names()),
        ("train", ["selective", "joint", *tg.methods.METHODS]),
        ("compare", PRESETS),
    ],
    ids=["recipes", "methods", "presets"],
)
def test_names_to_choose_from_are_listed(command, names):
    words = re.findall(r"[\w-]+", shown(app, [command], 120))
    assert not set(names) - set(words)


@pytest.mark.parametrize("path", PAGES, ids=" ".join)
def test_no_word_looks_like_markup(path):
    """Help goes through rich, which would leave out what looks like [markup]."""
    assert PAGES[path] == [escape(written) for written in PAGES[path]]
