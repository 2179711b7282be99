"""The tables of a comparison hold its numbers, whole, however wide the terminal."""

import csv
import dataclasses
import io
import math
import re

import pytest
from rich.console import Console

from taskgroup.lab.studies import comparison_report as report
from taskgroup.lab.studies.intervals import Estimate
from taskgroup.lab.studies.presets import PRESETS
from taskgroup.lab.studies.results import BUDGETS
from tests.lab.fabricated import fabricated, variants


def printed(table, width):
    console = Console(width=width, file=io.StringIO())
    for shown in report.tables(table):
        console.print(shown)
    return console.file.getvalue()


def cells(text):
    """``{(title of the table, first cell, header): cell}`` of all tables in a text.

    A column is where its header is; the first cell may take several lines.
    """
    found, lines = {}, text.splitlines()
    for n, line in enumerate(lines):
        if not (line.strip() and set(line.strip()) == {"─"}):
            continue
        rows = []
        for row in lines[n + 1 :]:
            if not row.strip():
                break
            # Columns are two spaces apart, and within a cell there is one.
            name, *values = re.split(r"  +", row.strip())
            if not values:
                rows[-1][0] += f" {name}"
            else:
                rows.append([name, *values])
        header = re.split(r"  +", lines[n - 1].strip())
        for name, *values in rows:
            found.setdefault((header[0], name), []).extend(values)
    return found


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", PRESETS)
def test_terminal_tables_are_whole(name, width):
    table = fabricated(variants(name))
    text = printed(table, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    found = cells(text)
    for row in table.rows:
        title, deltas, gains = row.variant.title, [], []
        for budget in BUDGETS:
            mean, half, _ = row.delta[budget, "held_out"]
            deltas.append(f"{mean:+.1f}±{half:.1f}")
        deltas[-1] += " (0.003)"
        assert found["Δm, %", title] == [f"{row.time:.2f}x", f"{row.memory:.2f}x", *deltas]
        if row.variant.name == row.variant.against:
            assert ("Δm minus that of GD", title) not in found
            continue
        for key in (*((budget, "held_out") for budget in BUDGETS), ("tuned", "train")):
            mean, half, _ = row.gain[key]
            gains.append(f"{mean:+.1f}±{half:.1f} {row.verdict(*key)}".strip())
        assert found["Δm minus that of GD", title] == gains


def test_terminal_table_is_one_where_a_wrapped_name_makes_the_room():
    table = fabricated(variants())
    (time,) = [f"{row.time:.2f}x" for row in table.rows if row.variant.name == "selective-cheap"]
    text = printed(table, 80)
    assert text.count(" Δm, %  ") == 1
    assert re.search(rf"Selective, 1 group +{time}", text)
    text = printed(table, 120)
    assert re.search(rf"Selective, 1 group per batch +{time}", text)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_long_names_huge_numbers_and_markup_are_whole(width):
    table = fabricated(variants()[:3])
    long = "[bold] a method with a name that somebody has made long, so that it is clear"
    variant = dataclasses.replace(table.rows[1].variant, title=long)
    huge = dict.fromkeys(table.rows[1].delta, Estimate(-812345678.9, 412345678.9, 5))
    table.rows[1] = dataclasses.replace(table.rows[1], variant=variant, delta=huge)
    table.rows[2].diverged["time"] = 2
    text = printed(table, width)
    assert max(len(line) for line in text.splitlines()) <= width
    found = cells(text)
    shown = [key for key in found if key[0] == "Δm, %" and key[1].startswith("[bold] a method")]
    assert shown == [("Δm, %", long)]
    assert found["Δm, %", long][2:] == [*["-8.1e+08±4.1e+08"] * 2, "-8.1e+08±4.1e+08 (0.003)"]
    assert found["Δm, %", "DTP"][3].endswith("(2 diverged)")


def test_diverged_runs_are_called_so():
    text = printed(fabricated(variants(), diverged=["uw"]), 140)
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("UW ")]
    assert lines[0] == ["UW", "diverged", "diverged", "diverged", "(0.003)"]
    assert "nan" not in text
    partly = fabricated(variants())
    partly.rows[2].diverged["batches"] = 2
    assert "(2 diverged)" in printed(partly, 140)


def test_one_seed_has_no_intervals():
    table = fabricated(variants(), seeds=1)
    text = printed(table, 140) + report.markdown(table, "x")
    assert "nan" not in text
    assert "±" not in text
    assert "Noise floor: unknown" in text


def test_notes_name_what_was_left_out_and_what_was_tried():
    text = report.markdown(fabricated(variants()), "taskgroup compare yeast")
    assert "```\ntaskgroup compare yeast\n```" in text
    assert "- DTP is left out: it needs a score" in text
    assert "Best rate: equal time, at the one of 3 learning rates with the best" in text
    assert "two sets of 5 joint runs differ by up to 1.2 by chance" in text
    assert "as take the time of Selective." in text


@pytest.mark.parametrize("width", [80, 120])
def test_published_numbers_stand_beside_equal_batches(width, monkeypatch):
    table = fabricated(variants()[:4])
    monkeypatch.setattr(table.problem, "published", {"gd": 177.6, "uw": -1.25, "other": 3.0})
    monkeypatch.setattr(table.problem, "published_note", "They trained for 300 epochs.")
    gains, differences, *_ = markdown_tables(report.markdown(table))
    assert gains[0][3:6] == ["equal batches", "published", "equal time"]
    assert {len(line) for line in gains} == {7}
    # Papers print what is worse as positive.
    assert [line[4] for line in gains[1:]] == ["-177.6", "+1.2", "", ""]
    assert "published" not in differences[0]
    assert (
        "- Published: the Δm of publications, whose sign is turned: they print positive numbers "
        "for what is worse than single-task training. They trained for 300 epochs.\n"
    ) in report.markdown(table)
    text = printed(table, width)
    assert cells(text)["Δm, %", "GD (joint)"][3] == "-177.6"
    assert max(len(line) for line in text.splitlines()) <= width


def test_without_published_numbers_of_the_methods_there_is_no_column(monkeypatch):
    table = fabricated(variants()[:2])
    monkeypatch.setattr(table.problem, "published", {"other": 3.0})
    monkeypatch.setattr(table.problem, "published_note", "They trained for 300 epochs.")
    assert "ublished" not in report.markdown(table)
    assert "300 epochs" not in report.markdown(table)


SIZES = (16, 32, 64)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_tables_hold_the_best_batch_size(width):
    table = fabricated(variants(), batch_sizes=SIZES)
    text = printed(table, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in table.rows:
        mean, half, _ = row.delta["tuned", "held_out"]
        shown = cells(text)["Δm, %", row.variant.title]
        assert shown[-1] == f"{mean:+.1f}±{half:.1f} (0.003, 32)"


def test_the_title_of_the_tuned_budget_says_what_there_is_to_choose_from():
    both = fabricated(variants()[:2], batch_sizes=SIZES)
    text = report.markdown(both)
    assert "| best rate and batch size |" in text
    assert "| held-out, best rate and batch size |" in text
    assert "of each task, best rate and batch size" in text
    assert (
        "Best rate and batch size: equal time, at the best of 3 learning rates, for encoder and "
        "heads alike, times 3 batch sizes (16, 32, 64), by held-out Δm over other seeds; the best "
        "pair is in brackets."
    ) in text
    text = report.markdown(dataclasses.replace(both, rates=[0.003]))
    assert "Best batch size: equal time, at the best of 3 batch sizes (16, 32, 64), by" in text
    assert "(32) |" in text
    assert "| best rate |" in report.markdown(fabricated(variants()[:2]))


def test_notes_name_tuned_runs_that_took_more_time():
    table = fabricated(variants()[:3], batch_sizes=SIZES)
    assert "times as long as the others" not in report.markdown(table)
    for n, time in enumerate((1.05, 1.2, 0.85)):
        table.rows[n] = dataclasses.replace(table.rows[n], tuned_time=time)
    text = report.markdown(table)
    assert "UW took 1.20 times as long" in text
    assert "DTP took 0.85 times as long" in text
    assert "GD (joint) took" not in text


def test_a_variant_that_is_not_tuned_has_no_rate():
    table = fabricated(variants()[:2], batch_sizes=SIZES)
    untuned = {"rate": None, "batch_size": None, "tuned_time": None}
    nothing = {key: Estimate(math.nan, math.nan, 0) for key in table.rows[1].delta}
    table.rows[1] = dataclasses.replace(table.rows[1], **untuned, delta=nothing, gain=nothing)
    (line,) = [x for x in report.markdown(table).splitlines() if x.startswith("| UW | 1.71x")]
    assert line.endswith("|  |")


def markdown_tables(text):
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([rows[0], *rows[2:]])  # without the rule
            assert len({len(row) for row in rows}) == 1
            rows = []
    return found


def estimate(cell):
    mean, half = re.match(
        r"([-+]\d+\.\d) ± (\d+\.\d)", cell.replace("\N{NO-BREAK SPACE}", " ")
    ).groups()
    return pytest.approx((float(mean), float(half)), abs=0.05)


def test_markdown_holds_the_numbers():
    table = fabricated(variants())
    gains, differences, *by_task, groups = markdown_tables(report.markdown(table, "x"))
    by_title = {row.variant.title: row for row in table.rows}
    assert [cells[0] for cells in gains[1:]] == list(by_title)
    for cells in gains[1:]:
        row = by_title[cells[0]]
        assert cells[1:3] == [f"{row.time:.2f}x", f"{row.memory:.2f}x"]
        for cell, budget in zip(cells[3:], ("batches", "time", "tuned"), strict=True):
            assert row.delta[budget, "held_out"][:2] == estimate(cell)
        assert cells[-1].endswith("(0.003)")
    assert [cells[0] for cells in differences[1:]] == list(by_title)[1:]
    for cells in differences[1:]:
        row = by_title[cells[0]]
        keys = [*((b, "held_out") for b in ("batches", "time", "tuned")), ("tuned", "train")]
        for cell, key in zip(cells[1:], keys, strict=True):
            assert row.gain[key][:2] == estimate(cell)
            assert cell.endswith(f" {row.verdict(*key)}")
    assert len(by_task) == 6  # three budgets, held-out and training data
    assert by_task[0][1][1:] == ["0.6500"] * 14
    # 0.701 over 0.65 is a gain of 7.8 per cent.
    assert by_task[0][3] == ["UW", *["0.7010 (+7.8)"] * 14]
    selective = [row for row in table.rows if row.variant.settings["method"] == "selective"]
    assert groups[1:] == [[r.variant.title, f"{r.groups:.1f}", "5 %", "0.25"] for r in selective]


def test_csv_holds_the_numbers(tmp_path):
    table = fabricated(variants(), diverged=["uw"])
    report.write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9 * len(table.rows) + 3
    found = {(line["variant"], line["budget"], line["split"]): line for line in lines}
    for row in table.rows:
        for key, delta in row.delta.items():
            budget, split = key
            line = found[row.variant.name, budget, split]
            if row.variant.name == "uw":
                assert (line["delta_m"], line["runs"], line["diverged"]) == ("", "0", "5")
                assert line["AUC class1"] == ""
                continue
            for column, value in (
                ("batches", row.batches[budget]),
                ("rate", 0.003),
                ("batch_size", 32),
                ("runs", 5),
                ("diverged", 0),
                ("delta_m", delta.mean),
                ("delta_m_half", delta.half),
                ("gain", row.gain[key].mean),
                ("gain_half", row.gain[key].half),
                ("noise_floor", 1.25),
                ("time", row.time),
                ("memory", row.memory),
                ("steps", row.steps),
                ("groups", row.groups),
                ("changes", row.changes),
                ("agreement", row.agreement),
                ("AUC class14", row.metrics[key]["class14"]),
            ):
                assert float(line[column]) == pytest.approx(value, rel=1e-5), column
            assert line["verdict"] == row.verdict(*key)
    single = found["single-task", "batches", "held_out"]
    assert (single["AUC class1"], single["runs"], single["delta_m"]) == ("0.65", "5", "")
