"""Delta m, the mean relative improvement over a baseline."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch

import taskgroup as tg

TASKS = ["DE", "DZ", "EO", "ET", "K2D", "K3D", "N", "PC", "R", "S2D", "S25D"]
SINGLE = [0.0199, 0.0195, 0.1085, 0.1714, 0.1633, 0.0872, 0.2715, 0.7586, 0.1503, 0.1742, 0.1504]
JOINT = [0.0187, 0.0188, 0.1301, 0.1757, 0.1733, 0.0942, 0.3076, 0.7991, 0.1826, 0.1902, 0.1652]


def test_published_table():
    """ViT-B on Taskonomy, DTME-MTL (ICCV 2025): joint training has -7.83%."""
    joint = dict(zip(TASKS, JOINT, strict=True))
    single = dict(zip(TASKS, SINGLE, strict=True))
    # The table's own numbers have three or four digits.
    assert tg.delta_m(joint, single, set(TASKS)) == pytest.approx(-7.83, abs=0.05)
    assert tg.delta_m(joint, single, dict.fromkeys(TASKS, True)) == pytest.approx(-7.83, abs=0.05)


def test_signs():
    results, baseline = {"error": 1.1, "score": 1.1}, {"error": 1.0, "score": 1.0}
    assert tg.delta_m(results, baseline, ["error"]) == pytest.approx(0.0)
    assert tg.delta_m(results, baseline, []) == pytest.approx(10.0)
    assert tg.delta_m(results, baseline, {"error": True, "score": True}) == pytest.approx(-10.0)
    assert math.isnan(tg.delta_m({"error": math.nan}, {"error": 1.0}, ["error"]))


@pytest.mark.parametrize(
    ("results", "baseline", "lower", "said"),
    [
        ({}, {}, [], "results is empty"),
        ({"a": 1.0}, {"b": 1.0}, [], "'a', 'b'"),
        ({"a": 1.0}, {"a": 1.0}, ["b"], "'b'"),
        ({"a": 1.0}, {"a": 1.0}, {"b": True}, "'a', 'b'"),
        ({"a": 1.0}, {"a": 0.0}, ["a"], "baseline of task 'a' is zero"),
        ({"a": 1.0}, {"a": -0.5}, ["a"], "baseline of task 'a' is -0.5.*above zero"),
        ({"a": 1.0}, {"a": math.inf}, ["a"], "baseline of task 'a' is inf"),
        ({"a": 1.0}, {"a": -math.inf}, [], "baseline of task 'a' is -inf"),
    ],
)
def test_bad_input(results, baseline, lower, said):
    with pytest.raises(ValueError, match=said):
        tg.delta_m(results, baseline, lower)


def test_string_is_no_collection_of_tasks():
    with pytest.raises(TypeError, match="got the string 'depth'"):
        tg.delta_m({"depth": 1.0}, {"depth": 1.0}, "depth")


@pytest.mark.parametrize(
    "number",
    [
        1.5,
        Decimal("1.5"),
        np.float32(1.5),
        np.array([1.5]),
        torch.tensor(1.5, dtype=torch.float16),
        torch.tensor([1.5]),
        torch.tensor(1.5, requires_grad=True),
    ],
)
def test_a_number_of_any_kind(number):
    gains = [tg.delta_m({"a": number}, {"a": 1.0}, []), tg.delta_m({"a": 3.0}, {"a": number}, [])]
    assert gains == [50.0, 100.0]
    assert {type(gain) for gain in gains} == {float}


@pytest.mark.parametrize(
    "value", ["0.5", b"0.5", np.str_("0.5"), None, [0.5], 1j, np.zeros(2), torch.zeros(2)]
)
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="metric of task 'b' must be one number, got "):
        tg.delta_m({"a": 1.0, "b": value}, {"a": 1.0, "b": 1.0}, [])
    with pytest.raises(TypeError, match="baseline of task 'b' must be one number, got "):
        tg.delta_m({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": value}, [])


def test_metrics_come_with_the_names_of_their_tasks():
    with pytest.raises(TypeError, match=r"results must be \{task: metric\}, got list"):
        tg.delta_m([0.5], {"a": 1.0}, [])
    with pytest.raises(TypeError, match=r"baseline must be \{task: metric\}, got float"):
        tg.delta_m({"a": 0.5}, 1.0, [])


def test_metrics_that_are_not_finite():
    assert tg.delta_m({"a": math.inf}, {"a": 1.0}, ["a"]) == -math.inf
    assert math.isnan(tg.delta_m({"a": 1.0}, {"a": math.nan}, []))
