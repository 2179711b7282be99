import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

import taskgroup as tg

# Of torch's own making, when it imports its compiler.
COMPILER_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script_method.*:DeprecationWarning"
)


class Tasks(nn.Module):
    """Three tasks on one encoder, with parameters frozen, unused, and reached by task 0 alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 8)
        self.extra = nn.Parameter(torch.randn(8))
        self.unused = nn.Parameter(torch.randn(3))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.first.bias.requires_grad_(False)

    @property
    def shared(self):
        return [*self.first.parameters(), *self.second.parameters(), self.extra, self.unused]

    def forward(self, x):
        features = self.second(self.first(x).tanh())
        losses = [head(features).square().mean() for head in self.heads]
        losses[0] = losses[0] + (features * self.extra).mean()
        return losses


@pytest.fixture
def model():
    return Tasks()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def one_by_one(model, x):
    """By ``.backward()`` on a fresh graph for every task."""
    rows = []
    for k in range(3):
        model.zero_grad()
        model(x)[k].backward()
        rows.append([None if p.grad is None else p.grad.clone() for p in model.shared])
    model.zero_grad()
    return rows


class TestTaskGradients:
    @pytest.mark.parametrize("kind", ["sequence", "dict", "stacked"])
    def test_are_those_of_separate_backward_passes(self, model, x, kind):
        losses = model(x)
        if kind == "dict":
            losses = dict(zip("abc", losses, strict=True))
        elif kind == "stacked":
            losses = torch.stack(losses)
        gradients = tg.task_gradients(losses, model.shared)
        for own, expected in zip(gradients, one_by_one(model, x), strict=True):
            for a, b in zip(own, expected, strict=True):
                if b is not None:
                    torch.testing.assert_close(a, b)
                else:  # what is stacked reaches whatever one of the losses reaches
                    assert a is None or (kind == "stacked" and not a.any())

    def test_none_where_frozen_unused_or_not_reached(self, model, x):
        gradients = tg.task_gradients(model(x), model.shared)
        missing = [[g is None for g in own] for own in gradients]
        #             first: w, b   second: w, b   extra, unused
        assert missing[0] == [False, True, False, False, False, True]
        assert missing[1] == missing[2] == [False, True, False, False, True, True]

    def test_dot_grad_stays(self, model, x):
        model.first.weight.grad = torch.ones_like(model.first.weight)
        tg.task_gradients(model(x), model.shared)
        assert model.first.weight.grad.eq(1).all()
        assert model.second.weight.grad is None

    def test_the_graph_is_freed_with_the_last(self, model, x):
        losses = model(x)
        tg.task_gradients(losses, model.shared)
        with pytest.raises(RuntimeError, match="second time"):
            losses[0].backward()

    def test_the_graph_is_kept_where_asked(self, model, x):
        losses = model(x)
        tg.task_gradients(losses, model.shared, retain_graph=True)
        sum(losses).backward()
        tg.task_gradients(model(x), model.shared, retain_graph=True, batched=True)

    def test_batched(self, model, x):
        batched = tg.task_gradients(model(x), model.shared, batched=True)
        for own, expected in zip(batched, tg.task_gradients(model(x), model.shared), strict=True):
            for t, (a, b) in enumerate(zip(own, expected, strict=True)):
                if b is not None:
                    torch.testing.assert_close(a, b)
                else:
                    assert a is None if t in (1, 5) else not a.any()

    def test_everything_frozen(self, model, x):
        frozen = [model.first.bias]
        assert tg.task_gradients(model(x), frozen) == [[None]] * 3

    @pytest.mark.parametrize(
        ("losses", "message"),
        [
            (lambda good: {}, "losses is empty"),
            (lambda good: {"a": good[0], "b": good[1].detach()}, "task 'b' has no graph"),
            (lambda good: [good[0], good[1].expand(2)], r"task 1 must be .* got shape \[2\]"),
            (lambda good: [1.0], "task 0 must be .* got float"),
            (lambda good: torch.stack(good).view(1, 3), r"must have shape \[K\]"),
        ],
    )
    @pytest.mark.parametrize("function", [tg.task_gradients, tg.streaming_task_gram])
    def test_bad_losses_are_named(self, model, x, function, losses, message):
        with pytest.raises(ValueError, match=message):
            function(losses(model(x)), model.shared)

    def test_no_parameters(self, model, x):
        with pytest.raises(ValueError, match="params is empty"):
            tg.task_gradients(model(x), [])

    @COMPILER_WARNINGS
    def test_a_compiled_model(self):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 8), nn.Softmax(-1)]
        model = nn.Sequential(*layers)
        x = torch.randn(5, 4)

        def losses(run):
            return [output.square().sum() for output in run(x).unbind(1)]

        compiled = torch.compile(model)
        losses(compiled)[0].backward()
        with pytest.raises(RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer"):
            tg.task_gradients(losses(compiled), model.parameters())
        torch.compiler.reset()
        with torch._functorch.config.patch(donated_buffer=False):
            compiled = torch.compile(model)
            losses(compiled)[0].backward()
            got = tg.task_gradients(losses(compiled), model.parameters())
            with pytest.raises(RuntimeError, match="no vectorised backward pass"):
                tg.streaming_task_gram(losses(compiled), model.parameters())
        expected = tg.task_gradients(losses(model), model.parameters())
        torch.testing.assert_close(got, expected)


class TestStreamingTaskGram:
    def test_is_the_gram_matrix_of_the_gradients(self, model, x):
        expected = tg.task_gram(tg.task_gradients(model(x), model.shared))
        got = tg.streaming_task_gram(model(x), model.shared)
        torch.testing.assert_close(got, expected)
        assert got.dtype == torch.float32

    def test_float64(self, model, x):
        model.double()
        expected = tg.task_gram(tg.task_gradients(model(x.double()), model.shared))
        got = tg.streaming_task_gram(model(x.double()), model.shared)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)

    def test_a_parameter_used_twice(self):
        weight = torch.randn(4, 4, requires_grad=True)

        def losses():
            hidden = weight @ (weight @ torch.ones(4)).tanh()
            return [hidden.square().sum(), hidden.sum()]

        expected = tg.task_gram(tg.task_gradients(losses(), [weight]))
        torch.testing.assert_close(tg.streaming_task_gram(losses(), [weight]), expected)

    def test_holds_the_gradients_on_one_parameter_at_a_time(self, monkeypatch):
        """K x P gradients never exist at once: those on one layer are gone before the next come."""
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
        losses = model(torch.randn(3, 16)).square().mean(0)
        alive, most = [], []

        def watch(gradients):
            alive.append(weakref.ref(gradients[0][0]._base))
            most.append(sum(ref() is not None for ref in alive))
            return tg.ops.task_gram(gradients)

        monkeypatch.setattr("taskgroup.gradients.task_gram", watch)
        tg.streaming_task_gram(losses, model.parameters())
        assert most == [1] * 6

    def test_leaves_no_hooks_behind(self, model, x):
        tg.streaming_task_gram(model(x), model.shared)
        with pytest.raises(ValueError, match="No loss reaches"):
            tg.streaming_task_gram(model(x), [model.unused])
        assert not any(parameter._backward_hooks for parameter in model.shared)
        sum(model(x)).backward()
        assert model.first.weight.grad.any()

    def test_the_graph_is_freed_unless_asked(self, model, x):
        losses = model(x)
        tg.streaming_task_gram(losses, model.shared, retain_graph=True)
        tg.streaming_task_gram(losses, model.shared)
        with pytest.raises(RuntimeError, match="second time"):
            losses[0].backward()


class TestConflicts:
    def test_are_cosines(self):
        gradients = torch.randn(5, 20)
        cosines = tg.conflicts(gradients @ gradients.t())
        expected = nn.functional.cosine_similarity(gradients[:, None], gradients[None], dim=-1)
        torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-6)
        assert cosines.diagonal().eq(1).all()

    def test_a_gradient_of_zero_conflicts_with_none(self):
        cosines = tg.conflicts(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        assert cosines.tolist() == [[1.0, 0.0], [0.0, 1.0]]

    def test_extreme_norms(self):
        gradients = torch.tensor([[1e-18, 0.0], [1e-18, 1e-18], [1e18, 0.0]])
        gram = gradients @ gradients.t()
        assert tg.conflicts(gram)[0, 2] == pytest.approx(1.0)
        assert tg.conflicts(gram)[1, 2] == pytest.approx(0.5**0.5)

    def test_bad_gram_is_refused(self):
        with pytest.raises(ValueError, match=r"\[K, K\], got \[2, 3\]"):
            tg.conflicts(torch.ones(2, 3))


def simplex_grid(n_tasks, steps):
    """All weights on the simplex that are multiples of ``1 / steps``."""
    counts = torch.cartesian_prod(*[torch.arange(steps + 1.0, dtype=torch.float64)] * n_tasks)
    return counts[counts.sum(1) == steps] / steps


class TestParetoStationarity:
    @pytest.mark.parametrize("n_tasks", [2, 3, 4])
    def test_no_weights_on_a_grid_do_better(self, n_tasks):
        steps = 20
        weights = simplex_grid(n_tasks, steps)
        for seed in range(30):
            generator = torch.Generator().manual_seed(seed)
            gradients = torch.randn(n_tasks, n_tasks + 1, generator=generator, dtype=torch.float64)
            gradients += 0.7 * torch.randn((), generator=generator)
            gram = gradients @ gradients.t()
            on_grid = ((weights @ gram) * weights).sum(1).min()
            least = tg.pareto_stationarity(gram)
            assert least <= on_grid + 1e-12
            assert least >= on_grid - 0.2 * gram.diagonal().max()

    @settings(max_examples=150, deadline=None)
    @given(
        n_tasks=st.integers(1, 12),
        dim=st.integers(1, 6),
        shift=st.floats(0, 2),
        seed=st.integers(0, 2**16),
        twins=st.booleans(),
    )
    def test_agrees_with_another_solver(self, n_tasks, dim, shift, seed, twins):
        generator = torch.Generator().manual_seed(seed)
        gradients = torch.randn(n_tasks, dim, generator=generator, dtype=torch.float64)
        gradients[:, 0] += shift
        if twins:
            gradients = gradients[torch.randint(n_tasks, (n_tasks,), generator=generator)]
        gram = gradients @ gradients.t()
        least = tg.pareto_stationarity(gram).item()
        # An independent solver, from the equal weights.
        other = minimize(
            lambda w: w @ gram.numpy() @ w,
            torch.full((n_tasks,), 1 / n_tasks).numpy(),
            jac=lambda w: 2 * gram.numpy() @ w,
            bounds=[(0, 1)] * n_tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        scale = gram.diagonal().max().item()
        assert 0 <= least <= other.fun + 1e-6 * scale
        assert least >= other.fun - 1e-5 * scale

    def test_known_cases(self):
        assert tg.pareto_stationarity(torch.tensor([[9.0]])).item() == 9.0
        assert tg.pareto_stationarity(torch.diag(torch.tensor([1.0, 3.0]))).item() == 0.75
        # One gradient is shorter and pulls the same way: it is the least itself.
        assert tg.pareto_stationarity(torch.tensor([[1.0, 2.0], [2.0, 4.0]])).item() == 1.0
        assert tg.pareto_stationarity(torch.zeros(3, 3)).item() == 0.0

    def test_nan_where_the_gram_matrix_is_not_finite(self):
        assert tg.pareto_stationarity(torch.tensor([[torch.nan]])).isnan()
        assert tg.pareto_stationarity(torch.tensor([[torch.inf]])).isnan()

    def test_bad_gram_is_refused(self):
        with pytest.raises(ValueError, match=r"\[K, K\]"):
            tg.pareto_stationarity(torch.ones(2, 3))
        with pytest.raises(ValueError, match="empty"):
            tg.pareto_stationarity(torch.ones(0, 0))

    @pytest.mark.learned
    def test_group_updates_end_where_it_is_zero(self):
        """Theorem 4 of the paper, on two quadratic tasks."""
        targets = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
        x = torch.tensor([0.3, 2.0], requires_grad=True)
        groups = tg.TaskGroups(["a", "b"], grouping=tg.Singletons())

        def stationarity():
            losses = (x - targets).square().sum(1)
            return tg.pareto_stationarity(tg.task_gram(tg.task_gradients(losses, [x]))).item()

        first = stationarity()
        for batch in range(400):
            for group in groups:
                loss = group.loss((x - targets).square().sum(1))
                (gradient,) = torch.autograd.grad(loss, x)
                x.data.sub_(0.1 / (1 + 0.05 * batch) * gradient)
        assert first > 1
        assert stationarity() < 1e-3
