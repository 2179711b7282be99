import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taskgroup as tg
from taskgroup import combine
from tests import random_gradients
from tests.backends import BACKENDS, INTERPRETED, WITH_OPS, backends_op, examples
from tests.random_gradients import DTYPES

# Of sum_k |w_k g_k|: rounding of the sum in float32, and once to the dtype of the gradient.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    # Triton's interpreter cuts off where its compiler rounds.
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-11 + 1e-6,
}


def check(result, gradients, weights):
    for t, total in enumerate(result):
        own = [g[t] for g in gradients]
        if all(g is None for g in own):
            assert total is None
            continue
        terms = [w * g.double() for w, g in zip(weights, own, strict=True) if g is not None]
        first = next(g for g in own if g is not None)
        assert (total.dtype, total.shape) == (first.dtype, first.shape)
        error = (total.double() - sum(terms)).abs()
        scale = sum(term.abs() for term in terms)
        assert (error <= TOLERANCE[total.dtype] * scale + 1e-7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(100), deadline=None)
@given(data=st.data(), gradients=random_gradients.gradients())
def test_is_the_weighted_sum(backend, data, gradients):
    n_tasks = len(gradients)
    weight = st.floats(-2, 2, width=32)
    weights = data.draw(st.lists(weight, min_size=n_tasks, max_size=n_tasks))
    with tg.ops.use_backend(backend):
        result = combine(gradients, torch.tensor(weights))
    check(result, gradients, weights)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data(), gradients=random_gradients.gradients())
def test_writes_to_out(backend, data, gradients):
    weights = torch.linspace(-1, 1, len(gradients)) + 0.1
    with tg.ops.use_backend(backend):
        expected = combine(gradients, weights)
        out, around = [], []
        for t, total in enumerate(expected):
            if total is None:
                out.append(data.draw(st.sampled_from([None, torch.ones(2)])))
                continue
            layout = data.draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
            out.append(random_gradients.laid_out(torch.full_like(total, 7), layout))
            if layout == "sliced":
                around.append(out[-1]._base[..., 1])
        assert combine(gradients, weights, out=out) == out
    for total, written in zip(expected, out, strict=True):
        if total is not None:
            torch.testing.assert_close(written, total, rtol=1e-6, atol=1e-6)
        elif written is not None:
            assert not written.any()
    assert all(gap.isnan().all() for gap in around)


@pytest.mark.parametrize("backend", BACKENDS)
class TestCombine:
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        with tg.ops.use_backend(backend):
            yield

    @pytest.mark.parametrize("n_tasks", [1, 4, 5, 64, 65, 200 if INTERPRETED else 1024])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_many_tasks(self, n_tasks, dtype):
        gradients = random_gradients.make(
            n_tasks, [(1300,), (3,)], [dtype] * 2, ["contiguous"], {(0, 1)}, 0
        )
        if n_tasks == 1:
            gradients[0][1] = torch.ones(3, dtype=dtype)
        weights = torch.randn(n_tasks)
        check(combine(gradients, weights), gradients, weights.tolist())

    @pytest.mark.parametrize("of", [0, 2, 6])
    def test_out_may_be_a_gradient(self, of):
        gradients = random_gradients.make(
            7, [(5000,), (9, 7)], [torch.float32, torch.bfloat16], ["contiguous"], set(), 0
        )
        weights = torch.randn(7)
        expected = combine(gradients, weights)
        result = combine(gradients, weights, out=gradients[of])
        for a, b in zip(result, expected, strict=True):
            assert torch.equal(a, b)

    def test_fills_the_gradients_of_parameters(self):
        parameters = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [[torch.ones(3), torch.ones(2, 2)], [torch.ones(3), None]]
        combine(gradients, [0.25, 0.5], out=[parameter.grad for parameter in parameters])
        assert parameters[0].grad.tolist() == [0.75] * 3
        assert parameters[1].grad.tolist() == [[0.25, 0.25]] * 2

    def test_rounds_once(self):
        """1 + 2^-8 - 1 in bfloat16: rounding every partial sum would give 0."""
        rows = [torch.tensor([v], dtype=torch.bfloat16) for v in (1.0, 2.0**-9, -1.0)]
        (total,) = combine([[row] for row in rows], [1.0, 1.0, 1.0])
        assert total.item() == 2.0**-9

    # Triton's interpreter cuts bfloat16 off; test_triton_compile.py sees that its compiler rounds.
    @pytest.mark.parametrize(
        "dtype", [torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str
    )
    def test_rounds_as_torch_does(self, dtype):
        """Every representable number and the points between, overflow and subnormals among them."""
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        every = bits.view(dtype)
        assert torch.equal(combine([[every]], [1.0])[0].nan_to_num(7.0), every.nan_to_num(7.0))
        for weight in (0.5, 1.0009765625, 1.00390625, 2.0, 0.3):
            (got,) = combine([[every]], [weight])
            expected = (every.float() * torch.tensor(weight)).to(dtype)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    def test_a_missing_gradient_has_no_weight(self):
        two = torch.full((3,), 2.0)
        totals = combine([[None, two], [two, two]], [math.inf, 1.0])
        assert totals[0].tolist() == [2.0] * 3
        assert totals[1].tolist() == [math.inf] * 3

    def test_float64_weights(self):
        gradients = [[torch.ones(1, dtype=torch.float64)]] * 2
        (total,) = combine(gradients, torch.tensor([1 / 3, 1 / 7], dtype=torch.float64))
        assert total.item() == 1 / 3 + 1 / 7

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_not_finite_numbers_propagate(self, dtype):
        gradients = [[torch.tensor([1.0, math.inf, math.nan, 1.0], dtype=dtype)]] * 2
        (total,) = combine(gradients, [0.0, 1.0])
        expected = torch.tensor([1.0, math.nan, math.nan, 1.0], dtype=dtype)
        torch.testing.assert_close(total, expected, equal_nan=True)
        (total,) = combine(gradients[:1], [math.inf])
        assert total.isinf().tolist() == [True, True, False, True]

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.ones(3), r"weights must be floating point \[2\], .* got torch.float32 \[3\]"),
            ([1.0], r"weights must be floating point \[2\]"),
            (torch.ones(2, 1), r"weights must be floating point \[2\]"),
            (torch.ones(2, dtype=torch.int64), "got torch.int64"),
            (torch.ones(2, device="meta"), "weights must be on the device"),
        ],
    )
    def test_bad_weights_are_named(self, weights, message):
        with pytest.raises(ValueError, match=message):
            combine([[torch.ones(2)], [torch.ones(2)]], weights)

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ([], "one tensor per parameter, 1, got 0"),
            ([None], "tensor to write to for tensor 0"),
            ([torch.ones(3)], r"tensor 0 is torch.float32 \[3\] on cpu, its gradient"),
            ([torch.ones(2).double()], "tensor 0 is torch.float64"),
            ([torch.ones(2, device="meta")], "on meta"),
            ([torch.ones(2).to_sparse()], r"tensor 0 has layout torch.sparse_coo"),
            ([torch.ones(1).expand(2)], r"must not be expanded: elements of tensor 0 share"),
        ],
    )
    def test_bad_out_is_named(self, out, message):
        with pytest.raises(ValueError, match=message):
            combine([[torch.ones(2)], [torch.ones(2)]], [1.0, 1.0], out=out)

    def test_nothing_is_written_where_an_argument_is_bad(self):
        out = [torch.ones(2), torch.ones(2)]
        for gradients, weights in (
            ([[torch.ones(2), None]], [1.0, 2.0]),
            ([[torch.ones(2), None], [torch.ones(3), None]], [1.0, 2.0]),
        ):
            with pytest.raises(ValueError, match=r"weights must|has shape"):
                combine(gradients, weights, out=out)
            assert all(tensor.eq(1).all() for tensor in out)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_the_defaults_of_torch_change_nothing(self, dtype, device):
        gradients = random_gradients.make(
            3, [(40,), (2, 5)], [torch.float32, torch.bfloat16], ["contiguous"], {(1, 0)}, 0
        )
        weights = [0.1, 0.7, -0.4]
        expected = combine(gradients, weights), tg.task_gram(gradients)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                found = combine(gradients, weights), tg.task_gram(gradients)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def test_bad_gradient_is_named(self):
        with pytest.raises(ValueError, match="task 1 on tensor 0 is on meta"):
            combine([[torch.ones(2)], [torch.ones(2, device="meta")]], [1.0, 1.0])
        with pytest.raises(ValueError, match="task 0 on tensor 0 must be a Tensor or None"):
            combine([["x"]], [1.0])
        with pytest.raises(ValueError, match="task 1 on tensor 0 has shape"):
            combine([[torch.ones(2)], [torch.ones(3)]], [1.0, 1.0])

    # Of torch's own making, when it imports its compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_compiles_without_a_break(self):
        gradients = random_gradients.make(
            3, [(40,), (2, 5), (2,)], [torch.float32] * 3, ["contiguous"], {(1, 0)}, 0
        )
        gradients = [[*own[:2], None] for own in gradients]
        weights = torch.randn(3)
        expected = combine(gradients, weights)
        compiled = torch.compile(combine, fullgraph=True)
        result = compiled(gradients, weights)
        assert result[2] is None
        torch.testing.assert_close(result[:2], expected[:2])
        out = [torch.zeros(40), torch.zeros(2, 5), torch.ones(2)]
        compiled(gradients, weights, out=out)
        torch.testing.assert_close(out, [*expected[:2], torch.zeros(2)])


class TestNativeOp:
    """The op itself, called without its Python face."""

    @pytest.mark.parametrize("backend", WITH_OPS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_opcheck(self, dtype, backend):
        flat = [torch.randn(5).to(dtype) for _ in range(3)]
        out = [torch.zeros(5).to(dtype) for _ in range(2)]
        torch.library.opcheck(
            backends_op(backend, "combine"), (flat, [0, 1, 3], torch.ones(2), out)
        )

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"weights": torch.ones(3, 1)}, "weights must have shape"),
            ({"weights": torch.ones(2).int()}, "weights must be float32"),
            ({"weights": torch.ones(4)[::2]}, "weights must be contiguous"),
            ({"slots": [0, 0]}, "slots must ascend"),
            ({"out": []}, "out must hold one tensor"),
            ({"out": [torch.ones(3)]}, "out must have the shape"),
            ({"out": [torch.ones(2).double()]}, "out must have the shape"),
        ],
    )
    def test_bad_argument_is_named(self, changed, message):
        good = {
            "gradients": [torch.ones(2)] * 2,
            "slots": [],
            "weights": torch.ones(2),
            "out": [torch.zeros(2)],
        }
        with pytest.raises(RuntimeError, match=message):
            torch.ops.taskgroup.combine(**{**good, **changed})
        assert not good["out"][0].any()
