"""Groupings learned from the affinity matrix."""

import sys

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


@pytest.mark.parametrize("preference", [float("nan"), float("inf")])
def test_a_preference_must_be_a_number(preference):
    with pytest.raises(ValueError, match="preference must be finite"):
        tg.AffinityPropagation(preference=preference)


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


def partitions(items):
    """All set partitions."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for place, group in enumerate(smaller):
            yield [*smaller[:place], [first, *group], *smaller[place + 1 :]]


def served(matrix, partition):
    """The mean affinity onto a task from the others of its group, summed over the tasks."""
    ratio = matrix.double().numpy() / matrix.double().numpy().diagonal()
    total = 0.0
    for group in partition:
        for k in group:
            others = [ratio[i, k] for i in group if i != k]
            total += np.mean(others) if others else 0.0
    return total


def partition_of(labels):
    groups = {}
    for task, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(task)
    return list(groups.values())


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_exhaustive_is_the_best_of_all_partitions(count):
    rng = np.random.default_rng(count)
    every = list(partitions(list(range(count))))
    for trial in range(12):
        matrix = rng.standard_normal((count, count)) + 0.3 * (trial % 3)
        np.fill_diagonal(matrix, rng.uniform(0.1, 1, count))
        if trial % 2:  # many ties
            matrix = matrix.round()
            np.fill_diagonal(matrix, 0.5)
        matrix = torch.tensor(matrix, dtype=torch.float32)
        for most in range(1, count + 1):
            found = partition_of(tg.Exhaustive(most)(matrix))
            scores = {len(p): [] for p in every if len(p) <= most}
            for partition in every:
                if len(partition) <= most:
                    scores[len(partition)].append(served(matrix, partition))
            best = max(map(max, scores.values()))
            assert len(found) <= most
            assert served(matrix, found) == pytest.approx(best, abs=1e-9)
            fewest = min(m for m, of_m in scores.items() if max(of_m) >= best - 1e-9)
            assert len(found) == fewest


def test_exhaustive_breaks_ties_by_fewer_groups_then_by_the_lowest():
    assert tg.Exhaustive(4)(torch.eye(4)).tolist() == [0, 0, 0, 0]
    # Every pair of two and two serves as well: 1 + 1.
    matrix = torch.tensor([[1.0, 2, 2, 2], [2, 1, 2, 2], [2, 2, 1, 2], [2, 2, 2, 1]])
    assert tg.Exhaustive(4)(matrix).tolist() == [0, 0, 0, 0]
    matrix = torch.tensor([[1.0, 1, -3, 1], [1, 1, 1, -3], [-3, 1, 1, 1], [1, -3, 1, 1]])
    assert tg.Exhaustive(4)(matrix).tolist() == [0, 0, 1, 1]  # not [0, 1, 1, 0]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8])
def test_exhaustive_sees_ties_through_rounding(count):
    """Where all affinities are equal, any groups of two or more serve equally well."""
    for affinity in (0.1, 0.3, 0.7, 0.9):
        matrix = torch.full((count, count), affinity, dtype=torch.float64).fill_diagonal_(1.0)
        assert tg.Exhaustive(count)(matrix).tolist() == [0] * count


def test_without_a_limit_pairs_and_triples_are_never_worse():
    rng = np.random.default_rng(0)
    every = list(partitions(list(range(6))))
    small = [partition for partition in every if max(map(len, partition)) <= 3]
    for _ in range(5):
        matrix = torch.tensor(rng.uniform(-0.2, 1, (6, 6))).fill_diagonal_(1.0)
        best = served(matrix, partition_of(tg.Exhaustive(6)(matrix)))
        assert max(served(matrix, partition) for partition in small) == pytest.approx(best)


def test_exhaustive_says_where_the_tasks_are_too_many():
    groups = [f"task{k}" for k in range(15)]
    tg.Exhaustive(2).start(tuple(groups[:14]))
    with pytest.raises(ValueError, match="up to 14 tasks, got 15; use AffinityPropagation"):
        tg.TaskGroups(groups, grouping=tg.Exhaustive(2))
    with pytest.raises(ValueError, match="got 15"):
        tg.Exhaustive(2)(torch.eye(15))


def conflict_graph(edges, count):
    matrix = torch.full((count, count), 0.5).fill_diagonal_(1.0)
    for i, k in edges:
        matrix[i, k] = matrix[k, i] = -0.5
    return matrix


def test_graph_coloring_is_proper_and_of_few_colours():
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = torch.tensor(rng.standard_normal((9, 9)), dtype=torch.float32)
        matrix.diagonal().abs_()
        ratio = matrix.double() / matrix.double().diagonal()
        conflict = ((ratio + ratio.T) / 2 < 0).fill_diagonal_(False)
        labels = tg.GraphColoring()(matrix)
        assert not (conflict & (labels[:, None] == labels)).any()
        # Welsh and Powell's bound, of which "one more than the most conflicts" is the weaker form.
        degree = conflict.sum(1).sort(descending=True).values.tolist()
        assert len(labels.unique()) <= max(min(d + 1, i + 1) for i, d in enumerate(degree))


def test_graph_coloring_takes_the_most_conflicts_first_and_ties_by_position():
    # A star: the centre is coloured first, whatever its position.
    assert tg.GraphColoring()(conflict_graph([(2, 0), (2, 1), (2, 3)], 4)).tolist() == [1, 1, 0, 1]
    # A path a-b-c-d: b and c have two conflicts each, b comes first.
    assert tg.GraphColoring()(conflict_graph([(0, 1), (1, 2), (2, 3)], 4)).tolist() == [1, 0, 1, 0]
    # The worst case: in this order a crown takes a colour per pair, where two would do.
    crown = [(i, k) for i in (0, 2, 4) for k in (1, 3, 5) if k != i + 1]
    assert tg.GraphColoring()(conflict_graph(crown, 6)).tolist() == [0, 0, 1, 1, 2, 2]


def test_graph_coloring_is_welsh_and_powells():
    """Against the algorithm as they wrote it, colour by colour, on graphs with many ties."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        edges = np.argwhere(np.triu(rng.random((40, 40)) < 0.1, 1)).tolist()
        conflicts = {k: {i for edge in edges if k in edge for i in edge} - {k} for k in range(40)}
        left = sorted(range(40), key=lambda k: (-len(conflicts[k]), k))
        colours = {}
        for colour in range(40):
            members = set()
            for k in left:
                if not conflicts[k] & members:
                    members.add(k)
            colours.update(dict.fromkeys(members, colour))
            left = [k for k in left if k not in members]
        matrix = conflict_graph(edges, 40)
        assert tg.GraphColoring()(matrix).tolist() == [colours[k] for k in range(40)]


def test_threshold_decides_who_conflicts():
    matrix = torch.tensor([[1.0, 0.2], [0.4, 1.0]])
    for threshold, colours in ((0.0, 1), (0.29, 1), (0.31, 2)):
        assert len(set(tg.GraphColoring(threshold)(matrix).tolist())) == colours
    assert tg.GraphColoring()(torch.eye(3)).tolist() == [0, 0, 0]  # zero is no conflict
    assert tg.GraphColoring(2.0)(torch.eye(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("make", [tg.KMeans, tg.Spectral, tg.Exhaustive])
@pytest.mark.parametrize("blocks", [[3, 3], [5, 4, 2], [4, 3, 3]])
def test_given_the_number_of_groups_blocks_are_found(make, blocks):
    for seed in range(5):
        matrix, expected = labels_of(blocks, seed=seed)
        found = partition_of(make(len(blocks))(matrix))
        assert sorted(found) == sorted(partition_of(torch.tensor(expected)))


def test_spectral_clips_the_affinity():
    rng = np.random.default_rng(0)
    for _ in range(10):
        matrix = 3 * rng.standard_normal((9, 9))
        matrix = torch.tensor(matrix + matrix.T).fill_diagonal_(1.0)
        assert torch.equal(tg.Spectral(3)(matrix), tg.Spectral(3)(matrix.clamp(-1, 1)))


@pytest.mark.parametrize("make", [tg.KMeans, tg.Spectral])
def test_fewer_known_tasks_than_groups_are_alone(make):
    assert make(4)(torch.ones(3, 3)).tolist() == [0, 1, 2]
    assert len(set(make(3)(torch.ones(4, 4).fill_diagonal_(0.0)).tolist())) == 4


@pytest.mark.parametrize("make", [tg.KMeans, tg.Spectral])
def test_without_scikit_learn_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install 'taskgroup\[compare\]'"):
        make(2)


def test_global_random_state_is_neither_read_nor_moved():
    matrix, _ = labels_of([4, 3], against=0.7)
    for make in (tg.KMeans, tg.Spectral):
        found = []
        for seed in (0, 1):
            np.random.seed(seed)  # noqa: NPY002 (scikit-learn's default)
            state = np.random.get_state()[1].copy()  # noqa: NPY002
            found.append(make(3)(matrix).tolist())
            assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
        assert found[0] == found[1]
