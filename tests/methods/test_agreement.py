"""The gradients of every method against TorchJD's own aggregators and scalarizers.

Losses are linear in the shared parameters, so that their gradients are the rows of a given matrix.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torchjd import aggregation, scalarization

import taskgroup as tg
from tests.methods.problems import Model, gradient_space, likelihood, made, tasks_of

AGGREGATORS = {
    "mgda": lambda n_tasks: aggregation.MGDA(),
    "pcgrad": lambda n_tasks: aggregation.PCGrad(),
    "cagrad": lambda n_tasks: aggregation.CAGrad(c=0.4),
    "graddrop": lambda n_tasks: aggregation.GradDrop(),
    "imtl-g": lambda n_tasks: aggregation.IMTLG(),
    "aligned-mtl": lambda n_tasks: aggregation.AlignedMTL(),
    "nash-mtl": lambda n_tasks: aggregation.NashMTL(n_tasks=n_tasks),
    "upgrad": lambda n_tasks: aggregation.UPGrad(),
    "fairgrad": lambda n_tasks: aggregation.FairGrad(alpha=2.0),
    "gradvac": lambda n_tasks: aggregation.GradVac(),
}
ITERATIVE = ("mgda", "cagrad", "nash-mtl", "fairgrad")
SIZE = 60
CASES = [
    (name, kind)
    for name in AGGREGATORS
    for kind in ("random", "conflicting", "uneven")
    if (name, kind) != ("nash-mtl", "uneven")  # ECOS warns there, on TorchJD's side as on ours
]


def jacobian(n_tasks, kind, seed):
    """Float32 ``[K, P]``."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n_tasks, SIZE))
    if kind == "conflicting":  # in two camps, with cosines of about -0.5 between them
        camp = np.where(np.arange(n_tasks) % 2, -1, 1)
        rows += camp[:, None] * rng.standard_normal(SIZE)
    elif kind == "uneven":  # lengths from 0.1 to 10
        rows *= np.logspace(-1, 1, n_tasks)[:, None]
    return torch.tensor(rows, dtype=torch.float32)


def test_every_method_is_compared():
    assert list(AGGREGATORS) == gradient_space()


@pytest.mark.filterwarnings("ignore:.*not DPP:UserWarning")  # of TorchJD's side
@pytest.mark.parametrize("n_tasks", [2, 5, 11])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_against_aggregator(name, kind, n_tasks):
    """Several steps, at 1e-5 of the length, 1e-3 where a solver iterates.

    At 1e-3 too for IMTL-G on lengths from 0.1 to 10: it inverts G, of condition 1e4, in float32.
    """
    x = nn.Parameter(torch.zeros(SIZE))
    method = made(name, None, [x], tasks_of(n_tasks))
    theirs = AGGREGATORS[name](n_tasks)
    for seed in range(3):
        rows = jacobian(n_tasks, kind, seed)
        torch.manual_seed(seed)
        # GradDrop draws in the dtype of its matrix.
        expected = theirs(rows if name == "graddrop" else rows.double()).float()
        torch.manual_seed(seed)
        method.backward({t: row @ x for t, row in zip(tasks_of(n_tasks), rows, strict=True)})
        loose = name in ITERATIVE or (name, kind) == ("imtl-g", "uneven")
        tolerance = 1e-3 if loose else 1e-5
        assert (x.grad - expected).norm() <= tolerance * expected.norm()
        x.grad = None


def test_graddrop_goes_parameter_by_parameter():
    rows = jacobian(5, "random", 0)
    x, y = nn.Parameter(torch.zeros(3, 10)), nn.Parameter(torch.zeros(30))
    losses = {
        t: (row[:30].view(3, 10) * x).sum() + row[30:] @ y
        for t, row in zip(tasks_of(5), rows, strict=True)
    }
    torch.manual_seed(0)
    made("graddrop", None, [x, y], tasks_of(5)).backward(losses)
    torch.manual_seed(0)
    theirs = aggregation.GradDrop()
    assert torch.equal(x.grad.view(-1), theirs(rows[:, :30].contiguous()))
    assert torch.equal(y.grad, theirs(rows[:, 30:].contiguous()))


@pytest.mark.parametrize("name", ["imtl-g", "aligned-mtl"])
def test_gradients_that_depend_on_each_other(name):
    """The rank is decided at the precision of the gradients: rounding is no direction."""
    rows = jacobian(4, "random", 0)
    rows[3] = rows[0] + rows[1]
    x = nn.Parameter(torch.zeros(SIZE))
    losses = {t: row @ x for t, row in zip(tasks_of(4), rows, strict=True)}
    weights = made(name, None, [x], tasks_of(4)).backward(losses)
    exact = rows.double()
    exact[3] = exact[0] + exact[1]
    expected = AGGREGATORS[name](4)(exact)
    assert weights.abs().max() < 2
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


SCALARIZERS = {
    "gd": lambda: scalarization.Sum(),
    "uw": lambda: scalarization.UW(5),
    "dwa": lambda: scalarization.DWA(),
    "famo": lambda: scalarization.FAMO(5),
    "imtl-l": lambda: scalarization.IMTLL(5),
}


@pytest.mark.parametrize("name", SCALARIZERS)
def test_against_scalarizer(name):
    """Seven steps of Adam beside the same with a plain backward pass, at 1e-4."""
    ours, plain = Model(5), Model(5)
    method = made(name, ours)
    scalarizer = SCALARIZERS[name]()
    learned = [] if name == "famo" else list(scalarizer.parameters())
    optimizer = torch.optim.Adam([*ours.parameters(), *method.parameters()], lr=0.01)
    their_optimizer = torch.optim.Adam([*plain.parameters(), *learned], lr=0.01)
    for batch in range(7):
        x = ours.x + 0.1 * batch
        optimizer.zero_grad()
        method.backward(ours.losses(x))
        optimizer.step()
        their_optimizer.zero_grad()
        scalarizer(torch.stack(list(plain.losses(x).values()))).backward()
        their_optimizer.step()
        if name == "famo":
            method.observe(ours.losses(x))
            scalarizer.update(torch.stack(list(plain.losses(x).values())))
        if name == "dwa" and batch % 2 == 1:
            scalarizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.parameters(), learned, rtol=1e-4, atol=1e-5)


def test_dtp_is_its_formula():
    model = Model(3)
    method = tg.methods.DTP(model.shared, tasks_of(3), score=likelihood, gamma=2.0, decay=0.25)
    average = None
    for batch in range(4):
        losses = model.losses(model.x + batch)
        score = np.array(
            [float(s) for s in likelihood({t: v.detach() for t, v in losses.items()}).values()]
        )
        average = score if average is None else 0.75 * average + 0.25 * score
        weights = method.backward(losses)
        expected = -((1 - average) ** 2.0) * np.log(average)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)
