import re
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn
from torch.utils.checkpoint import checkpoint

import taskgroup as tg
from taskgroup.gradients.through_grad import gradients_through_grad

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
            (lambda good: {}, "the loss of at least one task"),
            (lambda good: {"a": good[0], "b": good[1].detach()}, "task 'b' has no graph"),
            (lambda good: [good[0], good[1].expand(2)], r"task 1 must be .* of shape \[2\]"),
            (lambda good: [1.0], "task 0 must be .* got float"),
            (lambda good: torch.stack(good).view(1, 3), r"tensor \[K\], .* of shape \[1, 3\]"),
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
            return tg.task_gram(gradients)

        monkeypatch.setattr("taskgroup.gradients.streaming.task_gram", watch)
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


class ToNumPy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.numpy() * 1.0)


class ToItem(ToNumPy):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1.0 if gradient.sum().item() > 0 else 2.0)


class PlusConstant(torch.autograd.Function):
    """Adds to the gradient what does not depend on it, such as that of a regulariser."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 0.5


class Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, value):
        ctx.save_for_backward(weight)
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.full_like(ctx.saved_tensors[0], ctx.value), None


def dropped(x):
    return checkpoint(lambda y: nn.functional.dropout(y, 0.5), x, use_reentrant=False)


def shrunk(x):
    return checkpoint(torch.tanh, x, use_reentrant=True)


VECTORISED = {
    "batched": lambda losses, params: tg.task_gram(tg.task_gradients(losses, params, batched=True)),
    "streaming": tg.streaming_task_gram,
}


@pytest.mark.parametrize("way", VECTORISED)
class TestVectorised:
    """Of pytorch/functorch#1049, TorchJD#220, #154: the result of the loop, or what to do."""

    @pytest.fixture
    def weight(self):
        return nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    @pytest.fixture
    def x(self):
        return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("op", [ToNumPy.apply, ToItem.apply, dropped])
    @pytest.mark.parametrize("where", ["all", "one"])
    def test_what_torch_refuses_is_explained(self, way, weight, x, op, where):
        """An op in the encoder, or in the head of task 1; where it works, the result is right."""
        y = x @ weight
        first, second = (op(y), op(y)) if where == "all" else (y, op(y))
        losses = [first.tanh().sum(), second.square().sum()]
        expected = tg.task_gram(tg.task_gradients(losses, [weight], retain_graph=True))
        try:
            found = VECTORISED[way](losses, [weight])
        except RuntimeError as error:
            assert re.search(r"one by one, with task_gradients\(losses, params\)", str(error))  # noqa: PT017
        else:
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("task", [0, 1])
    @pytest.mark.parametrize(
        "op",
        [
            PlusConstant.apply,
            lambda y, w: Constant.apply(y, w, 0.5),
            lambda y, w: Constant.apply(y, w, 0.0),
            torch.cdist,
        ],
        ids=["plus constant", "constant", "zero", "cdist"],
    )
    def test_gradients_that_do_not_depend_on_the_loss(self, way, weight, x, op, task):
        """In the head of one task, where the others must not see them.

        functorch's backward pass of cdist drops the batch dimension and takes the first row's.
        """
        y = x @ weight
        losses = [y.tanh().sum(), y.tanh().sum()]
        head = op(y) if op == PlusConstant.apply else op(y, weight)
        losses[task] = head.square().sum()
        expected = tg.task_gram(tg.task_gradients(losses, [weight], retain_graph=True))
        try:
            found = VECTORISED[way](losses, [weight])
        except RuntimeError as error:
            assert "does not depend on the loss" in str(error)  # noqa: PT017
            assert "one by one" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(found, expected)

    def test_a_nonzero_constant_is_refused(self, way, weight, x):
        y = x @ weight
        losses = [y.sum(), PlusConstant.apply(y).sum()]
        with pytest.raises(RuntimeError, match=r"does not depend on the loss.*one by one"):
            VECTORISED[way](losses, [weight])

    def test_anomaly_mode_is_named(self, way, weight, x):
        losses = (x @ weight).square().mean(0)[:2]
        expected = tg.task_gram(tg.task_gradients(losses, [weight], retain_graph=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autograd.set_detect_anomaly(True):
                try:
                    found = VECTORISED[way](losses, [weight])
                except RuntimeError as error:
                    assert "set_detect_anomaly" in str(error)  # noqa: PT017
                    assert "one by one" in str(error)  # noqa: PT017
                else:
                    torch.testing.assert_close(found, expected)

    def test_sparse_gradients_are_named(self, way):
        embedding = nn.EmbeddingBag(9, 4, sparse=True)
        y = embedding(torch.tensor([[1, 2]]))
        with pytest.raises(RuntimeError, match=r"sparse=False, or .*one by one.*\.to_dense\(\)"):
            VECTORISED[way]([y.sum(), y.square().sum()], embedding.parameters())

    def test_what_is_wrong_in_any_pass_is_left_as_it_is(self, way, weight, x):
        losses = [(x @ weight).square().sum()]
        losses[0].backward()
        with pytest.raises(RuntimeError, match="a second time"):
            VECTORISED[way](losses, [weight])

    def test_nan_shows(self, way, weight, x):
        """It is 0 times infinity, no constant."""
        y = x @ weight
        losses = [y.sum(), (y * torch.inf).sum()]
        assert VECTORISED[way](losses, [weight]).isnan().any()

    def test_infinite_derivatives_of_one_task(self, way, weight, x):
        y = x @ weight
        losses = [y.sum(), y[0, 0] * torch.inf]
        assert not VECTORISED[way](losses, [weight])[1, 1].isfinite()

    def test_complex_parameters(self, way, x):
        weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        y = x.to(torch.complex64) @ weight
        losses = [y.abs().sum(), y.real.square().sum(), y.imag.sum()]
        own = tg.task_gradients(losses, [weight], retain_graph=True)
        assert own[0][0].dtype == torch.complex64
        rows = torch.stack([torch.view_as_real(g[0]).flatten() for g in own])
        if way == "streaming":
            found = tg.streaming_task_gram(losses, [weight])
            torch.testing.assert_close(found, rows @ rows.T, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(ValueError, match=r"must be real: call torch.view_as_real\(\)"):
                VECTORISED[way](losses, [weight])

    @pytest.mark.parametrize("first", ["features", "weight"])
    def test_parameters_that_are_computed(self, way, weight, x, first):
        """Their gradients go on to what they were computed from."""
        features = (x @ weight).tanh()
        params = [features, weight] if first == "features" else [weight, features]
        losses = [features.sum(), features.square().sum()]
        expected = tg.task_gram(tg.task_gradients(losses, params, retain_graph=True))
        torch.testing.assert_close(VECTORISED[way](losses, params), expected)

    def test_empty_parameters_and_numbers(self, way, weight, x):
        number = nn.Parameter(torch.tensor(2.0))
        empty = nn.Parameter(torch.zeros(0, 4))
        y = torch.cat([empty, x @ weight]) * number
        losses = [y.sum(), y.square().sum()]
        params = [empty, number, weight]
        expected = tg.task_gram(tg.task_gradients(losses, params, retain_graph=True))
        torch.testing.assert_close(VECTORISED[way](losses, params), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_the_defaults_of_torch_change_nothing(self, way, weight, x, dtype, device):
        losses = torch.stack([(x @ weight).sum(), (x @ weight).square().sum()])
        expected = VECTORISED[way](losses, [weight])
        losses = torch.stack([(x @ weight).sum(), (x @ weight).square().sum()])
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                found = VECTORISED[way](losses, [weight])
                more = tg.conflicts(found), tg.pareto_stationarity(found)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(more[0], tg.conflicts(expected), rtol=0, atol=0)
        torch.testing.assert_close(more[1], tg.pareto_stationarity(expected), rtol=0, atol=0)


class TestUnusualParameters:
    def test_one_that_is_listed_twice(self, model, x):
        shared = [*model.shared, model.second.weight]
        for batched in (False, True):
            with pytest.raises(ValueError, match=r"twice, as entries 2 and 6.*dict\.fromkeys"):
                tg.task_gradients(model(x), shared, batched=batched)
        found = tg.streaming_task_gram(model(x), shared)
        torch.testing.assert_close(found, tg.streaming_task_gram(model(x), model.shared))
        features = model.first(x)
        losses = [features.sum(), features.square().sum()]
        expected = tg.streaming_task_gram(losses, [features], retain_graph=True)
        torch.testing.assert_close(tg.streaming_task_gram(losses, [features] * 2), expected)

    def test_too_many_tasks_are_counted_first(self):
        x = nn.Parameter(torch.ones(1))
        with pytest.raises(ValueError, match="1 to 1024 of them, got 1025"):
            tg.streaming_task_gram(x.expand(1025) * 1.0, [x])

    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
    def test_fused_optimizers_take_the_combination(self, kind, batched):
        """They read .grad in the order of memory, whatever its strides."""
        found = []
        for fused in (False, True):
            generator = torch.Generator().manual_seed(0)
            sizes = {"transposed": (3, 4), "expanded": (2, 3), "negated": (4,), "row": (1, 4)}
            p = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in sizes.items()}
            x = torch.randn(5, 4, generator=generator)
            conjugate = torch.complex(torch.zeros(4), p["negated"]).conj().resolve_conj()
            imaginary = torch.view_as_real(conjugate)[:, 1]
            losses = [
                ((x @ p["transposed"].t()).square().sum() + p["expanded"].sum()),
                (x @ p["transposed"].t()).sum() + (imaginary * x).sum() + (p["row"] * x).sum(),
            ]
            gradients = tg.task_gradients(losses, p.values(), batched=batched)
            for parameter, gradient in zip(
                p.values(), tg.combine(gradients, [0.5, 2.0]), strict=True
            ):
                parameter.grad = gradient
            optimizer = kind(p.values(), lr=0.1, foreach=False, fused=fused)
            optimizer.step()
            found.append(list(p.values()))
        torch.testing.assert_close(*found)

    def test_gradients_have_the_strides_of_the_parameter(self):
        image = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
        wide = torch.randn(1, 3).expand(4, 3).detach().requires_grad_()
        part = torch.randn(1, requires_grad=True)
        conjugate = torch.complex(torch.zeros(1), part).conj().resolve_conj()
        negated = torch.view_as_real(conjugate)[:, 1]
        loss = image.sum() + wide.sum() + negated.sum()
        ((a, b, c),) = tg.task_gradients([loss], [image, wide, part])
        assert a.stride() == image.stride()
        assert b.is_contiguous()
        assert not c.is_neg()  # which lies in memory with the other sign
        assert a.eq(1).all()
        assert b.eq(1).all()
        assert c.eq(-1).all()

    def test_reentrant_checkpoints_are_named(self):
        weight = nn.Parameter(torch.randn(4, 4))
        for batched in (False, True):
            y = shrunk(torch.ones(2, 4) @ weight)
            with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
                tg.task_gradients([y.sum()], [weight], batched=batched)

    def test_running_out_of_memory_is_left_as_it_is(self):
        x = nn.Parameter(torch.ones(2))

        def refuse(gradient):
            raise torch.OutOfMemoryError("out of memory")

        y = x * 2
        y.register_hook(refuse)
        with pytest.raises(torch.OutOfMemoryError):
            tg.task_gradients([y.sum()], [x], batched=True)

    def test_hooks_do_not_run_on_borrowed_gradients(self):
        """By way of .grad, where those of sharded parameters are."""
        x, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        calls = []
        for parameter in (x, head):
            parameter.register_post_accumulate_grad_hook(calls.append)
        losses = [(x * head).sum(), (x * x * head).sum()]
        found = gradients_through_grad(losses, [x], retain_graph=True)
        assert [own[0].tolist() for own in found] == [[1, 1], [2, 2]]
        assert not calls
        losses[0].backward()
        assert len(calls) == 2


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
