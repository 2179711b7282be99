import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgroup import ops
from taskgroup.ops import gram_affinity_update_
from tests import random_gradients
from tests.backends import BACKENDS, WITH_OPS, backends_op, examples
from tests.random_gradients import exact_gram


def expected_update(matrix, gradients, losses, decay, lr):
    """Entry by entry, in Python floats."""
    gram = exact_gram(gradients).tolist()
    updated = matrix.double().clone()
    for i, own in enumerate(gradients):
        for k, others in enumerate(gradients):
            measured = any(g is not None for g in own) and any(g is not None for g in others)
            loss = losses[k].item()
            if measured and math.isfinite(gram[i][k]) and math.isfinite(loss) and loss > 0:
                updated[i, k] += decay * (lr * gram[i][k] / loss - updated[i, k])
    return updated


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=examples(60), deadline=None)
@given(data=st.data(), gradients=random_gradients.gradients())
def test_follows_the_formula(backend, data, gradients):
    n_tasks = len(gradients)
    for k in data.draw(st.sets(st.integers(0, n_tasks - 1))):
        if k > 0:  # a task that is not measured
            gradients[k] = [None] * len(gradients[k])
    loss = st.one_of(st.floats(0.125, 8), st.sampled_from([0.0, -1.0, math.nan, math.inf]))
    losses = torch.tensor(data.draw(st.lists(loss, min_size=n_tasks, max_size=n_tasks)))
    decay = data.draw(st.sampled_from([1.0, 0.1, 1e-3]))
    lr = data.draw(st.sampled_from([1.0, 1e-3]))
    matrix = torch.randn(n_tasks, n_tasks)
    expected = expected_update(matrix, gradients, losses, decay, lr)
    with ops.use_backend(backend):
        assert gram_affinity_update_(matrix, gradients, losses, decay, lr) is matrix
    gram = exact_gram(gradients)
    norm = gram.diagonal().sqrt()
    scale = 1 + (norm[:, None] * norm / losses.double().abs().clamp(min=0.1)).nan_to_num(0, 0, 0)
    assert ((matrix.double() - expected).abs() <= 2e-6 * scale).all()


@pytest.mark.parametrize("backend", BACKENDS)
class TestUpdate:
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        with ops.use_backend(backend):
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_losses_of_any_dtype(self, dtype):
        gradients = [[torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 1.0])]]
        losses = torch.tensor([0.5, 4.0], dtype=dtype, requires_grad=True)
        matrix = torch.ones(2, 2)
        gram_affinity_update_(matrix, gradients, losses, decay=0.5)
        assert matrix.tolist() == [[5.5, 0.75], [2.5, 0.625]]

    def test_entries_without_a_finite_product_stay(self):
        gradients = [[torch.tensor([1.0, bad])] for bad in (1.0, math.inf, 0.0)]
        matrix = torch.full((3, 3), 7.0)
        gram_affinity_update_(matrix, gradients, torch.ones(3), decay=1.0)
        assert matrix.tolist() == [[2.0, 7.0, 1.0], [7.0, 7.0, 7.0], [1.0, 7.0, 1.0]]

    def test_tasks_without_gradients_stay(self):
        matrix = torch.full((3, 3), 7.0)
        gradients = [[torch.ones(4)], [None], [torch.ones(4)]]
        gram_affinity_update_(matrix, gradients, torch.ones(3), decay=1.0)
        assert matrix.tolist() == [[4.0, 7.0, 4.0], [7.0, 7.0, 7.0], [4.0, 7.0, 4.0]]
        nothing = [[None]] * 3
        gram_affinity_update_(matrix, nothing, torch.ones(3), decay=1.0)
        assert matrix[0].tolist() == [4.0, 7.0, 4.0]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"matrix": torch.zeros(3, 3)}, r"matrix must have shape \[2, 2\]"),
            ({"matrix": torch.zeros(2, 2).double()}, "matrix must be float32"),
            ({"matrix": torch.zeros(2, 4)[:, ::2]}, "matrix must be contiguous"),
            ({"matrix": torch.zeros(2, 2, requires_grad=True)}, "matrix must not require"),
            ({"matrix": torch.zeros(2, 2, device="meta")}, "losses must be on the device"),
            ({"losses": torch.ones(3)}, r"losses must have shape \[2\]"),
            ({"losses": torch.ones(2).int()}, "losses must have a floating dtype"),
            ({"gradients": [[torch.ones(2)]] * 3}, r"matrix must have shape \[3, 3\]"),
            ({"gradients": [[torch.ones(2, device="meta")]] * 2}, "gradients must be on"),
            (
                {"gradients": [[torch.ones(2)], [torch.ones(2, device="meta")]]},
                "task 1 on tensor 0 is on meta",
            ),
            ({"gradients": [["x"], ["y"]]}, "task 0 on tensor 0 must be a Tensor or None"),
            (
                {"gradients": [[torch.ones(2)], [torch.ones(3)]]},
                "task 1 on tensor 0 has shape",
            ),
            ({"decay": 0.0}, "decay must be"),
            ({"decay": math.nan}, "decay must be"),
        ],
    )
    def test_bad_argument_is_named(self, changed, message):
        good = {
            "matrix": torch.zeros(2, 2),
            "gradients": [[torch.ones(2)]] * 2,
            "losses": torch.ones(2),
            "decay": 0.1,
        }
        with pytest.raises(ValueError, match=message):
            gram_affinity_update_(**{**good, **changed})
        assert not good["matrix"].any()

    # Of torch's own making, when it imports its compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_compiles_without_a_break(self):
        gradients = random_gradients.make(
            4, [(40,), (2, 5)], [torch.float32] * 2, ["contiguous"], {(1, 0), (1, 1), (2, 0)}, 0
        )
        losses = torch.rand(4) + 0.5
        matrix, expected = torch.zeros(4, 4), torch.zeros(4, 4)
        gram_affinity_update_(expected, gradients, losses, 0.5)
        torch.compile(gram_affinity_update_, fullgraph=True)(matrix, gradients, losses, 0.5)
        torch.testing.assert_close(matrix, expected)


class TestNativeOp:
    """The op itself, called without its Python face."""

    @pytest.mark.parametrize("backend", WITH_OPS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_opcheck(self, dtype, backend):
        flat = [torch.randn(5) for _ in range(3)]
        losses = torch.ones(3, dtype=dtype)
        arguments = (torch.zeros(3, 3), flat, [0, 1, 3], [0, 2], losses, 0.5, 1.0)
        torch.library.opcheck(backends_op(backend, "gram_affinity_update_"), arguments)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"matrix": torch.zeros(3, 2)}, "matrix must have shape"),
            ({"matrix": torch.zeros(2, 2).double()}, "matrix must be float32"),
            ({"matrix": torch.zeros(2, 4)[:, ::2]}, "matrix must be contiguous"),
            ({"losses": torch.ones(3)}, "losses must have shape"),
            ({"losses": torch.ones(2).half()}, "losses must be float32"),
            ({"losses": torch.ones(4)[::2]}, "losses must be contiguous"),
            ({"tasks": [0, 2]}, "tasks must ascend"),
            ({"tasks": [1, 0]}, "tasks must ascend"),
            ({"tasks": [-1, 0]}, "tasks must ascend"),
            ({"slots": [1, 0]}, "slots must ascend"),
            ({"decay": 0.0}, "decay must be"),
        ],
    )
    def test_bad_argument_is_named(self, changed, message):
        good = {
            "matrix": torch.zeros(2, 2),
            "gradients": [torch.ones(2)] * 2,
            "slots": [],
            "tasks": [0, 1],
            "losses": torch.ones(2),
            "decay": 0.1,
            "lr": 1.0,
        }
        with pytest.raises(RuntimeError, match=message):
            torch.ops.taskgroup.gram_affinity_update_(**{**good, **changed})
        assert not good["matrix"].any()
