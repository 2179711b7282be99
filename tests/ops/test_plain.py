"""Gradients that native code reads by itself: the same numbers as on the way through torch."""

import contextlib
import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import taskgroup as tg
from taskgroup.ops import _plain
from tests import random_gradients

pytestmark = pytest.mark.skipif(
    tg.ops.backends()["cpp"] is not None, reason="there is no native code to read them"
)


@pytest.fixture
def through_torch(monkeypatch):
    """Calls a function as if no tensor were plain."""

    def call(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_plain, "_reader", None)
            return function(*arguments, **options)

    return call


def plain(n_tasks=3, dtype=torch.float32):
    shapes = [(5, 7), (), (130,), (0,)]
    return random_gradients.make(n_tasks, shapes, [dtype] * 4, ["contiguous"], {(1, 0)}, 0)


def test_plain_tensors_are_read():
    """Otherwise every other test here would compare one way with itself."""
    for dtype in random_gradients.DTYPES:
        assert _plain.read_plain(plain(dtype=dtype)) is not None
    parameters = [[torch.nn.Parameter(torch.ones(2))], (torch.ones(2, requires_grad=True),)]
    assert _plain.read_plain(parameters) is not None
    transposed = [[torch.ones(2, 3).t()], [torch.zeros(2, 3).t()]]
    assert _plain.read_plain(transposed) is not None


@settings(max_examples=60)
@given(random_gradients.gradients())
def test_every_op_gives_the_same(gradients):
    n_tasks, reader = len(gradients), _plain._reader
    weights, losses = torch.linspace(-1, 2, n_tasks), torch.linspace(0.5, 1, n_tasks)
    results = []
    try:
        for _plain._reader in (reader, None):
            matrix, observed = torch.zeros(n_tasks, n_tasks), torch.zeros(n_tasks, n_tasks).int()
            tg.gram_affinity_update_(matrix, gradients, losses, 0.5, observed=observed)
            own = [tg.task_gram(gradients), matrix, observed, *tg.combine(gradients, weights)]
            out = [None if g is None else torch.full_like(g, 7) for g in own[3:]]
            results.append([*own, *tg.combine(gradients, weights, out=out)])
    finally:
        _plain._reader = reader
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_missing_tasks_and_parameters():
    gradients = [[None, torch.ones(3), None], [None] * 3, [None, None, torch.ones(2)]]
    assert _plain.read_plain(gradients) is not None
    assert tg.task_gram(gradients).tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 2]]
    out = [torch.full((4,), 7.0), torch.full((3,), 7.0), torch.full((2,), 7.0)]
    tg.combine(gradients, [2.0, 3.0, 4.0], out=out)
    assert [tensor.tolist() for tensor in out] == [[0] * 4, [2] * 3, [4] * 2]
    matrix = torch.zeros(3, 3)
    tg.gram_affinity_update_(matrix, gradients, torch.ones(3), decay=1.0)
    assert matrix.tolist() == [[3, 0, 0], [0, 0, 0], [0, 0, 2]]


def negated(shape):
    """Torch remembers that the numbers in memory are to be negated."""
    values = torch.complex(torch.zeros(shape), torch.ones(shape)).conj().imag
    assert values.is_neg()
    return values


class Own(torch.Tensor):
    """A class of somebody's own."""


@pytest.mark.parametrize(
    "special",
    [
        negated(()),
        negated((1,)),
        negated((3,)),
        torch.ones(3, 2)[:, 0],
        torch.ones(1).expand(3),
        torch._efficientzerotensor(3),
        torch.ones(3).as_subclass(Own),
    ],
    ids=["negated number", "negated", "negated vector", "gaps", "expanded", "zeros", "subclass"],
)
def test_what_is_not_plain_goes_through_torch(special):
    gradients = [[special], [torch.full(special.shape, 2.0)]]
    assert _plain.read_plain(gradients) is None
    value = special.flatten()[0].item() if special.numel() else 0.0
    n = special.numel()
    expected = [[n * value**2, 2 * n * value], [2 * n * value, 4 * n]]
    assert tg.task_gram(gradients).tolist() == expected
    (total,) = tg.combine(gradients, [1.0, 1.0])
    assert total.flatten().tolist() == [value + 2] * n


MISTAKES = {
    "no task": [],
    "no parameter": [[]],
    "no gradient": [[None], [None]],
    "lengths": [[torch.ones(2)], [torch.ones(2), torch.ones(2)]],
    "sizes": [[torch.ones(2)], [torch.ones(3)]],
    "shapes": [[torch.ones(2, 3)], [torch.ones(3, 2)]],
    "dtypes": [[torch.ones(2)], [torch.ones(2).double()]],
    "devices": [[torch.ones(2)], [torch.ones(2, device="meta")]],
    "sparse": [[torch.ones(2).to_sparse()]],
    "integers": [[torch.ones(2).int()]],
    "no tensor": [["a string"]],
    "too many tasks": [[torch.ones(1)]] * 1025,
    "no list": "text",
}


@pytest.mark.parametrize("gradients", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_on_the_way_through_torch(gradients):
    assert _plain.read_plain(gradients) is None


def test_outputs_that_do_not_fit_go_through_torch(through_torch):
    gradients = [[torch.arange(6.0).view(2, 3)], [torch.ones(2, 3)]]
    other_order = torch.zeros(3, 2).t()
    tg.combine(gradients, [1.0, 2.0], out=[other_order])
    (expected,) = through_torch(tg.combine, gradients, [1.0, 2.0])
    assert torch.equal(other_order, expected)
    for bad in (torch.zeros(6), torch.zeros(2, 3).double(), torch.zeros(2, 3, device="meta"), None):
        with pytest.raises(ValueError, match="out must"):
            tg.combine(gradients, [1.0, 2.0], out=[bad])
    with pytest.raises(ValueError, match="one tensor per parameter"):
        tg.combine(gradients, [1.0, 2.0], out=[])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_modes_and_transforms_see_the_ops():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.append(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    names = []
    with Seen():
        tg.task_gram(plain())
    assert "task_gram" in names
    traced = torch.jit.trace(
        lambda x, y: tg.task_gram([[x], [y]]), (torch.ones(3), torch.ones(3)), check_trace=False
    )
    assert traced(torch.full((3,), 2.0), torch.ones(3)).tolist() == [[12, 6], [6, 3]]
    graph = make_fx(lambda x: tg.task_gram([[x], [x]]), pre_dispatch=True)(torch.ones(3))
    assert graph(torch.full((3,), 2.0)).tolist() == [[12, 12], [12, 12]]
    with torch.device("cpu"):  # a mode, which a function of somebody's own could be as well
        assert _plain.read_plain(plain()) is None
    compiled = torch.compile(tg.task_gram, fullgraph=True, backend="eager")
    assert torch.equal(compiled(plain()), tg.task_gram(plain()))
    with pytest.raises(RuntimeError, match=r"vmap|Batch"):  # not wrong numbers
        torch.vmap(lambda g: tg.task_gram([[g], [g]]))(torch.ones(2, 3))


def test_lists_may_change_while_they_are_read():
    """A tensor of one element is asked for a mark, by a method that anybody can replace."""
    own = [torch.ones(1) for _ in range(1000)]
    own[0].is_neg = own.clear
    gram = tg.task_gram([own])
    assert gram.item() == 1000
    changing, stop = [torch.ones(1) for _ in range(100)], threading.Event()

    def change():
        while not stop.is_set():
            changing.clear()
            changing.extend(torch.ones(1) for _ in range(100))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            with contextlib.suppress(ValueError, IndexError):  # it was empty, or became so
                assert tg.task_gram([changing]).item() <= 100
    finally:
        stop.set()
        thread.join()


class Doubled(list):
    def __getitem__(self, index):
        return super().__getitem__(index) * 2


def test_lists_of_other_classes_are_asked_for_their_items():
    assert tg.task_gram([Doubled([torch.ones(3)])]).item() == 12


def test_out_may_be_an_iterator():
    for tensor in (torch.zeros(3, 2).t(), torch.zeros(2, 3)):
        (total,) = tg.combine([[torch.ones(2, 3)]], [2.0], out=iter([tensor]))
        assert total is tensor
        assert tensor.eq(2).all()


def test_memory_is_kept_while_it_is_needed():
    gradients = plain()
    expected = tg.task_gram(gradients)
    read = _plain.read_plain(gradients)
    del gradients
    gc.collect()
    torch.full((10_000,), 7.0)  # would take the place of what was freed
    assert torch.equal(torch.ops.taskgroup._plain_task_gram(read.address, read.like), expected)


def scalars(dtype=torch.float32):
    """The losses of three tasks, as a loop computes them; the second shares memory."""
    leaf = torch.tensor([0.5, 1.5, 2.5], dtype=dtype, requires_grad=True)
    return {"a": leaf.sum(), "b": leaf.detach()[1], "c": (2 * leaf).mean()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalars(dtype):
    losses = scalars(dtype)
    read = _plain.read_scalars(losses, ("a", "b", "c"))
    assert read.dtype == dtype
    assert not read.requires_grad
    assert torch.equal(read, torch.stack([*losses.values()]).detach())
    losses["b"].fill_(7.0)
    assert read[1] == 1.5  # a copy
    names = tuple(f"task {k}" for k in range(3))
    equal = {f"task {k}": loss for k, loss in enumerate(losses.values())}  # not the same strings
    assert _plain.read_scalars(equal, names)[1] == 7.0


@pytest.mark.parametrize(
    "special",
    [
        negated(()),
        negated((1,)),
        torch.ones(1),
        torch.tensor(1.0, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.bfloat16),
        torch.tensor(1),
        torch.tensor(1.0, device="meta"),
        torch.tensor(1.0).as_subclass(Own),
        torch._efficientzerotensor(()),
        1.0,
        None,
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_scalars_that_are_not_plain_are_not_read(special):
    for task in ("a", "b", "c"):
        assert _plain.read_scalars({**scalars(), task: special}, ("a", "b", "c")) is None


def test_scalars_are_not_read_by_the_reference():
    with tg.ops.use_backend("reference"):
        assert _plain.read_scalars(scalars(), ("a", "b", "c")) is None


def test_scalars_of_other_tasks_are_not_read():
    losses, seen = scalars(), []
    for names in (("a", "b"), ("a", "c", "b"), ("a", "b", "x"), ("a", "b", "c", "d"), ()):
        assert _plain.read_scalars(losses, names) is None
    assert _plain.read_scalars(torch.ones(3), ("a", "b", "c")) is None

    def transformed(x):
        loss = (2 * x).sum()
        seen.append(_plain.read_scalars({"a": loss}, ("a",)))
        return loss

    torch.func.grad(transformed)(torch.ones(3))
    torch.vmap(transformed)(torch.ones(2, 3))
    assert seen == [None, None]


def update(n_tasks=5, dtype=torch.float32):
    """The arguments of an update of the affinity."""
    generator = torch.Generator().manual_seed(n_tasks)
    before, after = torch.rand(2, n_tasks, generator=generator, dtype=dtype) + 0.5
    after[0] = torch.nan
    return {
        "matrix": torch.randn(n_tasks, n_tasks, generator=generator),
        "before": before,
        "after": after,
        "mask": torch.rand(n_tasks, generator=generator) < 0.5,
        "decay": 0.25,
        "observed": torch.ones(n_tasks, n_tasks, dtype=torch.int32),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_tasks", [1, 2, 11, 64])
def test_an_affinity_is_updated_as_by_the_op(n_tasks, dtype):
    own, expected = update(n_tasks, dtype), update(n_tasks, dtype)
    assert _plain.update_plain(**own)
    with tg.ops.use_backend("reference"):
        tg.affinity_update_(**expected)
    assert torch.equal(own["observed"], expected["observed"])
    torch.testing.assert_close(own["matrix"], expected["matrix"], rtol=1e-6, atol=1e-7)
    torch.ops.taskgroup.affinity_update_(*(again := update(n_tasks, dtype)).values())
    assert torch.equal(own["matrix"], again["matrix"])


@pytest.mark.parametrize(
    "other",
    [
        {"matrix": torch.zeros(5, 5, dtype=torch.float64)},
        {"matrix": torch.zeros(5, 6)},
        {"matrix": torch.zeros(10, 5)[::2].t()},
        {"before": torch.ones(4)},
        {"before": torch.ones(5, dtype=torch.float64)},
        {"after": torch.ones(10)[::2]},
        {"after": torch.ones(5, device="meta")},
        {"mask": torch.ones(5, dtype=torch.uint8)},
        {"observed": torch.ones(5, 5, dtype=torch.int64)},
        {"observed": torch.ones(5)},
    ],
    ids=lambda other: " ".join(f"{n} {t.dtype} {[*t.shape]}" for n, t in other.items()),
)
def test_other_updates_go_through_torch(other):
    given = {**update(), **other}
    kept = {name: t.clone() for name, t in given.items() if isinstance(t, torch.Tensor)}
    assert not _plain.update_plain(**given)
    for name, tensor in kept.items():
        if not tensor.is_meta:
            assert torch.equal(given[name].nan_to_num(), tensor.nan_to_num())


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_update_follows_the_backend_that_was_asked_for(backend, monkeypatch):
    monkeypatch.setattr("taskgroup.ops._backend._requested", backend)
    assert not _plain.update_plain(**update())
