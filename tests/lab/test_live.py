"""The displays in the terminal show what was trained so far."""

import io
import re

import pytest
from rich.console import Console

from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.report.live import Display
from taskgroup.lab.studies.cell import Cell
from taskgroup.lab.studies.comparison_display import ComparisonDisplay
from taskgroup.lab.train.trainer import Progress
from tests.terminal import screen


@pytest.fixture
def terminal():
    return Console(width=160, file=io.StringIO(), force_terminal=True, color_system=None)


def test_a_run_in_a_terminal(terminal):
    with Display("runs/[one]", {"a": "Depth", "b": "Edges"}, terminal) as display:
        for batch, loss in ((1, 1.0), (2, 3.0)):
            losses = {"a": loss, "b": 2.0}
            display.update(Progress(batch, 10, losses, [("a",), ("b",)], [("a", "b")]))
    text = terminal.file.getvalue()
    assert "runs/[one]" in text  # no markup
    assert "2/10 batches" in text
    assert re.search(r"Depth +1\.1000", text)  # smoothed
    assert "1 group  [Depth, Edges]" in text


def test_long_names_keep_the_losses_in_columns(terminal):
    titles = {"a": "Depth", "b": "A task whose name takes more room"}
    with Display("run", titles, terminal) as display:
        display.update(Progress(1, 10, {"a": 1.0, "b": 2.0}, [("a", "b")], [("a", "b")]))
    text = terminal.file.getvalue()
    assert "A task whose name takes more room 2.0000" in text
    assert "Depth                             1.0000" in text


def test_a_comparison_in_a_terminal(terminal):
    recipe = read_recipe("yeast")
    with ComparisonDisplay("runs/[two]", {"uw": "UW"}, terminal, lambda _: 3.0) as display:
        display.update("equal batches", 1, 10, Cell("uw", recipe), {"diverged": None})
        display.update("equal time", 1, 4, Cell("single", recipe), {"diverged": None})
        display.update("equal time", 2, 4, Cell("uw", recipe), {"diverged": 3})
        display.update("equal time", 3, 4, Cell("uw", recipe), {"diverged": None})
    text = terminal.file.getvalue()
    assert "3/4 runs" in text
    assert "Single-task" in text
    assert re.search(r"UW +2 +\+3\.0 % \(1 diverged\)", text)  # of this stage alone


@pytest.mark.parametrize("width", [60, 80, 120])
def test_long_names_are_shortened_and_numbers_are_not(width):
    terminal = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    tasks = [f"task{k}" for k in range(12)]
    titles = {task: f"Task {k}, whose name is long" * (1 + k % 3) for k, task in enumerate(tasks)}
    losses = {task: 123.4567 * 10**k for k, task in enumerate(tasks)}
    with Display("run", titles, terminal) as display:
        display.update(Progress(1, 10, losses, [], [tasks]))
    lines = terminal.file.getvalue().splitlines()
    for k, task in enumerate(tasks):
        found = [line for line in lines if re.search(rf" {losses[task]:.4f} ", line)]
        assert found, task
        assert f" Task {k}, whose na" in found[0]

    titles = {"uw": "UW", "long": "A variant whose name is long " * 3}
    with ComparisonDisplay("run", titles, terminal, lambda _: -812.3) as display:
        for done, name in enumerate(titles, start=1):
            cell = Cell(name, read_recipe("yeast"))
            display.update("equal time", done, 2, cell, {"diverged": None})
            display.update("equal time", done, 2, cell, {"diverged": 3})
    lines = terminal.file.getvalue().splitlines()
    for name in ("UW", "A variant whose name"):
        assert any(re.search(rf" {name}.* 2 +-812\.3 % \(1 diverged\)", line) for line in lines)


def test_ten_lines_in_a_pipe():
    pipe = Console(width=80, file=io.StringIO())
    with Display("run", {"a": "Depth"}, pipe) as display:
        for batch in range(1, 101):
            display.update(Progress(batch, 100, {"a": 1.0}, [("a",)], [("a",)]))
    lines = pipe.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"run: batch {batch} of 100" for batch in (*range(1, 100, 10), 100)
    ]
    assert lines[-1].endswith("summed loss 1.000, 1 group")


@pytest.mark.parametrize("columns", [40, 80])
def test_a_long_title_leaves_room_for_what_the_terminal_writes(columns):
    file = io.StringIO()
    terminal = Console(width=columns, height=30, file=file, force_terminal=True)
    with Display("runs/" + "x" * 100 + "/the-end", {"a": "A"}, terminal) as display:
        display.update(Progress(1, 10, {"a": 1.0}, [("a",)], [("a",)]))
    lines = screen(file.getvalue().replace("\n", "\r\n"), columns)
    assert max(map(len, lines)) == columns - 4
    assert any("the-end" in line for line in lines)
