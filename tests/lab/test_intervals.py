"""Means, intervals and the noise floor, against scipy and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from taskgroup.lab.studies.intervals import estimate, noise_floor


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_estimate_is_students_interval(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    found = estimate(values.tolist())
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert found.n == n
    assert found.mean == pytest.approx(values.mean())
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_few_values():
    mean, half, n = estimate([])
    assert (math.isnan(mean), math.isnan(half), n) == (True, True, 0)
    mean, half, n = estimate([2.5])
    assert (mean, math.isnan(half), n) == (2.5, True, 1)
    assert math.isnan(noise_floor([]))
    assert math.isnan(noise_floor([2.5]))
    assert noise_floor([2.5, 2.5]) == 0


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_95_per_cent_of_the_differences_of_two_sets_lie_within_the_floor(n):
    # The floor of one set, and the means of two others: all three by one method.
    draws = np.random.default_rng(n).normal(-1, 3, (3, 4000, n))
    floors = np.array([noise_floor(values) for values in draws[0]])
    inside = np.abs(draws[1].mean(1) - draws[2].mean(1)) <= floors
    # Of 4,000 draws a share of 0.95 has a standard error of 0.0034.
    assert inside.mean() == pytest.approx(0.95, abs=4 * 0.0034)
