import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.cluster import AffinityPropagation
from sklearn.exceptions import ConvergenceWarning

from taskgroup import affinity_propagation, ops

BACKENDS = ["cpp", "reference"]


def scikit_learn(similarity, **options):
    """Its labels at ``random_state=0``, or None where it warns that it did not converge."""
    model = AffinityPropagation(
        affinity="precomputed", random_state=0, **{"convergence_iter": 50, **options}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = model.fit(similarity).labels_
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        return None
    return labels.tolist()


def clusters(rng, n_tasks):
    of = rng.integers(0, max(2, n_tasks // 4), n_tasks)
    return (of[:, None] == of[None, :]).astype(float)


def symmetric(matrix):
    return (matrix + matrix.T) / 2


def affinity_like(rng, n_tasks):
    """What grouping makes of an affinity matrix: symmetric, in [-1, 1], ones on the diagonal."""
    matrix = clusters(rng, n_tasks) * 0.6 - 0.3 + 0.3 * rng.standard_normal((n_tasks, n_tasks))
    matrix = np.clip(symmetric(matrix), -1, 1)
    np.fill_diagonal(matrix, 1)
    return matrix


KINDS = {
    "gaussian": lambda rng, n: rng.standard_normal((n, n)),
    "symmetric": lambda rng, n: symmetric(rng.standard_normal((n, n))),
    "distances": lambda rng, n: (
        -((rng.standard_normal((n, 1, 2)) - rng.standard_normal((1, n, 2))) ** 2).sum(-1)
    ),
    "blocks": lambda rng, n: clusters(rng, n) + 0.1 * rng.standard_normal((n, n)),
    "pure blocks": clusters,  # ties decide
    "integers": lambda rng, n: rng.integers(-2, 3, (n, n)).astype(float),
    "rank one": lambda rng, n: np.multiply.outer(*[rng.standard_normal(n)] * 2),
    "affinity": affinity_like,
    "scales": lambda rng, n: rng.standard_normal((n, n)) * 10.0 ** rng.integers(-6, 6, (n, n)),
}


def options_of(rng, n_tasks):
    """Mostly what grouping uses, now and then anything that is allowed."""
    options = {}
    preference = rng.random()
    if preference < 0.2:
        options["preference"] = float(rng.standard_normal())
    elif preference < 0.4:
        options["preference"] = rng.standard_normal(n_tasks)
    if rng.random() < 0.2:
        options["damping"] = float(rng.uniform(0.5, 0.99))
    if rng.random() < 0.2:
        options["max_iter"] = int(rng.integers(1, 300))
    if rng.random() < 0.2:
        options["convergence_iter"] = int(rng.integers(1, 80))
    return options


def cases(rounds):
    """Hundreds of matrices a round, with what scikit-learn says of them."""
    made = []
    for (seed, kind), n_tasks in itertools.product(
        enumerate(list(KINDS) * rounds), [*range(1, 41), *[2, 3, 4, 5]]
    ):
        rng = np.random.default_rng([seed, n_tasks])
        similarity = KINDS[kind](rng, n_tasks)
        options = options_of(rng, n_tasks)
        made.append((kind, similarity, options, scikit_learn(similarity, **options)))
    for kind in KINDS:
        similarity = KINDS[kind](np.random.default_rng(0), 200)
        made.append((kind, similarity, {}, scikit_learn(similarity)))
    return made


def labels_of(similarity, **options):
    labels = affinity_propagation(similarity, **options)
    return None if labels is None else labels.tolist()


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.full)])
def test_agrees_with_scikit_learn(rounds):
    """Exactly, ties and failures to converge included: rounding is the same, step by step.

    One test of both backends, since what scikit-learn says takes longer than they do.
    """
    made = cases(rounds)
    expected = [expected for *_, expected in made]
    assert len(expected) > 360 * rounds
    assert sum(labels is None for labels in expected) > 25 * rounds
    assert sum(labels is not None and max(labels) > 1 for labels in expected) > 140 * rounds
    for backend in BACKENDS:
        with ops.use_backend(backend):
            for kind, similarity, options, labels in made:
                message = f"{backend}, {kind}, {len(similarity)} tasks, {options}"
                assert labels_of(similarity, **options) == labels, message


@pytest.mark.parametrize("backend", BACKENDS)
class TestAffinityPropagation:
    @pytest.fixture(autouse=True)
    def _backend(self, backend):
        with ops.use_backend(backend):
            yield

    @pytest.mark.parametrize("n_tasks", [1, 2, 3, 11])
    @pytest.mark.parametrize("preference", [None, -1.0, 0.0, 0.3, 0.5])
    def test_all_equal(self, n_tasks, preference):
        """Where nothing tells the tasks apart the preference alone decides."""
        similarity = np.full((n_tasks, n_tasks), 0.3)
        labels = labels_of(similarity, preference=preference)
        assert labels == scikit_learn(similarity, preference=preference)
        alone = preference is not None and preference > 0.3
        assert labels == (list(range(n_tasks)) if alone else [0] * n_tasks)

    def test_one_task(self):
        for preference in (None, -1.0, 2.0):
            labels = affinity_propagation(torch.tensor([[0.5]]), preference=preference)
            assert labels.tolist() == [0]

    def test_labels(self):
        labels = affinity_propagation(torch.block_diag(*[torch.ones(2, 2)] * 3))
        assert labels.dtype == torch.int64
        assert labels.device.type == "cpu"
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]

    def test_without_convergence_there_are_no_labels(self):
        similarity = torch.block_diag(*[torch.ones(2, 2)] * 3)
        # The first check comes after convergence_iter iterations, so as many are too few.
        assert affinity_propagation(similarity, max_iter=50, convergence_iter=50) is None
        assert affinity_propagation(similarity, max_iter=1, convergence_iter=1) is None

    def test_preference(self):
        similarity = affinity_like(np.random.default_rng(0), 8)
        assert labels_of(similarity, preference=5.0) == list(range(8))
        assert labels_of(similarity, preference=-20.0) == [0] * 8
        array = np.linspace(-1, 1, 8)
        expected = scikit_learn(similarity, preference=array)
        assert labels_of(similarity, preference=array) == expected
        assert labels_of(similarity, preference=torch.from_numpy(array)) == expected
        assert labels_of(similarity, preference=array.tolist()) == expected
        number = scikit_learn(similarity, preference=-0.25)
        for preference in (np.float32(-0.25), torch.tensor(-0.25), np.array(-0.25)):
            assert labels_of(similarity, preference=preference) == number
        assert labels_of(similarity) == scikit_learn(similarity, preference=np.median(similarity))

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_dtypes(self, dtype):
        similarity = torch.from_numpy(affinity_like(np.random.default_rng(3), 11)).to(dtype)
        assert labels_of(similarity) == scikit_learn(similarity.double().numpy())
        assert labels_of(similarity.requires_grad_()) is not None

    def test_layouts(self):
        similarity = np.random.default_rng(5).standard_normal((9, 9))
        expected = scikit_learn(similarity.T)
        assert labels_of(similarity.T) == expected
        assert labels_of(torch.from_numpy(similarity).t()) == expected
        wide = np.zeros((9, 18))
        wide[:, ::2] = similarity.T
        assert labels_of(wide[:, ::2]) == expected

    def test_input_is_not_modified(self):
        similarity = np.random.default_rng(0).standard_normal((7, 7))
        tensor, kept = torch.from_numpy(similarity.copy()), similarity.copy()
        similarity.flags.writeable = False
        affinity_propagation(similarity, preference=0.0)
        affinity_propagation(tensor, preference=0.0)
        assert (similarity == kept).all()
        assert (tensor.numpy() == kept).all()

    def test_random_generators_are_left_alone(self):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        affinity_propagation(torch.rand(6, 6, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002

    def test_threads(self):
        matrices = [affinity_like(np.random.default_rng(seed), 30) for seed in range(16)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(labels_of, matrices)) == [labels_of(m) for m in matrices]

    def test_huge_values_end(self):
        """Messages overflow; what comes back is some partition or none, not a crash."""
        similarity = np.random.default_rng(0).choice([-1.7e308, 1.7e308], (6, 6))
        with np.errstate(all="ignore"):
            labels = affinity_propagation(similarity)
        assert labels is None or labels.shape == (6,)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("similarity", {"similarity": torch.zeros(0, 0)}),
            ("similarity", {"similarity": torch.zeros(3)}),
            ("similarity", {"similarity": torch.zeros(2, 3)}),
            ("similarity", {"similarity": np.zeros((2, 2, 2))}),
            ("similarity", {"similarity": torch.tensor([[1.0, torch.nan], [0.0, 1.0]])}),
            ("similarity", {"similarity": torch.tensor([[1.0, torch.inf], [0.0, 1.0]])}),
            ("similarity", {"similarity": torch.zeros(2, 2, dtype=torch.complex64)}),
            ("similarity", {"similarity": np.zeros((2, 2), dtype=complex)}),
            ("preference", {"preference": float("nan")}),
            ("preference", {"preference": [0.0, 1.0]}),
            ("preference", {"preference": torch.zeros(3, 3)}),
            ("damping", {"damping": 0.4}),
            ("damping", {"damping": 1.0}),
            ("damping", {"damping": float("nan")}),
            ("max_iter", {"max_iter": 0}),
            ("convergence_iter", {"convergence_iter": 0}),
        ],
    )
    def test_bad_argument_is_named(self, name, options):
        with pytest.raises(ValueError, match=rf"^{name} must "):
            affinity_propagation(**{"similarity": torch.rand(3, 3), **options})
