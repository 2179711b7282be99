"""The batch: which groups, in what order, what they need, what is observed."""

import enum
import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import taskgroup as tg

TASKS = ["a", "b", "c", "d"]


class Toy:
    """Four losses of one parameter vector that a test can step by hand."""

    def __init__(self, tasks=TASKS):
        self.tasks = list(tasks)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(len(tasks), 3, generator=generator).requires_grad_()

    def losses(self):
        own = self.x.square().sum(1)
        return dict(zip(self.tasks, own + 0.1 * own.sum() + 1, strict=True))

    def step(self, group, lr=0.05):
        (gradient,) = torch.autograd.grad(group.loss(self.losses()), self.x)
        self.x.data.sub_(lr * gradient)


def run(groups, toy, batches=1):
    """The tasks of every group, by batch."""
    dealt = []
    for _ in range(batches):
        batch = []
        for group in groups:
            batch.append(group.tasks)
            toy.step(group)
        dealt.append(batch)
    return dealt


def test_readme_loop_starts_with_one_task_a_group():
    groups = tg.TaskGroups(TASKS)
    seen = [(group.tasks, group.first, group.last) for group in walk(groups)]
    assert sorted(tasks for tasks, _, _ in seen) == [("a",), ("b",), ("c",), ("d",)]
    assert [first for _, first, _ in seen] == [True, False, False, False]
    assert [last for _, _, last in seen] == [False, False, False, True]
    assert groups.partition == [("a",), ("b",), ("c",), ("d",)]


def walk(batch):
    """Pass over every group of a batch."""
    for group in batch:
        yield group
        group.skip()


def test_order_is_seeded_and_changes():
    def orders(seed):
        groups = tg.TaskGroups(TASKS, seed=seed)
        return [tuple(group.tasks for group in walk(groups)) for _ in range(20)]

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert len(set(orders(1))) > 5


def test_weighted_sum_and_mean_over_the_group():
    losses = {t: torch.tensor(float(k + 1), requires_grad=True) for k, t in enumerate(TASKS)}
    partition = [["a", "c"], ["b", "d"]]
    for weights in ({"a": 2.0, "b": 3.0, "c": 0.5, "d": 1.0}, [2.0, 3.0, 0.5, 1.0]):
        for reduction, divisor in (("sum", 1), ("mean", 2)):
            groups = tg.TaskGroups(
                TASKS, weights=weights, reduction=reduction, grouping=tg.Fixed(partition)
            )
            got = {group.tasks: group.loss(losses).item() for group in groups}
            assert got == {
                ("a", "c"): (2.0 * 1 + 0.5 * 3) / divisor,
                ("b", "d"): (3.0 * 2 + 1.0 * 4) / divisor,
            }


@pytest.mark.parametrize("stacked", [False, True])
def test_gradient_is_that_of_the_group_alone(stacked):
    groups = tg.TaskGroups(TASKS, grouping=tg.Fixed([["a", "b"], ["c"], ["d"]]))
    for group in groups:
        leaves = {task: torch.tensor(2.0, requires_grad=True) for task in TASKS}
        losses = {task: leaf.square() for task, leaf in leaves.items()}
        loss = group.loss(torch.stack(list(losses.values())) if stacked else losses)
        loss.backward()
        for task, leaf in leaves.items():
            gradient = 0.0 if leaf.grad is None else leaf.grad.item()
            assert gradient == (4.0 if task in group.tasks else 0.0)


def test_loss_outside_the_group_cannot_poison_the_step():
    groups = tg.TaskGroups(["a", "b"], grouping=tg.Singletons())
    for group in walk(groups):
        if group.tasks == ("a",):
            losses = torch.tensor([1.0, math.nan], requires_grad=True)
            with pytest.warns(UserWarning, match="'b'"):
                loss = group.loss(losses)
            loss.backward()
            assert loss.item() == 1.0
            assert losses.grad.tolist() == [1.0, 0.0]


def test_effect_is_credited_to_the_group_that_caused_it():
    """One batch by hand: A moves by the losses around each group's own step, the last one's not."""
    toy = Toy()
    decay = 0.1
    groups = tg.TaskGroups(
        TASKS,
        affinity=tg.ProximalAffinity(decay=decay),
        grouping=tg.Fixed([["a", "b"], ["c"], ["d"]]),
    )
    for _ in range(5):
        start = groups.affinity.matrix.double().clone()
        seen = []
        for group in groups:
            seen.append((group.tasks, [loss.item() for loss in toy.losses().values()]))
            toy.step(group)
        expected = start
        for (stepped, before), (_, after) in itertools.pairwise(seen):
            for i in (TASKS.index(task) for task in stepped):
                for k, task in enumerate(TASKS):
                    ratio = (1 - after[k] / before[k]) / len(stepped)
                    own = (1 - after[i] / before[i]) / len(stepped)
                    if task in stepped and k != i:
                        ratio = ratio if own * ratio >= 0 else -max(own, ratio)
                    expected[i, k] = (1 - decay) * expected[i, k] + decay * ratio
        last = [TASKS.index(task) for task in seen[-1][0]]
        torch.testing.assert_close(groups.affinity.matrix.double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(groups.affinity.matrix[last].double(), start[last])


def test_warmup_and_regroup_every_count_rounds():
    calls = []

    def grouping(matrix):
        calls.append(batch)
        return torch.zeros(4, dtype=torch.int64)

    groups = tg.TaskGroups(TASKS, grouping=grouping, warmup=3, regroup_every=5)
    toy = Toy()
    for batch in range(15):
        run(groups, toy)
    # Three rounds of warm-up, the next one begins with learned groups, and every fifth from it.
    assert calls == [3, 8, 13]
    assert groups.partition == [("a", "b", "c", "d")]


def test_groups_that_are_not_learned_change_every_so_many_rounds():
    tasks = [f"task{k}" for k in range(20)]
    groups = tg.TaskGroups(tasks, grouping=tg.RandomGroups(4), regroup_every=3)
    partitions = [groups.partition]
    for _ in range(12):
        list(walk(groups))
        partitions.append(groups.partition)
    changes = {n for n in range(12) if partitions[n] != partitions[n + 1]}
    assert changes == {3, 6, 9}


def test_groups_per_batch_deals_a_round_over_batches():
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons(), groups_per_batch=3)
    dealt = [[group.tasks for group in walk(groups)] for _ in range(4)]
    assert [len(batch) for batch in dealt] == [3, 1, 3, 1]
    for first, second in (dealt[:2], dealt[2:]):
        assert sorted(first + second) == [("a",), ("b",), ("c",), ("d",)]


def test_warmup_rounds_last_longer_with_fewer_groups_per_batch():
    calls = []

    def grouping(matrix):
        calls.append(batch)

    groups = tg.TaskGroups(
        TASKS, grouping=grouping, warmup=1, groups_per_batch=2, observe_every=1000
    )
    for batch in range(8):
        for _ in walk(groups):
            pass
    assert calls == [2, 4, 6]  # two batches are a round
    assert groups.unconverged == 3


def test_observing_batch_takes_a_second_step():
    groups = tg.TaskGroups(TASKS, groups_per_batch=1, observe_every=3, warmup=1000)
    batches = [[(g.tasks, g.observed) for g in walk(groups)] for _ in range(30)]
    for n, batch in enumerate(batches):
        assert len(batch) == (2 if n % 3 == 0 else 1)
        for tasks, observed in batch:
            assert observed == (tuple(TASKS) if n % 3 == 0 else tasks)
        if n % 3 == 0:
            assert batch[0][0] != batch[1][0]


def test_one_learned_group_is_stepped_twice_to_be_observed():
    toy = Toy()
    groups = tg.TaskGroups(TASKS, grouping=lambda matrix: torch.zeros(4).long(), warmup=0)
    run(groups, toy)
    before = groups.affinity.matrix.clone()
    assert run(groups, toy) == [[tuple(TASKS)] * 2]
    assert not torch.equal(groups.affinity.matrix, before)


def test_groupings_that_do_not_read_the_affinity_hold_from_the_first_batch():
    for grouping, partition in (
        (tg.Together(), [tuple(TASKS)]),
        (tg.Singletons(), [("a",), ("b",), ("c",), ("d",)]),
        (tg.Fixed([["b", "a"], ["d", "c"]]), [("a", "b"), ("c", "d")]),
    ):
        groups = tg.TaskGroups(TASKS, grouping=grouping, warmup=100)
        toy = Toy()
        for batch in run(groups, toy, batches=3):
            assert sorted(batch) == partition
        assert groups.partition == partition


def test_random_groups_are_m_and_change():
    groups = tg.TaskGroups(TASKS, grouping=tg.RandomGroups(2, seed=1))
    seen = set()
    for _ in range(40):
        for _ in walk(groups):
            pass
        assert len(groups.partition) == 2
        assert sorted(sum(groups.partition, ())) == TASKS
        seen.add(tuple(groups.partition))
    assert len(seen) == 7  # the ways to part four tasks in two


def test_together_costs_one_step_and_needs_its_own_losses_only():
    groups = tg.TaskGroups(TASKS, grouping=tg.Together())
    (group,) = list(walk(groups))
    assert group.observed == group.tasks == tuple(TASKS)


def test_leaving_early_forgets_the_open_step_only():
    toy = Toy()
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=1.0))
    for n, group in enumerate(groups):
        toy.step(group)
        if n == 1:
            break
    observed = groups.affinity.matrix.clone()
    assert observed.any(dim=1).sum() == 1  # of the first step, by the second forward
    groups.state_dict()  # outside the batch
    toy.x.data.mul_(2)  # a change that no group caused ...
    for group in groups:
        toy.step(group)
        break
    assert torch.equal(groups.affinity.matrix, observed)  # ... is credited to none

    with pytest.raises(ZeroDivisionError):
        for group in groups:
            toy.step(group)
            raise ZeroDivisionError
    groups.state_dict()

    group = next(iter(groups))  # outlives its iterator
    groups.state_dict()
    assert group.loss(toy.losses()).requires_grad


def test_skipped_group_leaves_the_observation_open_for_the_next():
    """a is stepped, then one group is skipped: the next forward still shows the step on a."""
    toy = Toy()
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=1.0))
    stepped = []
    for n, group in enumerate(groups):
        if n == 1:
            group.skip()
        else:
            toy.step(group)
            stepped.append(TASKS.index(group.tasks[0]))
    rows = groups.affinity.matrix.any(dim=1).nonzero().flatten().tolist()
    assert rows == sorted(stepped[:-1])


def test_skip_after_the_loss_is_no_step():
    toy = Toy()
    groups = tg.TaskGroups(["a", "b", "c", "d"], affinity=tg.ProximalAffinity(decay=1.0))
    looked_at = None
    for n, group in enumerate(groups):
        if n == 1:
            group.loss(toy.losses())
            toy.x.data.mul_(1.5)  # not this group's doing
            group.skip()
            looked_at = TASKS.index(group.tasks[0])
        else:
            toy.step(group)
    assert not groups.affinity.matrix[looked_at].any()


def test_accumulated_micro_batches_observe_the_whole_batch():
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]

    def train(shares):
        x = torch.zeros(2, requires_grad=True)
        groups = tg.TaskGroups(["a", "b"], affinity=tg.ProximalAffinity(decay=1.0))
        for group in groups:
            gradient = torch.zeros(2)
            if shares:
                for part in parts:
                    losses = (x - part).square() + 1
                    loss = group.loss(dict(zip("ab", losses, strict=True)), share=0.5)
                    gradient += torch.autograd.grad(loss, x)[0]
            else:
                losses = sum((x - part).square() + 1 for part in parts) / 2
                gradient += torch.autograd.grad(group.loss(losses), x)[0]
            x.data.sub_(0.1 * gradient)
        return x.detach(), groups.affinity.matrix

    for got, expected in zip(train(shares=True), train(shares=False), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_present_tasks_alone_are_dealt_and_observed():
    toy = Toy()
    groups = tg.TaskGroups(
        TASKS,
        grouping=tg.Fixed([["a", "b"], ["c"], ["d"]]),
        affinity=tg.ProximalAffinity(decay=1.0),
    )
    dealt = []
    for group in groups.batch(["b", "d"]):
        dealt.append(group.tasks)
        assert group.observed == ("b", "d")
        losses = toy.losses()
        (gradient,) = torch.autograd.grad(group.loss({t: losses[t] for t in "bd"}), toy.x)
        toy.x.data.sub_(0.05 * gradient)
    assert sorted(dealt) == [("b",), ("d",)]
    touched = groups.affinity.matrix.nonzero()
    assert {TASKS[i] for i in touched.flatten().tolist()} == {"b", "d"}
    assert [*groups.batch([])] == []


def test_absent_groups_do_not_hold_a_round_up():
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons(), groups_per_batch=1)
    dealt = [[g.tasks for g in walk(groups.batch(["a", "b"]))] for _ in range(6)]
    assert all(len(batch) == 1 for batch in dealt)
    for k in range(0, 6, 2):
        assert sorted(dealt[k] + dealt[k + 1]) == [("a",), ("b",)]


def test_replayed_dropout_shows_the_step_not_the_draw():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3))
    x = torch.randn(16, 8)

    def losses_of_a_batch(groups):
        seen = []
        for group in groups:
            losses = net(x).square().mean(0)
            group.loss(losses)  # and no step
            seen.append(losses.detach())
        return torch.stack(seen)

    replayed = losses_of_a_batch(tg.TaskGroups(["a", "b", "c"], grouping=tg.Singletons()))
    ratio = 1 - replayed / replayed[0]
    assert ratio.tolist() == torch.zeros(3, 3).tolist()

    drawn = losses_of_a_batch(
        tg.TaskGroups(["a", "b", "c"], grouping=tg.Singletons(), replay_rng=False)
    )
    assert (1 - drawn / drawn[0])[1:].abs().min() > 1e-4

    # From batch to batch the masks change all the same.
    groups = tg.TaskGroups(["a", "b", "c"], grouping=tg.Singletons())
    assert not torch.equal(losses_of_a_batch(groups), losses_of_a_batch(groups))


def test_no_step_is_not_observed():
    toy = Toy()
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=1.0))
    run(groups, toy)
    before = groups.affinity.matrix.clone()
    for group in groups:
        toy.step(group, lr=0.0)
    assert torch.equal(groups.affinity.matrix, before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tasks(count):
    tasks = TASKS[:count]
    toy = Toy(tasks)
    groups = tg.TaskGroups(tasks, warmup=2, affinity=tg.ProximalAffinity(decay=0.5))
    dealt = run(groups, toy, batches=8)
    assert all(sorted(set(sum(batch, ()))) == tasks for batch in dealt)
    if count == 1:
        assert all(len(batch) == 1 for batch in dealt)  # nothing to learn, no step to add


@pytest.mark.learned
def test_task_that_never_improves_keeps_its_own_group():
    x = torch.zeros(2, requires_grad=True)
    groups = tg.TaskGroups(["a", "b", "c"], warmup=3, affinity=tg.ProximalAffinity(decay=0.5))
    for _ in range(10):
        for group in groups:
            losses = torch.stack([(x - 3).square().sum(), (x - 4).square().sum(), x.exp().sum()])
            (gradient,) = torch.autograd.grad(group.loss(losses), x)
            # The step on c goes uphill.
            x.data.sub_(gradient * (-0.01 if group.tasks == ("c",) else 0.01))
    assert groups.affinity.matrix[2, 2] == 0
    assert groups.partition == [("a", "b"), ("c",)]


def test_group_must_get_its_loss():
    groups = tg.TaskGroups(TASKS)
    batch = iter(groups)
    next(batch)
    with pytest.raises(RuntimeError, match=r"got no loss: call group\.loss"):
        next(batch)
    groups.state_dict()  # the batch is over

    def last_without_loss():
        toy = Toy()
        for group in groups:
            if not group.last:
                toy.step(group)

    with pytest.raises(RuntimeError, match="got no loss"):
        last_without_loss()


def test_shares_must_add_up():
    toy = Toy()
    groups = tg.TaskGroups(TASKS)
    batch = iter(groups)
    next(batch).loss(toy.losses(), share=0.25)
    with pytest.raises(RuntimeError, match=r"add up to 0\.25, not to 1"):
        next(batch)
    group = next(iter(groups))
    group.loss(toy.losses())
    with pytest.raises(ValueError, match="would add up to 2"):
        group.loss(toy.losses())
    for share in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="share must be in"):
            next(iter(groups)).loss(toy.losses(), share=share)
    for group in groups:  # ten tenths are one
        for _ in range(10):
            group.loss(toy.losses(), share=0.1)


def test_skipped_group_takes_no_loss():
    group = next(iter(tg.TaskGroups(TASKS)))
    group.skip()
    with pytest.raises(RuntimeError, match="was skipped"):
        group.loss(Toy().losses())


def test_two_batches_at_once_are_refused():
    groups = tg.TaskGroups(TASKS)
    toy = Toy()
    first = iter(groups)
    toy.step(next(first))
    second = iter(groups)
    toy.step(next(second))
    assert not groups.affinity.matrix.any()  # the open step of the first is forgotten
    with pytest.raises(RuntimeError, match="Another batch"):
        next(first)
    toy.step(next(second))  # which goes on undisturbed


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(3).long(), r"int64 \[3\]"),
        (torch.zeros(4), r"float32 \[4\]"),
        ([0, 0, 1, 1], r"\[0, 0, 1, 1\]"),
    ],
)
def test_bad_labels_of_a_grouping(labels, said):
    groups = tg.TaskGroups(TASKS, grouping=lambda matrix: labels, warmup=1)
    run(groups, Toy())
    with pytest.raises(ValueError, match=said):
        run(groups, Toy())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["a", "b", "a"]}, "'a' is named twice"),
        ({"tasks": ["a", ""]}, "Task 1 must be a non-empty string"),
        ({"tasks": ["a", 3]}, "Task 1 must be a non-empty string, got 3"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"regroup_every": 0}, "regroup_every must be"),
        ({"groups_per_batch": 0}, "groups_per_batch must be"),
        ({"observe_every": 0.5}, "observe_every must be"),
        ({"reduction": "max"}, "reduction must be 'sum' or 'mean'"),
        ({"weights": {"a": 1.0}}, "'b'"),
        ({"weights": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}}, "'e'"),
        ({"weights": [1.0]}, "1 entries for 4 tasks"),
        ({"weights": [1.0, -1.0, 1.0, 1.0]}, "weight of task 'b'"),
        ({"grouping": tg.Fixed([["a"], ["b"]])}, "no group for task 'c'"),
        ({"grouping": tg.Fixed([["a", "b"], ["c", "d", "e"]])}, "unknown tasks .'e'"),
        ({"grouping": tg.RandomGroups(5)}, "cannot fill 5 groups with 4 tasks"),
        ({"warmup": True}, "warmup must be an integer of at least 0, got True"),
        ({"warmup": 5.0}, "warmup must be an integer of at least 0, got 5.0"),
        ({"regroup_every": True}, "regroup_every must be an integer"),
    ],
)
def test_bad_settings_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        tg.TaskGroups(**{"tasks": TASKS, **arguments})


def test_bad_arguments_that_are_easy_to_write():
    with pytest.raises(TypeError, match=r"write \['depth'\]"):
        tg.TaskGroups("depth")
    with pytest.raises(TypeError, match="put it in"):
        tg.TaskGroups(TASKS).batch("a")
    with pytest.raises(ValueError, match="unknown tasks"):
        tg.TaskGroups(TASKS).batch(["a", "x"])
    for decay in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="decay must be in"):
            tg.ProximalAffinity(decay=decay)
    affinity = tg.ProximalAffinity()
    tg.TaskGroups(TASKS, affinity=affinity)
    with pytest.raises(RuntimeError, match="already belongs"):
        tg.TaskGroups(TASKS, affinity=affinity)


def groups_with(**settings):
    return tg.TaskGroups(TASKS, **settings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: tg.TaskGroups(TASKS, affinity="proximal"),
            r"tg\.ProximalAffinity\(\).*'proximal'",
        ),
        (
            lambda: groups_with(affinity=tg.ProximalAffinity),
            "class ProximalAffinity; call",
        ),
        (lambda: groups_with(grouping="kmeans"), r"tg\.KMeans\(m\).*'kmeans'"),
        (lambda: groups_with(grouping=tg.KMeans), "class KMeans; call it"),
        (
            lambda: groups_with(grouping=[["a", "b"], ["c", "d"]]),
            r"tg\.Fixed\(partition\)",
        ),
        (lambda: tg.ProximalAffinity(decay=True), "decay as a number"),
        (lambda: tg.ProximalAffinity(decay="fast"), "decay as a number"),
        (lambda: tg.GradientAffinity([3.0]), "shared takes a module or its parameters"),
        (
            lambda: tg.TaskGroups(TASKS).batch(
                {"a": torch.tensor([True]), "b": torch.tensor([False])}
            ),
            r"\[task for task, mask in masks.items\(\) if mask.any\(\)\]",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_say_what_was_meant(make, said):
    with pytest.raises(TypeError, match=said):
        make()


def test_a_decay_that_is_a_momentum_is_told_of():
    with pytest.warns(UserWarning, match=r"write decay=0\.001\."):
        tg.ProximalAffinity(decay=0.999)
    with pytest.warns(UserWarning, match=r"write decay=0\.01\."):
        tg.GradientAffinity([torch.zeros(1, requires_grad=True)], decay=0.99)


def test_numbers_of_numpy_and_torch_are_numbers():
    groups = tg.TaskGroups(
        TASKS, warmup=np.int64(2), groups_per_batch=torch.tensor(2), observe_every=np.int32(1)
    )
    groups.load_state_dict(groups.state_dict())
    assert len(list(walk(groups))) == 2
    assert {type(setting) for setting in groups._settings.values()} == {int}
    tg.ProximalAffinity(decay=np.float32(0.1))


def test_tasks_are_plain_strings():
    class Name(str, enum.Enum):
        A = "a"

    groups = tg.TaskGroups([Name.A, *np.array(["b", "c"])])
    assert groups.tasks == ("a", "b", "c")
    assert {type(task) for task in groups.tasks} == {str}
    assert {type(task) for task in groups.state_dict()["tasks"]} == {str}


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_warmup_is_exactly_that_many_rounds(warmup):
    groups = tg.TaskGroups(TASKS, grouping=lambda matrix: torch.zeros(4).long(), warmup=warmup)
    toy = Toy()
    alone = [len({*batch}) == 4 for (batch,) in (run(groups, toy) for _ in range(8))]
    assert alone == [n < warmup for n in range(8)]


def test_item_losses_are_told_what_to_leave_out():
    groups = tg.TaskGroups(TASKS)
    group = next(iter(groups))
    with pytest.raises(ValueError, match=r"got float; pass the tensor itself, without .item"):
        group.loss(dict.fromkeys(TASKS, 1.0))


class TestFurtherPasses:
    """SAM and L-BFGS take several passes over the losses of one step."""

    def test_again_is_the_same_loss_and_is_not_observed(self):
        finals = []
        for passes in (1, 3):
            groups = tg.TaskGroups(TASKS, weights=[1, 2, 3, 4], reduction="mean", warmup=1000)
            toy = Toy()
            for _ in range(4):
                for group in groups:
                    first = group.loss(toy.losses(), again=True)
                    for _ in range(passes - 1):
                        again = group.loss({t: toy.losses()[t] for t in group.tasks}, again=True)
                        assert torch.equal(again, first)
                    (gradient,) = torch.autograd.grad(first, toy.x)
                    toy.x.data -= 0.01 * gradient
            finals.append((toy.x.detach(), groups.affinity.matrix, groups.affinity.observed))
        for one, other in zip(*finals, strict=True):
            assert torch.equal(one, other)

    def test_micro_batches_of_a_further_pass(self):
        groups = tg.TaskGroups(TASKS, grouping=tg.Together())
        toy = Toy()
        for group in groups:
            for _ in range(2):
                parts = [group.loss(toy.losses(), share=0.25, again=True) for _ in range(4)]
                torch.testing.assert_close(sum(parts), sum(toy.losses().values()))

    def test_without_a_word_a_second_loss_is_refused(self):
        groups = tg.TaskGroups(TASKS)
        toy = Toy()
        group = next(iter(groups))
        group.loss(toy.losses())
        with pytest.raises(ValueError, match=r"closure of L-BFGS, write .*again=True"):
            group.loss(toy.losses())


class TestNothingMoves:
    """Loops in which nothing can be observed are told of."""

    @pytest.mark.parametrize("stacked", [True, False])
    def test_one_forward_for_all_groups(self, stacked):
        groups = tg.TaskGroups(TASKS)
        losses = Toy().losses()
        given = torch.stack([*losses.values()]) if stacked else losses
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for group in groups:
                group.loss(given)
        (warning,) = told
        assert "move the forward pass into the loop over the groups" in str(warning.message)
        assert warning.filename == __file__

    def test_the_same_loss_in_other_batches_or_micro_batches_is_nobodys_business(self):
        groups = tg.TaskGroups(TASKS, grouping=tg.Together())
        losses = Toy().losses()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                for group in groups:
                    group.loss(losses, share=0.5)
                    group.loss(losses, share=0.5)

    @pytest.mark.parametrize("other", [0.0, None, torch.tensor(1)], ids=repr)
    def test_what_a_step_does_not_need_may_be_anything(self, other):
        groups = tg.TaskGroups(TASKS, grouping=tg.Fixed([["b"], ["a", "c", "d"]]))
        toy = Toy()
        for group in groups.batch(["b", "c", "d"]):
            group.loss({"a": other, **{t: toy.losses()[t] for t in "bcd"}})

    def test_steps_that_change_no_loss(self):
        groups = tg.TaskGroups(TASKS)
        toy = Toy()
        told = []
        for _ in range(30):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for group in groups:
                    group.loss(toy.losses())
            told.append([str(warning.message) for warning in caught])
        (said,) = [message for messages in told for message in messages]
        assert "changed no loss, so no affinity" in said
        assert told[6] == [said]  # after 20 of 3 a batch

    def test_a_step_now_and_then_is_enough(self):
        groups = tg.TaskGroups(TASKS)
        toy = Toy()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n in range(30):
                for group in groups:
                    loss = group.loss(toy.losses())
                    if n % 4 == 0 and group.first:
                        toy.x.data -= 0.01 * torch.autograd.grad(loss, toy.x)[0]
