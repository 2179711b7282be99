"""From an affinity matrix to a partition."""

import numpy as np
import pytest
import torch
from sklearn.cluster import AffinityPropagation
from sklearn.exceptions import ConvergenceWarning

import taskgroup as tg


def labels_of(blocks, strength=0.8, against=-0.4, seed=0):
    """An affinity with these blocks, in arbitrary units per column, and the labels they mean."""
    labels = np.repeat(range(len(blocks)), blocks)
    same = labels[:, None] == labels
    rng = np.random.default_rng(seed)
    matrix = np.where(same, strength, against) + 0.05 * rng.standard_normal(same.shape)
    np.fill_diagonal(matrix, 1)
    scale = 10.0 ** rng.uniform(-4, 0, len(labels))
    return torch.tensor(matrix * scale, dtype=torch.float32), labels.tolist()


@pytest.mark.parametrize("blocks", [[2], [1, 1], [3], [2, 1], [3, 3], [5, 4, 2], [6, 5, 4, 3]])
def test_units_of_a_task_do_not_matter(blocks):
    for seed in range(20):
        matrix, expected = labels_of(blocks, seed=seed)
        assert tg.AffinityPropagation()(matrix).tolist() == expected


def test_is_scikit_learns_clustering_of_the_normalised_affinity():
    rng = np.random.default_rng(0)
    agreed = 0
    for _ in range(200):
        matrix = rng.uniform(-1, 1, (8, 8)).astype(np.float32)
        np.fill_diagonal(matrix, rng.uniform(0.1, 1, 8))
        ratio = matrix.astype(np.float64) / matrix.diagonal()
        model = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)
        labels = tg.AffinityPropagation()(torch.tensor(matrix))
        try:
            expected = model.fit((ratio + ratio.T) / 2).labels_
        except ConvergenceWarning:
            assert labels is None
            continue
        # The same partition; the numbers of the groups may follow another order.
        pairs = set(zip(labels.tolist(), expected.tolist(), strict=True))
        assert len(pairs) == len(set(labels.tolist())) == len(set(expected.tolist()))
        agreed += 1
    assert agreed > 150


def test_tasks_without_self_affinity_stay_alone():
    matrix, _ = labels_of([3, 3])
    matrix[1, 1] = 0.0
    matrix[4, 4] = -0.1
    partition = {}
    for task, label in enumerate(tg.AffinityPropagation()(matrix).tolist()):
        partition.setdefault(label, set()).add(task)
    assert sorted(map(sorted, partition.values())) == [[0, 2], [1], [3, 5], [4]]
    assert len(set(tg.AffinityPropagation()(torch.zeros(5, 5)).tolist())) == 5


def test_no_measured_affinity_is_no_reason_to_join():
    for count in (1, 2, 3):
        assert len(set(tg.AffinityPropagation()(torch.eye(count)).tolist())) == count


def test_preference_steers_the_number_of_groups():
    matrix, _ = labels_of([4, 4])
    few = tg.AffinityPropagation(preference=-20.0)(matrix)
    many = tg.AffinityPropagation(preference=1.0)(matrix)
    assert len(set(few.tolist())) < len(set(many.tolist()))


@pytest.mark.parametrize("blocks", [[2, 2], [3, 3], [4, 4, 4], [5, 3, 2]])
def test_heterogeneous_spreads_every_cluster_over_as_many_groups(blocks):
    matrix, clusters = labels_of(blocks)
    groups = tg.Heterogeneous()(matrix).tolist()
    assert len(set(groups)) == len(blocks)
    for cluster in set(clusters):
        members = [group for group, c in zip(groups, clusters, strict=True) if c == cluster]
        counts = [members.count(group) for group in set(groups)]
        assert max(counts) - min(counts) <= 1


def test_no_convergence_keeps_the_partition():
    rng = np.random.default_rng(0)
    matrix = torch.tensor(rng.uniform(-1, 1, (30, 30)), dtype=torch.float32)
    matrix.fill_diagonal_(1.0)
    impatient = tg.AffinityPropagation(max_iter=2)
    assert impatient(matrix) is None


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: tg.Fixed([["a"], []]), ValueError, "an empty group"),
        (lambda: tg.Fixed([["a", "b"], ["b"]]), ValueError, "'b' twice"),
        (lambda: tg.Fixed(["a", "b"]), TypeError, r"write \['a'\]"),
        (lambda: tg.RandomGroups(0), ValueError, "at least one group, got m=0"),
        (lambda: tg.AffinityPropagation(damping=0.4), ValueError, r"damping must be in \[0.5, 1\)"),
        (lambda: tg.AffinityPropagation(max_iter=0), ValueError, "at least 1"),
    ],
)
def test_bad_groupings(make, error, said):
    with pytest.raises(error, match=said):
        make()
