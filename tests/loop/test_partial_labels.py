"""Batches with labels of some tasks: one data set per task, in turns or together."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch

import taskgroup as tg

SETS = (("a", "b"), ("c", "d"))  # two data sets with the labels of two tasks each
TASKS = ["a", "b", "c", "d"]
TARGETS = {"a": (3.0, 1.0), "b": (3.0, -1.0), "c": (-3.0, 1.0), "d": (-3.0, -1.0)}


class Toy:
    """A plane on which a and b pull one way, c and d the other."""

    def __init__(self, lr=0.01):
        self.x = torch.zeros(2, requires_grad=True)
        self.lr = lr

    def losses(self):
        return {t: (self.x - torch.tensor(y)).square().sum() for t, y in TARGETS.items()}

    def step(self, group):
        losses = self.losses()
        loss = group.loss({t: losses[t] for t in group.observed})
        (gradient,) = torch.autograd.grad(loss, self.x)
        self.x.data -= self.lr * gradient


def run(groups, toy, present):
    steps = []
    for group in groups.batch(present):
        toy.step(group)
        steps.append(group.tasks)
    return steps


def in_turns(batches):
    return [SETS[n % 2] for n in range(batches)]


def quiet_groups(**settings):
    """Groups whose warning of tasks that never meet is tested elsewhere."""
    groups = tg.TaskGroups(TASKS, **settings)
    groups._misuse._meets = False
    return groups


@pytest.mark.parametrize("affinity", ["proximal", "gradient"])
def test_one_labelled_task_is_stepped_once_and_nothing_is_observed(affinity):
    toy = Toy()
    settings = {"affinity": tg.GradientAffinity([toy.x])} if affinity == "gradient" else {}
    groups = quiet_groups(warmup=1, **settings)
    for n in range(8):
        task = TASKS[n % 4]
        assert run(groups, toy, [task]) == [(task,)]
    assert not groups.affinity.observed.any()
    assert not groups.affinity.matrix.any()
    assert groups.partition == [("a",), ("b",), ("c",), ("d",)]


def test_observed_counts_every_entry():
    """Three steps a batch of which the last is not seen; a task outside is always observed."""
    groups = tg.TaskGroups(TASKS[:3], warmup=1000, affinity=tg.ProximalAffinity(decay=0.5))
    toy = Toy()
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for _ in range(20):
        tasks = []
        for group in groups:
            losses = toy.losses()
            loss = group.loss({t: losses[t] for t in TASKS[:3]})
            (gradient,) = torch.autograd.grad(loss, toy.x)
            toy.x.data -= 0.01 * gradient  # every task's own step serves it
            tasks.append(group.tasks[0])
        for task in tasks[:-1]:
            expected[TASKS.index(task)] += 1
    observed = groups.affinity.observed
    assert observed.dtype == torch.int64
    assert torch.equal(observed, expected)
    observed += 1  # a copy
    groups.affinity.matrix.add_(1)
    assert torch.equal(groups.affinity.observed, expected)
    assert groups.affinity.matrix.max() < 1


@pytest.mark.learned
@pytest.mark.parametrize(
    "grouping",
    [
        tg.AffinityPropagation(),
        tg.AffinityPropagation(preference=-100.0),
        tg.GraphColoring(),
        tg.GraphColoring(threshold=-50.0),
        tg.Exhaustive(4),
        tg.KMeans(2),
        tg.Spectral(2),
    ],
    ids=repr,
)
@pytest.mark.parametrize("affinity", ["proximal", "gradient"])
def test_data_sets_in_turns_share_no_group(grouping, affinity):
    toy = Toy()
    affinity = (
        tg.GradientAffinity([toy.x], decay=0.2)
        if affinity == "gradient"
        else tg.ProximalAffinity(decay=0.2)
    )
    groups = quiet_groups(warmup=10, grouping=grouping, affinity=affinity)
    for present in in_turns(40):
        run(groups, toy, present)
        # "never share a group" holds in every batch, and within a set the groups are learned.
        for members in groups.partition:
            assert not {"a", "b"} & set(members) or not {"c", "d"} & set(members)
    within = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert torch.equal(groups.affinity.observed > 0, within)
    assert groups.partition == [("a", "b"), ("c", "d")]


@pytest.mark.learned
def test_tasks_that_meet_in_every_step_are_told_apart_and_together():
    """The same tasks, one mini-batch of each data set per step: all pairs are known."""
    groups = tg.TaskGroups(TASKS, warmup=10, affinity=tg.ProximalAffinity(decay=0.2))
    toy = Toy()
    for _ in range(30):
        run(groups, toy, TASKS)
    assert (groups.affinity.observed > 0).all()
    assert groups.partition == [("a", "b"), ("c", "d")]
    assert (groups.affinity.matrix[:2, 2:] < 0).all()


@pytest.mark.parametrize("every", [2, 4])
@pytest.mark.parametrize("affinity", ["proximal", "gradient"])
def test_data_sets_in_turns_are_all_observed(every, affinity):
    """Counting all batches would meet the first data set alone."""
    toy = Toy()
    if affinity == "gradient":
        groups = quiet_groups(
            warmup=1000, affinity=tg.GradientAffinity([toy.x], decay=0.5, every=every)
        )
    else:
        groups = quiet_groups(warmup=1000, observe_every=every)
    before, seen = groups.affinity.observed, []
    for present in in_turns(8 * every):
        run(groups, toy, present)
        seen.append(not torch.equal(groups.affinity.observed, before))
        before = groups.affinity.observed
    # Every n-th batch of each set, no more and no fewer, beginning with its first.
    for first in (0, 1):
        assert seen[first::2] == [n % every == 0 for n in range(4 * every)]
    assert (before.diagonal() > 0).sum() >= 3  # of two tasks one step is the last, and not seen


def test_turns_of_all_tasks_are_every_nth_batch():
    groups = tg.TaskGroups(TASKS, observe_every=3)
    found = []
    for _ in range(9):
        for group in groups:
            group.skip()
        found.append(group.observes)
    assert found == [n % 3 == 0 for n in range(9)]


def test_resume_in_the_middle_of_a_turn_is_exact():
    def make():
        return quiet_groups(
            warmup=3, observe_every=3, affinity=tg.ProximalAffinity(decay=0.3), seed=5
        )

    def train(groups, toy, batches):
        steps = [run(groups, toy, present) for present in batches]
        return steps, groups.affinity.matrix, groups.affinity.observed

    batches = in_turns(40)
    whole, toy = make(), Toy()
    train(whole, toy, batches[:19])
    state, x = copy.deepcopy(whole.state_dict()), toy.x.detach().clone()
    expected = train(whole, toy, batches[19:])
    other, toy = make(), Toy()
    other.load_state_dict(state)
    toy.x.data.copy_(x)
    found = train(other, toy, batches[19:])
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def test_tasks_that_never_meet_are_told_of_once():
    groups = tg.TaskGroups(TASKS, warmup=5)
    toy = Toy()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for present in in_turns(60):
            run(groups, toy, present)
    (warning,) = told
    assert "never in the same one" in str(warning.message)
    assert all(f"{one} and {other}" in str(warning.message) for one in "ab" for other in "cd")
    assert "a and b" not in str(warning.message)
    assert "tg.Fixed" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "case", ["all meet now and then", "a rare task", "fixed groups", "all labelled"]
)
def test_tasks_that_meet_are_nobodys_business(case):
    settings = {"grouping": tg.Fixed(SETS)} if case == "fixed groups" else {}
    groups = tg.TaskGroups(TASKS, warmup=5, **settings)
    toy = Toy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(80):
            present = SETS[n % 2]
            if case == "all meet now and then" and n % 10 == 0:
                present = TASKS
            elif case == "a rare task":
                present = ["a", "b", "c"] if n % 10 else ["a", "d"]
            elif case == "all labelled":
                present = TASKS
            run(groups, toy, present)


def test_function_groupings_are_given_zeros():
    seen = []

    def grouping(matrix):
        seen.append(matrix)

    groups = quiet_groups(warmup=1, grouping=grouping)
    for present in in_turns(6):
        run(groups, Toy(), present)
    assert seen
    assert all(matrix.isfinite().all() for matrix in seen)


class TestUnknownPairs:
    """The groupings themselves: NaN is a pair that was never observed."""

    @pytest.mark.parametrize("seed", range(20))
    def test_parts_without_a_known_pair_are_apart(self, seed):
        generator = np.random.default_rng(seed)
        n = int(generator.integers(4, 12))
        part = generator.integers(0, 3, n)
        matrix = generator.uniform(0.1, 1, (n, n)) + np.eye(n)  # all serve all
        matrix[part[:, None] != part] = np.nan
        for grouping in (
            tg.AffinityPropagation(),
            tg.AffinityPropagation(preference=-10.0),
            tg.GraphColoring(),
            tg.GraphColoring(-1e9),
        ):
            labels = grouping(torch.from_numpy(matrix))
            if labels is None:  # no convergence: the partition stays
                continue
            for one, other in itertools.combinations(range(n), 2):
                assert labels[one] != labels[other] or part[one] == part[other]

    @pytest.mark.parametrize("seed", range(10))
    def test_is_scikit_learns_clustering_of_what_is_known(self, seed):
        """Of a connected matrix: unknown pairs are the least; the median is of the known ones."""
        from sklearn.cluster import AffinityPropagation

        generator = np.random.default_rng(seed)
        n = 9
        matrix = generator.uniform(-2, 1, (n, n)) + 2 * np.eye(n)
        unknown = np.triu(generator.uniform(size=(n, n)) < 0.3, 2)  # neighbours are known
        matrix[unknown | unknown.T] = np.nan
        ratio = matrix / matrix.diagonal()
        similarity = (ratio + ratio.T) / 2
        known = np.isfinite(similarity)
        filled = np.where(known, similarity, min(-1.0, similarity[known].min()))
        model = AffinityPropagation(
            affinity="precomputed",
            preference=np.median(similarity[known]),
            convergence_iter=50,
            random_state=0,
        )
        expected = model.fit(filled).labels_
        found = tg.AffinityPropagation()(torch.from_numpy(matrix))
        assert found.tolist() == expected.tolist()

    def test_a_pair_observed_one_way_is_known(self):
        matrix = torch.tensor([[1.0, 0.8], [torch.nan, 1.0]])
        assert tg.AffinityPropagation()(matrix).tolist() == [0, 0]
        matrix[0, 1] = torch.nan
        assert tg.AffinityPropagation()(matrix).tolist() == [0, 1]

    def test_a_task_without_a_known_pair_is_alone(self):
        matrix = torch.full((4, 4), 0.9) + 0.1 * torch.eye(4)
        matrix[3, :3] = matrix[:3, 3] = torch.nan
        for grouping in (tg.AffinityPropagation(), tg.Exhaustive(1), tg.KMeans(1), tg.Spectral(1)):
            labels = grouping(matrix)
            assert (labels == labels[0]).tolist() == [True, True, True, False]
