import copy
import warnings

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.planted import Planted

# Of torch's own making, when it imports its compiler, and compiles what has an input with a graph.
COMPILER_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
TASKS = ["a", "b", "c"]


@pytest.mark.learned
@pytest.mark.parametrize(
    ("sizes", "cosine", "sample"),
    [
        pytest.param([3, 3], -0.5, None, id="2x3"),
        pytest.param([4, 4, 4], -0.3, None, id="3x4"),
        pytest.param([5, 5, 5, 5], -0.2, None, id="4x5"),
        pytest.param([2, 1], -0.5, None, id="two-against-one"),
        pytest.param([3, 3], -0.5, 3, id="2x3-sampled"),
        pytest.param([5, 5, 5, 5], -0.2, 8, id="4x5-sampled"),
    ],
)
def test_finds_planted_partition(sizes, cosine, sample):
    warmup = 100
    for seed in range(4):
        planted = Planted(sizes, cosine, seed)
        affinity = tg.GradientAffinity([planted.x], decay=0.01, sample=sample)
        groups = tg.TaskGroups(planted.tasks, affinity=affinity, warmup=warmup, seed=seed)
        learned = planted.train(groups, 200)[warmup + 1 :]
        found = sum(partition == planted.partition for partition in learned)
        assert found >= 0.99 * len(learned), f"seed {seed}: {found} of {len(learned)} batches"


def make_model():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    model = tg.MultiTaskModel(encoder, {task: nn.Linear(6, 1) for task in TASKS})
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    target = torch.randn(3, 8, 1, generator=torch.Generator().manual_seed(2))

    def losses(outputs):
        return {t: (out - target[TASKS.index(t)]).square().mean() for t, out in outputs.items()}

    return model, x, losses


def expected_matrix(model, x, losses):
    """Pair by pair, from separate backward passes."""
    values, rows = [], []
    for task in TASKS:
        loss = losses(model(x))[task]
        gradients = torch.autograd.grad(loss, list(model.encoder.parameters()))
        values.append(loss.item())
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack([torch.stack([a @ b / v for b, v in zip(rows, values)]) for a in rows])  # noqa: B905


@pytest.mark.parametrize("kind", ["model", "dict", "stacked", "compiled apart", "compiled whole"])
@COMPILER_WARNINGS
def test_measures_before_the_step_whatever_the_losses(kind):
    model, x, losses = make_model()
    expected = expected_matrix(model, x, losses)
    affinity = tg.GradientAffinity(model.encoder, decay=1.0)
    groups = tg.TaskGroups(TASKS, affinity=affinity, warmup=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    run = model
    with torch._functorch.config.patch(donated_buffer=False):
        if kind == "compiled apart":
            model.compile(backend="aot_eager")
        elif kind == "compiled whole":
            run = torch.compile(model)
        for group in groups:
            optimizer.zero_grad()
            if kind in ("model", "compiled apart"):
                found = losses(model(x, group=group))
            else:
                found = losses(run(x))
                if kind == "stacked":
                    found = torch.stack(list(found.values()))
                elif kind == "dict":
                    found = {t: found[t] for t in group.observed}
            group.loss(found).backward()
            optimizer.step()
    torch.testing.assert_close(affinity.matrix, expected, rtol=1e-4, atol=1e-6)


def test_the_step_is_that_without_it():
    """Measuring changes neither the gradients of the step nor the random numbers."""
    ends = []
    for affinity in ("gradient", "proximal"):
        model, x, losses = make_model()
        groups = tg.TaskGroups(
            TASKS,
            affinity=tg.GradientAffinity(model.encoder)
            if affinity == "gradient"
            else tg.ProximalAffinity(),
            grouping=tg.Fixed([["a", "b"], ["c"]]),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(4):
            for group in groups:
                optimizer.zero_grad()
                group.loss(losses(model(x, group=group))).backward()
                optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def batches(groups, n, losses):
    """Runs n batches; per batch, per step: (tasks, observed, graph)."""
    seen = []
    for _ in range(n):
        steps = []
        for group in groups:
            steps.append((group.tasks, group.observed, group.graph))
            group.loss({t: losses()[t] for t in group.observed})
        seen.append(steps)
    return seen


def quadratic(x):
    return lambda: {t: (x - k).square().sum() for k, t in enumerate(TASKS, start=1)}


class TestSchedule:
    @pytest.fixture
    def x(self):
        return torch.zeros(2, requires_grad=True)

    def test_measures_every_so_many_rounds_in_the_first_step(self, x):
        groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity([x], every=3), warmup=100)
        for n, steps in enumerate(batches(groups, 7, quadratic(x))):
            (first, *rest) = steps
            assert len(steps) == 3
            if n % 3 == 0:
                assert first[1] == first[2] == tuple(TASKS)
            else:
                assert first[0] == first[1] == first[2]
            assert all(tasks == observed == graph for tasks, observed, graph in rest)

    def test_adds_no_second_step(self, x):
        """All tasks agree: one group, and one step a batch."""
        groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity([x], decay=0.5), warmup=2)
        assert [len(steps) for steps in batches(groups, 6, quadratic(x))] == [3, 3, 1, 1, 1, 1]

    def test_rounds_over_several_batches(self, x):
        affinity = tg.GradientAffinity([x], every=1)
        groups = tg.TaskGroups(TASKS, affinity=affinity, warmup=100, groups_per_batch=1)
        seen = batches(groups, 6, quadratic(x))
        assert [len(steps) for steps in seen] == [1] * 6
        assert [len(steps[0][1]) for steps in seen] == [3, 1, 1, 3, 1, 1]

    def test_sample(self, x):
        affinity = tg.GradientAffinity([x], sample=2, decay=0.5)
        groups = tg.TaskGroups(TASKS, affinity=affinity, warmup=100)
        for steps in batches(groups, 30, quadratic(x)):
            own, observed, graph = steps[0]
            assert 2 <= len(graph) <= 3  # two measured, and the one stepped on
            assert observed == graph
            assert set(own) <= set(graph)
        # Nothing moved, so the average of what was observed is what is there.
        # <g_i, g_k> / L_k with g = -2k (1, 1) and L = 2 k^2
        expected = torch.tensor([[4.0 * i / k for k in (1, 2, 3)] for i in (1, 2, 3)])
        torch.testing.assert_close(affinity.matrix, expected, rtol=1e-5, atol=1e-5)

    def test_absent_tasks_are_not_measured(self, x):
        affinity = tg.GradientAffinity([x], decay=1.0)
        groups = tg.TaskGroups(TASKS, affinity=affinity)
        for group in groups.batch(["a", "c"]):
            group.loss({t: quadratic(x)()[t] for t in group.observed})
        measured = affinity.matrix != 0
        assert measured.tolist() == [[True, False, True], [False] * 3, [True, False, True]]

    def test_with_fixed_groups_it_is_measured_too(self, x):
        affinity = tg.GradientAffinity([x])
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        batches(groups, 1, quadratic(x))
        assert affinity.matrix.all()

    def test_gradient_accumulation_measures_once(self, x):
        affinity = tg.GradientAffinity([x], decay=1.0)
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        for group in groups:
            for _ in range(4):
                group.loss(quadratic(x)(), share=0.25).backward()
        torch.testing.assert_close(affinity.matrix.diagonal(), torch.full((3,), 4.0))

    def test_invalid_losses_leave_their_entries(self, x):
        affinity = tg.GradientAffinity([x], decay=1.0)
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        losses = quadratic(x)()
        losses["b"] = losses["b"] - 100
        with pytest.warns(UserWarning, match="task 'b'"):
            [group.loss(losses) for group in groups]
        assert (affinity.matrix != 0).tolist() == [[True, False, True]] * 3

    def test_invalid_losses_do_not_weigh_on_the_average_of_a_sample(self, x):
        """Only what was observed counts: the average is over as much as there is."""
        affinity = tg.GradientAffinity([x], sample=2, decay=0.5)
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the loss of b, which is negative now and then
            for n in range(40):
                losses = quadratic(x)()
                losses["b"] = losses["b"] - 100 * (n % 3 > 0)
                for group in groups:
                    group.loss(losses)
        expected = torch.tensor([[4.0 * i / k for k in (1, 2, 3)] for i in (1, 2, 3)])
        assert (affinity.observed > 0).all()
        torch.testing.assert_close(affinity.matrix, expected, rtol=1e-5, atol=1e-5)

    def test_a_sample_of_all_tasks_and_batches_of_some(self, x):
        """Whole and partial batches weigh alike: nothing moves, so the average is what is there."""
        affinity = tg.GradientAffinity([x], sample=8, decay=0.1)
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        for present in (TASKS, ["a", "b"], TASKS, ["b", "c"]):
            for group in groups.batch(present):
                group.loss({t: quadratic(x)()[t] for t in group.observed})
        expected = torch.tensor([[4.0 * i / k for k in (1, 2, 3)] for i in (1, 2, 3)])
        torch.testing.assert_close(affinity.matrix, expected, rtol=1e-5, atol=1e-5)

    def test_more_tasks_than_one_gram_matrix_holds(self):
        tasks = [f"t{k}" for k in range(1310)]
        generator = torch.Generator().manual_seed(0)
        targets = torch.randn(len(tasks), 4, generator=generator)
        x = torch.zeros(4, requires_grad=True)
        with pytest.raises(ValueError, match=r"1024 tasks at a time, and there are 1310.*sample="):
            tg.TaskGroups(tasks, affinity=tg.GradientAffinity([x]))
        with pytest.raises(ValueError, match="sample must be at most 1024"):
            tg.GradientAffinity([x], sample=1025)
        affinity = tg.GradientAffinity([x], sample=8, decay=0.5)
        groups = tg.TaskGroups(tasks, affinity=affinity, grouping=tg.Together())
        for _ in range(3):
            for group in groups:
                group.loss((x - targets).square().sum(1))
        observed = affinity.observed > 0
        assert 3 * 8**2 - 60 <= observed.sum() <= 3 * 8**2  # three samples of 8, few in common
        # <g_i, g_k> / L_k with g = -2 y and L = |y|^2
        expected = 4 * targets @ targets.T / targets.square().sum(1)
        torch.testing.assert_close(
            affinity.matrix[observed], expected[observed], rtol=1e-4, atol=1e-4
        )

    def test_a_parameter_that_is_named_twice_counts_once(self, x):
        affinity = tg.GradientAffinity([x, x], decay=1.0)
        groups = tg.TaskGroups(TASKS, affinity=affinity, grouping=tg.Together())
        batches(groups, 1, quadratic(x))
        torch.testing.assert_close(affinity.matrix.diagonal(), torch.full((3,), 4.0))

    def test_resume_is_exact(self, x):
        def make():
            affinity = tg.GradientAffinity([x], sample=2, decay=0.1)
            return tg.TaskGroups(TASKS, affinity=affinity, warmup=3, groups_per_batch=2)

        whole, first = make(), make()
        batches(first, 7, quadratic(x))
        second = make()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        tail = batches(whole, 20, quadratic(x))[7:]
        assert batches(second, 13, quadratic(x)) == tail
        assert torch.equal(second.affinity.matrix, whole.affinity.matrix)

    def test_state_of_another_affinity_is_refused(self, x):
        proximal = tg.TaskGroups(TASKS).state_dict()
        groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity([x]))
        with pytest.raises(ValueError, match="state of a GradientAffinity holds"):
            groups.load_state_dict(proximal)
        with pytest.raises(ValueError, match="state of a ProximalAffinity holds"):
            tg.TaskGroups(TASKS).load_state_dict(groups.state_dict())


class TestErrors:
    def test_arguments(self):
        x = torch.zeros(1, requires_grad=True)
        with pytest.raises(ValueError, match="shared is empty"):
            tg.GradientAffinity([])
        with pytest.raises(ValueError, match="decay must be"):
            tg.GradientAffinity([x], decay=0.0)
        with pytest.raises(ValueError, match="every must be an integer of at least 1"):
            tg.GradientAffinity([x], every=0)
        with pytest.raises(ValueError, match="sample must be an integer of at least 2"):
            tg.GradientAffinity([x], sample=1)

    def test_a_loss_without_a_graph_is_named(self):
        x = torch.zeros(2, requires_grad=True)
        groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity([x]))
        for group in groups:
            losses = quadratic(x)()
            outside = next(t for t in TASKS if t not in group.tasks)
            losses[outside] = losses[outside].detach()
            with pytest.raises(ValueError, match=f"task '{outside}' has no graph, so this step"):
                group.loss(losses)
            break
        assert not groups.affinity.matrix.any()

    @COMPILER_WARNINGS
    def test_a_compiled_model_that_frees_its_buffers(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 3), nn.Softmax(-1))
        compiled = torch.compile(model)
        x = torch.randn(5, 4)
        compiled(x).sum().backward()
        groups = tg.TaskGroups(TASKS, affinity=tg.GradientAffinity(model))
        for group in groups:
            with pytest.raises(RuntimeError, match=r"donated_buffer = False before the model"):
                group.loss(compiled(x).square().sum(0))
            break


def test_sparse_gradients_are_refused_by_a_sentence_that_says_what_to_leave_out():
    table, layer = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    shared = nn.ModuleList([table, layer])
    groups = tg.TaskGroups(["a", "b"], affinity=tg.GradientAffinity(shared))
    outputs = layer(table(torch.tensor([1, 2]))).square().mean(0)
    with pytest.raises(ValueError, match=r"parameter of shape \[5, 3\] has sparse.*leave the emb"):
        next(iter(groups)).loss({"a": outputs[0], "b": outputs[1]})
    groups = tg.TaskGroups(["a", "b"], affinity=tg.GradientAffinity(layer))
    next(iter(groups)).loss({"a": outputs[0], "b": outputs[1]})
    assert groups.affinity.observed.all()


# Each row of the batch belongs to one task.


def rows_setting(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    rows = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])
    return model, torch.randn(8, 4), rows


def row_step(group, model, x, rows, at_once, **options):
    losses = model(x).squeeze(1).square()
    if at_once:
        return group.loss(losses, rows=rows, **options)
    return group.loss(
        {task: losses[k == rows].mean() for k, task in enumerate(TASKS) if (k == rows).any()},
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"sample": 2}, {"every": 2}])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_rows_and_means_give_the_same(options, dtype):
    found = []
    for at_once in (True, False):
        model, x, rows = rows_setting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        affinity = tg.GradientAffinity(model, decay=0.5, **options)
        groups = tg.TaskGroups(TASKS, affinity=affinity, warmup=2)
        for _ in range(4):
            for group in groups:
                optimizer.zero_grad()
                loss = row_step(group, model, x, rows.to(dtype), at_once)
                loss.backward()
                optimizer.step()
        found.append([groups.affinity.matrix, groups.affinity.observed, *model.parameters()])
    assert found[0][0].any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_of_some_tasks_with_micro_batches():
    found = []
    for at_once in (True, False):
        model, x, rows = rows_setting()
        rows = torch.where(rows == 2, -1, rows)
        affinity = tg.GradientAffinity(model, decay=0.5)
        groups = tg.TaskGroups(TASKS, affinity=affinity)
        for group in groups.batch(["a", "b"]):
            for _ in range(2):
                row_step(group, model, x, rows, at_once, share=0.5).backward()
        found.append([affinity.matrix, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_rows_for_the_proximal_affinity():
    model, x, rows = rows_setting()
    groups = tg.TaskGroups(TASKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in groups:
        optimizer.zero_grad()
        loss = row_step(group, model, x, rows, True)
        k = TASKS.index(group.tasks[0])
        torch.testing.assert_close(loss, model(x).squeeze(1).square()[rows == k].mean())
        loss.backward()
        optimizer.step()
    assert groups.affinity.observed.any()


def test_a_task_without_rows_is_named():
    model, x, rows = rows_setting()
    groups = tg.TaskGroups(TASKS)
    group = next(iter(groups))
    with pytest.raises(ValueError, match=r"no row of \['c'\].*groups\.batch\(present\)"):
        row_step(group, model, x, rows.clamp(max=1), True)
    with pytest.raises(TypeError, match="one loss for each row"):
        group.loss({"a": torch.zeros(())}, rows=rows)
    group.skip()


@pytest.mark.filterwarnings("ignore:The loss of task 'b' is nan")
def test_rows_that_are_not_finite_belong_to_their_task_alone():
    model, x, rows = rows_setting()
    x[3] = torch.nan  # of task b
    affinity = tg.GradientAffinity(model, decay=0.5)
    groups = tg.TaskGroups(TASKS, affinity=affinity)
    for group in groups:
        row_step(group, model, x, rows, True)
    known = affinity.matrix != 0
    assert known[0, 2]
    assert not known[1].any()
    assert not known[:, 1].any()
