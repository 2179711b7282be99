import importlib
import math

import pytest
import torch
from hypothesis import given, settings

from taskgroup import ops, task_gram
from tests import random_gradients
from tests.backends import BACKENDS, INTERPRETED, WITH_OPS, backends_op, examples
from tests.random_gradients import DTYPES, gram_error

TOLERANCE = 1e-6  # of |g_i| |g_j|


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(100), deadline=None)
@given(gradients=random_gradients.gradients())
def test_is_the_matrix_of_inner_products(backend, gradients):
    with ops.use_backend(backend):
        gram = task_gram(gradients)
    present = [g for own in gradients for g in own if g is not None]
    wide = any(g.dtype == torch.float64 for g in present)
    assert gram.dtype == (torch.float64 if wide else torch.float32)
    assert torch.equal(gram, gram.t())
    assert gram_error(gram, gradients) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_tasks", [16, 17, 65] if INTERPRETED else [16, 17, 63, 64, 65, 130])
def test_many_tasks(backend, n_tasks, dtype):
    shapes = [(100 if INTERPRETED else 700,), (3, 11)]
    gradients = random_gradients.make(
        n_tasks, shapes, [dtype] * 2, ["contiguous"], {(0, 0), (16, 1)}, 0
    )
    with ops.use_backend(backend):
        gram = task_gram(gradients)
    assert gram_error(gram, gradients) <= TOLERANCE


def test_a_thousand_tasks():
    rows = torch.randn(1024, 33)
    error = task_gram([[row] for row in rows]).double() - rows.double() @ rows.double().t()
    norm = rows.double().norm(dim=1)
    assert (error.abs() / (norm[:, None] * norm)).max() <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
class TestGram:
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        with ops.use_backend(backend):
            yield

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rounding_that_always_goes_one_way_stays_small(self, dtype):
        """Sums of one and the same number: the worst case for float32 accumulation."""
        for value in (0.1, 1 / 3, 0.7, 1.1):
            n = 1_003 if INTERPRETED else 100_003
            gradients = [[torch.full((n,), value, dtype=dtype)]] * 2
            assert gram_error(task_gram(gradients), gradients) <= TOLERANCE

    def test_products_of_bfloat16_are_exact(self):
        """Sums of few products that float32 holds exactly come out exactly."""
        a = torch.tensor([1.0078125, -3.0, 2.0**-6], dtype=torch.bfloat16)
        b = torch.tensor([1.0078125, 5.0, 2.0**-6], dtype=torch.bfloat16)
        gram = task_gram([[a], [b]])
        assert gram[0, 1].item() == 1.0078125**2 - 15 + 2.0**-12

    def test_float16_does_not_overflow(self):
        gradient = torch.full((100,), 60000.0, dtype=torch.float16)
        gram = task_gram([[gradient]])
        assert gram.item() == pytest.approx(100 * gradient[0].double().item() ** 2, rel=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("at", [0, 5, 599])
    def test_not_finite_numbers_propagate(self, dtype, bad, at):
        gradients = [[torch.ones(600, dtype=dtype)] for _ in range(3)]
        gradients[1][0][at] = bad
        gram = task_gram(gradients)
        expected = torch.full((3, 3), 600.0)
        expected[1, :] = expected[:, 1] = bad
        expected[1, 1] = bad * bad
        torch.testing.assert_close(gram.float(), expected, equal_nan=True)

    def test_opposite_infinities_are_nan(self):
        gradients = [[torch.tensor([math.inf, 1.0])], [torch.tensor([0.0, math.inf])]]
        gram = task_gram(gradients)
        assert gram[0, 0] == math.inf
        assert gram[0, 1].isnan()  # inf * 0 + 1 * inf

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_missing_gradient_hides_what_is_not_finite(self, dtype, bad):
        """It is not zero, which times infinity would be NaN: it is not there."""
        two = torch.full((40,), 2, dtype=dtype)
        gram = task_gram([[torch.full((40,), bad, dtype=dtype), two], [None, two], [two, two]])
        assert gram[0, 1] == gram[1, 1] == gram[1, 2] == 160
        assert gram[2, 2] == 320
        assert not gram[0, ::2].isfinite().any()

    def test_sums_over_many_parameters(self):
        """Some threads or programs end in one, some in the next."""
        shapes = [(1500,), (3,), (40, 40), (1,), (2100,), (700,), (0,), (4000,)]
        dtypes = [DTYPES[t % 4] for t in range(8)]
        gradients = random_gradients.make(3, shapes, dtypes, ["contiguous"], {(0, 2), (1, 4)}, 0)
        assert gram_error(task_gram(gradients), gradients) <= TOLERANCE
        gradients = random_gradients.make(
            3, shapes, [torch.float32] * 8, ["contiguous"], {(0, 2), (1, 4)}, 0
        )
        assert gram_error(task_gram(gradients), gradients) <= TOLERANCE

    def test_long_gradients(self, backend, monkeypatch):
        """More parts than are summed side by side; which are fewer where that takes long."""
        if backend == "triton":
            module = importlib.import_module("taskgroup.ops.triton.task_gram")
            monkeypatch.setattr(module, "parts_at_once", lambda size: 4)
        gradients = [[row] for row in torch.randn(2, 12_003 if INTERPRETED else 140_003)]
        gram = task_gram(gradients)
        assert gram_error(gram, gradients) <= TOLERANCE
        assert torch.equal(task_gram(gradients), gram)

    def test_extreme_magnitudes(self):
        tiny, huge = torch.full((50,), 1e-18), torch.full((50,), 1e18)
        gradients = [[tiny], [huge]]
        assert gram_error(task_gram(gradients), gradients) <= TOLERANCE

    def test_a_gradient_may_carry_a_graph(self):
        x = torch.ones(3, requires_grad=True)
        gram = task_gram([[x * 2], [x * 3]])
        assert not gram.requires_grad
        assert gram.tolist() == [[12.0, 18.0], [18.0, 27.0]]

    def test_a_task_that_reaches_nothing_is_zero(self):
        gram = task_gram([[None, None], [torch.ones(3), None]])
        assert gram.tolist() == [[0.0, 0.0], [0.0, 3.0]]

    def test_empty_tensors(self):
        gram = task_gram([[torch.ones(0), torch.ones(2)]] * 2)
        assert gram.tolist() == [[2.0, 2.0], [2.0, 2.0]]
        assert task_gram([[torch.ones(0)]] * 2).tolist() == [[0.0, 0.0], [0.0, 0.0]]

    @pytest.mark.parametrize(
        ("gradients", "message"),
        [
            ([], r"one list per task, 1 to 1024 of them, got 0"),
            ([[torch.ones(1)]] * 1025, r"1 to 1024 of them, got 1025"),
            ([[], []], "at least one parameter"),
            ([[None], [None]], "no task reaches any"),
            ([[torch.ones(1)] * 2, [torch.ones(1)]], "task 1 has 1, task 0 has 2"),
            (
                [[torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(4)]],
                r"task 1 on tensor 1 has shape \[4\], that of task 0 \[3\]",
            ),
            (
                [[torch.ones(6)], [torch.ones(2, 3)]],
                r"task 1 on tensor 0 has shape \[2, 3\]",
            ),
            (
                [[torch.ones(2)], [torch.ones(2, dtype=torch.float64)]],
                "task 1 on tensor 0 is torch.float64, that of task 0 torch.float32",
            ),
            (
                [[torch.ones(2), torch.ones(2, dtype=torch.int64)]],
                "task 0 on tensor 1 is torch.int64",
            ),
            (
                [[torch.ones(2, dtype=torch.complex64)]],
                r"task 0 on tensor 0 is torch.complex64, and .* call torch.view_as_real\(\)",
            ),
            ([[torch.eye(2).to_sparse()]], "task 0 on tensor 0 has layout torch.sparse_coo"),
            (
                [[torch.ones(2)], [torch.eye(2)[0].to_sparse()]],
                "task 1 on tensor 0 has layout torch.sparse_coo",
            ),
            (
                [[torch.ones(2)], [torch.ones(2, device="meta")]],
                "task 1 on tensor 0 is on meta, the first on cpu",
            ),
            ([[torch.ones(2)], [1.0]], "task 1 on tensor 0 must be a Tensor or None, got float"),
            ([["x"]], "task 0 on tensor 0 must be a Tensor or None, got str"),
        ],
    )
    def test_bad_input_is_named(self, gradients, message):
        with pytest.raises(ValueError, match=message):
            task_gram(gradients)

    # Of torch's own making, when it imports its compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_compiles_without_a_break(self):
        gradients = random_gradients.make(
            3, [(40,), (2, 5)], [torch.float32, torch.bfloat16], ["contiguous"], {(1, 0)}, 0
        )
        compiled = torch.compile(task_gram, fullgraph=True)
        torch.testing.assert_close(compiled(gradients), task_gram(gradients))


@pytest.mark.slow
def test_more_elements_than_an_int_counts():
    """One number in memory stands for all: read by its strides, of which none is contiguous."""
    n = 2**31 + 256  # which float32 holds
    ones, twos = (torch.full((1,), v, dtype=torch.bfloat16).expand(n) for v in (1.0, 2.0))
    with ops.use_backend("cpp"):
        assert task_gram([[ones], [twos]]).double().tolist() == [[n, 2 * n], [2 * n, 4 * n]]


def test_does_not_depend_on_the_number_of_threads():
    gradients = [[torch.randn(1_000_003)] for _ in range(5)]
    threads = torch.get_num_threads()
    grams = []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            grams.append(task_gram(gradients))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gram, grams[0]) for gram in grams)


def test_nothing_of_the_size_of_the_gradients_is_copied():
    """Peak memory of a fresh process, while 400 MB of gradients are read."""
    import subprocess
    import sys

    script = """
import resource, torch, taskgroup
torch.set_num_threads(2)
gradients = [[torch.ones(5, 1_000_000), torch.ones(5_000_000)] for _ in range(10)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
taskgroup.task_gram(gradients)
taskgroup.combine(gradients, [1.0] * 10, out=[g for g in gradients[0]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.check_output([sys.executable, "-c", script]))  # KiB
    assert grown < 30_000


class TestNativeOp:
    """The op itself, called without its Python face."""

    @pytest.mark.parametrize("backend", WITH_OPS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, dtype, backend):
        flat = [torch.randn(5).to(dtype) for _ in range(3)]
        torch.library.opcheck(backends_op(backend, "task_gram"), (flat, [0, 1, 3], 2))
        torch.library.opcheck(backends_op(backend, "task_gram"), (flat, [], 3))

    @pytest.mark.parametrize(
        ("gradients", "slots", "n_tasks", "message"),
        [
            ([torch.ones(1)], [], 0, "tasks must be 1 to 1024"),
            ([torch.ones(1)], [], 1025, "tasks must be 1 to 1024"),
            ([torch.ones(1)], [0, 1], 2, "slots must hold one entry"),
            ([torch.ones(1)] * 2, [1, 1], 2, "slots must ascend"),
            ([torch.ones(1)] * 2, [-1, 0], 2, "slots must ascend"),
            ([torch.ones(2), torch.ones(3)], [], 2, "one shape and dtype per parameter"),
            ([torch.ones(2), torch.ones(2).double()], [], 2, "one shape and dtype per parameter"),
            ([torch.ones(2).int()], [], 1, "gradients must be float32"),
        ],
    )
    def test_bad_argument_is_named(self, gradients, slots, n_tasks, message):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.taskgroup.task_gram(gradients, slots, n_tasks)
