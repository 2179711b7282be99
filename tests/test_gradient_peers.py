"""The peers of the benchmarks compute what the ops compute."""

import sys

import pytest
import torch

import taskgroup as tg
from benchmarks import gradient_peers as peer
from benchmarks.limits import COPY, PRODUCT, Limits

WEIGHTS = torch.tensor([0.5, -1.0, 2.0])


@pytest.fixture
def gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), ()]
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]


def test_gram_peers(gradients):
    expected = tg.task_gram(gradients)
    rows = peer.concatenated(gradients)
    assert torch.equal(peer.ready_rows(gradients), rows)
    for gram in (peer.pairwise_gram(gradients), peer.row_gram(rows)):
        torch.testing.assert_close(gram, expected)


def test_affinity_peer(gradients):
    losses = torch.tensor([0.5, 1.0, 2.0])
    ours, theirs = torch.full((3, 3), 0.5), torch.full((3, 3), 0.5)
    tg.gram_affinity_update_(ours, gradients, losses, decay=0.25)
    gram = peer.pairwise_gram(gradients)
    torch.testing.assert_close(peer.updated_affinity(theirs, gram, losses, 0.25), ours)


def test_combination_peers(gradients):
    expected = tg.combine(gradients, WEIGHTS)
    torch.testing.assert_close(peer.summed(gradients, WEIGHTS), expected)
    rows = peer.concatenated(gradients)
    out = torch.empty(rows.shape[1])
    for vector in (
        peer.row_combination(rows, WEIGHTS),
        peer.row_combination(rows, WEIGHTS, out),
    ):
        torch.testing.assert_close(peer.split(vector, gradients[0]), expected)
    assert vector is out


def test_torchjd(gradients):
    pytest.importorskip("torchjd")
    grams = peer.torchjd_sides(gradients, WEIGHTS, combines=False, room=1e6)
    combinations = peer.torchjd_sides(gradients, WEIGHTS, combines=True, room=1e6)
    assert list(grams) == list(combinations) == list(peer.TORCHJD)
    for gram, combination in zip(grams.values(), combinations.values(), strict=True):
        for _ in range(2):  # nothing is used up
            torch.testing.assert_close(gram(), tg.task_gram(gradients))
            torch.testing.assert_close(combination(), tg.combine(gradients, WEIGHTS))


def test_why_torchjd_is_not_run(gradients, monkeypatch):
    sides = peer.torchjd_sides(gradients, WEIGHTS, combines=False, room=100)
    assert set(sides.values()) == {"no room"}
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    sides = peer.torchjd_sides(gradients, WEIGHTS, combines=False, room=1e6)
    assert set(sides.values()) == {"not installed"}


def test_the_limit_is_the_larger_of_bytes_and_flops():
    limits = Limits(torch.device("cpu"), torch.float32)
    copied = 2 * 2**27  # a tensor of 128 MiB, read and written
    least = {COPY: 1.0, PRODUCT: 2.0}  # seconds; the product is of 2 * 1536**3 operations
    assert limits.of(least, copied / 2).seconds == 0.5
    assert limits.of(least, copied / 2, 1536**3).seconds == 1.0
    assert limits.of(least, copied / 2, 1536**3) == (0.5, 1.0)
