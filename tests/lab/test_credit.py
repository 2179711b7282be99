"""The published rule of credit, driven by the loop and by hand."""

import pytest
import torch

import taskgroup as tg
from taskgroup.lab.train.credit import PublishedCredit


@pytest.mark.parametrize("settings", [{}, {"groups_per_batch": 1}], ids=str)
def test_the_loop_gives_what_a_plain_loop_gives_bitwise(settings):
    given, by_hand = [], []
    matrix = torch.zeros(4, 4)

    def grouping(affinity):
        given.append(affinity.clone())
        by_hand.append(matrix.clone())
        return torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3]][len(given) % 2])

    grouping.takes_nan = True
    groups = tg.TaskGroups(
        ["a", "b", "c", "d"],
        affinity=PublishedCredit(decay=0.3),
        grouping=grouping,
        warmup=2,
        **settings,
    )
    x = torch.zeros(4, requires_grad=True)
    for _ in range(20):
        before = None
        for group in groups:
            losses = (x - torch.arange(1.0, 5.0)).square() + x.sum().square()
            if before is not None:
                tg.affinity_update_(matrix, before, losses.detach(), group.mask, 0.3)
            before = losses.detach()
            (gradient,) = torch.autograd.grad(group.loss(losses), x)
            x.data -= 0.01 * gradient
    assert len(given) > 4
    assert all(torch.equal(one, other) for one, other in zip(given, by_hand, strict=True))
    assert torch.equal(groups.affinity.matrix, matrix)
    assert matrix.any(dim=1).all()


def test_what_was_never_observed_is_zero():
    affinity = PublishedCredit(decay=0.5)
    affinity.start(("a", "b"))
    assert affinity.known().tolist() == [[0, 0], [0, 0]]
