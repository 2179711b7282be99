"""Gradients of tasks from rows, against one backward pass per task."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import taskgroup as tg
from taskgroup.gradients import row_graph, row_rules

K = 4


class Tokens(nn.Module):
    """A ViT on patches: a class token, positions, attention."""

    def __init__(self, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.layers(x)[:, 0])


class Language(nn.Module):
    """A transformer whose output layer is tied to its embedding."""

    def __init__(self, sequence_first=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.position = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=not sequence_first)
        self.norm = nn.RMSNorm(8)
        self.sequence_first = sequence_first

    def forward(self, x):
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        x = x.transpose(0, 1) if self.sequence_first else x
        x = x + self.attention(self.norm(x), x, x, need_weights=False)[0]
        x = x.transpose(0, 1) if self.sequence_first else x
        return F.linear(x, self.embedding.weight)


class Recommender(nn.Module):
    """Embeddings of users and items, and products of them."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(9, 8), nn.Embedding(7, 8)
        self.bias = nn.Parameter(torch.randn(()))
        self.mlp = nn.Sequential(nn.Linear(16, 8), nn.PReLU(), nn.Linear(8, 1))

    def forward(self, x):
        user, item = self.users(x[:, 0]), self.items(x[:, 1])
        return self.mlp(torch.cat([user, item], 1)) + (user * item).sum(1, keepdim=True) + self.bias


class Residual(nn.Module):
    """Convolutions with GroupNorm, strides and groups, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm = nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = x + F.relu(self.norm(self.again(x)))
        return self.up(x) * self.scale


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, tokens that are joined, and weight norm."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.left, self.right = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(5))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        x = self.frozen(x) + F.linear(x, self.a @ self.b) + torch.cat([self.left, self.right])
        return self.normed(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x):
        return checkpoint(
            self.block, checkpoint(self.block, x, use_reentrant=False), use_reentrant=False
        )


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient):
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


class Own(nn.Module):
    """A function with a backward pass of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return Scale.apply(self.layer(x), self.scale)


class Products(nn.Module):
    """Matrices that lie as the rows need them, not transposed as in nn.Linear."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, (x @ self.first).tanh(), self.second)


class Complex(nn.Module):
    """Complex parameters: a matrix, and factors of the rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, dtype=torch.complex128))
        self.factor = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight * self.factor).abs()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x):
        return self.lstm(self.embedding(x))[0]


def images(n):
    return torch.randn(n, 3, 8, 8)


def words(n):
    return torch.randint(0, 11, (n, 6))


def vectors(n):
    return torch.randn(n, 8)


NETWORKS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), vectors),
    "ViT": (Tokens, images),
    "ViT, norm first": (lambda: Tokens(norm_first=True), images),
    "tied": (Language, words),
    "tied, sequence first": (lambda: Language(sequence_first=True), words),
    "recommender": (Recommender, lambda n: torch.randint(0, 7, (n, 2))),
    "residual": (Residual, images),
    "adapted": (Adapted, vectors),
    "checkpointed": (Checkpointed, vectors),
    "recurrent": (Recurrent, words),
    "products": (Products, vectors),
    "a function of its own": (Own, vectors),
    "1d": (lambda: nn.Sequential(nn.Conv1d(8, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()),
           lambda n: torch.randn(n, 8, 9)),
    "BatchNorm in eval mode": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), images),
    "BatchNorm of the input": (
        lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)), vectors),
    "positions of the rows' own": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Linear(2, 3), nn.Flatten(0, 1),
                              nn.Linear(3, 2), nn.Unflatten(0, (-1, 4))), vectors),
}  # fmt: skip


def setting(name, n=13, dtype=torch.float64, seed=0, in_order=False):
    torch.manual_seed(seed)
    make, inputs = NETWORKS[name]
    model, x = make().to(dtype), inputs(n)
    x = x.to(dtype) if x.is_floating_point() else x
    tasks = torch.randint(0, K, (n,))
    tasks[:K] = torch.arange(K)
    if in_order:
        tasks = tasks.sort().values
    return model, x, tasks


def row_losses(model, x):
    return model(x).flatten(1).square().mean(1)


def expected(losses, tasks, params, reduction="mean"):
    scalars = [getattr(losses[tasks == k], reduction)() for k in range(K)]
    return tg.task_gradients(scalars, params, retain_graph=True)


def assert_same(found, wanted, params, tolerance):
    """Relative to the length of the gradient of the parameter, over all tasks."""
    for t, parameter in enumerate(params):
        zero = torch.zeros_like(parameter)
        a = torch.stack([zero if own[t] is None else own[t] for own in found])
        b = torch.stack([zero if own[t] is None else own[t] for own in wanted])
        assert (a - b).norm() <= tolerance * b.norm(), f"parameter {t}"


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name, in_order):
    model, x, tasks = setting(name, in_order=in_order)
    params = list(model.parameters())
    for seed in range(2):  # the second time, where the rows lie is known
        torch.manual_seed(seed)
        losses = row_losses(model, x)
        found = tg.row_task_gradients(losses, tasks, model)
        wanted = expected(losses, tasks, params)
        assert_same(found, wanted, params, 1e-12)
        for own in found:
            for gradient, parameter in zip(own, params, strict=True):
                assert gradient is None or gradient.shape == parameter.shape
                assert gradient is None or gradient.stride() == parameter.stride()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gram(name, dtype, tolerance):
    model, x, tasks = setting(name, dtype=dtype)
    losses = row_losses(model, x)
    wanted = tg.task_gram(expected(losses, tasks, list(model.parameters())))
    found = tg.row_task_gram(losses, tasks, model)
    assert found.dtype == dtype
    length = wanted.diagonal().sqrt()
    assert ((found - wanted).abs() <= tolerance * length[:, None] * length).all()


# What is asked, and what is not.


def test_sums_rows_of_no_task_and_tasks_without_rows():
    model, x, tasks = setting("ViT")
    tasks[tasks == 2] = 3
    tasks[5] = -1
    losses = row_losses(model, x)
    params = list(model.parameters())
    found = tg.row_task_gradients(losses, tasks, params, 5, reduction="sum")
    assert found[2] == found[4] == [None] * len(params)
    for k in (0, 1, 3):
        (wanted,) = tg.task_gradients([losses[tasks == k].sum()], params, retain_graph=True)
        assert_same([found[k]], [wanted], params, 1e-12)
    gram = tg.row_task_gram(losses, tasks, params, 5, reduction="sum")
    assert not gram[[2, 4]].any()
    assert torch.equal(gram, gram.T)


def test_complex_parameters():
    torch.manual_seed(0)
    model, x, tasks = Complex(), torch.randn(12, 8, dtype=torch.float64), torch.arange(12) % K
    losses = row_losses(model, x)
    params = list(model.parameters())
    wanted = expected(losses, tasks, params)
    assert_same(tg.row_task_gradients(losses, tasks, model), wanted, params, 1e-12)
    scalars = [losses[tasks == k].mean() for k in range(K)]
    gram = tg.streaming_task_gram(scalars, params, retain_graph=True)
    torch.testing.assert_close(tg.row_task_gram(losses, tasks, model), gram, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", [tg.row_task_gram, tg.row_task_gradients])
def test_hooks_of_parameters_are_refused(function):
    layer, losses = layer_losses()
    layer.bias.register_hook(lambda gradient: 0 * gradient)
    with pytest.raises(ValueError, match=r"Entry 1 of params, of shape \[1\], has a hook"):
        function(losses, torch.arange(4), layer)


def test_some_parameters_alone():
    model, x, tasks = setting("ViT")
    model.layers.requires_grad_(False)
    losses = row_losses(model, x)
    params = [model.cls, *model.layers.parameters(), model.patches.weight]
    found = tg.row_task_gradients(losses, tasks, iter(params))
    assert_same(found, expected(losses, tasks, params), params, 1e-12)
    assert found[0][1:-1] == [None] * len(list(model.layers.parameters()))


def test_nothing_is_written_and_the_graph_is_kept():
    model, x, tasks = setting("residual")
    losses = row_losses(model, x)
    before = torch.random.get_rng_state()
    tg.row_task_gram(losses, tasks, model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)
    losses.sum().backward()


@pytest.mark.parametrize("name", ["MLP", "ViT", "tied, sequence first"])
def test_mixed_precision(name):
    model, x, tasks = setting(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = row_losses(model, x).float()
    params = list(model.parameters())
    found = tg.row_task_gradients(losses, tasks, model)
    assert all(g is None or g.dtype == torch.float32 for own in found for g in own)
    # Both round the products of the rows to bfloat16, in another order.
    assert_same(found, expected(losses, tasks, params), params, 2e-2)


def test_a_pass_on_half_of_the_rows_is_taken_once_for_a_graph(monkeypatch):
    model, x, tasks = setting("tied, sequence first")
    passes = []
    backward = row_graph.incoming

    def counted(*arguments):
        passes.append(arguments)
        return backward(*arguments)

    monkeypatch.setattr(row_graph, "incoming", counted)
    monkeypatch.setattr(row_graph, "_plans", {})
    for n, new in ((13, True), (13, False), (6, True), (6, False), (13, False)):
        x, tasks = words(n), torch.arange(n) % K
        passes.clear()
        losses = row_losses(model, x)
        found = tg.row_task_gradients(losses, tasks, model)
        params = list(model.parameters())
        assert_same(found, expected(losses, tasks, params), params, 1e-12)
        assert bool(passes) == new


def test_as_many_rows_as_positions_and_channels():
    """The rows are found by what depends on them, not by the size of a dimension."""
    for name in ("tied", "tied, sequence first", "1d", "residual"):
        model, _, _ = setting(name)
        for n in (4, 6, 8, 9):
            x = NETWORKS[name][1](n)
            x = x.double() if x.is_floating_point() else x
            tasks = torch.arange(n) % K
            losses = row_losses(model, x)
            params = list(model.parameters())
            found = tg.row_task_gradients(losses, tasks, model)
            assert_same(found, expected(losses, tasks, params), params, 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows(n):
    for name in NETWORKS:
        if "BatchNorm of" in name and n == 1:
            continue  # torch refuses it
        model, x, _ = setting(name, n=K + n)
        losses = row_losses(model, x[:n])
        tasks = torch.arange(n) % K
        params = list(model.parameters())
        found = tg.row_task_gradients(losses, tasks, params)
        scalars = [losses[tasks == k].mean() for k in range(n)]
        wanted = tg.task_gradients(scalars, params, retain_graph=True)
        assert_same(found, wanted, params, 1e-12)


def test_experts_that_few_rows_reach():
    """Where a gradient is zero for most rows, one pass cannot tell how the rows lie."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(4))

        def forward(self, x):
            out = torch.stack([expert(x.transpose(0, 1)) for expert in self.experts])
            return (out * gates).sum(0).transpose(0, 1)  # [N, T, 4]

    torch.manual_seed(0)
    model = Experts().double()
    params = list(model.parameters())
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = torch.randint(0, 4, (6, 8))  # of each position of each row
        chosen[chosen == 3] = 0
        if seed % 2:
            chosen[0, 0] = 3  # a single one
        gates = torch.nn.functional.one_hot(chosen, 4).permute(2, 0, 1)[..., None].double()
        losses = row_losses(model, torch.randn(8, 6, 8, dtype=torch.float64))
        tasks = torch.arange(8) % K
        found = tg.row_task_gradients(losses, tasks, model)
        assert_same(found, expected(losses, tasks, params), params, 1e-12)


def test_a_layout_that_could_not_be_seen_is_not_kept():
    """Where all gradients are zero, the first layout is as good as any; but not for the next."""
    torch.manual_seed(0)
    layer, tasks = nn.Linear(8, 4).double(), torch.arange(8) % K
    for gate in (0.0, 1.0):
        x = torch.randn(8, 6, 8, dtype=torch.float64)
        out = layer(x.transpose(0, 1).contiguous()).transpose(0, 1) * torch.full((), gate)
        losses = out.flatten(1).square().mean(1) + out.flatten(1).mean(1)
        found = tg.row_task_gradients(losses, tasks, layer)
        assert_same(
            found, expected(losses, tasks, layer.parameters()), [*layer.parameters()], 1e-12
        )


@pytest.mark.parametrize("n_tasks", [2, 40])
def test_inner_products_of_rows_and_of_gradients_agree(n_tasks, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Unflatten(1, (4, 10)), nn.Linear(10, 20))
    model.double()
    tasks = torch.randint(0, n_tasks, (60,))
    losses = row_losses(model, torch.randn(60, 30, dtype=torch.float64))
    taken = []
    inner = row_rules.gram_of_matrix
    monkeypatch.setattr(
        "taskgroup.gradients.row_tasks.gram_of_matrix",
        lambda *arguments: taken.append(1) or inner(*arguments),
    )
    grams = []
    for cheaper in (True, False):
        monkeypatch.setattr("taskgroup.gradients.row_tasks.cheaper", lambda *_, c=cheaper: c)
        grams.append(tg.row_task_gram(losses, tasks, model, n_tasks))
    assert len(taken) == 2
    torch.testing.assert_close(*grams, rtol=1e-12, atol=1e-14 * float(grams[0].max()))


def test_a_row_that_is_not_finite_belongs_to_its_task_alone(monkeypatch):
    for row in (*range(6), 5):  # the last one where the rows have been found before
        model, x, tasks = setting("ViT")
        if row < 5:
            monkeypatch.setattr(row_graph, "_plans", {})
        x[row] = torch.inf
        found = tg.row_task_gradients(row_losses(model, x), tasks, model)
        for k, own in enumerate(found):
            assert all(g.isfinite().all() for g in own) == (k != tasks[row])


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.layer, self.mix = nn.Linear(8, 8), mix

    def forward(self, x):
        return self.mix(self.layer(x))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (nn.BatchNorm1d(8), "BatchNorm layer in training mixes the rows"),
        (lambda x: x - x.mean(0), "mixes the rows"),
        (lambda x: x.softmax(0), "mixes the rows"),
        (lambda x: x @ x.T @ x, "mixes the rows"),
        (lambda x: x.flip(0), "mixes the rows"),
        (lambda x: x[torch.arange(12).roll(1)], "mixes the rows"),
    ],
)
def test_mixed_rows(mix, message):
    model = Mixing(mix)
    losses = row_losses(model, torch.randn(12, 8))
    with pytest.raises(ValueError, match=message):
        tg.row_task_gram(losses, torch.arange(12) % K, model)


def test_rows_that_are_mixed_by_the_data_are_noticed_every_time():
    model = Mixing(lambda x: x[order])
    for shift in (0, 1, 0):
        order = torch.arange(12).roll(shift)
        losses = row_losses(model, torch.randn(12, 8))
        if shift:
            with pytest.raises(ValueError, match="mixes the rows"):
                tg.row_task_gram(losses, torch.arange(12) % K, model)
        else:
            tg.row_task_gram(losses, torch.arange(12) % K, model)


def layer_losses(n=4):
    layer = nn.Linear(2, 1)
    return layer, layer(torch.randn(n, 2)).squeeze(1)


BAD = {
    "a scalar": (lambda losses: {"losses": losses.mean()}, "one loss for each row"),
    "a dict": (lambda losses: {"losses": {"a": losses.mean()}}, "got dict"),
    "no graph": (lambda losses: {"losses": losses.detach()}, "has no graph"),
    "integers": (lambda losses: {"losses": torch.arange(4)}, "floating-point tensor"),
    "few tasks": (lambda losses: {"task_of_row": torch.arange(3)}, r"must be integers \[4\]"),
    "fractions": (lambda losses: {"task_of_row": torch.zeros(4)}, r"must be integers \[4\]"),
    "a list": (lambda losses: {"task_of_row": [0, 1, 2, 3]}, r"must be integers \[4\]"),
    "too large": (lambda losses: {"n_tasks": 3}, "of task 3, but tasks are numbered from 0 to 2"),
    "negative": (lambda losses: {"task_of_row": torch.tensor([0, -2, 1, 1])}, "of task -2"),
    "no task": (lambda losses: {"n_tasks": 0}, "n_tasks must be an integer of at least 1"),
    "reduction": (lambda losses: {"reduction": "max"}, "'mean' or 'sum', got 'max'"),
    "nothing": (lambda losses: {"params": []}, "at least one parameter"),
}


@pytest.mark.parametrize("function", [tg.row_task_gram, tg.row_task_gradients])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, function):
    layer, losses = layer_losses()
    change, message = BAD[case]
    arguments = {"losses": losses, "task_of_row": torch.arange(4), "params": layer}
    arguments.update(change(losses))
    with pytest.raises((TypeError, ValueError), match=message):
        function(**arguments)


def test_a_parameter_twice():
    layer, losses = layer_losses()
    with pytest.raises(ValueError, match="each once"):
        tg.row_task_gram(losses, torch.arange(4), [layer.weight, layer.weight])


def test_parameters_that_no_row_reaches():
    _, losses = layer_losses()
    other = nn.Linear(2, 1)
    assert tg.row_task_gradients(losses, torch.tensor([0, 1, 1, 0]), other) == [[None, None]] * 2
    with pytest.raises(ValueError, match="No row reaches any of the parameters"):
        tg.row_task_gram(losses, torch.arange(4), other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler
def test_compiled():
    torch.compiler.reset()
    layer = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(layer, backend="aot_eager")
    losses = row_losses(compiled, torch.randn(6, 8))
    with pytest.raises(ValueError, match=re.escape("compiled")):
        tg.row_task_gram(losses, torch.arange(6) % 3, layer)
    torch.compiler.reset()


def test_reentrant_checkpointing():
    layer = nn.Linear(8, 8)
    x = torch.randn(6, 8, requires_grad=True)
    losses = row_losses(lambda x: checkpoint(layer, x, use_reentrant=True), x)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tg.row_task_gram(losses, torch.arange(6) % 3, layer)
