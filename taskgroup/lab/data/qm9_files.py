"""The molecules of QM9, read from the CSV files of the package qm9pack and kept as arrays."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taskgroup.lab.molecules.coulomb import coulomb_features
from taskgroup.lab.words import listed

__all__ = [
    "ATOMS",
    "COLUMNS",
    "PARTS",
    "Molecules",
    "cache_folder",
    "check_part",
    "csv_folder",
    "molecules",
]

#: The CSV files and the number of molecules in each: 130,831 in all. QM9 has 133,885, less the
#: 3,054 that its authors list as uncharacterised.
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

_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
_ENTRY = re.compile(r"[^\[\],'\s]+")  # of a list as Python prints it
_NEEDED = ("XYZ_file", "N_atoms", "Elements", "XYZ_Ang", *COLUMNS.values())
_VERSION = 1  # of the cache; a cache of another version is written anew
_CHUNK = 4096  # molecules at a time, to keep the memory small


class Molecules(NamedTuple):
    """Molecules as arrays; those of the cache are mapped, so processes share them.

    Attributes:
        charges: [N, 29] uint8, nuclear charges; 0 is padding.
        positions: [N, 29, 3] float32, ångström.
        coulomb: [N, 435] float32, see :func:`~taskgroup.lab.molecules.coulomb.coulomb_features`.
        targets: [N, 11] float64, in the units and the order of :data:`COLUMNS`.
    """

    charges: NDArray[np.uint8]
    positions: NDArray[np.float32]
    coulomb: NDArray[np.float32]
    targets: NDArray[np.float64]


def csv_folder(root: str | Path | None = None) -> Path:
    """The folder with the CSV files: ``root``, or that of the installed package qm9pack.

    Raises:
        ImportError: if no folder is given and qm9pack is not installed.
        ValueError: if a file is missing.
    """
    if root is None:
        # The package is not imported: that would import pandas.
        spec = importlib.util.find_spec("qm9pack")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                "The molecules of QM9 ship with qm9pack, which is not installed: "
                "pip install 'taskgroup[qm9]' (100 MB)."
            )
        folder = Path(spec.submodule_search_locations[0]) / "data"
    else:
        folder = Path(root)
    if missing := [name for name in PARTS if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} lacks {listed(missing)} of QM9; install qm9pack again: "
            "pip install --force-reinstall --no-deps qm9pack."
        )
    return folder


def cache_folder() -> Path:
    """Where the arrays are kept: ``taskgroup`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskgroup"


@cache
def molecules(root: str | None = None) -> Molecules:
    """All molecules, from the cache, which is written at the first call (300 MB, half a minute).

    Raises:
        ImportError: if no folder is given and qm9pack is not installed.
        ValueError: if a file is missing, lacks a column, is cut off, or holds something that is
            not a molecule; or if the cache cannot be written or read. The sentence says what to do.
    """
    folder = csv_folder(root)
    header = {
        "version": _VERSION,
        "bytes": {name: (folder / name).stat().st_size for name in PARTS},
    }
    where = cache_folder() / "qm9"
    if root is not None:  # each folder has a cache of its own
        digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        where = where.with_name(f"qm9-{digest}")
    there = _read_header(where)
    if there != header:
        if there is not None:
            warnings.warn(
                f"{where} holds arrays of other files or of another version; it is written anew.",
                stacklevel=2,
            )
        _write(where, header, folder)
    try:
        arrays = [np.load(where / f"{name}.npy", mmap_mode="r") for name in Molecules._fields]
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read ({error}); delete the folder.") from None
    found = Molecules(*arrays)
    if len({len(array) for array in found}) != 1:
        raise ValueError(f"{where} holds arrays of different lengths; delete the folder.")
    return found


def _read_header(where: Path) -> object:
    """What the cache says of itself; None if there is no cache."""
    try:
        return json.loads((where / "header.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return "unreadable"


def _write(where: Path, header: dict[str, object], folder: Path) -> None:
    """Write the cache whole or not at all; the last of several processes that write wins."""
    arrays = _read(folder)
    made: str | None = None
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix="qm9-", dir=where.parent)
        for name in Molecules._fields:
            np.save(Path(made) / f"{name}.npy", getattr(arrays, name))
        (Path(made) / "header.json").write_text(json.dumps(header))
        if where.exists():
            shutil.rmtree(where, ignore_errors=True)
        Path(made).rename(where)
    except OSError as error:
        if _read_header(where) == header:  # another process was faster
            return
        raise ValueError(
            f"{where} cannot be written ({error.strerror or error}); it needs 300 MB. Set "
            "XDG_CACHE_HOME to a folder on a disk with space."
        ) from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _read(folder: Path) -> Molecules:
    """All molecules of the CSV files."""
    parts = [molecule for name in PARTS for molecule in _rows(folder / name)]
    charges, positions, targets = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    coulomb = np.concatenate(
        [
            coulomb_features(charges[i : i + _CHUNK], positions[i : i + _CHUNK])
            for i in range(0, len(charges), _CHUNK)
        ]
    )
    return Molecules(charges, positions, coulomb, targets)


Row = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float64]]


def _rows(file: Path, problems: Callable[[str], None] | None = None) -> Iterator[Row]:
    """The molecules of a file: charges [29], positions [29, 3] and targets [11] of each.

    What is wrong is raised as a ValueError, or passed to ``problems``.
    """
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        reader = csv.DictReader(lines)
        if missing := [name for name in _NEEDED if name not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{file} lacks the columns {listed(missing)}; the columns of qm9pack 1.0.3 are "
                "expected: pip install 'qm9pack==1.0.3'."
            )
        rows = 0
        try:
            for row in reader:
                rows += 1
                try:
                    yield _molecule(row)
                except (KeyError, TypeError, ValueError) as error:
                    sentence = f"{file}, line {reader.line_num}: {_reason(error)}"
                    if problems is None:
                        raise ValueError(f"{sentence}; install qm9pack again.") from None
                    problems(f"{sentence}.")
        except csv.Error as error:
            raise ValueError(f"{file} is not a CSV file: {error}.") from None
    if rows != PARTS[file.name] and problems is None:
        raise ValueError(
            f"{file} holds {rows:,} molecules instead of {PARTS[file.name]:,}; install qm9pack "
            "again: pip install --force-reinstall --no-deps qm9pack."
        )


def _molecule(row: dict[str, str]) -> Row:
    numbers = [_NUMBERS[name] for name in _ENTRY.findall(row["Elements"])]
    # Some numbers end with the decimal point, which JSON does not allow.
    places = [float(number) for number in _ENTRY.findall(row["XYZ_Ang"])]
    n_atoms = int(row["N_atoms"])
    if not 1 <= n_atoms <= ATOMS or len(numbers) != n_atoms or len(places) != 3 * n_atoms:
        raise ValueError(f"{n_atoms} atoms, {len(numbers)} elements, {len(places)} coordinates")
    charges = np.zeros(ATOMS, np.uint8)
    positions = np.zeros((ATOMS, 3), np.float32)
    charges[:n_atoms] = numbers
    positions[:n_atoms] = np.reshape(places, (n_atoms, 3))
    targets = np.array([float(row[column]) for column in COLUMNS.values()])
    if not (np.isfinite(positions).all() and np.isfinite(targets).all()):
        raise ValueError("a number is not finite")
    return charges, positions, targets


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no element {error.args[0]!r} in QM9"
    return f"this is not a molecule ({error})"


def check_part(file: Path) -> tuple[int, list[str]]:
    """The number of molecules that can be read from a file, and a sentence per problem."""
    problems: list[str] = []
    try:
        whole = sum(1 for _ in _rows(file, problems.append))
    except (OSError, ValueError) as error:
        return 0, [str(error)]
    return whole, problems
