"""save() either accepts a value, and load() returns it, or names the value that it refuses."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import math
import pathlib
import random
import re
import threading
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import taskgroup as tg


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


class Real(float):
    pass


class Names(dict):
    pass


class Rows(list):
    pass


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Lossy:
    """An object whose pickle restores a set."""

    def __reduce__(self):
        return set, ([1],)


class Refusing:
    def __reduce__(self):
        raise KeyError("not now")


class Tagged(torch.Tensor):
    pass


Point = collections.namedtuple("Point", "x y")
shared = torch.arange(4.0)
attributed = nn.Parameter(torch.ones(2))
attributed.tag = "encoder"
badly_attributed = torch.ones(2)
badly_attributed.tag = Point(1, 2)
ordered = collections.OrderedDict(a=1)
ordered._metadata = collections.OrderedDict({"": {"version": 1}})
badly_ordered = collections.OrderedDict(a=1)
badly_ordered._metadata = frozenset("a")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # both are in beta
    compressed = torch.eye(2).to_sparse_csr()
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)

# Values whose way through torch.save and torch.load nobody should have to know.
UNUSUAL = [
    b"", b"\x00\xff", bytearray(), bytearray(b"\xff"), 1 << 70, -(1 << 2500), math.nan, "\ud800",
    2j, Text("a"), Whole(1), Real(0.5), Names(a=1), Rows([1]), Point(1, 2), Colour.RED, Level.LOW,
    np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a"), np.zeros(2),
    np.array([{}]), np.datetime64("2024-01-01"), np.random.RandomState(0).get_state(),
    collections.defaultdict(list), collections.Counter("aab"), collections.deque([1]),
    collections.OrderedDict(a=1), ordered, badly_ordered, frozenset({1}), {1, "a"}, {(1, "a")},
    {frozenset({1})}, {np.str_("a"): 1}, {frozenset(): 1}, {(1, None): 1}, {torch.float32: 1},
    {Level.LOW: 1}, {1: {2.5: {True: {None: Point(1, 2)}}}}, range(3), slice(1), ..., object(), int,
    len, lambda: 0, math, iter([1]), (n for n in ()), threading.Lock(), Lossy(), Refusing(),
    argparse.Namespace(lr=1e-3), types.SimpleNamespace(a=1), types.MappingProxyType({}),
    pathlib.PurePosixPath("a"), datetime.date(2024, 1, 1), datetime.timedelta(1),
    decimal.Decimal(1), fractions.Fraction(1, 2), random.getstate(), random.Random(0),
    torch.float16, torch.uint3, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2]),
    torch.strided, torch.per_tensor_affine, torch.channels_last, torch.finfo(torch.float32),
    torch.Generator(), torch.get_rng_state(), nn.Linear(1, 1), torch.ones(2).untyped_storage(),
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), nn.UninitializedParameter(),
    torch.tensor(1.5), torch.zeros(0, 3), torch.ones(2, 3).t(), torch.ones(1).expand(4), shared[1:],
    torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.bfloat16),
    torch.ones(2, dtype=torch.uint16), torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2) > 0,
    torch.empty(2, dtype=torch.int3), torch.ones(2, requires_grad=True) * 2,
    nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False),
    nn.Buffer(torch.ones(2)), attributed, badly_attributed, torch.empty(2, device="meta"),
    torch.eye(2).to_sparse(), compressed, torch.ones(2).to_mkldnn(), quantized,
    torch.ones(2).as_subclass(Tagged),
]  # fmt: skip


def alike(one, other):
    """Whether two values are equal and have the same types, including their attributes."""
    if type(one) is not type(other) or vars_of(one).keys() != vars_of(other).keys():
        return False
    if not all(alike(value, vars_of(other)[name]) for name, value in vars_of(one).items()):
        return False
    if isinstance(one, torch.Tensor):
        facts = ("dtype", "shape", "layout", "requires_grad", "is_meta")
        if any(getattr(one, fact) != getattr(other, fact) for fact in facts):
            return False
        if one.is_meta:
            return one.stride() == other.stride()
        if one.is_quantized:
            return torch.equal(one, other)
        one, other = (t.detach().to_dense().resolve_conj() for t in (one, other))
        if one.element_size() == 1:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        return one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            alike(a, b) for pair in zip(one.items(), other.items(), strict=True) for a, b in [pair]
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, set | frozenset):
        return one == other and {type(a) for a in one} == {type(a) for a in other}
    return one == other or (one != one and other != other)


def vars_of(value):
    return vars(value) if isinstance(value, torch.Tensor | collections.OrderedDict) else {}


def can_be_a_key(value):
    """Whether a value equals its saved form, so that it can be a key."""
    try:
        hash(value)
    except TypeError:
        return False
    return not isinstance(value, torch.Tensor) and value is not math.nan


def straight(path, state):
    """Whether torch.save and torch.load alone restore the state."""
    try:
        torch.save(state, path)
        return alike(torch.load(path, weights_only=True), state)
    except Exception:
        return False


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(tg.checkpoint.os, "fsync", lambda file: None)


def check(folder, state, key):
    """Check that a state is restored as by torch alone, or refused with its key in the message."""
    path = folder / "checkpoint.pt"
    expected = straight(folder / "straight.pt", state)
    if not expected:
        with pytest.raises((TypeError, ValueError)) as caught:
            tg.checkpoint.save(path, state)
        assert str(caught.value).startswith(f"state{key}")
        assert "\n" not in str(caught.value)
        assert not path.exists()
        return False
    tg.checkpoint.save(path, state)
    assert alike(tg.checkpoint.load(path), state)
    path.unlink()
    return True


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("value", UNUSUAL, ids=lambda value: type(value).__name__)
def test_what_is_saved_can_be_loaded(value, tmp_path):
    taken = check(tmp_path, {"first": 1, "other": {"best": value}}, '["other"]["best"]')
    assert check(tmp_path, {"other": [0, (None, value)]}, '["other"][1][1]') == taken
    if can_be_a_key(value):
        assert check(tmp_path, {"other": {value: 1}}, '["other"], key ') == taken
        assert check(tmp_path, {"other": {value}}, '["other"], element ') == taken


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)
)
keys = st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers(), st.text(max_size=1)))
states = st.recursive(
    st.one_of(scalars, st.integers(0, len(UNUSUAL) - 1).map(lambda n: UNUSUAL[n])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=2).map(collections.OrderedDict),
        st.sets(scalars, max_size=3),
    ),
    max_leaves=4,
)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(state=st.dictionaries(st.text(max_size=3), states, max_size=3))
def test_any_state_is_loaded_as_it_was_or_refused(tmp_path, state):
    check(tmp_path, state, "")


def refusal(state, tmp_path):
    """The message of the refusal; nothing may be written, not even the folder."""
    with pytest.raises((TypeError, ValueError)) as caught:
        tg.checkpoint.save(tmp_path / "run" / "checkpoint.pt", state)
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (np.float64(0.5), "write float(x)"),
        (np.int64(1), "write int(x)"),
        (np.bool_(True), "write bool(x)"),
        (np.str_("a"), "write str(x)"),
        (np.zeros(2), "write torch.from_numpy(x)"),
        (np.array(["a"]), "write x.tolist()"),
        (argparse.Namespace(lr=1), "write vars(x)"),
        (collections.defaultdict(list), "write dict(x)"),
        (Point(1, 2), "write x._asdict()"),
        (frozenset(), "write set(x)"),
        (range(3), "write list(x)"),
        (collections.deque(), "write list(x)"),
        (pathlib.Path("a"), "write str(x)"),
        (Text("a"), "write str(x)"),
        (Colour.RED, "write x.name"),
        (datetime.date(2024, 1, 1), "write x.isoformat()"),
        (nn.Linear(1, 1), "write x.state_dict()"),
        (torch.Generator(), "write x.get_state()"),
        (1 << 3000, "write str(x)"),
        (b"", "write bytearray(x)"),
        (nn.UninitializedParameter(), "run the module on one batch"),
        (torch.ones(2).as_subclass(Tagged), "write x.as_subclass(torch.Tensor)"),
        (len, "leave it out"),
        (Names, "leave it out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_sentence_says_what_to_write(value, advice, tmp_path):
    sentence = refusal({"optimizer": {"best": [value]}}, tmp_path)
    assert sentence.startswith('state["optimizer"]["best"][0] is of type ')
    assert f"weights_only=True: {advice}" in sentence
    assert sentence.endswith("Nothing was saved.")


def test_a_state_is_a_dict(tmp_path):
    for state, advice in (
        (collections.defaultdict(int, a=1), "write dict(state)"),
        (types.MappingProxyType({"a": 1}), "write dict(state)"),
        ([1], "write {name: state}"),
    ):
        sentence = refusal(state, tmp_path)
        assert f"{type(state).__name__}: {advice}" in sentence


def test_keys_are_looked_at_too(tmp_path):
    assert refusal({"a": {np.str_("b"): 1}}, tmp_path).startswith(
        "state[\"a\"], key np.str_('b') is of type numpy.str_ "
    )
    long = (*range(100), frozenset())
    assert refusal({long: 1}, tmp_path).startswith("state, key of type tuple[100] is of type froz")


def test_containers_that_hold_themselves(tmp_path):
    rows, table, ordered = [], {}, collections.OrderedDict()
    rows.append(rows)
    table["rows"] = [table]
    ordered["self"] = (ordered,)
    path = tmp_path / "checkpoint.pt"
    tg.checkpoint.save(path, {"rows": rows, "table": table, "ordered": ordered})
    loaded = tg.checkpoint.load(path)
    assert loaded["rows"][0] is loaded["rows"]
    assert loaded["table"]["rows"][0] is loaded["table"]
    assert loaded["ordered"]["self"][0] is loaded["ordered"]
    path.unlink()

    pair = ([],)
    pair[0].append(pair)
    assert refusal({"pair": pair}, tmp_path).startswith('state["pair"][0][0] is a tuple that holds')
    tensor = torch.ones(1)
    tensor.me = [tensor]
    assert refusal({"t": tensor}, tmp_path).startswith('state["t"].me[0] is a Tensor that holds')


def nested(times):
    chain = []
    for _ in range(times):
        chain = [chain]
    return chain


def test_a_chain_too_long_for_pickle(tmp_path):
    chain = nested(100_000)
    assert "nested too deeply" in refusal({"chain": chain}, tmp_path)
    assert check(tmp_path, {"chain": nested(400)}, "")
    while chain:  # or the interpreter goes down the chain as well
        chain = chain.pop()


def test_one_memory_of_two_dtypes(tmp_path):
    numbers = torch.ones(3, dtype=torch.complex64)
    sentence = refusal({"z": numbers, "parts": [torch.view_as_real(numbers)]}, tmp_path)
    assert 'state["z"] and state["parts"][0] view the same memory as torch.complex64' in sentence
    small = torch.ones(4).to(torch.float8_e4m3fn)  # which torch writes as bytes
    check(tmp_path, {"small": small, "bytes": small.view(torch.uint8)}, "")


def test_a_small_view_of_a_large_tensor_is_told_of(tmp_path):
    path = tmp_path / "checkpoint.pt"
    large = torch.zeros(1_000_000)
    with pytest.warns(
        UserWarning, match=r'state\["rows"\]\[1\] views 40 bytes of.*4,000,000'
    ) as seen:
        tg.checkpoint.save(path, {"rows": [1, large[:10]]})
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tg.checkpoint.save(path, {"rows": large[:10].clone()})
        # A flat tensor whose parts are saved one by one, as FSDP's; a small one.
        tg.checkpoint.save(path, {"parts": list(large.split(10_000)), "row": torch.ones(99)[:1]})
    loaded = tg.checkpoint.load(path)["parts"]
    assert loaded[0].untyped_storage().data_ptr() == loaded[1].untyped_storage().data_ptr()


def training_state(optimizer):
    torch.manual_seed(0)  # a state that diverges holds NaN, which differs from itself
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = optimizer(model.parameters())
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        ],
        milestones=[2],
    )
    scaler = torch.amp.GradScaler("cpu")
    groups = tg.TaskGroups(["a", "b"], affinity=tg.GradientAffinity(model[0], sample=2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):

        def closure():
            optimizer.zero_grad()
            loss = model(torch.randn(4, 2)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
        averaged.update_parameters(model)
    loader = torch.Generator().manual_seed(3)
    parts = [model, optimizer, scheduler, scaler, groups, averaged]
    return {
        **{type(part).__name__: part.state_dict() for part in parts},
        "loader": loader.get_state(),
        "random": [torch.get_rng_state(), random.getstate()],
        "numpy": np.random.default_rng(0).bit_generator.state,
        "epoch": 3,
        "best": None,
    }


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True, betas=(0.9, 0.99)),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.Rprop(p),
    ],
)
def test_what_a_training_run_has_to_save(optimizer, tmp_path):
    assert check(tmp_path, training_state(optimizer), "")


def test_the_attributes_of_a_state_dict_stay(tmp_path):
    """Without the versions in it, a model saved by an earlier version would be loaded wrongly."""
    tg.checkpoint.save(tmp_path / "model.pt", nn.BatchNorm1d(2).state_dict())
    loaded = tg.checkpoint.load(tmp_path / "model.pt")
    assert type(loaded) is collections.OrderedDict
    assert loaded._metadata[""] == {"version": 2}


def test_types_that_the_user_has_allowed(tmp_path):
    state = {"point": Point(1, 2)}
    with torch.serialization.safe_globals([Point]):
        tg.checkpoint.save(tmp_path / "a.pt", state)
        assert tg.checkpoint.load(tmp_path / "a.pt") == state
    with pytest.raises(ValueError, match=r"it holds \['.*Point'\].*weights_only=False"):
        tg.checkpoint.load(tmp_path / "a.pt")


def test_usual_values_are_not_serialised_to_find_out(tmp_path, monkeypatch):
    """A large state is traversed once and written once."""
    state = training_state(lambda p: torch.optim.Adam(p, lr=0.1))
    calls = []
    original = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: calls.append(args) or original(*args))
    tg.checkpoint.save(tmp_path / "a.pt", state)
    assert len(calls) == 1


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_under_another_default(device, tmp_path):
    """A default device or dtype changes neither what is saved nor what is loaded."""
    state = {"tensor": torch.arange(3.0), "sparse": torch.eye(2).to_sparse()}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            tg.checkpoint.save(tmp_path / "a.pt", state)
            loaded = tg.checkpoint.load(tmp_path / "a.pt")
    finally:
        torch.set_default_dtype(torch.float32)
    assert alike(loaded, state)


def test_sharded_tensors(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        tg.checkpoint.save(tmp_path / "a.pt", {"model": sharded})
        loaded = tg.checkpoint.load(tmp_path / "a.pt")["model"]
        assert type(loaded) is type(sharded)
        assert torch.equal(loaded.to_local(), sharded.to_local())
    finally:
        dist.destroy_process_group()


def damaged(kind, path):
    """Write a file that is no checkpoint, or a part of one."""
    tg.checkpoint.save(path, {"model": torch.arange(1000.0), "batch": 7})
    whole = path.read_bytes()
    if isinstance(kind, float):
        path.write_bytes(whole[: int(kind * len(whole))])
    elif kind == "changed":
        middle = whole.index(torch.arange(500.0, 502.0).numpy().tobytes())
        path.write_bytes(whole[:middle] + b"\xff" * 8 + whole[middle + 8 :])
    elif kind == "changed pickle":
        place = whole.index(b"model")
        path.write_bytes(whole[: place - 8] + b"\xff" * 8 + whole[place:])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        path.write_bytes(kind)


CUT = "it is cut short or damaged, as after a copy that was stopped"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        *((part, CUT) for part in (0.01, 0.3, 0.5, 0.9, 0.999)),
        (0.0, "it is empty"),
        (b"PK", CUT),
        ("changed pickle", "it is damaged"),
        ("folder", "it is a folder"),
        ("archive", "it is a zip archive of something else"),
        (b"a text\n", "it is not a file that tg.checkpoint.save() wrote"),
        (b"\x80\x02", "it is not a file that tg.checkpoint.save() wrote"),
    ],
)
def test_damaged_files_are_explained_without_torchs_words(kind, said, tmp_path):
    path = tmp_path / "checkpoint.pt"
    damaged(kind, path)
    with pytest.raises(ValueError, match=re.escape(f"as a checkpoint: {said}")) as raised:
        tg.checkpoint.load(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert message.endswith(". Resume from another one, or start again.")
    assert not any(word in message for word in ("PytorchStreamReader", "pickle", "archive:"))
    assert isinstance(raised.value.__cause__, Exception)
