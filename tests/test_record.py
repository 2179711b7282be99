"""What the benchmarks rest on: equal turns for all sides, and results that are kept."""

import csv

import pytest
import torch

import benchmarks.record
from benchmarks.record import Record
from benchmarks.shapes import parameter_shapes


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.record, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks.record, "machine", lambda device: "abacus")
    return Record("sums", "cpu", rounds=4, seconds=0, full=False, command="pytest sums")


def scripted_clock(monkeypatch, seconds):
    """A clock that says so many seconds a call for each function, one after the other."""
    measured = []

    def clock(function, calls):
        measured.append((function.__name__, calls))
        return seconds[function.__name__].pop(0)

    monkeypatch.setattr(benchmarks.record, "_wall_seconds", clock)
    return measured


def ours():
    pass


def peer():
    pass


def test_sides_are_measured_in_turn_and_the_least_counts(record, monkeypatch):
    times = {"ours": [5.0, 0.3, 0.2, 0.4], "peer": [1.0, 2.0, 3.0, 4.0]}
    measured = scripted_clock(monkeypatch, times)
    least = record.least_seconds({"us": ours, "them": peer, "absent": "not installed"})
    assert least == {"us": 0.2, "them": 1.0, "absent": "not installed"}
    assert [name for name, _ in measured] == ["ours", "peer"] * 4


def test_short_calls_are_repeated_and_their_first_call_does_not_count(record, monkeypatch):
    times = {"ours": [1e-6, 3e-6, 4e-6, 5e-6, 6e-6], "peer": [1e-2] * 5}
    measured = scripted_clock(monkeypatch, times)
    assert record.least_seconds({"us": ours, "them": peer})["us"] == 3e-6
    assert measured[2:4] == [("ours", 200), ("peer", 1)]


def test_a_slow_side_gets_no_more_rounds(record, monkeypatch):
    measured = scripted_clock(monkeypatch, {"ours": [1.0] * 4, "peer": [20.0] * 2})
    record.least_seconds({"us": ours, "them": peer})
    assert [name for name, _ in measured].count("peer") == 2


def test_the_share_of_the_limit_is_the_median_over_the_rounds(record, monkeypatch):
    times = {"ours": [9.0, 0.4, 0.5, 1.0], "peer": [9.0, 0.3, 0.1, 0.4]}
    scripted_clock(monkeypatch, times)
    record.least_seconds({"us": ours, "copy": peer})
    # Of 0.3 / 0.4, 0.1 / 0.5 and 0.4 / 1.0; the first call is no round.
    assert record.share("us", lambda seconds: seconds["copy"]) == 0.4
    assert record.share("nobody", lambda seconds: seconds["copy"]) is None


def test_results_are_appended(record, tmp_path):
    record.add("sum", 3, 2e-6, {"loop": 8e-6, "abacus": "sold"}, limit=1e-6, share=0.5)
    record.save()
    path = record.save()
    assert path == tmp_path / "results" / "abacus" / "sums.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    loop, absent = rows[:2]
    assert (loop["op"], loop["K"], loop["peer"], loop["command"]) == (
        "sum",
        "3",
        "loop",
        "pytest sums",
    )
    assert [float(loop[name]) for name in ("ours_us", "peer_us", "ratio")] == [2, 8, 4]
    assert float(loop["share_of_limit"]) == 0.5
    assert (absent["peer_us"], absent["ratio"]) == ("", "")


def test_the_table_says_ratio_goal_and_why_a_peer_was_not_run(record, capsys):
    peers = {"loop": 8e-6, "abacus": "sold"}
    record.add("sum", 3, 2e-6, peers, goals={"loop": 7.5}, limit=1e-6, share=0.5, limit_goal=0.6)
    record.remark("on a quiet day")
    record.print()
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert [
        "sum",
        "3",
        "float32",
        "2.0",
        "1.0",
        "0.50",
        "0.60",
        "loop",
        "8.0",
        "4.0",
        "7.5",
    ] in lines
    assert ["abacus", "sold"] in lines
    assert "on a quiet day" in printed


@pytest.mark.parametrize("model", ["ViT-T", "ViT-S", "ViT-B"])
def test_shapes_are_those_of_the_architecture(model):
    transformers = pytest.importorskip("transformers")
    width, heads = {"ViT-T": (192, 3), "ViT-S": (384, 6), "ViT-B": (768, 12)}[model]
    config = transformers.ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads
    )
    with torch.device("meta"):
        network = transformers.ViTModel(config, add_pooling_layer=False)
    theirs = sum(parameter.numel() for parameter in network.parameters())
    assert sum(torch.Size(shape).numel() for shape in parameter_shapes(model)) == theirs
