"""The tables of runs, evaluations and data sets hold their numbers, whole, at any width."""

import io
import re
import types

import pytest
from rich.console import Console

from taskgroup.lab.commands.tables import check_table, evaluation_table, summary_table
from taskgroup.lab.data.check import Checked

TASKS = [f"task{k}" for k in range(12)]
TITLES = {
    task: f"Task {k}" if k % 3 else f"[{k}] whose name is as long as the names of some columns are"
    for k, task in enumerate(TASKS)
}
METRICS = {task: 123.4567 * (k + 1) for k, task in enumerate(TASKS)}
NAMES = dict.fromkeys(TASKS, "mean angular error")
LOWER = dict.fromkeys(TASKS, True)
BASELINE = "runs/a/folder/with-a-name-that-has-no-spaces-in-it/and-is-long/baseline.yaml"


def printed(shown, width):
    console = Console(width=width, file=io.StringIO())
    console.print(shown)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    return text


def rows(text):
    """``{name: number}``; a name may take several lines."""
    found, name = {}, None
    for line in text.splitlines():
        if line.startswith("│"):
            first, number = (cell.strip() for cell in line.strip("│").split("│"))
            if number:
                name = first
                found[name] = number
            else:
                found[f"{name} {first}"] = found.pop(name)
                name = f"{name} {first}"
    return {re.sub(r"\s", "", name): number for name, number in found.items()}


def expected():
    return {
        f"{TITLES[task]},{NAMES[task]}↓".replace(" ", ""): f"{METRICS[task]:.4f}" for task in TASKS
    }


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_run(width):
    summary = {
        "method": "selective",
        "batches": 300,
        "metric": NAMES,
        "lower_is_better": LOWER,
        "metrics": METRICS,
        "delta_m": -12.345,
        "baseline": BASELINE,
        "peak_bytes": 2**33,
        "partition": [TASKS[:5], TASKS[5:]],
        "seconds_per_batch": 0.1234,
        "share_outside_model": 0.0123,
    }
    text = printed(summary_table(summary, TITLES), width)
    assert rows(text) == {
        **expected(),
        f"Δmagainst{BASELINE}": "-12.35 %",
        "Secondsperbatch": "0.123",
        "Timeoutsidethemodel": "1.2 %",
        "GPUmemoryatthepeak": "8.00 GiB",
    }
    assert "2 groups: [0] whose name" in text  # no markup


@pytest.mark.parametrize("width", [60, 80, 120])
def test_an_evaluation(width):
    problem = types.SimpleNamespace(titles=TITLES, metric_names=NAMES, lower_is_better=LOWER)
    shown = evaluation_table("[run], 300 batches", METRICS, problem, BASELINE, -12.3)
    text = printed(shown, width)
    assert text.startswith("[run], 300 batches")
    assert rows(text) == {**expected(), f"Δmagainst{BASELINE}": "-12.30 %"}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_data_set(width):
    splits = [
        Checked("a_split_with_a_long_name", 12345678, 23456789, 12345677, ["x"] * 1234),
        Checked("train", 5, None, 4, []),
    ]
    text = printed(check_table("/data/[one]: taskonomy", splits), width)
    assert "/data/[one]: taskonomy" in text
    for number in ("12,345,678", "23,456,789", "12,345,677", "1,234"):
        assert len(re.findall(rf" {number}( |$)", text, re.MULTILINE)) == 1
    assert all(word in text for word in ("listed", "public", "release", "whole", "problems"))
