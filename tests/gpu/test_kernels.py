"""Every op on the GPU, in every backend that runs there, against float64 sums."""

import math

import pytest
import torch

import taskgroup as tg
from benchmarks.ours import launches
from tests import random_gradients
from tests.backends import INTERPRETED
from tests.gpu.device import GPU, needs_cuda
from tests.random_gradients import DTYPES, combination_error, gram_error, laid_out, large

ON_THE_HOST = ["triton"] if INTERPRETED else ["cpp", "reference"]
BACKENDS = ["cuda", "triton", "reference"] if GPU == "cuda" else ON_THE_HOST
NATIVE = [backend for backend in BACKENDS if backend != "reference"]
TOLERANCE = 1e-6  # of |g_i| |g_j|
SHAPES = [(5000,), (), (3, 70), (0,), (129,), (64, 33), (8, 16, 3, 3)]
# Of so many elements the ring of bulk copies takes every stage several times; the second is whole
# tiles alone.
MANY = [(1_000_003,), (976, 1024), (77,)] if GPU == "cuda" else [(20_003,), (20, 1024), (77,)]


def on(backend):
    if problem := tg.ops.backends()[backend]:
        pytest.skip(problem)
    return tg.ops.use_backend(backend)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with on(request.param):
        yield request.param


@pytest.fixture(params=NATIVE)
def native(request):
    with on(request.param):
        yield request.param


def random(n_tasks, dtype=torch.float32, layouts=("contiguous",), missing=(), seed=0):
    dtypes = [dtype] * len(SHAPES)
    return random_gradients.make(n_tasks, SHAPES, dtypes, layouts, set(missing), seed, device=GPU)


def assert_gram(gram, gradients):
    """To 1e-6 of ``|g_i| |g_j|``; the message says which entry is off."""
    error = gram_error(gram, gradients)
    assert error <= TOLERANCE, f"entry {error.entry} is off by {error:.1e}"


def assert_combination(total, gradients, weights):
    error = combination_error(total, gradients, weights)
    assert error <= 1, f"tensor and element {error.entry}: {error:.1f} times what rounding explains"


def on_side_stream(run):
    if GPU != "cuda":
        return run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = run()
    torch.cuda.current_stream().wait_stream(side)
    return result


class TestTaskGram:
    # One K for every kernel that is compiled, and for what stands beside the last whole block.
    @pytest.mark.parametrize(
        ("n_tasks", "dtype"),
        [
            *((k, torch.float32) for k in (1, 2, 3, 5, 7, 9, 11, 13, 16, 17, 33, 49, 64, 65, 130)),
            *((k, torch.bfloat16) for k in (1, 11, 16, 17, 33, 64, 65, 130)),
            *((k, torch.float16) for k in (11, 26, 64, 70)),
            *((k, torch.float64) for k in (1, 7, 8, 9, 70)),
        ],
        ids=str,
    )
    def test_accuracy(self, backend, n_tasks, dtype):
        gradients = random(n_tasks, dtype)
        gram = tg.task_gram(gradients)
        assert gram.device.type == GPU
        assert torch.equal(gram, gram.t())
        assert_gram(gram, gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("n_tasks", [2, 5, 11, 16, 20, 64, 100])
    def test_many_tiles(self, native, n_tasks, dtype):
        """Aligned, of random numbers, and the same to the bit from run to run."""
        gradients = large(n_tasks, MANY, dtype, device=GPU)
        gradients[1][2] = None
        gram = tg.task_gram(gradients)
        assert_gram(gram, gradients)
        for _ in range(5):
            assert torch.equal(gram, on_side_stream(lambda: tg.task_gram(gradients)))

    @needs_cuda
    @pytest.mark.parametrize("n_tasks", [2, 11, 16, 20])
    def test_segments_longer_than_the_least(self, native, n_tasks):
        gradients = large(n_tasks, [(20_000_011,)], torch.float32, device=GPU)
        gram = tg.task_gram(gradients)
        assert_gram(gram, gradients)
        assert torch.equal(gram, tg.task_gram(gradients))

    @pytest.mark.parametrize("n_tasks", [3, 11, 20, 70])
    @pytest.mark.parametrize(
        "layout", ["transposed", "channels_last", "sliced", "offset", "expanded", "mixed"]
    )
    def test_layouts(self, backend, n_tasks, layout):
        every = ("contiguous", "transposed", "channels_last", "sliced", "offset")
        gradients = random(n_tasks, layouts=every if layout == "mixed" else (layout,))
        assert_gram(tg.task_gram(gradients), gradients)

    @pytest.mark.parametrize("n_tasks", [3, 11, 20, 70])
    def test_missing_gradients(self, backend, n_tasks):
        missing = {(k, t) for k in range(n_tasks) for t in range(len(SHAPES)) if (k + t) % 3 == 0}
        gradients = random(n_tasks, missing=missing)
        assert_gram(tg.task_gram(gradients), gradients)

    def test_mixed_dtypes(self, backend):
        dtypes = [DTYPES[t % len(DTYPES)] for t in range(len(SHAPES))]
        gradients = random_gradients.make(7, SHAPES, dtypes, ["contiguous"], set(), 0, device=GPU)
        gram = tg.task_gram(gradients)
        assert gram.dtype == torch.float64
        assert_gram(gram, gradients)

    def test_a_thousand_tasks(self, backend):
        gradients = [[row] for row in torch.randn(1024, 33, device=GPU)]
        assert_gram(tg.task_gram(gradients), gradients)

    @pytest.mark.parametrize("n_tasks", [2, 20])
    @pytest.mark.parametrize("scale", [1e-15, 1e15])
    def test_of_any_scale(self, native, n_tasks, scale):
        gradients = [
            [own[0] * scale] for own in large(n_tasks, MANY[:1], torch.float32, device=GPU)
        ]
        assert_gram(tg.task_gram(gradients), gradients)

    @pytest.mark.parametrize("n_tasks", [2, 20])
    def test_rounding_that_always_goes_one_way_stays_small(self, native, n_tasks):
        for value in (0.1, 1 / 3, 0.7, 1.1):
            gradients = [[torch.full((1_000_003,), value, device=GPU)]] * n_tasks
            # The sums of a thread are in float32.
            assert gram_error(tg.task_gram(gradients), gradients) <= 5e-6

    @pytest.mark.parametrize("n_tasks", [3, 20])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite_numbers_propagate(self, backend, n_tasks, dtype, bad):
        gradients = [[torch.ones(20_000, dtype=dtype, device=GPU)] for _ in range(n_tasks)]
        gradients[1][0][12_345] = bad
        gram = tg.task_gram(gradients).float().cpu()
        expected = torch.full((n_tasks, n_tasks), 20_000.0)
        expected[1, :] = expected[:, 1] = bad
        expected[1, 1] = bad * bad
        torch.testing.assert_close(gram, expected, equal_nan=True)

    @needs_cuda
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_more_elements_than_an_int_counts(self, native, dtype):
        n = 2**31 + 77
        needed = 2 * n * dtype.itemsize + 2**30
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"takes {needed / 2**30:.0f} GiB of GPU memory")
        gradient = torch.zeros(n, dtype=dtype, device=GPU)
        gradient[-5:] = 2.0
        other = torch.zeros(n, dtype=dtype, device=GPU)
        other[-3:] = 3.0
        gradients = [[gradient], [other]]
        assert tg.task_gram(gradients).tolist() == [[20.0, 18.0], [18.0, 27.0]]
        (total,) = tg.combine(gradients, [0.5, 0.5], out=[gradient])
        assert total[-6:].tolist() == [0.0, 1.0, 1.0, 2.5, 2.5, 2.5]


@pytest.mark.parametrize("n_tasks", [2, 11, 20, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_missing_gradient_adds_nothing_to_infinity(backend, n_tasks, dtype):
    gradients = [
        [torch.ones(5000, dtype=dtype, device=GPU) for _ in range(2)] for _ in range(n_tasks)
    ]
    gradients[0][1] = None
    gradients[1][1][4000] = math.inf
    gram = tg.task_gram(gradients)
    assert gram[0].eq(5000).all()
    assert gram[1, 1:].isinf().all()


class TestCombine:
    @pytest.mark.parametrize(
        ("n_tasks", "dtype"),
        [
            *((k, torch.float32) for k in (1, 2, 3, 4, 5, 11, 65, 1024)),
            *((k, dtype) for k in (2, 11) for dtype in DTYPES[1:]),
        ],
        ids=str,
    )
    def test_accuracy(self, backend, n_tasks, dtype):
        gradients = random(n_tasks, dtype)
        weights = torch.randn(n_tasks, device=GPU)
        total = tg.combine(gradients, weights)
        assert all(own.device.type == GPU for own in total)
        assert_combination(total, gradients, weights)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("n_tasks", [2, 11, 64])
    def test_many_elements(self, native, n_tasks, dtype):
        gradients = large(n_tasks, MANY, dtype, device=GPU)
        weights = torch.randn(n_tasks, device=GPU)
        out = [torch.full_like(gradient, 7) for gradient in gradients[0]]
        gradients[1][2] = None
        tg.combine(gradients, weights, out=out)
        assert_combination(out, gradients, weights)

    @pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced", "offset", "mixed"])
    def test_layouts(self, backend, layout):
        every = ("contiguous", "transposed", "channels_last", "sliced", "offset")
        missing = {(1, 0), (2, 5)}
        layouts = every if layout == "mixed" else (layout,)
        gradients = random(5, layouts=layouts, missing=missing)
        weights = torch.randn(5, device=GPU)
        assert_combination(tg.combine(gradients, weights), gradients, weights)

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
    def test_writes_to_out(self, backend, layout):
        gradients = random(5, layouts=("contiguous", "transposed"))
        weights = torch.randn(5, device=GPU)
        expected = tg.combine(gradients, weights)
        out = [laid_out(torch.full_like(g, 7), layout) for g in expected]
        tg.combine(gradients, weights, out=out)
        for written, total in zip(out, expected, strict=True):
            torch.testing.assert_close(written, total, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("of", [0, 3, 6])
    def test_out_may_be_a_gradient(self, backend, of):
        gradients = random(7, layouts=("contiguous", "offset"))
        weights = torch.randn(7, device=GPU)
        expected = tg.combine(gradients, weights)
        for got, total in zip(
            tg.combine(gradients, weights, out=gradients[of]), expected, strict=True
        ):
            assert torch.equal(got, total)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_not_finite_numbers_propagate(self, backend, dtype):
        values = torch.tensor([1.0, math.inf, math.nan, 1.0], dtype=dtype, device=GPU)
        (total,) = tg.combine([[values]] * 2, [0.0, 1.0])
        expected = torch.tensor([1.0, math.nan, math.nan, 1.0], dtype=dtype)
        torch.testing.assert_close(total.cpu(), expected, equal_nan=True)


class TestAffinityUpdate:
    @pytest.mark.parametrize(
        ("n_tasks", "dtype"),
        [
            *((k, torch.float32) for k in (1, 2, 11, 64, 200, 1024, 1500)),
            (11, torch.float64),
            (200, torch.float64),
        ],
        ids=str,
    )
    def test_agrees_with_the_host(self, backend, n_tasks, dtype):
        generator = torch.Generator().manual_seed(n_tasks)
        matrix = torch.rand(n_tasks, n_tasks, generator=generator) - 0.5
        before = torch.rand(n_tasks, generator=generator, dtype=dtype) + 0.5
        after = before * (1 + 0.1 * torch.randn(n_tasks, generator=generator, dtype=dtype))
        mask = torch.rand(n_tasks, generator=generator) < 0.3
        before[::7], after[1::9] = -1.0, math.nan
        observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32)
        on_gpu, not_counted, counts = matrix.to(GPU), matrix.to(GPU), observed.to(GPU)
        step = [tensor.to(GPU) for tensor in (before, after, mask)]
        for _ in range(3):
            tg.affinity_update_(on_gpu, *step, decay=0.1, observed=counts)
            tg.affinity_update_(not_counted, *step, decay=0.1)
            with tg.ops.use_backend(None):
                tg.affinity_update_(matrix, before, after, mask, decay=0.1, observed=observed)
        torch.testing.assert_close(on_gpu.cpu(), matrix, rtol=0, atol=1e-7)
        assert torch.equal(on_gpu, not_counted)
        assert torch.equal(counts.cpu(), observed)

    @needs_cuda
    @pytest.mark.parametrize("n_tasks", [11, 200])
    @pytest.mark.parametrize("counted", [False, True])
    def test_one_launch(self, native, counted, n_tasks):
        tensors = [torch.rand(n_tasks, device=GPU) for _ in range(2)]
        mask = torch.ones(n_tasks, dtype=torch.bool, device=GPU)
        matrix = torch.zeros(n_tasks, n_tasks, device=GPU)
        observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32, device=GPU) if counted else None
        assert launches(lambda: tg.affinity_update_(matrix, *tensors, mask, 0.1, observed)) == 1


class TestGramAffinityUpdate:
    @pytest.mark.parametrize("n_tasks", [2, 11, 20, 70])
    def test_agrees_with_the_host(self, backend, n_tasks):
        gradients = random(n_tasks, missing={(0, t) for t in range(len(SHAPES))})
        losses = torch.rand(n_tasks) + 0.5
        losses[1] = -1.0
        matrix = torch.rand(n_tasks, n_tasks)
        observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32)
        on_gpu, not_counted, counts = matrix.to(GPU), matrix.to(GPU), observed.to(GPU)
        options = {"decay": 0.3, "lr": 0.1}
        host = [[None if g is None else g.cpu() for g in own] for own in gradients]
        for _ in range(2):
            on = losses.to(GPU)
            tg.gram_affinity_update_(on_gpu, gradients, on, **options, observed=counts)
            tg.gram_affinity_update_(not_counted, gradients, on, **options)
            with tg.ops.use_backend(None):
                tg.gram_affinity_update_(matrix, host, losses, **options, observed=observed)
        scale = matrix.abs().max().item()
        torch.testing.assert_close(on_gpu.cpu(), matrix, rtol=1e-5, atol=2e-6 * scale)
        assert torch.equal(on_gpu, not_counted)
        assert torch.equal(counts.cpu(), observed)

    @needs_cuda
    def test_no_more_launches_than_the_gram_matrix(self, native):
        gradients = random(11)
        losses, matrix = torch.ones(11, device=GPU), torch.zeros(11, 11, device=GPU)
        counts = torch.zeros(11, 11, dtype=torch.int32, device=GPU)
        own = launches(
            lambda: tg.gram_affinity_update_(matrix, gradients, losses, 0.1, observed=counts)
        )
        assert own <= launches(lambda: tg.task_gram(gradients))

    @needs_cuda
    def test_two_launches_where_the_gradients_fit_one_table(self):
        gradients = [[row] for row in torch.randn(11, 50_000, device=GPU)]
        losses, matrix = torch.ones(11, device=GPU), torch.zeros(11, 11, device=GPU)
        counts = torch.zeros(11, 11, dtype=torch.int32, device=GPU)
        arguments = (matrix, gradients, losses, 0.1)
        with on("cuda"):
            assert launches(lambda: tg.gram_affinity_update_(*arguments, observed=counts)) == 2


@needs_cuda
def test_follows_the_current_stream(native):
    """Behind a long wait on a side stream: run anywhere else, the ops would see zeros."""
    gradients = [[torch.zeros(100_000, device=GPU)] for _ in range(3)]
    losses = torch.zeros(3, device=GPU)
    matrix, weights = torch.zeros(3, 3, device=GPU), torch.ones(3, device=GPU)

    def run():
        tg.gram_affinity_update_(matrix, gradients, losses, 1.0)
        return tg.task_gram(gradients), tg.combine(gradients, weights)[0]

    run()  # what is made once is made here
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for (gradient,) in gradients:
            gradient.fill_(1.0)
        losses.fill_(2.0)
        gram, total = run()
    side.synchronize()
    assert gram.eq(100_000).all()
    assert total.eq(3).all()
    assert matrix.eq(50_000).all()


@needs_cuda
@pytest.mark.parametrize("n_tasks", [11, 40, 70])
@pytest.mark.parametrize("n_elements", [100_003, 100_096], ids=["not aligned", "aligned"])
def test_captured_in_a_graph(n_elements, n_tasks):
    """Capture once, change the gradients in place, replay."""
    gradients = [[row] for row in torch.randn(n_tasks, n_elements, device=GPU)]
    weights, losses = torch.randn(n_tasks, device=GPU), torch.rand(n_tasks, device=GPU) + 0.5
    matrix = torch.zeros(n_tasks, n_tasks, device=GPU)
    affinity = torch.zeros(n_tasks, n_tasks, device=GPU)
    counts = torch.zeros(n_tasks, n_tasks, dtype=torch.int32, device=GPU)
    mask = torch.rand(n_tasks, device=GPU) < 0.5
    out = [torch.zeros(n_elements, device=GPU)]

    def run():
        gram = tg.task_gram(gradients)
        tg.combine(gradients, weights, out=out)
        tg.gram_affinity_update_(matrix, gradients, losses, decay=1.0, observed=counts)
        tg.affinity_update_(affinity, losses, losses * weights.abs(), mask, 1.0, counts)
        return gram

    with on("cuda"):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for (gradient,) in gradients:
            gradient.copy_(torch.randn_like(gradient))
        losses.add_(0.25)
        graph.replay()
        replayed = [captured.clone(), out[0].clone(), matrix.clone(), affinity.clone()]
        gram = run()
    # Run, replayed, run again: capturing alone runs nothing.
    assert counts[~mask].eq(3).all()
    assert counts[mask].ge(3).all()
    assert counts[mask].gt(3).any() == mask.any()
    for a, b in zip(replayed, [gram, out[0], matrix, affinity], strict=True):
        assert torch.equal(a, b)


def test_compiles_without_a_break(native):
    gradients = random(5, missing={(1, 0)})
    losses, weights = torch.ones(5, device=GPU), torch.randn(5, device=GPU)

    def run(gradients):
        matrix = torch.zeros(5, 5, device=GPU)
        tg.gram_affinity_update_(matrix, gradients, losses, 0.5)
        return tg.task_gram(gradients), tg.combine(gradients, weights), matrix

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gradients), run(gradients))


@needs_cuda
def test_gradients_on_two_devices_are_named():
    with pytest.raises(ValueError, match="task 1 on tensor 0 is on cpu, the first on cuda:0"):
        tg.task_gram([[torch.ones(2, device=GPU)], [torch.ones(2)]])


@needs_cuda
@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_another_device_than_the_current_one(native):
    gradients = [[torch.ones(100_000, device="cuda:1")] for _ in range(3)]
    losses, matrix = torch.full((3,), 2.0, device="cuda:1"), torch.zeros(3, 3, device="cuda:1")
    assert tg.task_gram(gradients).eq(100_000).all()
    assert tg.combine(gradients, [1.0, 2.0, 3.0])[0].eq(6).all()
    assert tg.gram_affinity_update_(matrix, gradients, losses, 1.0).eq(50_000).all()
    assert torch.cuda.current_device() == 0
