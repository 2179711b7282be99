import numpy as np
import pytest
import torch

from taskgroup.lab.molecules.regimes import PLANTED, REGIMES, loss_factors, plant

NAMES = ["dipole", "homo", "energy"]


def table(n=400, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_real_targets_stay_as_they_are(regime):
    targets = table()
    before = targets.clone()
    planted, names = plant(targets, NAMES, regime, seed=0)
    assert torch.equal(planted[:, :3], before)
    assert names[:3] == tuple(NAMES)
    planted.zero_()
    assert torch.equal(targets, before), "the planted table shares memory with the real one"


@pytest.mark.parametrize("regime", ["clean", "scales"])
def test_only_negatives_add_tasks(regime):
    planted, names = plant(table(), NAMES, regime, seed=0)
    assert planted.shape == (400, 3)
    assert names == tuple(NAMES)


def test_shuffled_targets_are_those_of_other_molecules_and_say_nothing_of_their_own():
    targets = table()
    planted, names = plant(targets, NAMES, "negatives", seed=0)
    assert names == (*NAMES, *PLANTED)
    shuffled = planted[:, names.index("shuffled")]
    assert torch.equal(shuffled.sort().values, targets[:, 0].sort().values)
    correlations = np.corrcoef(torch.cat([shuffled[:, None], targets], dim=1).T)[0, 1:]
    assert (abs(correlations) < 4 / 20).all()  # four standard errors of 400 molecules


def test_negated_targets_change_sign_on_some_molecules_the_same_in_every_split():
    targets = table()
    planted, names = plant(targets, NAMES, "negatives", seed=0)
    negated = planted[:, names.index("negated")]
    assert torch.equal(negated.abs(), targets[:, 0].abs())
    assert torch.equal(negated == targets[:, 0], targets[:, 2] >= 0)
    assert 100 < (negated == targets[:, 0]).sum() < 300
    split, _ = plant(targets[:30], NAMES, "negatives", seed=5)
    assert torch.equal(split[:, -1], negated[:30])


def test_a_linear_head_that_fits_the_target_has_no_hold_on_the_negated_one():
    """A target negated on all molecules would be fitted by the head alone."""
    targets = table()
    planted, names = plant(targets, NAMES, "negatives", seed=0)
    negated = planted[:, [names.index("negated")]]
    features = torch.cat([targets, torch.ones(400, 1, dtype=torch.float64)], dim=1)
    for labels, explained in ((-targets[:, :1], True), (negated, False)):
        head = torch.linalg.lstsq(features, labels).solution
        left = (features @ head - labels).var() / labels.var()
        assert (left < 1e-9) if explained else (left > 0.9)


def test_the_seed_decides_the_permutation():
    def shuffled(seed):
        return plant(table(), NAMES, "negatives", seed)[0][:, 3]

    assert torch.equal(shuffled(3), shuffled(3))
    assert not torch.equal(shuffled(3), shuffled(4))


def test_planting_keeps_the_dtype_and_leaves_the_global_generator_alone():
    targets, before = table(dtype=torch.float32), torch.get_rng_state()
    with torch.device("meta"):
        planted, _ = plant(targets, NAMES, "negatives", seed=0)
    assert planted.dtype == torch.float32
    assert planted.device == targets.device
    assert torch.equal(torch.get_rng_state(), before)


def test_scales_spread_over_three_decades_in_an_order_of_the_seed():
    names = [f"task{k}" for k in range(11)]
    factors = loss_factors(names, "scales", seed=0)
    assert list(factors) == names
    logs = np.log10(sorted(factors.values()))
    np.testing.assert_allclose(logs, np.linspace(-1.5, 1.5, 11), atol=1e-12)
    assert factors == loss_factors(names, "scales", seed=0)
    assert factors != loss_factors(names, "scales", seed=1)


@pytest.mark.parametrize("regime", ["clean", "negatives"])
def test_other_regimes_leave_the_losses_alone(regime):
    assert loss_factors(NAMES, regime, seed=0) == dict.fromkeys(NAMES, 1.0)


def test_one_task_has_the_factor_one():
    assert loss_factors(["homo"], "scales", seed=0) == {"homo": 1.0}


@pytest.mark.parametrize(
    ("targets", "names", "regime", "words"),
    [
        (table(), NAMES, "noise", "regime must be one of clean, negatives, scales; got 'noise'"),
        (table(), NAMES[:2], "clean", "targets has 3 columns, and names has 2 tasks"),
        (table()[:, 0], NAMES, "clean", r"floating-point tensor \[N, K\].*a tensor \[400\]"),
        (table().long(), NAMES, "clean", "floating-point"),
        (table().numpy(), NAMES, "clean", "got an object of type ndarray"),
        (table()[:, :1], NAMES[:1], "negatives", "needs two tasks at least; names is"),
        (table(), ["a", "b", "a"], "clean", r"names has \['a'\] more than once"),
        (table(), ["a", "b", "shuffled"], "negatives", r"\['shuffled'\], which the regime"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(targets, names, regime, words):
    with pytest.raises(ValueError, match=words):
        plant(targets, names, regime, seed=0)
