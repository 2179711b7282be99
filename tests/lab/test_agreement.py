"""The agreement of partitions, against scikit-learn."""

import math
import random

import pytest
from sklearn.metrics import adjusted_rand_score

from taskgroup.lab.studies.agreement import agreement, rand_index


def labels(partition):
    found = {task: k for k, group in enumerate(partition) for task in group}
    return [found[task] for task in sorted(found)]


def drawn(n_tasks, n_groups):
    groups = [[] for _ in range(n_groups)]
    for task in range(n_tasks):
        random.choice(groups).append(f"t{task:02}")
    return [group for group in groups if group]


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 11, 40])
def test_rand_index(n_tasks):
    random.seed(n_tasks)
    for _ in range(50):
        one, other = (drawn(n_tasks, random.randint(1, n_tasks)) for _ in range(2))
        wanted = adjusted_rand_score(labels(one), labels(other))
        assert rand_index(one, other) == pytest.approx(wanted, abs=1e-12)
        assert rand_index(one, one) == 1.0


def test_agreement():
    one, other, third = [["a", "b"], ["c"]], [["a"], ["b", "c"]], [["a", "b", "c"]]
    wanted = sum(rand_index(*pair) for pair in ((one, other), (one, third), (other, third))) / 3
    assert agreement([one, other, third]) == pytest.approx(wanted)
    assert math.isnan(agreement([one]))
    assert math.isnan(agreement([]))
