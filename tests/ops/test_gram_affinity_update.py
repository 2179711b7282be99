import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgroup import gram_affinity_update_, ops
from taskgroup.ops.gram_affinity_update import _update
from tests import random_gradients
from tests.backends import BACKENDS, WITH_OPS, backends_op, examples
from tests.random_gradients import exact_gram


def expected_update(matrix, gradients, losses, decay, lr):
    """Entry by entry, in Python floats: the new matrix, and the entries that moved."""
    gram = exact_gram(gradients).tolist()
    updated = matrix.double().clone()
    moved = torch.zeros(updated.shape, dtype=torch.int32)
    for i, own in enumerate(gradients):
        for k, others in enumerate(gradients):
            measured = any(g is not None for g in own) and any(g is not None for g in others)
            loss = losses[k].item()
            if measured and math.isfinite(gram[i][k]) and math.isfinite(loss) and loss > 0:
                updated[i, k] += decay * (lr * gram[i][k] / loss - updated[i, k])
                moved[i, k] = 1
    return updated, moved


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
    expected, moved = expected_update(matrix, gradients, losses, decay, lr)
    not_counted = matrix.clone()
    observed = torch.arange(n_tasks**2, dtype=torch.int32).view(n_tasks, n_tasks)
    counts = observed + moved
    with ops.use_backend(backend):
        assert gram_affinity_update_(matrix, gradients, losses, decay, lr, observed) is matrix
        gram_affinity_update_(not_counted, gradients, losses, decay, lr)
    assert torch.equal(observed, counts)
    assert torch.equal(matrix.view(torch.int32), not_counted.view(torch.int32))
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
        matrix, observed = torch.full((3, 3), 7.0), torch.full((3, 3), 7, dtype=torch.int32)
        gram_affinity_update_(matrix, gradients, torch.ones(3), decay=1.0, observed=observed)
        assert matrix.tolist() == [[2.0, 7.0, 1.0], [7.0, 7.0, 7.0], [1.0, 7.0, 1.0]]
        assert observed.tolist() == [[8, 7, 8], [7, 7, 7], [8, 7, 8]]

    def test_only_columns_with_a_valid_loss_are_observed(self):
        gradients = [[torch.tensor([1.0, k])] for k in range(5)]
        losses = torch.tensor([0.5, 0.0, -1.0, math.nan, math.inf])
        matrix, observed = torch.full((5, 5), 7.0), torch.zeros(5, 5, dtype=torch.int32)
        gram_affinity_update_(matrix, gradients, losses, decay=1.0, observed=observed)
        assert matrix.tolist() == [[2.0, 7.0, 7.0, 7.0, 7.0]] * 5
        assert observed.tolist() == [[1, 0, 0, 0, 0]] * 5

    def test_one_task(self):
        matrix, observed = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32)
        loss = torch.tensor([2.0])
        gram_affinity_update_(matrix, [[torch.tensor(3.0)]], loss, 1.0, observed=observed)
        assert (matrix.item(), observed.item()) == (4.5, 1)

    def test_tasks_without_gradients_stay(self):
        matrix, observed = torch.full((3, 3), 7.0), torch.zeros(3, 3, dtype=torch.int32)
        gradients = [[torch.ones(4)], [None], [torch.ones(4)]]
        gram_affinity_update_(matrix, gradients, torch.ones(3), decay=1.0, observed=observed)
        assert matrix.tolist() == [[4.0, 7.0, 4.0], [7.0, 7.0, 7.0], [4.0, 7.0, 4.0]]
        nothing = [[None]] * 3
        gram_affinity_update_(matrix, nothing, torch.ones(3), decay=1.0, observed=observed)
        assert matrix[0].tolist() == [4.0, 7.0, 4.0]
        assert observed.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]

    def test_parameters_without_elements_are_observed_as_zero(self):
        matrix, observed = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int32)
        gradients = [[torch.zeros(0)], [torch.zeros(0)]]
        gram_affinity_update_(matrix, gradients, torch.ones(2), 0.5, observed=observed)
        assert matrix.tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert observed.tolist() == [[1, 1], [1, 1]]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"matrix": torch.zeros(3, 3)}, r"matrix must have shape \[2, 2\]"),
            ({"matrix": torch.zeros(2, 2).double()}, "matrix must be float32"),
            ({"matrix": torch.zeros(2, 4)[:, ::2]}, "matrix must be contiguous"),
            ({"matrix": torch.zeros(2, 2, requires_grad=True)}, "matrix must not require"),
            ({"matrix": torch.zeros(2, 2).to_sparse()}, "matrix must be dense"),
            ({"matrix": [[0.0]]}, "matrix must be a Tensor, got list"),
            ({"losses": [1.0, 1.0]}, "losses must be a Tensor, got list"),
            ({"losses": torch.ones(2).to_sparse()}, "losses must be dense"),
            ({"losses": torch.tensor(1.0)}, r"losses must have shape \[2\], got \[\]"),
            ({"losses": torch.ones(2) + 1j}, "losses must have a floating dtype"),
            ({"observed": [[0]]}, "observed must be a Tensor, got list"),
            ({"observed": torch.zeros(3, 3).int()}, r"observed must have the shape .* \[2, 2\]"),
            ({"observed": torch.zeros(2, 2)}, "observed must be int32, got torch.float32"),
            ({"observed": torch.zeros(2, 2).int().t()}, "observed must be contiguous"),
            ({"observed": torch.zeros(2, 2).int().to_sparse()}, "observed must be dense"),
            ({"observed": torch.zeros(2, 2).int().to("meta")}, "observed must be on the device"),
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
            "observed": torch.zeros(2, 2, dtype=torch.int32),
        }
        with pytest.raises(ValueError, match=message):
            gram_affinity_update_(**{**good, **changed})
        assert not good["matrix"].any()
        assert not good["observed"].any()

    def test_counts_in_the_memory_of_the_matrix_are_refused(self):
        matrix = torch.zeros(2, 2)
        gradients, losses = [[torch.ones(2)]] * 2, torch.ones(2)
        with pytest.raises(ValueError, match=r"^observed must not share memory with matrix"):
            gram_affinity_update_(matrix, gradients, losses, 0.1, observed=matrix.view(torch.int32))
        assert not matrix.any()

    # Of torch's own making, when it imports its compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
    def test_compiles_without_a_break(self):
        gradients = random_gradients.make(
            4, [(40,), (2, 5)], [torch.float32] * 2, ["contiguous"], {(1, 0), (1, 1), (2, 0)}, 0
        )
        losses = torch.rand(4) + 0.5
        matrix, expected = torch.zeros(4, 4), torch.zeros(4, 4)
        observed, counts = (torch.zeros(4, 4, dtype=torch.int32) for _ in range(2))
        gram_affinity_update_(expected, gradients, losses, 0.5, observed=counts)
        compiled = torch.compile(gram_affinity_update_, fullgraph=True)
        compiled(matrix, gradients, losses, 0.5, observed=observed)
        torch.testing.assert_close(matrix, expected)
        assert torch.equal(observed, counts)
        assert counts.any()


class TestUnderOtherDefaults:
    @pytest.fixture(autouse=True)
    def _default_dtype(self):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(default)

    @pytest.fixture
    def state(self):
        matrix = torch.ones(2, 2, dtype=torch.float32)
        losses = torch.tensor([0.5, 4.0], dtype=torch.float32)
        return matrix, losses, torch.zeros(2, 2, dtype=torch.int32)

    def check(self, matrix, observed):
        assert matrix.tolist() == [[5.5, 0.75], [2.5, 0.625]]
        assert observed.tolist() == [[1, 1], [1, 1]]

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_dtype(self, backend, state):
        matrix, losses, observed = state
        gradients = [[torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 1.0])]]
        with ops.use_backend(backend):
            gram_affinity_update_(matrix, gradients, losses, 0.5, observed=observed)
        self.check(matrix, observed)

    def test_device(self, state):
        matrix, losses, observed = state
        gradients = [[torch.tensor([1.0, 2.0])], [torch.tensor([0.0, 1.0])]]
        with ops.use_backend("cpp"), torch.device("meta"):
            gram_affinity_update_(matrix, gradients, losses, 0.5, observed=observed)
        self.check(matrix, observed)

    def test_device_in_plain_torch(self, state):
        """As gradients that are sharded take it, once the Gram matrix is there."""
        matrix, losses, observed = state
        gram = torch.tensor([[5.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
        with torch.device("meta"):
            _update(matrix, gram, [0, 1], losses, 0.5, 1.0, observed)
        self.check(matrix, observed)


class TestNativeOp:
    """The op itself, called without its Python face."""

    @pytest.mark.parametrize("backend", WITH_OPS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_opcheck(self, dtype, backend):
        flat = [torch.randn(5) for _ in range(3)]
        losses = torch.ones(3, dtype=dtype)
        arguments = (torch.zeros(3, 3), flat, [0, 1, 3], [0, 2], losses, 0.5, 1.0)
        op = backends_op(backend, "gram_affinity_update_")
        torch.library.opcheck(op, arguments)
        torch.library.opcheck(op, (*arguments, torch.zeros(3, 3, dtype=torch.int32)))

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
            ({"observed": torch.zeros(3, 3).int()}, "observed must have shape"),
            ({"observed": torch.zeros(2, 2)}, "observed must be int32"),
            ({"observed": torch.zeros(2, 2).int().t()}, "observed must be contiguous"),
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
