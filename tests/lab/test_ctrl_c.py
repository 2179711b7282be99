"""Ctrl-C in a terminal leaves one sentence on the screen, status 130, and no process."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.report.live import Display
from taskgroup.lab.studies import comparison
from taskgroup.lab.train.trainer import Progress
from tests.lab.small import options
from tests.terminal import interrupted, screen

PROGRAM = "from taskgroup.lab.cli import app; app()"


def worker_imports_torch(output, processes):
    return any(
        b"spawn_main" in read(f"/proc/{p}/cmdline") and b"libtorch_cpu" in read(f"/proc/{p}/maps")
        for p in processes
    )


def read(path):
    try:
        return Path(path).read_bytes()
    except OSError:  # the process has ended meanwhile
        return b""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_comparison_whose_workers_are_starting(tmp_path):
    words = ["compare", "yeast", *options(batches=50), "--methods", "selective", "--seeds", "2"]
    out = tmp_path / ("a-folder-whose-name-is-longer-than-the-frame-is-wide" * 2)
    words += ["--budgets", "batches", "--jobs", "2", "--out", str(out)]
    status, lines, left = interrupted(PROGRAM, words, worker_imports_torch)
    said = "Stopped; finished runs are kept. Run the same command again to continue."
    assert [line for line in lines if line] == [said]
    assert status == 130
    assert left == []


def test_command_that_says_nothing_more(tmp_path, monkeypatch):
    # While the comparison looks whether its methods can work, before it begins.
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "Comparison", interrupt)
    result = CliRunner().invoke(app, ["compare", "yeast", "--out", str(tmp_path)])
    assert (result.exit_code, result.output) == (130, "Stopped.\n")


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("tasks", [2, 100])  # 100 are a frame that is higher than the terminal
def test_frame_is_cleared(columns, tasks):
    file = io.StringIO()
    terminal = Console(width=columns, height=30, file=file, force_terminal=True)
    titles = {f"task{k}": f"Task {k}" for k in range(tasks)}
    progress = Progress(1, 10, dict.fromkeys(titles, 1.0), [], [tuple(titles)])
    terminal.print("before")
    with pytest.raises(KeyboardInterrupt), Display("run", titles, terminal) as display:
        display.update(progress)
        display._live.refresh()
        file.write("^C")  # as the terminal echoes the key
        display._live.refresh()
        file.write("^C")
        raise KeyboardInterrupt
    terminal.print("Stopped.")
    output = file.getvalue().replace("\n", "\r\n")  # as the terminal does
    assert [line for line in screen(output, columns) if line] == ["before", "Stopped."]


def test_the_screen_of_these_tests():
    assert screen("ab\r\ncd\x1b[1A\x1b[2K\rx", 3) == ["x", "cd"]
    assert screen("abcd\x1b[2K\re", 3) == ["abc", "e"]
    assert screen("\x1b[1mabc\x1b[0m\r\x1b[2Kd", 3) == ["d"]
