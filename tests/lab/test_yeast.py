"""The yeast data against river's records, and its losses and metrics against other libraries."""

import builtins
import math
import sys

import numpy as np
import pytest
import torch
from river import datasets
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from taskgroup.lab.data.yeast import _SPLITS, Yeast, _tables
from taskgroup.lab.problem import make_problem, measure
from tests.lab.small import yeast


@pytest.fixture(scope="module")
def records():
    rows = [(list(x.values()), list(y.values())) for x, y in datasets.Yeast()]
    return np.array([x for x, _ in rows]), np.array([y for _, y in rows], dtype=float)


@pytest.fixture(scope="module")
def order():
    """What row of the records the n-th row of the data is."""
    return torch.randperm(2417, generator=torch.Generator().manual_seed(0)).numpy()


def test_splits_are_the_whole_data_set(records, order):
    features, labels = records
    assert features.shape == (2417, 103)
    assert labels.shape == (2417, 14)
    tables = _tables()
    assert [len(table.features) for table in tables.values()] == [1450, 400, 567]
    assert tuple(tables) == Yeast.splits == tuple(_SPLITS)
    train = features[order[:1450]]
    expected = (features[order] - train.mean(0)) / train.std(0, ddof=1)
    found = torch.cat([table.features for table in tables.values()]).numpy()
    # Standardised by the training rows alone; float32 of values up to about 30.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (torch.cat([table.labels for table in tables.values()]).numpy() == labels[order]).all()


def test_titles_are_the_columns():
    _, labels = next(iter(datasets.Yeast()))
    assert [title.replace(" ", "") for title in Yeast.tasks.values()] == list(labels)


def test_losses_of_the_raw_records(records, order):
    problem = make_problem(yeast())
    batch = next(problem.batches(64, 5))
    rows = torch.randint(1450, (64,), generator=torch.Generator().manual_seed(5)).numpy()
    labels = records[1][order[rows]]
    outputs = {"class14": torch.randn(64, 1), "class2": torch.randn(64, 1)}
    losses = problem.losses(outputs, batch)
    assert list(losses) == ["class14", "class2"]
    for task, column in (("class14", 13), ("class2", 1)):
        expected = F.binary_cross_entropy(
            outputs[task].sigmoid().double(), torch.tensor(labels[:, column : column + 1])
        )
        assert losses[task].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("split", Yeast.splits)
def test_metric_is_the_area_under_the_roc_curve(split, records, order):
    problem = make_problem(yeast(dropout=0.5))
    torch.manual_seed(0)
    model = problem.model(["class3", "class14"]).train()
    found = measure(problem, model, ["class3", "class14"], split)
    assert model.training
    with torch.no_grad():
        scores = model.eval()(_tables()[split].features)
    labels = records[1][order][_SPLITS[split]]
    for task, column in (("class3", 2), ("class14", 13)):
        expected = roc_auc_score(labels[:, column], scores[task][:, 0])
        assert found[task] == pytest.approx(expected, abs=1e-6)


def test_network_has_the_size_of_the_recipe():
    model = make_problem(yeast(dim=5, depth=3, dropout=0.0)).model(["class1", "class2"])
    sizes = [tuple(p.shape) for p in model.encoder.parameters() if p.ndim == 2]
    assert sizes == [(5, 103), (5, 5), (5, 5)]
    assert {t: y.shape for t, y in model(torch.zeros(7, 103)).items()} == {
        "class1": (7, 1),
        "class2": (7, 1),
    }


def test_score_is_the_probability_of_the_right_label():
    scores = Yeast.score(
        {k: torch.tensor(v) for k, v in {"a": math.log(2), "b": 0.0, "c": 1e4}.items()}
    )
    assert scores["a"] == pytest.approx(0.5)
    assert all(0 < score < 1 for score in scores.values())


def test_without_river_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("river"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "taskgroup.lab.data.yeast")
    with pytest.raises(ImportError, match=r"river, which is not installed: pip install .*compare"):
        make_problem(yeast())
