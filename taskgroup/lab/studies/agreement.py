"""How far the partitions of several runs agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

__all__ = ["agreement", "rand_index"]

Partition = Sequence[Sequence[str]]


def agreement(partitions: Iterable[Partition]) -> float:
    """The mean adjusted Rand index over all pairs of partitions; NaN for a single one."""
    found = [rand_index(a, b) for a, b in itertools.combinations(list(partitions), 2)]
    return sum(found) / len(found) if found else math.nan


def rand_index(one: Partition, other: Partition) -> float:
    """The adjusted Rand index of two partitions of the same tasks.

    It is 1 for equal partitions, and 0 in the mean for random ones with groups of these sizes
    (Hubert and Arabie, "Comparing partitions", Journal of Classification, 1985).

    Example:
        >>> rand_index([["a", "b"], ["c", "d"]], [["d", "c"], ["a", "b"]])
        1.0
        >>> round(rand_index([["a", "b"], ["c", "d"]], [["a", "c"], ["b", "d"]]), 3)
        -0.5
    """
    in_one, in_other = _pairs(map(len, one)), _pairs(map(len, other))
    in_both = _pairs(len({*a} & {*b}) for a in one for b in other)
    by_chance = in_one * in_other / max(1, _pairs([sum(map(len, one))]))
    most = (in_one + in_other) / 2
    return 1.0 if most == by_chance else (in_both - by_chance) / (most - by_chance)


def _pairs(sizes: Iterable[int]) -> int:
    return sum(math.comb(size, 2) for size in sizes)
