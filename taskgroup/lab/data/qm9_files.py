"""The molecules of QM9, read from the CSV files of the package qm9pack and kept as arrays."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

import taskgroup as tg
from taskgroup.lab.data.cache import cache_folder
from taskgroup.lab.molecules.coulomb import coulomb_features
from taskgroup.lab.words import listed

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["ATOMS", "COLUMNS", "PARTS", "Molecules", "check_part", "csv_folder", "molecules"]

#: The CSV files and the number of molecules in each file of qm9pack: 130,831 in all. QM9 has
#: 133,885, less the 3,054 that its authors list as uncharacterised.
PARTS = {"qm9_part1.csv": 43_610, "qm9_part2.csv": 43_611, "qm9_part3.csv": 43_610}
#: The columns of the targets, by task; see :data:`taskgroup.lab.data.qm9.TASKS`.
COLUMNS = {
    "dipole": "Dipole_debye",
    "polarizability": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "u0": "InternalEnergy_0K_au",
    "u": "InternalEnergy_298K_au",
    "h": "Enthalphy_298K_au",
    "g": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}
ATOMS = 29  # of the largest molecule

_CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_NEEDED = ("N_atoms", "Elements", "XYZ_Ang", *COLUMNS.values())
_LISTS = str.maketrans("", "", "[]' ")  # what surrounds the entries of a list in these files
_FARTHEST = 1e6  # ångström; no atom is farther from the origin, and neither infinite nor NaN
_CHUNK = 4096  # molecules at a time, to keep the memory small
_BLOCK = 2**20  # bytes

_VERSION = 1  # of what is kept; to be counted up when _ROW or coulomb_features changes
_ROW = np.dtype(
    [
        ("targets", np.float64, len(COLUMNS)),
        ("coulomb", np.float32, ATOMS * (ATOMS + 1) // 2),
        ("positions", np.float32, (ATOMS, 3)),
        ("charges", np.uint8, ATOMS),
    ],
    align=True,
)


class Molecules(NamedTuple):
    """Molecules as arrays that are mapped from a file, so that processes share the memory.

    Attributes:
        charges: [N, 29] uint8, nuclear charges; 0 is padding, which comes last.
        positions: [N, 29, 3] float32, ångström.
        coulomb: [N, 435] float32, see :func:`~taskgroup.lab.molecules.coulomb.coulomb_features`.
        targets: [N, 11] float64, in the units and the order of :data:`COLUMNS`.
    """

    charges: NDArray[np.uint8]
    positions: NDArray[np.float32]
    coulomb: NDArray[np.float32]
    targets: NDArray[np.float64]


def csv_folder() -> Path:
    """The folder of the CSV files of the installed package qm9pack.

    Raises:
        ImportError: if qm9pack is not installed.
    """
    # The package is not imported: that would import pandas.
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The molecules of QM9 ship with qm9pack, which is not installed: "
            "pip install 'taskgroup[qm9]' (100 MB)."
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def molecules(root: str | Path | None = None) -> Molecules:
    """All molecules of the three CSV files, in their order.

    The first call reads the files, which takes half a minute, and keeps the molecules in a file of
    290 MB in :func:`~taskgroup.lab.data.cache.cache_folder`; if several processes ask at once, one
    reads and the others wait. The name of that file holds a digest of the CSV files, so other CSV
    files, and another version of this package, have a file of their own. A damaged file is written
    again.

    Args:
        root: folder of the CSV files; None takes those of the installed qm9pack. The files of
            another folder may hold fewer molecules.

    Raises:
        ImportError: if no folder is given and qm9pack is not installed.
        ValueError: if a CSV file is missing, lacks a column, is cut off, or holds something that is
            not a molecule; or if the molecules cannot be kept. The sentence says what to do.
    """
    folder = csv_folder() if root is None else Path(root)
    if missing := [name for name in PARTS if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {listed(missing)} of QM9; {_advice(folder)}.")
    file = cache_folder() / f"qm9-{_digest(folder)}.npy"
    rows = _kept(file)
    if rows is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _one_process(file.parent):
                rows = _kept(file)  # another process may have written it meanwhile
                if rows is None:
                    print(
                        f"Reading the molecules of QM9 from {folder}. This takes half a minute, "
                        f"once; they are kept in {file}",
                        file=sys.stderr,
                    )
                    tg.checkpoint.write_atomically(file, lambda stream: _write(stream, folder))
                    rows = np.load(file, mmap_mode="r")
        except OSError as error:
            why = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise ValueError(
                f"The molecules of QM9 cannot be kept in {file.parent} ({why.strerror or why}), "
                "which takes 290 MB; set TASKGROUP_CACHE to a folder that can be written, on a "
                "disk with space."
            ) from None
    plain = rows.view(np.ndarray)  # whose rows are read faster than those of a memmap
    return Molecules(*(plain[name] for name in Molecules._fields))


def check_part(
    file: Path, quick: bool = False, watch: Callable[[int], None] = lambda whole: None
) -> tuple[int, int, list[str]]:
    """Check a CSV file: the molecules it lists, those that can be read, and a sentence per problem.

    Args:
        file: one of :data:`PARTS`.
        quick: only count the lines and look for missing columns.
        watch: called from time to time with the number of molecules read so far.
    """
    lines = whole = 0
    problems: list[str] = []

    def tell(fault: str) -> None:
        problems.append(f"{fault}.")

    try:
        lines = _lines(file, tell)
        found = _read(file, lines, tell)
        if quick:
            next(found, None)
            return lines, lines, problems
        for _ in found:
            whole += 1
            if whole % 1000 == 0:
                watch(whole)
    except ValueError as error:
        problems.append(str(error))
    return lines, whole, problems


def _advice(folder: Path) -> str:
    if _is_of_package(folder):
        return "install it again: pip install --force-reinstall --no-deps 'qm9pack>=1.0.3,<2'"
    return "copy the file again from the folder data of the package qm9pack"


def _is_of_package(folder: Path) -> bool:
    return folder.parts[-2:] == ("qm9pack", "data")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise a ValueError if a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error}).") from None


def _digest(folder: Path) -> str:
    """A digest of the CSV files, and of the version of what is kept of them."""
    digest = hashlib.sha256(str(_VERSION).encode())
    for name in PARTS:
        with _reading(folder / name), (folder / name).open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]


def _kept(file: Path) -> NDArray[Any] | None:
    """The rows of the file that keeps the molecules; None, with a warning if it is damaged."""
    try:
        rows: NDArray[Any] = np.load(file, mmap_mode="r")
    except OSError:
        return None
    except (ValueError, EOFError) as error:
        why = str(error)
    else:
        if rows.dtype == _ROW and rows.ndim == 1:
            return rows
        why = f"it holds {rows.dtype}"
    warnings.warn(f"{file} is damaged ({why}); it is written again.", stacklevel=3)
    return None


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block, where the system can lock a folder.

    Where it cannot, several processes read the CSV files, and each writes the same file whole.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _write(stream: BinaryIO, folder: Path) -> None:
    """Write the molecules of a folder as an array of ``_ROW``."""

    def refuse(fault: str) -> None:
        raise ValueError(f"{fault}; {_advice(folder)}.")

    lines = {name: _lines(folder / name, refuse) for name in PARTS}
    for name, number in lines.items():
        if _is_of_package(folder) and number != PARTS[name]:
            refuse(f"{folder / name} lists {number:,} molecules instead of {PARTS[name]:,}")
    header = {"descr": np.lib.format.dtype_to_descr(_ROW), "fortran_order": False}
    np.lib.format.write_array_header_1_0(stream, {**header, "shape": (sum(lines.values()),)})
    for name, number in lines.items():
        found = _read(folder / name, number, refuse)
        while some := list(islice(found, _CHUNK)):
            stream.write(_rows(some).tobytes())


class _Molecule(NamedTuple):
    charges: list[int]
    positions: NDArray[np.float64]  # [n_atoms, 3]
    targets: list[float]


def _rows(some: Sequence[_Molecule]) -> NDArray[Any]:
    """Molecules as an array of ``_ROW``."""
    rows = np.zeros(len(some), _ROW)
    for k, (charges, positions, _) in enumerate(some):
        rows["charges"][k, : len(charges)] = charges
        rows["positions"][k, : len(charges)] = positions
    rows["targets"] = [molecule.targets for molecule in some]
    rows["coulomb"] = coulomb_features(rows["charges"], rows["positions"])
    return rows


def _lines(file: Path, tell: Callable[[str], None]) -> int:
    """The number of lines after the first; ``tell`` is called if the last line has no end."""
    number, last = 0, b""
    with _reading(file), file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            number, last = number + block.count(b"\n"), block[-1:]
    if last != b"\n":
        tell(f"{file} is cut off in the middle of a line" if last else f"{file} is empty")
    return max(number - 1, 0)


def _read(file: Path, lines: int, tell: Callable[[str], None]) -> Iterator[_Molecule]:
    """The molecules of a file, one per line; ``tell`` gets what is wrong, and may raise it."""
    rows = 0
    with _reading(file), file.open(newline="", encoding="utf-8", errors="replace") as stream:
        reader = csv.reader(stream)
        try:
            header = next(reader, [])
            if missing := [name for name in _NEEDED if name not in header]:
                return tell(f"{file} lacks the columns {listed(missing)} of qm9pack 1.0.3")
            places = [header.index(name) for name in _NEEDED]
            for row in reader:
                rows += 1
                try:
                    if len(row) != len(header):
                        raise ValueError(f"it has {len(row)} of {len(header)} columns")
                    molecule = _molecule(*(row[place] for place in places))
                except ValueError as error:
                    tell(f"{file}, line {reader.line_num}, is not a molecule: {error}")
                else:
                    yield molecule
        except csv.Error as error:
            return tell(f"{file}, line {reader.line_num}, is not CSV: {error}")
    if rows != lines:
        tell(f"{file} has {lines:,} lines for {rows:,} molecules")
    return None


def _molecule(n_atoms: str, elements: str, positions: str, *targets: str) -> _Molecule:
    """A molecule from the columns ``_NEEDED``; a ValueError says what is wrong."""
    names = elements.translate(_LISTS).split(",")
    if unknown := sorted(set(names) - _CHARGES.keys()):
        raise ValueError(f"QM9 has no element {unknown[0]!r}")
    # Some numbers end with the decimal point, which JSON does not allow.
    numbers = np.array([float(number) for number in positions.translate(_LISTS).split(",")])
    if not 1 <= int(n_atoms) == len(names) == len(numbers) / 3 <= ATOMS:
        raise ValueError(f"{n_atoms} atoms, {len(names)} elements and {len(numbers)} coordinates")
    if not (np.abs(numbers) < _FARTHEST).all():
        raise ValueError("a coordinate is not a number of ångström")
    if len({*zip(*numbers.reshape(-1, 3).T.tolist(), strict=True)}) < len(names):
        raise ValueError("two atoms are at the same place")
    values = [float(target) for target in targets]
    if not all(map(math.isfinite, values)):
        raise ValueError("a target is not finite")
    return _Molecule([_CHARGES[name] for name in names], numbers.reshape(-1, 3), values)
