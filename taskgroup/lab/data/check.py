"""Whether a folder holds a data set whole: what is there, and what is missing or broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from taskgroup.lab.data import DATASETS, Taskonomy
from taskgroup.lab.data.processes import in_processes

__all__ = ["Checked", "check", "recognise"]


class Checked(NamedTuple):
    """What a split was found to hold.

    Attributes:
        split: its name.
        listed: samples that the data set lists.
        published: samples in the public release; None where it depends on the release.
        whole: of these, those that can be read.
        problems: what is wrong, a sentence each.
    """

    split: str
    listed: int
    published: int | None
    whole: int
    problems: list[str]


def recognise(root: Path) -> str:
    """Which data set a folder holds, by name.

    Raises:
        ValueError: if none.
    """
    for name, kind in DATASETS.items():
        if (root / kind.LISTS).is_dir():
            return name
    marks = ", ".join(f"{kind.LISTS} ({name})" for name, kind in DATASETS.items())
    raise ValueError(f"{root} holds none of the data sets: it has none of {marks}.")


def check(
    root: Path,
    *,
    quick: bool = False,
    workers: int = 0,
    watch: Callable[[str, int, int], None] = lambda split, done, of: None,
) -> Iterator[Checked]:
    """Check all splits of a data set.

    Names are compared first: every file that a listed sample needs must be there. Then every file
    is read, and its type, its size and its values are looked at: those that are possible and yet
    odd, such as an edge map without an edge, are problems of samples that are whole. Of Taskonomy
    the subsets whose list is there are checked, each building once.

    Args:
        root: folder of the data set.
        quick: compare names alone.
        workers: processes that read; 0 is this one.
        watch: called with the split, the samples read and all of them.

    Raises:
        ValueError: if the folder holds none of the data sets.
    """
    kind = DATASETS[recognise(root)]
    seen: set[str] = set()
    for split in kind.SPLITS:
        if kind is Taskonomy and not Taskonomy.list_of(root, split).is_file():
            continue
        try:
            dataset = kind(root, split, bad="keep")
            listed = dataset.listed_ids()
        except ValueError as error:  # there is no list, say
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
