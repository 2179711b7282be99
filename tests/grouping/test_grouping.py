"""What every grouping promises, and those that do not read the affinity."""

import numpy as np
import pytest
import torch

import taskgroup as tg

TASKS = ("a", "b", "c", "d", "e", "f")
K = len(TASKS)
GROUPINGS = {
    "together": tg.Together,
    "singletons": tg.Singletons,
    "fixed": lambda: tg.Fixed([["a", "c"], ["b"], ["d", "e", "f"]]),
    "random": lambda: tg.RandomGroups(3),
    "propagation": tg.AffinityPropagation,
    "heterogeneous": tg.Heterogeneous,
    "coloring": tg.GraphColoring,
    "coloring-strict": lambda: tg.GraphColoring(threshold=0.5),
    "exhaustive": lambda: tg.Exhaustive(3),
    "exhaustive-one": lambda: tg.Exhaustive(1),
    "k-means": lambda: tg.KMeans(3),
    "k-means-one": lambda: tg.KMeans(1),
    "k-means-many": lambda: tg.KMeans(10),
    "spectral": lambda: tg.Spectral(3),
    "spectral-one": lambda: tg.Spectral(1),
    "spectral-many": lambda: tg.Spectral(10),
}
LEARNED = [name for name in GROUPINGS if GROUPINGS[name]().reads_affinity]


def affinities():
    rng = np.random.default_rng(0)
    random = rng.standard_normal((K, K))
    positive = random.copy()
    np.fill_diagonal(positive, rng.uniform(0.1, 1, K))
    labels = np.array([0, 0, 0, 1, 1, 2])
    blocks = np.where(labels[:, None] == labels, 1.0, -1.0)
    holes = positive.copy()
    holes[:, 1] = np.nan  # as a lookahead has them: where a loss is not positive
    holes[2, 3] = holes[4, 0] = np.nan
    infinite = positive.copy()
    infinite[0, 1], infinite[3, 3] = np.inf, np.inf
    return {
        "zeros": np.zeros((K, K)),
        "identity": np.eye(K),
        "ones": np.ones((K, K)),
        "nan": np.full((K, K), np.nan),
        "holes": holes,
        "infinite": infinite,
        "random": random,
        "positive": positive,
        "negative": -positive,
        "tiny": positive * 1e-42,
        "huge": positive * 1e38,
        "steep": positive / 10.0 ** np.arange(0, 6 * K, 6),  # unlike units
        "blocks": blocks,
        "two-known": np.diag([1.0, 1, 0, 0, 0, 0]) + 0.1,
    }


AFFINITIES = {name: torch.tensor(a, dtype=torch.float32) for name, a in affinities().items()}


@pytest.mark.parametrize("kind", AFFINITIES)
@pytest.mark.parametrize("name", GROUPINGS)
def test_any_affinity_gives_a_partition(name, kind):
    matrix = AFFINITIES[kind].clone()
    found = []
    for _ in range(2):
        grouping = GROUPINGS[name]()
        grouping.start(TASKS)
        labels = grouping(matrix)
        assert torch.equal(matrix.nan_to_num(7.0), AFFINITIES[kind].nan_to_num(7.0))
        if labels is not None:
            assert labels.dtype == torch.int64
            assert labels.shape == (K,)
            assert set(labels.tolist()) == set(range(int(labels.max()) + 1))
            labels = labels.tolist()
        found.append(labels)
        if name != "random":
            again = grouping(matrix)
            found.append(again if again is None else again.tolist())
    assert all(labels == found[0] for labels in found)
    assert found[0] is not None or name in ("propagation", "heterogeneous")


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tasks(name, count):
    for matrix in (torch.zeros(count, count), torch.eye(count), torch.ones(count, count)):
        labels = GROUPINGS[name]()(matrix)
        assert set(labels.tolist()) == set(range(int(labels.max()) + 1))
        assert len(labels) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", LEARNED)
def test_any_dtype(name, dtype):
    matrix = AFFINITIES["blocks"]
    assert torch.equal(GROUPINGS[name]()(matrix.to(dtype)), GROUPINGS[name]()(matrix))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: tg.Fixed([["a"], []]), ValueError, "an empty group"),
        (lambda: tg.Fixed([["a", "b"], ["b"]]), ValueError, "'b' twice"),
        (lambda: tg.Fixed(["a", "b"]), TypeError, r"write \['a'\]"),
        (lambda: tg.RandomGroups(0), ValueError, "m of RandomGroups must be an integer"),
        (lambda: tg.AffinityPropagation(damping=0.4), ValueError, r"damping must be in \[0.5, 1\)"),
        (lambda: tg.AffinityPropagation(max_iter=0), ValueError, "at least 1"),
        (lambda: tg.GraphColoring(float("nan")), ValueError, "threshold must be a finite number"),
        (lambda: tg.Exhaustive(0), ValueError, "max_groups of Exhaustive must be an integer"),
        (lambda: tg.KMeans(0), ValueError, "m of KMeans must be an integer"),
        (lambda: tg.Spectral(0), ValueError, "m of Spectral must be an integer"),
    ],
)
def test_bad_groupings(make, error, said):
    with pytest.raises(error, match=said):
        make()
