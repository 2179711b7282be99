"""The joint methods on parameters and gradients that are not plain dense matrices."""

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.methods.problems import NAMES, Model, gradient_space, made, tasks_of


def grads(model):
    return [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]


class Bag(nn.Module):
    """Tasks on an embedding, of which the batch visits every row but the last."""

    def __init__(self, sparse):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.shared = nn.Sequential(nn.EmbeddingBag(7, 4, sparse=sparse), nn.Linear(4, 4))
            self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.x = torch.tensor([[0, 1, 1], [2, 3, 3], [4, 5, 0]])

    def losses(self, x):
        """Each task sees some of the rows, and some of them twice."""
        found = []
        for k, head in enumerate(self.heads):
            features = self.shared(x[: k + 1])
            found.append((head(features) - k).square().mean())
        return dict(zip(tasks_of(3), found, strict=True))


class TestSparseGradients:
    @pytest.mark.parametrize("name", [n for n in NAMES if n != "graddrop"])
    def test_are_those_of_a_dense_embedding(self, name):
        found = []
        for sparse in (False, True):
            model = Bag(sparse)
            method = made(name, model)
            for _ in range(2):  # the second adds to what is there
                torch.manual_seed(0)
                weights = method.backward(model.losses(model.x))
                if method.observes_step:
                    method.observe(model.losses(model.x))
            gradient = model.shared[0].weight.grad
            assert gradient.is_sparse == sparse
            found.append([weights, *grads(model)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

    def test_of_graddrop_are_drawn_row_by_row(self):
        """Where all tasks visit all rows the draws are those of a dense embedding."""
        found = []
        for sparse in (False, True):
            embedding = nn.Embedding(5, 4, sparse=sparse)
            nn.init.ones_(embedding.weight)
            method = tg.methods.GradDrop(embedding, tasks_of(3))
            rows = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
            y = embedding(torch.arange(5))
            torch.manual_seed(0)
            method.backward({t: (y * r).sum() for t, r in zip(tasks_of(3), rows, strict=True)})
            found.append(embedding.weight.grad.to_dense())
        assert torch.equal(*found)

    def test_sparse_adam_takes_them(self):
        model = Bag(sparse=True)
        before = model.shared[0].weight.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = torch.optim.SparseAdam([model.shared[0].weight])
        made("upgrad", model).backward(model.losses(model.x), scaler=scaler)
        scaler.step(optimizer)
        moved = (model.shared[0].weight != before).any(1)
        assert moved.tolist() == [True] * 6 + [False]

    @pytest.mark.parametrize("first", ["sparse", "dense"])
    def test_mixed_with_dense_ones(self, first):
        """A weight that is an embedding for one task and a matrix for another."""
        found = []
        for sparse in (False, True):
            embedding = nn.Embedding(5, 4, sparse=sparse)
            nn.init.ones_(embedding.weight)
            losses = {
                "sparse": embedding(torch.tensor([1, 3])).square().sum(),
                "dense": (embedding.weight * torch.arange(5.0)[:, None]).sum(),
            }
            tasks = sorted(losses, reverse=first == "sparse")
            weights = tg.methods.MGDA(embedding, tasks).backward(losses)
            found.append([weights, embedding.weight.grad])
        torch.testing.assert_close(*found)

    def test_dense_ones_add_to_a_sparse_grad(self):
        embedding = nn.Embedding(3, 2, sparse=True)
        nn.init.ones_(embedding.weight)
        method = tg.methods.MGDA(embedding, ["a"])
        method.backward({"a": embedding(torch.tensor([2])).sum()})
        method.backward({"a": embedding.weight.sum()})
        assert embedding.weight.grad.tolist() == [[1, 1], [1, 1], [2, 2]]

    def test_with_two_sparse_dimensions(self):
        index = torch.tensor([[0, 2, 2], [1, 0, 1]])
        values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

        class Rows(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight, k):
                ctx.k = k
                return weight.sum()

            @staticmethod
            def backward(ctx, gradient):
                part = slice(ctx.k, 3)
                rows = gradient * values[ctx.k, part]
                shape = (3, 2, 4)
                sparse = torch.sparse_coo_tensor(index[:, part], rows, shape, check_invariants=True)
                return sparse, None

        weight = nn.Parameter(torch.zeros(3, 2, 4))
        method = tg.methods.UPGrad([weight], tasks_of(2))
        weights = method.backward({f"task{k}": Rows.apply(weight, k) for k in range(2)})
        expected = torch.zeros(3, 2, 4)
        for k in range(2):
            for entry in range(k, 3):
                expected[tuple(index[:, entry])] += weights[k] * values[k, entry]
        torch.testing.assert_close(weight.grad.to_dense(), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conjugate", [False, True])
def test_complex_parameters_are_pairs_of_real_ones(name, conjugate):
    """Real and imaginary part as two numbers, as torch's optimizers take them."""
    rows = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.complex64):
        x = nn.Parameter(torch.zeros(5, 2))
        if dtype == torch.complex64:
            x = nn.Parameter(torch.view_as_complex(x.detach().clone()))
        method = made(name, None, [x], tasks_of(3))
        torch.manual_seed(0)
        for _ in range(2):
            if x.is_complex():
                y = torch.view_as_real(x.conj().resolve_conj() if conjugate else x)
            else:
                y = x * torch.tensor([1.0, -1.0 if conjugate else 1.0])
            losses = {t: (y * row).sum() + 1 for t, row in zip(tasks_of(3), rows, strict=True)}
            weights = method.backward(losses)
            if method.observes_step:
                method.observe(losses)
        assert x.grad.dtype == dtype
        gradient = x.grad.resolve_conj()
        found.append([weights, torch.view_as_real(gradient) if x.is_complex() else gradient])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Laid(nn.Module):
    """Parameters that are transposed, in another memory format, expanded, empty, without dimension
    or tied, or copies of these that are plain."""

    def __init__(self, plain):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 4, generator=generator)
        image = torch.randn(4, 3, 2, 2, generator=generator)
        row = torch.randn(1, 4, generator=generator)
        if plain:
            laid = weight.t().contiguous(), image, row.repeat(4, 1)
        else:
            laid = weight.t(), image.to(memory_format=torch.channels_last), row.expand(4, 4)
        self.shared = nn.ParameterDict(
            {
                "transposed": laid[0],
                "image": laid[1],
                "expanded": laid[2],
                "empty": torch.zeros(0, 4),
                "number": torch.tensor(0.5),
            }
        )
        self.heads = nn.ModuleList([self.shared] * 3)
        self.x = torch.randn(5, 4, generator=generator)

    def losses(self, x):
        p = self.shared
        found = []
        for k in range(3):
            y = (x @ p["transposed"]).tanh() @ p["transposed"] + k * (x @ p["expanded"])
            y = y @ p["image"].flatten(1) * p["number"] + torch.cat([p["empty"], x]).sum()
            found.append((y - k).square().mean())
        return dict(zip(tasks_of(3), found, strict=True))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "graddrop"])
def test_the_layout_of_parameters_does_not_matter(name):
    found = []
    for plain in (True, False):
        model = Laid(plain)
        torch.manual_seed(0)
        weights = made(name, model).backward(model.losses(model.x))
        found.append([weights, *(p.grad for p in model.shared.parameters())])
        for parameter in model.shared.parameters():
            assert parameter.grad.shape == parameter.shape
            assert (parameter.grad.stride() == parameter.stride()) or not parameter.stride(0)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers_take_the_gradients(name, kind):
    """They read .grad in the order of memory, whatever its strides."""
    found = []
    for fused in (False, True):
        model = Laid(plain=False)
        parameters = [p for n, p in model.shared.items() if n != "expanded"]
        optimizer = kind(parameters, lr=0.1, fused=fused, foreach=False)
        torch.manual_seed(0)
        made(name, model).backward(model.losses(model.x))
        optimizer.step()
        found.append([p.detach() for p in parameters])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def stepping_in_the_backward_pass(model, calls):
    """torch's tutorial: an optimizer per parameter, in a hook that drops the gradient."""
    each = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def hook(parameter):
        calls.append(parameter)
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in each:
        parameter.register_post_accumulate_grad_hook(hook)


class TestHooksAfterTheGradient:
    """Of pytorch/pytorch#124523: an optimizer in the backward pass steps on every pass."""

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("stacked", [False, True])
    def test_run_once_on_what_the_method_makes(self, name, stacked):
        found = []
        for hooked in (False, True):
            model = Model(3)
            method = made(name, model)
            calls = []
            if hooked:
                stepping_in_the_backward_pass(model, calls)
            torch.manual_seed(0)
            losses = model.losses(model.x)
            method.backward(torch.stack(list(losses.values())) if stacked else losses)
            if hooked:
                assert len(calls) == len(set(calls)) == len(list(model.parameters()))
            else:
                torch.optim.SGD(model.parameters(), lr=0.1).step()
            found.append(list(model.parameters()))
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("stacked", [False, True])
    def test_of_heads_alone(self, stacked):
        """Through a stacked tensor every pass comes to all heads."""
        model = Model(3)
        calls = []
        for parameter in model.heads.parameters():
            parameter.register_post_accumulate_grad_hook(calls.append)
        losses = model.losses(model.x)
        made("mgda", model).backward(torch.stack(list(losses.values())) if stacked else losses)
        assert len(calls) == len(set(calls)) == 6

    def test_stay_and_can_be_removed(self):
        model = Model(2)
        calls = []
        handle = model.shared[0].weight.register_post_accumulate_grad_hook(calls.append)
        method = made("mgda", model)
        method.backward(model.losses(model.x))
        sum(model.losses(model.x).values()).backward()
        assert len(calls) == 2
        handle.remove()
        method.backward(model.losses(model.x))
        assert len(calls) == 2

    @pytest.mark.parametrize("name", [n for n in gradient_space() if n != "graddrop"])
    def test_do_not_run_where_the_method_fails(self, name):
        model = Model(3)
        calls = []
        stepping_in_the_backward_pass(model, calls)
        before = [p.detach().clone() for p in model.parameters()]
        losses = model.losses(model.x)
        losses["task1"] = losses["task1"] * torch.inf
        with pytest.raises(FloatingPointError):
            made(name, model).backward(losses)
        assert not calls
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert len(model.shared[0].weight._post_accumulate_grad_hooks) == 1


@pytest.mark.parametrize("name", NAMES)
def test_one_parameter_is_no_list(name):
    options = {"epoch": 1} if name == "dwa" else {}
    with pytest.raises(ValueError, match=r"pass \[parameter\]"):
        tg.methods.find(name)(nn.Parameter(torch.ones(2)), ["a", "b"], **options)
