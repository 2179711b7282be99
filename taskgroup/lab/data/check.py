"""Check whether a folder holds a whole data set, and report what is missing or broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from taskgroup.lab.data import DATASETS, Taskonomy
from taskgroup.lab.data.qm9_files import PARTS, check_part
from taskgroup.lab.processes import in_processes

__all__ = ["Checked", "check", "recognise"]


class Checked(NamedTuple):
    """The result of checking a split: counts of samples, and one sentence for each problem.

    The data set lists ``listed`` samples, of which ``whole`` can be read; the public release has
    ``published``, or None where it depends on the release. A split of QM9 is one of its CSV files.
    """

    split: str
    listed: int
    published: int | None
    whole: int
    problems: list[str]


def recognise(root: Path) -> str:
    """Return the name of the data set that a folder holds.

    Raises:
        ValueError: if the folder holds none of the data sets.
    """
    for name, kind in DATASETS.items():
        if (root / kind.LISTS).is_dir():
            return name
    if any((root / name).exists() for name in PARTS):
        return "qm9"
    marks = ", ".join(f"{kind.LISTS} ({name})" for name, kind in DATASETS.items())
    marks = f"{marks}, {next(iter(PARTS))} (qm9)"
    raise ValueError(f"{root} holds none of the data sets: it has none of {marks}.")


def check(
    root: Path,
    *,
    quick: bool = False,
    workers: int = 0,
    watch: Callable[[str, int, int], None] = lambda split, done, of: None,
) -> Iterator[Checked]:
    """Check all splits of a data set.

    First, file names are compared: every file that a listed sample needs must be there. Then every
    file is read, and its type, size and values are checked; not if ``quick``. Unlikely values, such
    as an edge map without an edge, are reported as problems, but the sample still counts as whole.
    Of Taskonomy, every subset whose list is there is checked, each building once. Of QM9, every
    line of the CSV files is read in this process; if ``quick``, they are counted. ``watch`` is
    called with the split, the number of samples read so far, and the number to read.

    Raises:
        ValueError: if the folder holds none of the data sets.
    """
    name = recognise(root)
    if name == "qm9":
        for file, published in PARTS.items():
            yield _check_part(root / file, published, quick, watch)
        return
    kind = DATASETS[name]
    seen: set[str] = set()
    for split in kind.SPLITS:
        if kind is Taskonomy and not Taskonomy.list_of(root, split).is_file():
            continue
        try:
            dataset = kind(root, split, bad="keep")
            listed = dataset.listed_ids()
        except ValueError as error:  # for example, there is no list
            yield Checked(split, 0, kind.SPLITS[split], 0, [str(error)])
            continue
        problems: list[str] = []
        missing = list(dataset.problems(listed))
        bad = {problem.sample for problem in missing if not problem.usable}.intersection(listed)
        problems += [problem.sentence for problem in missing]
        if not quick:
            fresh = [sample for sample in dataset.ids if sample not in seen and sample not in bad]
            for done, found in enumerate(in_processes(dataset.inspect, fresh, workers), start=1):
                watch(split, done, len(fresh))
                bad |= {problem.sample for problem in found if not problem.usable}
                problems += [problem.sentence for problem in found]
            seen.update(dataset.ids)
        n_listed = len(dict.fromkeys(listed))
        yield Checked(split, n_listed, kind.SPLITS[split], n_listed - len(bad), problems)


def _check_part(
    file: Path, published: int, quick: bool, watch: Callable[[str, int, int], None]
) -> Checked:
    listed, whole, problems = check_part(
        file, quick, lambda done: watch(file.name, done, published)
    )
    return Checked(file.name, listed, published, whole, problems)
