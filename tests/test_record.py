"""Benchmarks measure all sides in equal turns, and keep their results."""

import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

import benchmarks.record
from benchmarks.clocks import CudaClock, Measured
from benchmarks.limits import Rates
from benchmarks.ours import WrongNumberError, check_affinity, check_combination, check_gram
from benchmarks.record import Record, append
from benchmarks.shapes import parameter_shapes


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.record, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks.record, "machine", lambda device: "abacus")
    return Record("sums", "cpu", rounds=4, seconds=0, full=False, command="pytest sums", save=True)


def scripted_clock(record, seconds):
    """A clock that returns given seconds for each function, one after the other."""
    measured = []

    def clock(function, calls):
        measured.append((function.__name__, calls))
        once = seconds[function.__name__].pop(0)
        return once if isinstance(once, Measured) else Measured(once)

    record.clock = clock
    return measured


def ours():
    pass


def peer():
    pass


def test_sides_are_measured_in_turn_and_the_least_counts(record):
    times = {"ours": [5.0, 0.3, 0.2, 0.4], "peer": [1.0, 2.0, 3.0, 4.0]}
    measured = scripted_clock(record, times)
    least = record.least_seconds({"us": ours, "them": peer, "absent": "not installed"})
    assert least == {"us": 0.2, "them": 1.0, "absent": "not installed"}
    assert [name for name, _ in measured] == ["ours", "peer"] * 4


def test_short_calls_are_repeated_and_their_first_call_does_not_count(record):
    times = {"ours": [1e-6, 3e-6, 4e-6, 5e-6, 6e-6], "peer": [1e-2] * 5}
    measured = scripted_clock(record, times)
    assert record.least_seconds({"us": ours, "them": peer})["us"] == 3e-6
    assert measured[2:4] == [("ours", 200), ("peer", 1)]


def test_a_slow_side_gets_no_more_rounds(record):
    measured = scripted_clock(record, {"ours": [1.0] * 4, "peer": [20.0] * 2})
    record.least_seconds({"us": ours, "them": peer})
    assert [name for name, _ in measured].count("peer") == 2


def test_the_share_of_the_limit_is_the_median_over_the_rounds(record):
    times = {"ours": [9.0, 0.4, 0.5, 1.0], "peer": [9.0, 0.3, 0.1, 0.4]}
    scripted_clock(record, times)
    record.least_seconds({"us": ours, "copy": peer})
    # Of 0.3 / 0.4, 0.1 / 0.5 and 0.4 / 1.0; the first call is no round.
    assert record.share("us", lambda seconds: seconds["copy"]) == 0.4
    assert record.share("nobody", lambda seconds: seconds["copy"]) is None


def test_beside_the_least_stand_the_median_the_most_and_the_time_of_the_host(record):
    times = [Measured(9.0, 0.3), Measured(0.4, 0.2), Measured(0.5, 0.8), Measured(0.7, 0.1)]
    scripted_clock(record, {"ours": times, "peer": [1.0] * 4})
    least = record.least_seconds({"us": ours, "them": peer})
    assert (least["us"], least["us"].median, least["us"].most, least["us"].host) == (
        0.4,
        0.6,
        9.0,
        0.25,
    )
    assert least["them"].host is None
    record.add("sum", 3, least["us"], {"them": least["them"]})
    (row,) = rows_of(record.path)
    names = ("ours_us", "ours_median_us", "ours_most_us", "host_us")
    assert [float(row[name]) for name in names] == [4e5, 6e5, 9e6, 2.5e5]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_result_is_kept_when_it_is_added(record, tmp_path):
    path = tmp_path / "abacus" / "sums.csv"
    for n in (1, 2):
        record.add(
            "sum",
            3,
            2e-6,
            {"loop": 8e-6, "abacus": "sold"},
            limit=1e-6,
            share=0.5,
            share_of_copy=0.25,
            rates=Rates(3e12, 4e13),
            backend="cpp",
            launches=2,
        )
        assert len(rows_of(path)) == 2 * n
    loop, absent = rows_of(path)[:2]
    assert (loop["op"], loop["K"], loop["peer"], loop["command"]) == (
        "sum",
        "3",
        "loop",
        "pytest sums",
    )
    assert [float(loop[name]) for name in ("ours_us", "peer_us", "ratio")] == [2, 8, 4]
    assert float(loop["share_of_limit"]) == 0.5
    rest = ("backend", "share_of_copy", "copy_gb_s", "product_tflop_s", "launches")
    assert [loop[name] for name in rest] == ["cpp", "0.25", "3000.0", "40.0", "2"]
    assert (absent["peer_us"], absent["ratio"], absent["host_us"]) == ("", "", "")


def test_nothing_is_kept_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.record, "RESULTS", tmp_path)
    record = Record("sums", "cpu", rounds=4, seconds=0, full=False, command="pytest sums")
    record.add("sum", 3, 2e-6, {"loop": 8e-6})
    assert list(tmp_path.iterdir()) == []


ENDINGS = """
import pytest, torch
from benchmarks.ours import WrongNumberError

@pytest.fixture(scope="module")
def record():
    yield
    print("the record is printed")

def test_too_large(record):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

def test_wrong():
    raise WrongNumberError("task_gram on cuda, K = 3: entry (1, 2) is off")

def test_next():
    raise AssertionError("measured all the same")
"""


def test_a_wrong_number_ends_a_benchmark_and_what_does_not_fit_is_left_out(tmp_path):
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import pytest_runtest_call\n")
    (tmp_path / "test_endings.py").write_text(ENDINGS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-rs", tmp_path, "-c", "/dev/null"],
        env={**os.environ, "PYTHONPATH": str(benchmarks.record.ROOT.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "does not fit into the memory of the GPU: CUDA out of memory" in done.stdout
    assert "entry (1, 2) is off" in done.stdout
    assert "measured all the same" not in done.stdout
    assert "the record is printed" in done.stdout


def test_the_checks_name_the_wrong_entry():
    gradients = [[torch.randn(50), torch.randn(3, 7)] for _ in range(3)]
    rows = torch.stack([torch.cat([g.flatten() for g in own]) for own in gradients]).double()
    weights = torch.tensor([0.5, -1.0, 2.0])
    gram = rows @ rows.t()
    total = [
        sum(w * gradient for w, gradient in zip(weights, of_tasks, strict=True))
        for of_tasks in zip(*gradients, strict=True)
    ]
    check_gram("task_gram", gram, gradients)
    check_combination("combine", total, gradients, weights)
    check_affinity("affinity_update_", gram, gram + 1e-9, 1e-7)
    gram[1, 2] += 1e-5 * (gram[1, 1] * gram[2, 2]).sqrt()
    total[1][1, 3] += 1e-5
    with pytest.raises(WrongNumberError, match=r"K = 3, 71 parameters, .*: entry \(1, 2\)"):
        check_gram("task_gram", gram, gradients)
    with pytest.raises(WrongNumberError, match="element 10 of tensor 1 is off by"):
        check_combination("combine", total, gradients, weights)
    with pytest.raises(WrongNumberError, match=r"K = 3, torch.float64: .*\(1, 2\)"):
        check_affinity("affinity_update_", gram, rows @ rows.t(), 1e-7)
    gram[0, 1] = torch.nan
    with pytest.raises(WrongNumberError, match=r"entry \(0, 1\)"):
        check_gram("task_gram", gram, gradients)


@dataclass
class Weight:
    fruit: str
    grams: float
    ripe: bool | None = None


def test_a_file_with_other_columns_loses_nothing(tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text('colour,fruit\n"red, mostly",apple\n')
    append(path, Weight("pear", 151.23456))
    append(path, Weight("fig", 50.0, ripe=True))
    assert path.read_text().splitlines() == [
        "colour,fruit,grams,ripe",
        '"red, mostly",apple,,',
        ",pear,151.2,",
        ",fig,50.0,True",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["weights.csv"]


def test_results_of_earlier_versions_take_new_rows(record, tmp_path):
    """The results in the repository have fewer columns."""
    old = benchmarks.record.ROOT / "results" / "amd-epyc" / "combine.csv"
    before = rows_of(old)
    record.path.parent.mkdir()
    record.path.write_text(old.read_text())
    record.add("sum", 3, 2e-6, {"loop": 8e-6}, backend="cpp")
    *after, new = rows_of(record.path)
    assert [{name: row[name] for name in before[0]} for row in after] == before
    assert (new["op"], new["backend"]) == ("sum", "cpp")


def test_the_clock_of_a_gpu_finds_the_calls_queued(monkeypatch):
    """The (fake) GPU is delayed for longer than the host needs to queue the calls."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 5.0  # milliseconds; of the calibration too: 2e9 cycles a second

    def call():
        time.sleep(1e-3)
        events.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append(cycles))
    clock = CudaClock()
    clock(call, 1)  # calibrates
    events.clear()
    measured = clock(call, 3)
    waits = [event for event in events if isinstance(event, int)]
    assert events == [*["call"] * 3, *waits, "event", *["call"] * 3, "event"]
    assert len(waits) == 1
    assert waits[0] / 2e9 >= 2 * 3 * measured.host >= 6e-3
    assert measured.seconds == pytest.approx(5e-3 / 3)


def test_the_table_says_ratio_goal_and_why_a_peer_was_not_run(record, capsys):
    peers = {"loop": 8e-6, "abacus": "sold"}
    record.add("sum", 3, 2e-6, peers, goals={"loop": 7.5}, limit=1e-6, share=0.5, limit_goal=0.6)
    record.remark("on a quiet day")
    record.print()
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["sum", "3", "float32", "2.0", "2.0", "2.0", "0.50", "0.60"] in lines
    assert ["sum", "3", "float32", "loop", "8.0", "4.0", "7.5"] in lines
    assert ["abacus", "sold"] in lines
    assert "on a quiet day" in printed


@pytest.mark.parametrize("columns", [100, 200])
def test_no_number_is_cut_however_narrow_the_terminal(record, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    record.add(
        "task_gram, combine",
        64,
        13_542.1e-6,
        {"TorchJD, concatenating": 98_765.4e-6},
        model="ViT-B",
        dtype=torch.bfloat16,
        limit=9_876e-6,
        share=0.73,
        share_of_copy=0.72,
        backend="triton",
        launches=3,
        limit_goal=0.65,
    )
    record.print()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    for number in ("13 542", "98 765", "0.73", "0.72", "0.65", "7.3"):
        assert number in printed


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
