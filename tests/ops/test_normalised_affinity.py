"""The normalisation before clustering, on every backend, against its formula entry by entry."""

import math

import numpy as np
import pytest

from taskgroup.ops import use_backend
from taskgroup.ops.normalised_affinity import normalised_affinity

BACKENDS = ["cpp", "reference"]


def by_formula(affinity):
    finite = [[a if math.isfinite(a) else 0.0 for a in row] for row in affinity.tolist()]
    known = [k for k in range(len(finite)) if finite[k][k] > 0]
    return known, [
        [(finite[i][k] / finite[k][k] + finite[k][i] / finite[i][i]) / 2 for k in known]
        for i in known
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_tasks", [1, 2, 11, 70])
def test_is_the_formula_to_the_bit(n_tasks, dtype, backend):
    rng = np.random.default_rng(n_tasks)
    affinity = rng.standard_normal((n_tasks, n_tasks)).astype(dtype)
    affinity[rng.random(affinity.shape) < 0.1] = np.nan
    affinity[rng.random(affinity.shape) < 0.05] = np.inf
    kept = affinity.copy()
    with use_backend(backend):
        known, similarity, complete = normalised_affinity(affinity)
    assert complete == np.isfinite(affinity).all()
    expected, entries = by_formula(affinity)
    assert known.tolist() == expected
    assert similarity.shape == (len(expected), len(expected))
    assert similarity.tolist() == entries
    np.testing.assert_array_equal(affinity, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [0.0, -1.0, math.nan, math.inf])
def test_tasks_without_an_effect_on_themselves_are_left_out(own, backend):
    affinity = np.ones((3, 3), np.float32)
    affinity[1, 1] = own
    with use_backend(backend):
        known, similarity, complete = normalised_affinity(affinity)
    assert complete == math.isfinite(own)
    assert known.tolist() == [0, 2]
    assert similarity.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_is_known(backend):
    with use_backend(backend):
        known, similarity, _ = normalised_affinity(np.zeros((4, 4), np.float32))
    assert known.shape == (0,)
    assert similarity.shape == (0, 0)
