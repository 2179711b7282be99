"""What all joint methods promise: their losses, their gradients, their state."""

import copy
import importlib.util
import io
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import taskgroup as tg
import taskgroup.methods.gradient_space as gradient_space_module
from taskgroup.gradients.through_grad import backward_passes
from tests.methods.problems import NAMES, Model, gradient_space, made, tasks_of

RANDOM = ("pcgrad", "graddrop", "gradvac")


def step(method, model, x):
    """One step of SGD, observed where the method asks for it; the weights."""
    weights = method.backward(model.losses(x))
    with torch.no_grad():
        for parameter in [*model.parameters(), *method.parameters()]:
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        if method.observes_step:
            method.observe(model.losses(x))
    return weights


def observe(method, model, x):
    if method.observes_step:
        with torch.no_grad():
            method.observe(model.losses(x))


def grads(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def same(state, other):
    """To the bit."""
    return state.keys() == other.keys() and all(
        value.equal(other[key]) or (value.isnan().all() and other[key].isnan().all())
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in state.items()
    )


def test_registry_is_in_order():
    order = (
        "gd si rlw uw dtp dwa famo imtl-l mgda pcgrad cagrad graddrop imtl-g aligned-mtl nash-mtl "
        "upgrad fairgrad gradvac"
    )
    assert " ".join(tg.methods.METHODS) == order
    for name, method in tg.methods.METHODS.items():
        assert tg.methods.find(name) is method
        assert getattr(tg.methods, method.__name__) is method
        assert method.observes_step == (name == "famo")


def test_unknown_method_lists_the_nearest_first():
    with pytest.raises(ValueError, match=r"no method 'PC-Grad'.*\['pcgrad'"):
        tg.methods.find("PC-Grad")


NEEDS = {
    "cvxpy": ("cagrad", "nash-mtl"),
    "clarabel": ("cagrad",),
    "ecos": ("nash-mtl",),
    "qpsolvers": ("upgrad",),
    "quadprog": ("upgrad",),
    "scipy": ("fairgrad",),
    "torchjd": tuple(gradient_space()),
}


@pytest.mark.parametrize("module", NEEDS)
def test_missing_extra_raises_at_construction(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert importlib.util.find_spec(module) is None
    for name in NEEDS[module]:
        with pytest.raises(ImportError, match=rf"{module}.*pip install 'taskgroup\[compare\]'"):
            made(name, Model(2))
    for name in set(NAMES) - set(NEEDS[module]):
        made(name, Model(2))


@pytest.mark.parametrize("name", NAMES)
def test_constructor_says_what_is_wrong(name):
    shared = nn.Parameter(torch.ones(2))
    options = {"epoch": 1} if name == "dwa" else {}
    method = tg.methods.find(name)
    with pytest.raises(ValueError, match="shared is empty"):
        method([], ["a", "b"], **options)
    with pytest.raises(ValueError, match="entry 1 is computed"):
        method([shared, shared * 2], ["a", "b"], **options)
    for tasks in ("depth", [], ["a", "a"]):
        with pytest.raises(ValueError, match="sequence of different names"):
            method([shared], tasks, **options)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dwa", {"epoch": 0}, "epoch must be"),
        ("dwa", {"epoch": 1, "temperature": 0.0}, "temperature must be"),
        ("famo", {"lr": -1.0}, "lr must not"),
        ("dtp", {}, r"score in \(0, 1\) per task, such as accuracy or exp\(-cross entropy\)"),
        ("dtp", {"score": dict, "gamma": -1}, "gamma must not"),
        ("dtp", {"score": dict, "decay": 0}, "decay must be"),
        ("cagrad", {"c": -1}, "c must be"),
        ("fairgrad", {"alpha": 0}, "alpha must be"),
        ("aligned-mtl", {"scale_mode": "max"}, "scale_mode must be"),
        ("gradvac", {"beta": 2}, "beta"),
        ("nash-mtl", {"optim_niter": 0}, "optim_niter"),
        ("mgda", {"epsilon": 0}, "epsilon"),
    ],
)
def test_options_are_checked(name, options, said):
    with pytest.raises(ValueError, match=said):
        tg.methods.find(name)([nn.Parameter(torch.ones(2))], ["a", "b"], **options)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_checked_before_anything_changes(name):
    model = Model(3)
    method = made(name, model)
    state = method.state_dict()
    good = model.losses(model.x)
    for bad, said in (
        ({**good, "zz": good["task0"]}, "Unknown task 'zz'"),
        ({t: good[t] for t in ("task0", "task2")}, "'task1' is missing"),
        ({**good, "task1": good["task1"].expand(2)}, "'task1' must be a floating-point scalar"),
        ({**good, "task1": 1.0}, "'task1' must be a floating-point scalar tensor, got float"),
        ({**good, "task1": good["task1"].detach()}, "'task1' has no graph"),
        (torch.stack(list(good.values()))[:2], r"tensor \[3\].* of shape \[2\]"),
        (torch.ones(3), "'task0' has no graph"),
    ):
        with pytest.raises(ValueError, match=said):
            method.backward(bad)
    with pytest.raises(TypeError, match="got list"):
        method.backward(list(good.values()))
    assert all(p.grad is None for p in model.parameters())
    assert same(method.state_dict(), state)
    method.backward(good)  # the graph is still there


@pytest.mark.parametrize("name", NAMES)
def test_stacked_losses_and_any_order_are_the_same(name):
    found = []
    for way in ("ordered", "reversed", "stacked"):
        model = Model(3)
        losses = model.losses(model.x)
        if way == "reversed":
            losses = dict(reversed(losses.items()))
        elif way == "stacked":
            losses = torch.stack(list(losses.values()))
        torch.manual_seed(1)
        weights = made(name, model).backward(losses)
        found.append([weights, *grads(model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate(name):
    model = Model(3)
    x, y = model.x, model.x.flip(0) + 0.1
    method = made(name, model)
    parts = []
    for batch in (x, y):
        torch.manual_seed(2)
        method.backward(model.losses(batch))
        observe(method, model, batch)
        parts.append(grads(model.parameters()))
        model.zero_grad()
    again = made(name, model)
    for batch in (x, y):
        torch.manual_seed(2)
        again.backward(model.losses(batch))
        observe(again, model, batch)
    expected = [None if a is None and b is None else a + b for a, b in zip(*parts, strict=True)]
    torch.testing.assert_close(grads(model.parameters()), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_task_reaches_is_passed_over(name):
    model = Model(3)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    unused = nn.Parameter(torch.ones(3))
    lonely = nn.Parameter(torch.tensor(2.0))  # reached by one task alone
    method = made(name, model, [*model.shared.parameters(), frozen, unused, lonely, lonely])
    losses = model.losses(model.x)
    losses["task1"] = losses["task1"] * lonely
    weights = method.backward(losses)
    assert frozen.grad is None
    assert unused.grad is None
    assert lonely.grad is not None
    observe(method, model, model.x)
    unused.grad = torch.ones(3)
    method.backward(model.losses(model.x))
    assert unused.grad.tolist() == [1, 1, 1]
    assert weights.shape == (3,)
    assert not weights.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_all_shared_parameters_frozen(name):
    model = Model(3)
    model.shared.requires_grad_(False)
    weights = made(name, model).backward(model.losses(model.x))
    assert weights.isfinite().all()
    assert all(p.grad is None for p in model.shared.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_weights_reproduce_the_gradients(name):
    model = Model(5)
    weights = made(name, model).backward(model.losses(model.x))
    found = grads(model.parameters())
    model.zero_grad()
    losses = list(model.losses(model.x).values())
    shared = list(model.shared.parameters())
    per_task = tg.task_gradients(losses, shared, retain_graph=True)
    if name != "graddrop":
        columns = zip(*per_task, strict=True)
        expected = [sum(w * g for w, g in zip(weights, c, strict=True)) for c in columns]
        torch.testing.assert_close(found[: len(shared)], expected, rtol=1e-4, atol=1e-6)
    for k, (loss, head) in enumerate(zip(losses, model.heads, strict=True)):
        own = torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)
        scale = 1 if name in gradient_space() else weights[k]
        expected = [scale * gradient for gradient in own]
        begin = len(shared) + k * len(own)
        close = {"rtol": 0, "atol": 0} if name in gradient_space() else {}
        torch.testing.assert_close(found[begin : begin + len(own)], expected, **close)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32(name):
    """The same problem, of which bfloat16 is exact: 1e-2 of the longest gradient."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).bfloat16().to(dtype)
        x = torch.zeros(40, dtype=dtype, requires_grad=True)
        method = made(name, None, [x], tasks_of(5))
        torch.manual_seed(4)
        losses = {t: row @ x + 1 for t, row in zip(tasks_of(5), rows, strict=True)}
        weights = method.backward(losses)
        assert weights.dtype == torch.float32
        assert x.grad.isfinite().all()
        found[dtype] = x.grad.float(), weights
    (wide, wide_weights), (narrow, narrow_weights) = found.values()
    assert (narrow - wide).norm() <= 1e-2 * wide.norm()
    assert (narrow_weights - wide_weights).norm() <= 1e-2 * wide_weights.norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 5])
def test_resumes_exactly(name, after):
    model = Model(3)
    method = made(name, model)
    for k in range(after):
        torch.manual_seed(k)
        step(method, model, model.x)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "method": method.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved["method"]) == set(made(name, model).state_dict())
    other = Model(3)
    other.load_state_dict(saved["model"])
    resumed = made(name, other)
    resumed.load_state_dict(saved["method"])
    for k in range(3):
        torch.manual_seed(100 + k)
        expected = step(method, model, model.x)
        torch.manual_seed(100 + k)
        assert torch.equal(step(resumed, other, other.x), expected)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert same(resumed.state_dict(), method.state_dict())


@pytest.mark.parametrize("name", ["dwa", "famo", "gradvac", "nash-mtl", "uw", "dtp"])
def test_state_matters_and_is_a_copy(name):
    model = Model(3)
    method = made(name, model)
    fresh = method.state_dict()
    kept = copy.deepcopy(fresh)
    step(method, model, model.x)
    assert not same(method.state_dict(), fresh)
    assert same(fresh, kept)


@pytest.mark.parametrize("name", NAMES)
def test_load_is_strict(name):
    model = Model(3)
    method = made(name, model)
    state = method.state_dict()
    for bad, said in (
        ({**state, "extra": 1}, "extra missing or unexpected"),
        ({k: v for k, v in state.items() if k != "tasks"}, "tasks missing"),
        ({**state, "tasks": ["x"]}, "same tasks"),
        ({**state, "method": "Other"}, "same method"),
    ):
        with pytest.raises(ValueError, match=said):
            method.load_state_dict(bad)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"{key} in the state .* must be"):
                method.load_state_dict({**state, key: torch.zeros(7)})
    method.load_state_dict(state)


class Allocated(TorchDispatchMode):
    """The bytes of every memory that an operation makes, the largest."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                known = {
                    a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)
                }
                if tensor.untyped_storage().data_ptr() not in known:
                    n_bytes = tensor.untyped_storage().nbytes()
                    self.largest = max(self.largest, n_bytes)
                    self.total += n_bytes
        return out


@pytest.mark.parametrize("name", gradient_space())
def test_nothing_besides_the_gradients_is_large(name, monkeypatch):
    """After the K passes: no copy of a gradient; K x one parameter for GradDrop."""
    n_tasks, n_parameters, size = 11, 20, 1000
    generator = torch.Generator().manual_seed(0)
    shared = [nn.Parameter(torch.zeros(size)) for _ in range(n_parameters)]
    method = made(name, None, shared, tasks_of(n_tasks))
    gradients = [[torch.randn(size, generator=generator) for _ in shared] for _ in range(n_tasks)]
    first = [g.data_ptr() for g in gradients[0]]
    monkeypatch.setattr(gradient_space_module, "backward_passes", lambda *args: gradients)
    losses = {t: torch.ones((), requires_grad=True) for t in tasks_of(n_tasks)}
    with tg.ops.use_backend("cpp"), Allocated() as made_there:
        method.backward(losses)
    assert [p.grad.data_ptr() for p in shared] == first  # written over a gradient
    if name == "graddrop":
        assert made_there.largest <= 4 * size * n_tasks
    else:
        assert made_there.largest < 4 * size
        assert made_there.total < 4 * size * n_tasks


def test_gradients_are_those_that_autograd_made():
    """Taken away from the parameters, not copied."""
    model = Model(3)
    losses = model.losses(model.x)
    seen = []
    for parameter in model.shared.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.data_ptr()))
    gradients = backward_passes(list(losses.values()), list(model.shared.parameters()))
    assert sorted(seen) == sorted(g.data_ptr() for own in gradients for g in own)


def test_gradients_that_share_memory_are_told_apart():
    rows = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    a = nn.Parameter(torch.zeros(3, 4))
    b = nn.Parameter(torch.zeros(4, 3))
    method = tg.methods.MGDA([a, b], tasks_of(3))
    y = a.view(-1) + b.view(-1)
    weights = method.backward(
        {t: (y * row).sum() for t, row in zip(tasks_of(3), rows, strict=True)}
    )
    torch.testing.assert_close(a.grad.view(-1), weights @ rows)
    torch.testing.assert_close(b.grad.view(-1), weights @ rows)
    assert a.grad.data_ptr() != b.grad.data_ptr()


@pytest.mark.parametrize("name", [n for n in gradient_space() if n != "graddrop"])
def test_gradient_that_is_not_finite_is_named(name):
    model = Model(3)
    method = made(name, model)
    before = torch.ones_like(model.shared[0].weight)
    model.shared[0].weight.grad = before
    losses = model.losses(model.x)
    losses["task1"] = losses["task1"] * torch.inf
    with pytest.raises(FloatingPointError, match="gradient of 'task1' on the shared"):
        method.backward(losses)
    assert model.shared[0].weight.grad is before
    assert (before == 1).all()


@pytest.mark.parametrize("name", [n for n in gradient_space() if n not in (*RANDOM, "nash-mtl")])
def test_small_gradients_are_no_zeros(name):
    """Scaled by 1e-4, the direction stays. (Of Nash-MTL ECOS warns then, as for everyone.)"""
    found = []
    for scale in (1.0, 1e-4):
        rows = torch.randn(3, 20, generator=torch.Generator().manual_seed(6)) * scale
        x = nn.Parameter(torch.zeros(20))
        losses = {t: row @ x for t, row in zip(tasks_of(3), rows, strict=True)}
        made(name, None, [x], tasks_of(3)).backward(losses)
        assert x.grad.norm() > 0
        found.append(x.grad / x.grad.norm())
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_compiled_backward_that_runs_once_is_explained():
    def refuse(gradient):
        raise RuntimeError("This backward function was compiled with a donated buffer")

    x = nn.Parameter(torch.ones(2))
    loss = x.sum()
    loss.register_hook(refuse)
    with pytest.raises(RuntimeError, match="single tasks need one pass each: set torch"):
        tg.methods.MGDA([x], ["a"]).backward({"a": loss})


@pytest.mark.parametrize("name", NAMES)
def test_backward_warns_of_nothing(name):
    model = Model(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(name, model).backward(model.losses(model.x))
