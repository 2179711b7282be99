"""QM9 against the numbers in its CSV files: splits, units, energies of atomisation, errors."""

from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from taskgroup.lab.data.qm9 import QM9, TASKS, split_rows, targets_in_units
from taskgroup.lab.data.qm9_files import COLUMNS, molecules
from taskgroup.lab.problem import make_problem, measure
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.train.evaluation import delta_m
from tests.lab.tiny_qm9 import ENERGIES, OF_ATOMS, make_molecules, write_qm9

MEV = 27211.386  # per hartree
UNITS = dict.fromkeys(("homo", "lumo", "zpve", *ENERGIES), MEV)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qm9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKGROUP_CACHE", str(folder / "cache"))
        write_qm9(folder / "data")
        molecules(folder / "data")
        yield folder / "data"


@pytest.fixture(scope="module")
def made(root):
    return make_molecules()


def recipe(root, name="qm9", **changes):
    return read_recipe(name, {"root": str(root), "dim": 8, "depth": 1, **changes})


@pytest.fixture(scope="module")
def problem(root):
    return make_problem(recipe(root))


@pytest.fixture(scope="module")
def reference(made):
    """``{task: targets in their unit}`` of all molecules, by other means than the package's.

    The energies of the atoms solve the normal equations of the training split.
    """
    counts = np.array([[charges.count(z) for z in OF_ATOMS] for charges in made.charges], float)
    train = split_rows(200, 0)["train"]
    targets = {task: made.column(task) * UNITS.get(task, 1.0) for task in COLUMNS}
    for task in ENERGIES:
        x, y = counts[train], targets[task][train]
        targets[task] = targets[task] - counts @ np.linalg.solve(x.T @ x, x.T @ y)
    return targets


def standardised(reference):
    train = split_rows(200, 0)["train"]
    columns = [(y - y[train].mean()) / y[train].std() for y in reference.values()]
    return np.stack(columns, 1)


# Splits


def test_splits_are_those_of_the_published_comparisons():
    splits = split_rows(130_831, 0)
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sizes == {"train": 110_000, "validation": 10_000, "held_out": 10_831}
    assert tuple(splits) == QM9.splits
    assert sorted(np.concatenate(list(splits.values()))) == list(range(130_831))
    again, other = split_rows(130_831, 0), split_rows(130_831, 1)
    assert all(np.array_equal(splits[name], again[name]) for name in splits)
    assert not any(np.array_equal(splits[name], other[name]) for name in splits)


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(200, [168, 15, 17]), (14, [11, 1, 2]), (140_000, [110_000, 10_000, 20_000])],
)
def test_other_numbers_of_molecules_are_split_in_proportion(number, sizes):
    splits = split_rows(number, 0)
    assert [len(rows) for rows in splits.values()] == sizes
    assert sorted(np.concatenate(list(splits.values()))) == list(range(number))


@pytest.mark.parametrize("number", [0, 13])
def test_too_few_molecules(number):
    with pytest.raises(
        ValueError, match=rf"{number} molecules are too few .* must hold 14 or more"
    ):
        split_rows(number, 0)


# Targets


def test_the_energies_of_the_atoms_are_found_and_taken_off(tmp_path, root):
    write_qm9(tmp_path, make_molecules(noise=0.0))
    found = molecules(tmp_path)
    targets = targets_in_units(found, split_rows(200, 0)["train"])
    columns = [list(COLUMNS).index(task) for task in ENERGIES]
    # The files have six decimals, which is 0.03 meV; the energies were up to ten million meV.
    assert np.abs(targets[:, columns]).max() < 0.1
    assert np.abs(found.targets[:, columns]).max() * MEV > 5e6


def test_targets_have_the_units_of_chemists_and_the_order_of_the_files(root, reference):
    targets = targets_in_units(molecules(root), split_rows(200, 0)["train"])
    assert list(TASKS) == list(COLUMNS)
    for place, task in enumerate(COLUMNS):
        np.testing.assert_allclose(targets[:, place], reference[task], rtol=1e-6, atol=1e-2)


def test_held_out_targets_change_neither_the_fit_nor_the_statistics(tmp_path, root, made):
    rows = split_rows(200, 0)
    changed = [dict(targets) for targets in made.targets]
    for row in (*rows["validation"], *rows["held_out"]):
        changed[row] = {task: 3 * value + 1 for task, value in changed[row].items()}
    write_qm9(tmp_path, made._replace(targets=changed))
    first, second = (next(make_problem(recipe(r)).batches(500, 0)) for r in (root, tmp_path))
    assert torch.equal(first.targets, second.targets)
    assert torch.equal(first.inputs, second.inputs)
    errors = []
    for folder in (root, tmp_path):
        problem = make_problem(recipe(folder))
        torch.manual_seed(0)
        model = problem.model(list(COLUMNS))
        errors.append({split: measure(problem, model, list(COLUMNS), split) for split in rows})
    assert errors[0]["train"] == errors[1]["train"]
    for split in ("validation", "held_out"):
        assert all(errors[0][split][task] != errors[1][split][task] for task in COLUMNS)


def test_a_target_that_never_differs_is_named(tmp_path, root, made):
    same = [{**targets, "zpve": 0.25, "cv": 6.0} for targets in made.targets]
    write_qm9(tmp_path, made._replace(targets=same))
    with pytest.raises(ValueError, match=r"training split have the same \['zpve', 'cv'\]"):
        make_problem(recipe(tmp_path))


# Batches, losses and errors


def test_training_batches_are_standardised_rows_of_the_training_split(problem, root, reference):
    train = split_rows(200, 0)["train"]
    rows = train[torch.randint(168, (64,), generator=torch.Generator().manual_seed(5)).numpy()]
    batch = next(problem.batches(64, 5))
    np.testing.assert_allclose(batch.targets, standardised(reference)[rows], atol=1e-4)
    features = molecules(root).coulomb.astype(float)
    deviation = features[train].std(0, ddof=1)
    deviation = np.maximum(deviation, 0.1 * np.sort(deviation)[(435 - 1) // 2] or 1.0)
    expected = (features[rows] - features[train].mean(0)) / deviation
    np.testing.assert_allclose(batch.inputs, expected, atol=1e-4)
    assert problem.inputs(batch) is batch.inputs


@pytest.mark.parametrize("backbone", ["mlp", "message-passing"])
def test_a_batch_depends_on_the_seed_and_its_number_alone(backbone, root):
    problem = make_problem(recipe(root, backbone=backbone))

    def tensors(batch):
        inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
        return (*inputs, batch.targets)

    def same(a, b):
        return all(map(torch.equal, tensors(a), tensors(b)))

    batches = list(islice(problem.batches(8, 3), 6))
    torch.manual_seed(1)
    later = list(islice(problem.batches(8, 3, start=4), 2))
    assert all(map(same, batches[4:], later))
    assert not torch.equal(batches[0].targets, batches[1].targets)
    assert not torch.equal(batches[0].targets, next(problem.batches(8, 4)).targets)


def test_message_passing_gets_the_atoms_of_each_molecule(root, made):
    problem = make_problem(recipe(root, backbone="message-passing"))
    batch = next(problem.batches(16, 5))
    train = split_rows(200, 0)["train"]
    rows = train[torch.randint(168, (16,), generator=torch.Generator().manual_seed(5)).numpy()]
    charges, positions = problem.inputs(batch)
    assert charges.dtype == torch.int64
    largest = max(len(made.charges[row]) for row in rows)
    assert (charges.shape, positions.shape) == ((16, largest), (16, largest, 3))
    for k, row in enumerate(rows):
        n_atoms = len(made.charges[row])
        assert charges[k].tolist() == made.charges[row] + [0] * (largest - n_atoms)
        np.testing.assert_allclose(positions[k, :n_atoms], made.positions[row], rtol=1e-6)


def test_losses_are_mean_squares_of_the_tasks_that_are_trained(problem):
    batch = next(problem.batches(32, 0))
    outputs = {"cv": torch.randn(32, 1), "homo": torch.randn(32, 1)}
    losses = problem.losses(outputs, batch)
    assert list(losses) == ["cv", "homo"]
    for task, column in (("cv", 10), ("homo", 2)):
        expected = np.mean((outputs[task][:, 0].numpy() - batch.targets[:, column].numpy()) ** 2)
        assert losses[task].item() == pytest.approx(float(expected), rel=1e-5)


class Constant(nn.Module):
    """Predicts the same number, in standard deviations, for every molecule."""

    def __init__(self, values):
        super().__init__()
        self.values = values
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return {t: inputs.new_full((len(inputs), 1), v) for t, v in self.values.items()}


@pytest.mark.parametrize("split", QM9.splits)
def test_metric_is_the_mean_absolute_error_in_units(split, problem, reference):
    rows = split_rows(200, 0)
    values = {"g": 0.5, "dipole": -1.0, "homo": 0.0}
    found = measure(problem, Constant(values), ["dipole", "homo", "g"], split)
    for task, value in values.items():
        y, train = reference[task], reference[task][rows["train"]]
        expected = np.abs(y[rows[split]] - (train.mean() + value * train.std())).mean()
        assert found[task] == pytest.approx(expected, rel=1e-4)
    assert problem.metric_names["homo"] == "MAE in meV"
    assert set(problem.lower_is_better.values()) == {True}


def test_molecules_beyond_one_forward_pass_are_counted_once(problem, monkeypatch):
    values = {"dipole": 0.3}
    whole = measure(problem, Constant(values), ["dipole"], "train")
    monkeypatch.setattr("taskgroup.lab.data.qm9._AT_ONCE", 11)
    assert measure(problem, Constant(values), ["dipole"], "train") == pytest.approx(whole)


# Networks


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({}, [(8, 435), (1, 8)]),
        ({"depth": 2, "head_depth": 1}, [(8, 435), (8, 8), (8, 8), (1, 8)]),
        ({"head_depth": 2, "head_width": 5}, [(8, 435), (5, 8), (5, 5), (1, 5)]),
    ],
)
def test_network_has_the_size_of_the_recipe(changes, shapes, root):
    model = make_problem(recipe(root, **changes)).model(["homo"])
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == shapes


def test_dropout_is_that_of_the_encoder(root):
    model = make_problem(recipe(root, dropout=0.5, head_depth=1)).model(["homo"])
    assert [m.p for m in model.encoder.modules() if isinstance(m, nn.Dropout)] == [0.5]
    assert not [m for m in model.heads.modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": "vit-t"}, "backbone of qm9 must be 'mlp' or 'message-passing', got 'vit-t'"),
        ({"decoder": "conv"}, "decoder is not a setting of qm9; leave it out"),
        ({"size": 32}, "size is not a setting of qm9"),
        (
            {"weights": "there"},
            "weights are loaded into a backbone such as .* mlp has",
        ),
        ({"workers": 2}, "workers is not a setting of qm9"),
        (
            {"backbone": "message-passing", "dropout": 0.1},
            "dropout is a setting of .* mlp",
        ),
        ({"head_width": 64}, "head_width is the width of the hidden layers .* set head_depth"),
        ({"data": "nyud-v2", "backbone": "mlp"}, "'mlp' is a network of molecules, for qm9"),
    ],
)
def test_settings_that_do_not_fit(changes, said):
    with pytest.raises(ValueError, match=said):
        read_recipe("qm9", changes)


# What is planted


@pytest.fixture(scope="module")
def negatives(root):
    return make_problem(recipe(root, regime="negatives"))


def test_planted_tasks_are_trained_and_do_not_count_in_delta_m(root, negatives):
    assert list(negatives.tasks) == [*TASKS, "shuffled", "negated"]
    batch = next(negatives.batches(6, seed=0))
    clean = next(make_problem(recipe(root)).batches(6, seed=0))
    assert torch.equal(batch.targets[:, :11], clean.targets)
    dipole, cv = batch.targets[:, 0], batch.targets[:, 10]
    assert torch.equal(batch.targets[:, 12], torch.where(cv < 0, -dipole, dipole))
    model = negatives.model(list(negatives.tasks))
    losses = negatives.losses(model(batch.inputs), batch)
    expected = (model(batch.inputs)["shuffled"][:, 0] - batch.targets[:, 11]).square().mean()
    torch.testing.assert_close(losses["shuffled"], expected)
    metrics = measure(negatives, model, list(negatives.tasks), "held_out")
    baseline = dict(metrics, dipole=2 * metrics["dipole"], shuffled=99.0, negated=99.0)
    assert delta_m(metrics, baseline, negatives) == pytest.approx(50 / 11)


@pytest.mark.parametrize("regime", ["clean", "negatives", "scales"])
def test_published_numbers_are_of_the_clean_data_set(root, regime):
    assert bool(make_problem(recipe(root, regime=regime)).published) == (regime == "clean")


def test_shuffled_targets_stay_within_their_split(root, negatives):
    for split in QM9.splits:
        rows = negatives._data.rows[split]
        targets = negatives._data.targets[rows]
        assert np.array_equal(np.sort(targets[:, 11]), np.sort(targets[:, 0]))
        assert not np.array_equal(targets[:, 11], targets[:, 0])


def test_scales_are_factors_of_the_losses_and_not_of_the_errors(root, problem):
    scaled = make_problem(recipe(root, regime="scales"))
    model, batch = problem.model(list(TASKS)), next(problem.batches(6, seed=0))
    outputs = model(batch.inputs)
    plain, losses = problem.losses(outputs, batch), scaled.losses(outputs, batch)
    ratios = sorted((losses[task] / plain[task]).item() for task in TASKS)
    np.testing.assert_allclose(ratios, np.logspace(-1.5, 1.5, 11), rtol=1e-5)
    # The factor of a task does not depend on which others are trained.
    some = scaled.losses({task: outputs[task] for task in ("cv", "u0")}, batch)
    assert all(torch.equal(some[task], losses[task]) for task in some)
    errors = [measure(one, model, list(TASKS), "held_out") for one in (problem, scaled)]
    assert errors[0] == errors[1]
