"""The CSV files of QM9 and the file that keeps their molecules: whole, or a sentence on why not."""

import re
import resource
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from typer.testing import CliRunner

from taskgroup.lab.cli import app
from taskgroup.lab.data import qm9_files
from taskgroup.lab.data.cache import cache_folder
from taskgroup.lab.data.check import check, recognise
from taskgroup.lab.data.qm9_files import ATOMS, COLUMNS, molecules
from taskgroup.lab.molecules.coulomb import coulomb_features
from tests.lab.tiny_qm9 import HEADER, line, make_molecules, write_qm9


@pytest.fixture
def root(tmp_path):
    write_qm9(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TASKGROUP_CACHE", str(folder))
    return folder


def never(*_):
    raise AssertionError("read again")


def test_molecules_are_those_of_the_files_in_their_order(root):
    made = make_molecules()
    found = molecules(root)
    assert [(a.dtype, a.shape) for a in found] == [
        ("uint8", (200, ATOMS)),
        ("float32", (200, ATOMS, 3)),
        ("float32", (200, 435)),
        ("float64", (200, 11)),
    ]
    for row, (charges, positions) in enumerate(zip(made.charges, made.positions, strict=True)):
        n_atoms = len(charges)
        assert found.charges[row].tolist() == charges + [0] * (ATOMS - n_atoms)
        np.testing.assert_allclose(found.positions[row, :n_atoms], positions, rtol=1e-6)
        assert not found.positions[row, n_atoms:].any()
    for place, task in enumerate(COLUMNS):
        assert found.targets[:, place].tolist() == made.column(task).tolist()
    np.testing.assert_array_equal(found.coulomb, coulomb_features(found.charges, found.positions))


def test_more_molecules_than_are_held_at_a_time(root, monkeypatch):
    whole = molecules(root)
    monkeypatch.setattr(qm9_files, "_CHUNK", 7)
    monkeypatch.setenv("TASKGROUP_CACHE", str(root / "other"))
    assert all(map(np.array_equal, whole, molecules(root)))


def test_the_second_call_reads_the_kept_file_alone(root, cache, monkeypatch, capsys):
    first = molecules(root)
    said = capsys.readouterr().err
    (kept,) = cache.iterdir()
    assert str(kept) in said
    monkeypatch.setattr(qm9_files, "_write", never)
    assert all(map(np.array_equal, first, molecules(root)))
    assert capsys.readouterr().err == ""
    # The same files elsewhere are the same molecules.
    assert all(map(np.array_equal, first, molecules(shutil.copytree(root, root / "copy"))))


def test_the_kept_file_is_read_from_a_folder_that_cannot_be_locked_or_written(root, monkeypatch):
    first = molecules(root)
    monkeypatch.setattr(qm9_files, "_one_process", never)
    assert all(map(np.array_equal, first, molecules(root)))


def test_other_files_and_another_version_have_a_file_of_their_own(root, cache, monkeypatch):
    first = molecules(root)
    other = write_qm9(root, make_molecules(seed=1))
    second = molecules(root)
    assert second.targets[:, 0].tolist() == other.column("dipole").tolist()
    assert not np.array_equal(first.targets, second.targets)
    monkeypatch.setattr(qm9_files, "_VERSION", 2)
    assert all(map(np.array_equal, second, molecules(root)))
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "cut header", "empty", "text", "other array"])
def test_a_damaged_file_is_written_again(damage, root, cache, monkeypatch):
    first = [array.copy() for array in molecules(root)]
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # what is mapped stays whole
    if damage == "other array":
        with kept.open("wb") as stream:
            np.save(stream, np.zeros((200, 3)))
    else:
        bad = {"cut": whole[:-1], "cut header": whole[:30], "empty": b"", "text": b"molecules"}
        kept.write_bytes(bad[damage])
    with pytest.warns(UserWarning, match=rf"{kept} is damaged \(.+\); it is written again"):
        again = molecules(root)
    assert all(map(np.array_equal, first, again))
    monkeypatch.setattr(qm9_files, "_write", never)
    molecules(root)


@pytest.mark.parametrize("locks", [True, False])
def test_of_several_that_ask_at_once_one_reads_and_all_get_the_whole(
    locks, root, cache, monkeypatch
):
    write, written = qm9_files._write, []

    def slowly(stream, folder):
        written.append(1)
        time.sleep(0.2)
        write(stream, folder)

    monkeypatch.setattr(qm9_files, "_write", slowly)
    if not locks:  # then each writes the whole file
        monkeypatch.setattr(qm9_files, "fcntl", None)
    askers = 4 if locks else 1
    barrier = threading.Barrier(askers)

    def ask(_):
        barrier.wait()
        return molecules(root)

    # The system tells locks of threads apart as it does those of processes.
    with ThreadPoolExecutor(askers) as threads:
        found = list(threads.map(ask, range(askers)))
    assert written == [1]
    assert all(len(each.targets) == 200 for each in found)
    assert all(map(np.array_equal, found[0], found[-1]))
    assert len(list(cache.iterdir())) == 1


# Nowhere to keep the molecules


def test_a_folder_that_cannot_be_made(root, cache, monkeypatch):
    cache.write_text("in the way")
    monkeypatch.setattr(qm9_files, "_read", never)
    said = rf"cannot be kept in {cache} \(File exists\).*set TASKGROUP_CACHE to a folder that can"
    with pytest.raises(ValueError, match=said):
        molecules(root)
    monkeypatch.setenv("TASKGROUP_CACHE", str(cache / "below"))
    with pytest.raises(ValueError, match=r"\(Not a directory\).*set TASKGROUP_CACHE"):
        molecules(root)


def test_a_folder_that_cannot_be_written_is_found_before_the_files_are_read(
    root, cache, monkeypatch
):
    def refuse(path, write):
        raise OSError("could not be written") from PermissionError(13, "Permission denied")

    monkeypatch.setattr(qm9_files.tg.checkpoint, "write_atomically", refuse)
    with pytest.raises(ValueError, match=r"\(Permission denied\), which takes 290 MB; set TASKGRO"):
        molecules(root)


def test_no_space(root, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the molecules take 440,000 bytes
    try:
        with pytest.raises(ValueError, match=r"\(File too large\).* on a disk with space") as error:
            molecules(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []
    molecules(root)


def test_the_folder_comes_from_the_environment(tmp_path, monkeypatch):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("TASKGROUP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "taskgroup"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "taskgroup"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    with pytest.raises(ValueError, match=r"There is no home directory .* set TASKGROUP_CACHE"):
        cache_folder()


# CSV files that are not whole

MADE = make_molecules(1)
METHANE = ([6, 1, 1, 1, 1], np.arange(15.0).reshape(5, 3), MADE.targets[0])


def cut_in_a_row(text):
    return text[:-300]


def cut_in_the_last_number(text):
    return text[:-1]


def cut_after_half(text):
    return text[: len(text) // 2].rsplit("\n", 1)[0] + "\n" + '"dsgdb9nsd_1.xyz",1,"C"\n'


def without_column(text):
    return text.replace("Enthalphy_298K_au", "Enthalpy_298K_au")


def with_line(*molecule, **changes):
    def change(text):
        new = line(*(molecule or METHANE))
        for old, other in changes.get("replace", {}).items():
            assert old in new
            new = new.replace(old, other)
        return text + new + "\n"

    return change


FAULTS = {
    "cut in a row": (cut_in_a_row, "is cut off in the middle of a line"),
    "cut in the last number": (cut_in_the_last_number, "is cut off in the middle of a line"),
    "short line": (cut_after_half, "line 32, is not a molecule: it has 3 of 25 columns"),
    "empty": (lambda text: "", "is empty"),
    "no header": (lambda text: text[len(HEADER) + 1 :], "lacks the columns .*'N_atoms'"),
    "another version": (without_column, r"lacks the columns \['Enthalphy_298K_au'\] of qm9pack"),
    "element": (with_line([14, 1], np.eye(2, 3), METHANE[2]), "QM9 has no element '14'"),
    "atoms": (with_line(replace={",5,": ",6,"}), "6 atoms, 5 elements and 15 coordinates"),
    "large": (
        with_line([1] * 30, np.arange(90.0).reshape(30, 3), METHANE[2]),
        "30 atoms, 30 elements and 90 coordinates",
    ),
    "no number": (with_line(replace={"[3.,": "[x,"}), "could not convert string to float: 'x'"),
    "infinite": (with_line(replace={"[3.,": "[inf,"}), "a coordinate is not a number of ångström"),
    "far": (with_line(replace={"[3.,": "[1e39,"}), "a coordinate is not a number of ångström"),
    "twice": (with_line([6, 6], np.ones((2, 3)), METHANE[2]), "two atoms are at the same place"),
    "target": (
        with_line(*METHANE[:2], {**METHANE[2], "g": float("nan")}), "a target is not finite"
    ),
    "quotes": (lambda text: text + '"' + "x" * 200_000 + "\n", "is not CSV: field larger than"),
    "blank line": (lambda text: text + "\n", "line 69, is not a molecule: it has 0 of 25 columns"),
    "broken line": (with_line(replace={'"C"': '"C\n"'}), "has 69 lines for 68 molecules"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_whole_is_named_in_a_sentence(fault, root, cache):
    change, said = FAULTS[fault]
    file = root / "qm9_part2.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=said) as error:
        molecules(root)
    assert str(file) in str(error.value)
    advice = "; copy the file again from the folder data of the package qm9pack."
    assert str(error.value).endswith(advice)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_it_too(fault, root):
    change, said = FAULTS[fault]
    file = root / "qm9_part2.csv"
    file.write_text(change(file.read_text()))
    result = invoke("data", "check", root)
    assert result.exit_code == 1
    checked = {part.split: part for part in check(root)}
    assert checked["qm9_part1.csv"] == ("qm9_part1.csv", 66, 43_610, 66, [])
    problems = checked["qm9_part2.csv"].problems
    assert all(problem in result.output and problem.endswith(".") for problem in problems)
    assert any(re.search(said, problem) for problem in problems)


def test_bytes_that_are_no_text(root):
    file = root / "qm9_part3.csv"
    file.write_bytes(file.read_bytes() + b"\xff\xfe\x00\n")
    with pytest.raises(ValueError, match=r"qm9_part3.csv, line 69, is not (a molecule|CSV)"):
        molecules(root)


def test_files_that_are_missing(root):
    (root / "qm9_part1.csv").unlink()
    with pytest.raises(ValueError, match=r"lacks \['qm9_part1.csv'\] of QM9; copy the file again"):
        molecules(root)
    result = invoke("data", "check", root)
    assert result.exit_code == 1
    assert f"{root / 'qm9_part1.csv'} cannot be read (No such file or directory)." in result.output


def test_the_package_itself_must_hold_the_published_molecules(tmp_path):
    folder = tmp_path / "qm9pack" / "data"
    write_qm9(folder)
    said = (
        r"qm9_part1.csv lists 66 molecules instead of 43,610; install it again: pip install "
        r"--force-reinstall --no-deps 'qm9pack"
    )
    with pytest.raises(ValueError, match=said):
        molecules(folder)


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "250"})


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_the_check_counts_molecules(options, root):
    result = invoke("data", "check", root, *options)
    assert result.exit_code == 0, result.output
    assert f"{root}: qm9" in result.output
    rows = [words.split() for words in result.output.splitlines() if words.startswith(" qm9_part")]
    assert rows == [
        ["qm9_part1.csv", "66", "43,610", "66", "0"],
        ["qm9_part2.csv", "67", "43,611", "67", "0"],
        ["qm9_part3.csv", "67", "43,610", "67", "0"],
    ]
    assert "This is not the whole public release; it lists qm9_part1.csv: 66 of" in result.output


def test_the_check_reports_every_bad_line_and_counts_the_others(root):
    file = root / "qm9_part1.csv"
    lines = file.read_text().splitlines()
    lines[3] = lines[3].replace("'H'", "'Si'")
    lines[5] = lines[5].rsplit(",", 3)[0]
    file.write_text("\n".join(lines) + "\n")
    (first, *_) = check(root)
    assert (first.listed, first.whole) == (66, 64)
    assert [problem[: len(str(file)) + 8] for problem in first.problems] == [
        f"{file}, line 4",
        f"{file}, line 6",
    ]
    (quick, *_) = check(root, quick=True)
    assert (quick.listed, quick.problems) == (66, [])


def test_the_check_shows_its_progress(root, monkeypatch):
    lines = (root / "qm9_part2.csv").read_text().splitlines(keepends=True)
    (root / "qm9_part2.csv").write_text("".join(lines[:1] + 40 * lines[1:]))
    seen = []
    list(check(root, watch=lambda *state: seen.append(state)))
    assert seen == [("qm9_part2.csv", 1000, 43_611), ("qm9_part2.csv", 2000, 43_611)]


def test_a_folder_of_these_files_is_recognised(root, tmp_path):
    assert recognise(root) == "qm9"
    with pytest.raises(ValueError, match=r"holds none of the data sets: .*qm9_part1.csv \(qm9\)"):
        recognise(tmp_path)


@pytest.mark.parametrize("command", [["train", "qm9"], ["data", "check", "qm9"]])
def test_without_qm9pack_it_says_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "qm9pack", None)
    monkeypatch.chdir(tmp_path)
    result = invoke(*command)
    assert result.exit_code == 2
    assert (
        "qm9pack, which is not installed: pip install 'taskgroup[qm9]' (100 MB)." in result.output
    )
    assert not (tmp_path / "runs").exists()


def test_the_name_stands_for_the_installed_package(monkeypatch, tmp_path, root):
    monkeypatch.setattr(qm9_files, "csv_folder", lambda: root)
    monkeypatch.chdir(tmp_path)
    result = invoke("data", "check", "qm9")
    assert result.exit_code == 0
    assert f"{root}: qm9" in result.output
