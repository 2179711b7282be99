"""The published code's reimplementation for the benchmarks, against values worked out by hand."""

import numpy as np
import pytest
import torch

import benchmarks.published
from benchmarks.published import PublishedTaskAffinity

TASKS = ["a", "b", "c"]


def losses(*values):
    return {task: torch.tensor(value) for task, value in zip("abcdefghij", values, strict=False)}


def with_map(rows, groups=None):
    tasks = [f"task{k}" for k in range(len(rows))]
    peer = PublishedTaskAffinity(tasks, groups or {task: [task] for task in tasks}, 0.1)
    peer.affinity_map = torch.tensor(rows)
    return peer


def test_a_change_is_credited_to_the_group_about_to_be_stepped():
    peer = PublishedTaskAffinity(TASKS, {"first": ["a"], "second": ["b"], "third": ["c"]}, 0.5)
    peer.update("first", losses(1.0, 2.0, 4.0))
    assert not peer.affinity_map.any()  # nothing to compare with: the first group gets nothing
    # The step on a took a to 1/2, b to 3/2 and c to 5; it is entered in the row of b.
    peer.update("second", losses(0.5, 1.5, 5.0))
    assert peer.affinity_map.tolist() == [[0, 0, 0], [0.25, 0.125, -0.125], [0, 0, 0]]
    # The step on b left all as it was; it is entered in the row of c. That on c is never seen.
    peer.update("third", losses(0.5, 1.5, 5.0))
    assert peer.affinity_map.tolist() == [[0, 0, 0], [0.25, 0.125, -0.125], [0, 0, 0]]


def test_a_batch_starts_without_losses():
    peer = PublishedTaskAffinity(TASKS, {"all": TASKS}, 0.5)
    for _ in range(3):
        peer.init_pre_loss()
        peer.update("all", losses(*torch.rand(3).tolist()))
    assert not peer.affinity_map.any()


def test_the_old_entry_decays():
    peer = PublishedTaskAffinity(TASKS, {"a": ["a"]}, 0.25)
    peer.affinity_map.fill_(0.5)
    peer.update("a", losses(1.0, 1.0, 1.0))
    peer.update("a", losses(0.0, 0.5, 2.0))
    expected = [0.75 * 0.5 + 0.25, 0.75 * 0.5 + 0.25 * 0.5, 0.75 * 0.5 - 0.25]
    assert peer.affinity_map[0].tolist() == expected
    assert (peer.affinity_map[1:] == 0.5).all()


def test_a_task_without_a_loss_before_is_left_alone():
    peer = PublishedTaskAffinity(TASKS, {"ab": ["a", "b"]}, 1.0)
    peer.update("ab", losses(1.0, 0.0, -1.0))
    peer.update("ab", losses(0.5, 0.5, 0.5))
    # b and c had no positive loss. Row b meets a inside the group and needs b's own: skipped.
    assert peer.affinity_map.tolist() == [[0.25, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_signs_inside_the_group():
    peer = PublishedTaskAffinity(TASKS, {"ab": ["a", "b"]}, 1.0)
    peer.affinity_map.fill_(7.0)
    peer.update("ab", losses(1.0, 1.0, 1.0))
    peer.update("ab", losses(0.5, 1.25, 2.0))
    # The shares: a 1/4, b -1/8, c -1/2. Of opposite signs, so minus the larger; b's own is dropped.
    assert peer.affinity_map.tolist() == [[0.25, -0.25, -0.5], [-0.25, 7, -0.5], [7, 7, 7]]


@pytest.mark.parametrize(("after", "expected"), [(0.5, 0.25), (1.5, -0.25)])
def test_equal_signs_inside_the_group(after, expected):
    peer = PublishedTaskAffinity(TASKS, {"ab": ["a", "b"]}, 1.0)
    peer.update("ab", losses(1.0, 1.0, 1.0))
    peer.update("ab", losses(after, after, after))
    assert peer.affinity_map[0, 1] == peer.affinity_map[1, 0] == expected
    assert peer.affinity_map[0, 0] == peer.affinity_map[1, 1] == max(expected, 0)
    assert (peer.affinity_map[:2, 2] == expected).all()


def test_losses_are_read_twice_for_every_entry():
    reads = 0

    class Counted(torch.Tensor):
        def item(self):
            nonlocal reads
            reads += 1
            return 1.0

    peer = PublishedTaskAffinity(TASKS, {"ab": ["a", "b"], "c": ["c"]}, 0.5)
    values = {task: torch.ones(()).as_subclass(Counted) for task in TASKS}
    peer.update("ab", values)
    assert reads == 3 * 2 * 2


def test_the_matrix_is_normalised_above_the_diagonal_only():
    rng = np.random.default_rng(0)
    affinity = rng.uniform(-1, 1, (7, 7)).astype(np.float32)
    np.fill_diagonal(affinity, rng.uniform(0.1, 2, 7))
    peer = with_map(affinity.tolist())

    expected = np.zeros((7, 7))
    for i in range(7):
        for k in range(7):
            own = affinity[max(i, k), max(i, k)]  # of the entry above the diagonal
            above, below = affinity[min(i, k), max(i, k)], affinity[max(i, k), min(i, k)]
            expected[i, k] = 1 if i == k else (above / own + below) / 2
    np.testing.assert_allclose(peer.similarity().numpy(), expected, rtol=1e-6, atol=1e-7)
    assert peer.affinity_map.tolist() == affinity.tolist()  # a copy was divided


def test_the_half_normalised_matrix_by_hand():
    peer = with_map([[0.5, 1.0], [1.0, 0.25]])
    # Above: 1 / 0.25 = 4. Below: 1, not 1 / 0.5 = 2. Their mean is 2.5, not 3.
    assert peer.similarity().tolist() == [[1, 2.5], [2.5, 1]]


def test_planted_groups_are_found_once_they_are_in_the_matrix():
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    affinity = np.where(labels[:, None] == labels, 0.5, -0.2)
    affinity += 0.05 * np.random.default_rng(0).standard_normal((7, 7))
    np.fill_diagonal(affinity, 1)
    peer = with_map(affinity.astype(np.float32).tolist())
    found = peer.next_groups()
    assert sorted(found.values()) == [peer.tasks[:3], peer.tasks[3:]]
    assert peer.groups is found


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_zero_on_the_diagonal_raises():
    peer = with_map([[0.0, 0.0, 0.1], [0.0, 1.0, 0.1], [0.1, 0.1, 1.0]])
    assert peer.similarity()[0, 0].isnan()
    with pytest.raises(ValueError, match="NaN"):
        peer.next_groups()


def test_without_exemplars_it_waits_longer_ten_times_and_keeps_the_groups(monkeypatch):
    asked = []

    class Unconverged:
        cluster_centers_indices_ = ()

        def __init__(self, *, preference, affinity, convergence_iter):
            assert (preference, affinity) == (None, "precomputed")
            asked.append(convergence_iter)

        def fit(self, similarity):
            return self

    monkeypatch.setattr(benchmarks.published, "AffinityPropagation", Unconverged)
    peer = with_map([[1.0, 0.5], [0.5, 1.0]], {"both": ["task0", "task1"]})
    assert peer.next_groups() == {"both": ["task0", "task1"]}
    assert asked == list(range(50, 1050, 100))


def test_a_single_group_is_stepped_on_twice_and_its_second_step_sees_the_first():
    peer = PublishedTaskAffinity(TASKS, {"all": TASKS}, 1.0)
    assert peer.order() == ["all", "all"]
    peer.update("all", losses(1.0, 1.0, 1.0))
    peer.update("all", losses(0.25, 0.25, 0.25))
    assert (peer.affinity_map == 0.25).all()


def test_groups_may_be_set_and_are_dealt_in_any_order():
    peer = PublishedTaskAffinity(TASKS, {"all": TASKS}, 0.5)
    peer.groups = {"ab": ["a", "b"], "c": ["c"]}
    orders = {tuple(peer.order()) for _ in range(100)}
    assert orders == {("ab", "c"), ("c", "ab")}
