import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgroup import affinity_update_, ops
from tests.backends import BACKENDS, WITH_OPS, backends_op, examples

TOLERANCE = 1e-6


def update_by_the_rules(matrix, before, after, group, decay):
    """The rules one by one, on plain Python floats: a new matrix, and the entries that moved."""
    tasks = range(len(before))
    valid = [math.isfinite(before[k]) and before[k] > 0 and math.isfinite(after[k]) for k in tasks]
    updated = [list(row) for row in matrix]
    moved = [[0] * len(row) for row in matrix]
    if all(after[k] == before[k] for k in tasks if valid[k]):
        return updated, moved
    ratio = {
        k: max(-1.0, min(1.0, 1 - after[k] / before[k])) / len(group)
        for k in tasks
        if valid[k] and group
    }
    for i in group:
        for k in tasks:
            if k not in ratio or (k in group and i not in ratio):
                continue
            if k not in group:
                observed = ratio[k]
            elif k == i:
                if ratio[i] < 0:
                    continue
                observed = ratio[i]
            elif ratio[i] * ratio[k] >= 0:
                observed = ratio[k]
            else:
                observed = -max(ratio[i], ratio[k])
            updated[i][k] = (1 - decay) * updated[i][k] + decay * observed
            moved[i][k] = 1
    return updated, moved


losses = st.one_of(
    st.floats(-3, 3).map(lambda exponent: 10**exponent),
    st.sampled_from([0.0, -0.0, -1.5, math.nan, math.inf, -math.inf, 1.0, 5e-324]),
)


@st.composite
def steps(draw, n_tasks):
    """One step: losses before and after it, the group, the decay."""
    before = draw(st.lists(losses, min_size=n_tasks, max_size=n_tasks))
    changed = st.one_of(losses, st.none())
    after = draw(st.lists(changed, min_size=n_tasks, max_size=n_tasks))
    if draw(st.integers(0, 9)) == 0:  # no step
        after = [None] * n_tasks
    after = [b if a is None else a for b, a in zip(before, after, strict=True)]
    group = draw(st.sets(st.integers(0, n_tasks - 1)))
    decay = draw(st.one_of(st.sampled_from([1.0, 1e-3, 1e-4]), st.floats(1e-6, 1)))
    return before, after, group, decay


@st.composite
def sequences(draw):
    n_tasks = draw(st.one_of(st.integers(1, 12), st.sampled_from([17, 40])))
    seed = draw(st.integers(0, 2**16))
    return n_tasks, seed, draw(st.lists(steps(n_tasks), min_size=1, max_size=5))


def arguments(before, after, group, dtype=torch.float64):
    mask = torch.zeros(len(before), dtype=torch.bool)
    mask[list(group)] = True
    return torch.tensor(before, dtype=dtype), torch.tensor(after, dtype=dtype), mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(150), deadline=None)
@given(sequence=sequences())
def test_follows_the_rules(backend, dtype, sequence):
    n_tasks, seed, updates = sequence
    start = torch.rand(n_tasks, n_tasks, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    matrix, expected = start.clone(), start.double().tolist()
    observed = torch.arange(n_tasks**2, dtype=torch.int32).view(n_tasks, n_tasks)
    counts = observed.clone()
    for before, after, group, decay in updates:
        b, a, mask = arguments(before, after, group, dtype)
        with ops.use_backend(backend):
            assert affinity_update_(matrix, b, a, mask, decay, observed) is matrix
        expected, moved = update_by_the_rules(expected, b.tolist(), a.tolist(), group, decay)
        counts += torch.tensor(moved)
    torch.testing.assert_close(
        matrix.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=TOLERANCE
    )
    assert torch.equal(observed, counts)


@settings(max_examples=examples(150), deadline=None)
@given(sequence=sequences())
def test_backends_agree_to_the_bit(sequence):
    n_tasks, _, updates = sequence
    results = []
    for backend, counted in itertools.product(BACKENDS, [True, False]):
        matrix = torch.zeros(n_tasks, n_tasks)
        observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32) if counted else None
        with ops.use_backend(backend):
            for before, after, group, decay in updates:
                affinity_update_(matrix, *arguments(before, after, group), decay, observed)
        results.append((matrix.view(torch.int32), observed))
    bits, counts = results[0]
    for matrix, observed in results:
        assert torch.equal(matrix, bits)  # counting changes no bit either
        assert observed is None or torch.equal(observed, counts)


@pytest.mark.parametrize("backend", BACKENDS)
class TestUpdate:
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        with ops.use_backend(backend):
            yield

    def test_worked_example(self):
        matrix = torch.full((4, 4), 0.5)
        before, after, group = arguments([1.0, 2.0, 4.0, 1.0], [0.5, 2.2, 5.0, 0.9], {0, 1})
        observed = torch.full((4, 4), 7, dtype=torch.int32)
        affinity_update_(matrix, before, after, group, decay=0.5, observed=observed)
        r = [0.25, -0.05, -0.125, 0.05]  # each halved: the group has two tasks
        expected = 0.25 + 0.5 * torch.tensor(
            [
                [r[0], -r[0], r[2], r[3]],  # task 1 got worse while task 0 got better: a conflict
                [-r[0], 0.5, r[2], r[3]],  # no observation of task 1 on itself: it got worse
                [0.5, 0.5, 0.5, 0.5],
                [0.5, 0.5, 0.5, 0.5],
            ]
        )
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-7)
        assert observed.tolist() == [[8, 8, 8, 8], [8, 7, 8, 8], [7] * 4, [7] * 4]

    def test_an_observation_that_changes_no_value_counts(self):
        matrix, observed = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32)
        step = arguments([1.0, 1.0], [1.0, 0.5], {0})  # task 0 did not move, task 1 did
        affinity_update_(matrix, *step, 1.0, observed)
        assert matrix.tolist() == [[0.0, 0.5], [0.0, 0.0]]
        assert observed.tolist() == [[1, 1], [0, 0]]

    def test_one_task(self):
        matrix, observed = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32)
        for after, value, count in [(0.5, 0.5, 1), (2.0, 0.5, 1), (1.0, 0.5, 1), (0.25, 0.75, 2)]:
            affinity_update_(matrix, *arguments([1.0], [after], {0}), 1.0, observed)
            assert (matrix.item(), observed.item()) == (value, count)

    def test_without_a_step_nothing_is_observed(self):
        matrix = torch.rand(3, 3)
        kept = matrix.clone()
        before = torch.tensor([1.0, math.nan, 0.3])
        after = torch.tensor([1.0, 7.0, 0.3])  # the one that moved is not valid
        observed = torch.zeros(3, 3, dtype=torch.int32)
        affinity_update_(matrix, before, after, torch.tensor([True, True, False]), 0.5, observed)
        assert torch.equal(matrix, kept)
        assert not observed.any()

    def test_a_step_seen_by_one_task_alone_is_observed(self):
        matrix = torch.ones(2, 2)
        before, after, group = arguments([1.0, 1.0], [1.0, 0.5], {0})
        affinity_update_(matrix, before, after, group, 0.5)
        assert matrix.tolist() == [[0.5, 0.75], [1.0, 1.0]]

    def test_an_empty_group_changes_nothing(self):
        matrix = torch.rand(3, 3)
        kept = matrix.clone()
        observed = torch.zeros(3, 3, dtype=torch.int32)
        step = arguments([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], set())
        affinity_update_(matrix, *step, 1.0, observed)
        assert torch.equal(matrix, kept)
        assert not observed.any()

    def test_no_tasks(self):
        empty = torch.zeros(0)
        observed = torch.zeros(0, 0, dtype=torch.int32)
        affinity_update_(torch.zeros(0, 0), empty, empty, empty.bool(), 1.0, observed)

    def test_many_tasks(self):
        n_tasks = 1024
        generator = torch.Generator().manual_seed(0)
        before = torch.rand(n_tasks, generator=generator) + 0.5
        after = before * (1 + 0.1 * torch.randn(n_tasks, generator=generator))
        mask = torch.rand(n_tasks, generator=generator) < 0.02
        matrix = torch.zeros(n_tasks, n_tasks)
        observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32)
        affinity_update_(matrix, before, after, mask, 1.0, observed)
        group = mask.nonzero().flatten().tolist()
        expected, moved = update_by_the_rules(
            torch.zeros(n_tasks, n_tasks).tolist(), before.tolist(), after.tolist(), group, 1.0
        )
        torch.testing.assert_close(matrix, torch.tensor(expected), rtol=0, atol=TOLERANCE)
        assert torch.equal(observed, torch.tensor(moved, dtype=torch.int32))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_low_precision_losses(self, dtype):
        before, after, mask = arguments([1.0, 0.3, 2.5], [0.9, 0.31, 2.0], {0, 1}, dtype)
        matrix, expected = torch.zeros(3, 3), torch.zeros(3, 3)
        affinity_update_(matrix, before, after, mask, 0.1)
        affinity_update_(expected, before.float(), after.float(), mask, 0.1)
        assert torch.equal(matrix, expected)
        assert matrix[0].all()

    def test_views_of_one_buffer_that_do_not_overlap(self):
        buffer = torch.zeros(2, 3, 3)
        matrix, observed = buffer[0], buffer.view(torch.int32)[1]
        step = arguments([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], {2})
        affinity_update_(matrix, *step, 1.0, observed)
        assert matrix.tolist() == [[0.0] * 3, [0.0] * 3, [0.5] * 3]
        assert observed.tolist() == [[0] * 3, [0] * 3, [1] * 3]

    def test_under_other_defaults(self):
        matrix, observed = torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.int32)
        before, after, mask = arguments([1.0, 2.0, 3.0], [0.5, 2.5, 1.0], {0, 1}, torch.float32)
        expected = affinity_update_(matrix.clone(), before, after, mask, 0.5)
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                affinity_update_(matrix, before, after, mask, 0.5, observed)
        finally:
            torch.set_default_dtype(default)
        assert torch.equal(matrix, expected)
        assert observed.tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 0]]

    def test_losses_may_carry_a_graph_and_strides(self):
        before = torch.rand(3, 2, requires_grad=True)[:, 0]
        after = before * 0.5
        mask = torch.ones(2, 3, dtype=torch.bool).t()[:, 0]
        matrix = affinity_update_(torch.zeros(3, 3), before, after, mask, 1.0)
        torch.testing.assert_close(matrix, torch.full((3, 3), 0.5 / 3))
        assert not matrix.requires_grad

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("matrix", torch.zeros(3, 4)),
            ("matrix", torch.zeros(3)),
            ("matrix", torch.zeros(3, 3, dtype=torch.float64)),
            ("matrix", torch.arange(9.0).view(3, 3).t()),
            ("matrix", torch.zeros(3, 3, requires_grad=True)),
            ("matrix", torch.zeros(3, 3).to_sparse()),
            ("matrix", [[0.0] * 3] * 3),
            ("before", [1.0, 1.0, 1.0]),
            ("before", torch.tensor(1.0)),
            ("before", torch.ones(3).to_sparse()),
            ("before", torch.ones(3).to(torch.float8_e4m3fn)),
            ("before", torch.ones(2)),
            ("before", torch.ones(3, 1)),
            ("before", torch.ones(3, device="meta")),
            ("before", torch.ones(3, dtype=torch.int64)),
            ("before", torch.ones(3, dtype=torch.complex64)),
            ("after", None),
            ("after", torch.ones(4)),
            ("after", torch.ones(3, dtype=torch.float64)),
            ("after", torch.ones(3, device="meta")),
            ("after", torch.ones(3).to_sparse()),
            ("mask", {0, 1}),
            ("mask", torch.ones(4, dtype=torch.bool)),
            ("mask", torch.ones(3)),
            ("mask", torch.ones(3, dtype=torch.bool).to_sparse()),
            ("mask", torch.ones(3, dtype=torch.bool, device="meta")),
            ("decay", 0.0),
            ("decay", -0.1),
            ("decay", 1.01),
            ("decay", math.nan),
            ("observed", [[0] * 3] * 3),
            ("observed", torch.zeros(3, 3)),
            ("observed", torch.zeros(3, 3, dtype=torch.int64)),
            ("observed", torch.zeros(9, dtype=torch.int32)),
            ("observed", torch.zeros(4, 4, dtype=torch.int32)),
            ("observed", torch.zeros(3, 3, dtype=torch.int32).t()),
            ("observed", torch.zeros(3, 3, dtype=torch.int32).to_sparse()),
            ("observed", torch.zeros(3, 3, dtype=torch.int32, device="meta")),
        ],
    )
    def test_bad_argument_is_named(self, name, value):
        good = {
            "matrix": torch.zeros(3, 3),
            "before": torch.ones(3),
            "after": torch.full((3,), 0.5),
            "mask": torch.ones(3, dtype=torch.bool),
            "decay": 0.1,
            "observed": torch.zeros(3, 3, dtype=torch.int32),
        }
        with pytest.raises(ValueError, match=rf"^{name} must "):
            affinity_update_(**{**good, name: value})
        assert not good["matrix"].any()
        assert not good["observed"].any()

    @pytest.mark.parametrize("offset", [0, 1, 8])
    def test_counts_in_the_memory_of_the_matrix_are_refused(self, offset):
        buffer = torch.zeros(17)
        matrix = buffer[:9].view(3, 3)
        observed = buffer.view(torch.int32)[offset : offset + 9].view(3, 3)
        step = arguments([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], {0})
        with pytest.raises(ValueError, match=r"^observed must not share memory with matrix"):
            affinity_update_(matrix, *step, 1.0, observed)
        assert not buffer.any()

    # Of torch's own making, when it imports its compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_compiles_without_a_break(self):
        compiled = torch.compile(affinity_update_, fullgraph=True)
        generator = torch.Generator().manual_seed(0)
        matrix, expected = torch.zeros(5, 5), torch.zeros(5, 5)
        observed, counts = (torch.zeros(5, 5, dtype=torch.int32) for _ in range(2))
        for _ in range(3):
            before = torch.rand(5, generator=generator) + 0.5
            after = torch.rand(5, generator=generator) + 0.5
            mask = torch.rand(5, generator=generator) < 0.5
            compiled(matrix, before, after, mask, 0.3, observed)
            affinity_update_(expected, before, after, mask, 0.3, counts)
        torch.testing.assert_close(matrix, expected, rtol=0, atol=TOLERANCE)
        assert torch.equal(observed, counts)
        assert expected.any()


def test_reference_waits_for_no_device():
    """A meta tensor has no data: whatever read a value back on the host would raise."""
    meta = torch.ones(4, device="meta")
    matrix = torch.zeros(4, 4, device="meta")
    affinity_update_(matrix, meta, meta, meta.bool(), 0.5, matrix.int())


class TestNativeOp:
    """The op itself, called without its Python face."""

    @pytest.fixture
    def op(self):
        return torch.ops.taskgroup.affinity_update_.default

    @pytest.mark.parametrize("backend", WITH_OPS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_opcheck(self, dtype, backend):
        before, after, mask = arguments([1.0, 0.3, 2.5], [0.9, 0.31, 2.0], {0, 1}, dtype)
        op = backends_op(backend, "affinity_update_")
        arguments_ = (torch.zeros(3, 3), before, after, mask, 0.5)
        torch.library.opcheck(op, arguments_)
        torch.library.opcheck(op, (*arguments_, torch.zeros(3, 3, dtype=torch.int32)))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("matrix", torch.zeros(3, 4)),
            ("matrix", torch.zeros(9)),
            ("matrix", torch.zeros(3, 3, dtype=torch.float64)),
            ("matrix", torch.arange(9.0).view(3, 3).t()),
            ("before", torch.ones(2)),
            ("before", torch.ones(())),
            ("before", torch.ones(1).expand(3)),
            ("before", torch.ones(3, dtype=torch.float16)),
            ("after", torch.ones(4)),
            ("after", torch.ones(3, dtype=torch.float64)),
            ("mask", torch.ones(2, dtype=torch.bool)),
            ("mask", torch.ones(3, dtype=torch.uint8)),
            ("decay", 0.0),
            ("decay", 1.5),
            ("decay", math.nan),
            ("observed", torch.zeros(9, dtype=torch.int32)),
            ("observed", torch.zeros(4, 4, dtype=torch.int32)),
            ("observed", torch.zeros(3, 3)),
            ("observed", torch.zeros(3, 3, dtype=torch.int32).t()),
        ],
    )
    def test_bad_argument_is_named(self, op, name, value):
        good = {
            "matrix": torch.zeros(3, 3),
            "before": torch.ones(3),
            "after": torch.full((3,), 0.5),
            "mask": torch.ones(3, dtype=torch.bool),
            "decay": 0.1,
            "observed": torch.zeros(3, 3, dtype=torch.int32),
        }
        with pytest.raises(RuntimeError, match=rf"{name} must "):
            op(**{**good, name: value})
        assert not good["matrix"].any()
        assert not good["observed"].any()

    def test_counts_in_the_memory_of_the_matrix_are_refused(self, op):
        matrix = torch.zeros(3, 3)
        half = torch.full((3,), 0.5)
        with pytest.raises(RuntimeError, match="observed must have memory of its own"):
            op(matrix, torch.ones(3), half, half.bool(), 0.5, matrix.view(torch.int32))
        assert not matrix.any()
