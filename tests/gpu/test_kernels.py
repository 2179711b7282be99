"""Every op on the GPU, in every backend that runs there, against float64 sums on the host."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from taskgroup import ops
from tests import random_gradients
from tests.random_gradients import DTYPES, gram_error

BACKENDS = ["cuda", "triton", "reference"]
NATIVE = ["cuda", "triton"]
GPU = "cuda"
TOLERANCE = 1e-6  # of |g_i| |g_j|
SHAPES = [(5000,), (), (3, 70), (0,), (129,), (64, 33)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture(params=NATIVE)
def native(request):
    with ops.use_backend(request.param):
        yield request.param


def random(n_tasks, dtype=torch.float32, layouts=("contiguous",), missing=(), seed=0):
    dtypes = [dtype] * len(SHAPES)
    return random_gradients.make(n_tasks, SHAPES, dtypes, layouts, set(missing), seed, device=GPU)


class TestTaskGram:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n_tasks", [1, 2, 3, 5, 8, 11, 16, 17, 26, 33, 64, 65, 130])
    def test_accuracy(self, backend, n_tasks, dtype):
        gradients = random(n_tasks, dtype)
        gram = ops.task_gram(gradients)
        assert gram.is_cuda
        assert torch.equal(gram, gram.t())
        assert gram_error(gram, gradients) <= TOLERANCE

    @pytest.mark.parametrize("n_tasks", [3, 11, 20, 70])
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "offset", "expanded", "mixed"])
    def test_layouts(self, backend, n_tasks, layout):
        every = ("contiguous", "transposed", "sliced", "offset")
        gradients = random(n_tasks, layouts=every if layout == "mixed" else (layout,))
        assert gram_error(ops.task_gram(gradients), gradients) <= TOLERANCE

    @pytest.mark.parametrize("n_tasks", [3, 11, 20, 70])
    def test_missing_gradients(self, backend, n_tasks):
        missing = {(k, t) for k in range(n_tasks) for t in range(len(SHAPES)) if (k + t) % 3 == 0}
        gradients = random(n_tasks, missing=missing)
        assert gram_error(ops.task_gram(gradients), gradients) <= TOLERANCE

    def test_mixed_dtypes(self, backend):
        dtypes = [DTYPES[t % len(DTYPES)] for t in range(len(SHAPES))]
        gradients = random_gradients.make(7, SHAPES, dtypes, ["contiguous"], set(), 0, device=GPU)
        gram = ops.task_gram(gradients)
        assert gram.dtype == torch.float64
        assert gram_error(gram, gradients) <= TOLERANCE

    def test_a_thousand_tasks(self, backend):
        gradients = [[row] for row in torch.randn(1024, 33, device=GPU)]
        gram = ops.task_gram(gradients).double()
        rows = torch.stack([own[0] for own in gradients]).double()
        norm = rows.norm(dim=1)
        error = (gram - rows @ rows.t()).abs() / (norm[:, None] * norm)
        assert error.max() <= TOLERANCE

    @pytest.mark.parametrize("n_tasks", [2, 11, 20, 64])
    @pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
    def test_larger_and_of_any_scale(self, native, n_tasks, scale):
        generator = torch.Generator(GPU).manual_seed(0)
        rows = torch.randn(n_tasks, 3_000_001, device=GPU, generator=generator) * scale
        gram = ops.task_gram([[row] for row in rows]).double()
        wide = rows.double()
        norm = wide.norm(dim=1)
        error = (gram - wide @ wide.t()).abs() / (norm[:, None] * norm)
        assert error.max() <= TOLERANCE

    @pytest.mark.parametrize("n_tasks", [2, 20])
    def test_rounding_that_always_goes_one_way_stays_small(self, native, n_tasks):
        for value in (0.1, 1 / 3, 0.7, 1.1):
            gradients = [[torch.full((1_000_003,), value, device=GPU)]] * n_tasks
            expected = gradients[0][0].double().square().sum()
            error = (ops.task_gram(gradients).double() / expected - 1).abs().max()
            assert error <= 5e-6  # the sums of a thread are in float32

    @pytest.mark.parametrize("n_tasks", [3, 20])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite_numbers_propagate(self, backend, n_tasks, dtype, bad):
        gradients = [[torch.ones(20_000, dtype=dtype, device=GPU)] for _ in range(n_tasks)]
        gradients[1][0][12_345] = bad
        gram = ops.task_gram(gradients).float().cpu()
        expected = torch.full((n_tasks, n_tasks), 20_000.0)
        expected[1, :] = expected[:, 1] = bad
        expected[1, 1] = bad * bad
        torch.testing.assert_close(gram, expected, equal_nan=True)

    @pytest.mark.parametrize("n_tasks", [2, 20])
    def test_more_elements_than_an_int_counts(self, native, n_tasks):
        n = 2**31 + 77
        if torch.cuda.mem_get_info()[0] < 2 * 2 * n + 2**30:
            pytest.skip("takes 9 GiB of GPU memory")
        gradient = torch.zeros(n, dtype=torch.bfloat16, device=GPU)
        gradient[-5:] = 2.0
        other = torch.zeros(n, dtype=torch.bfloat16, device=GPU)
        other[-3:] = 3.0
        gradients = [[gradient], [other], *([None] for _ in range(n_tasks - 2))]
        gram = ops.task_gram(gradients)
        assert gram[:2, :2].tolist() == [[20.0, 18.0], [18.0, 27.0]]
        (total,) = ops.combine(gradients, [0.5] * n_tasks, out=[gradient])
        assert total[-6:].tolist() == [0.0, 1.0, 1.0, 2.5, 2.5, 2.5]

    @pytest.mark.parametrize("n_tasks", [11, 40, 100])
    def test_is_the_same_from_run_to_run(self, native, n_tasks):
        gradients = [[row] for row in torch.randn(n_tasks, 1_000_003, device=GPU)]
        first = ops.task_gram(gradients)
        for _ in range(5):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                again = ops.task_gram(gradients)
            torch.cuda.current_stream().wait_stream(side)
            assert torch.equal(first, again)


class TestCombine:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("n_tasks", [1, 4, 11, 65, 1024])
    def test_accuracy(self, backend, n_tasks, dtype):
        gradients = random(n_tasks, dtype)
        weights = torch.randn(n_tasks, device=GPU)
        result = ops.combine(gradients, weights)
        host = [[g.cpu() for g in own] for own in gradients]
        with ops.use_backend(None):
            expected = ops.combine(host, weights.cpu())
        unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}
        for t, (got, total) in enumerate(zip(result, expected, strict=True)):
            assert got.is_cuda
            size = sum(
                w * max(1.0, own[t].abs().max().item() if own[t].numel() else 0)
                for w, own in zip(weights.abs().tolist(), gradients, strict=True)
            )
            atol = unit.get(dtype, 1e-6) * size
            torch.testing.assert_close(got.cpu(), total, rtol=0, atol=atol)

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
    def test_writes_to_out(self, backend, layout):
        gradients = random(5, layouts=("contiguous", "transposed"))
        weights = torch.randn(5, device=GPU)
        expected = ops.combine(gradients, weights)
        out = [random_gradients.laid_out(torch.full_like(g, 7), layout) for g in expected]
        ops.combine(gradients, weights, out=out)
        for written, total in zip(out, expected, strict=True):
            torch.testing.assert_close(written, total, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("of", [0, 3, 6])
    def test_out_may_be_a_gradient(self, backend, of):
        gradients = random(7, layouts=("contiguous", "offset"))
        weights = torch.randn(7, device=GPU)
        expected = ops.combine(gradients, weights)
        for got, total in zip(
            ops.combine(gradients, weights, out=gradients[of]), expected, strict=True
        ):
            assert torch.equal(got, total)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_not_finite_numbers_propagate(self, backend, dtype):
        values = torch.tensor([1.0, math.inf, math.nan, 1.0], dtype=dtype, device=GPU)
        (total,) = ops.combine([[values]] * 2, [0.0, 1.0])
        expected = torch.tensor([1.0, math.nan, math.nan, 1.0], dtype=dtype)
        torch.testing.assert_close(total.cpu(), expected, equal_nan=True)


class TestAffinityUpdate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("n_tasks", [1, 2, 11, 64, 200, 1024, 1500])
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
            ops.affinity_update_(on_gpu, *step, decay=0.1, observed=counts)
            ops.affinity_update_(not_counted, *step, decay=0.1)
            with ops.use_backend(None):
                ops.affinity_update_(matrix, before, after, mask, decay=0.1, observed=observed)
        torch.testing.assert_close(on_gpu.cpu(), matrix, rtol=0, atol=1e-7)
        assert torch.equal(on_gpu, not_counted)
        assert torch.equal(counts.cpu(), observed)

    @pytest.mark.parametrize("counted", [False, True])
    def test_one_launch(self, native, counted):
        tensors = [torch.rand(11, device=GPU) for _ in range(2)]
        mask = torch.ones(11, dtype=torch.bool, device=GPU)
        matrix = torch.zeros(11, 11, device=GPU)
        observed = torch.zeros(11, 11, dtype=torch.int32, device=GPU) if counted else None
        assert launches(lambda: ops.affinity_update_(matrix, *tensors, mask, 0.1, observed)) == 1


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
            ops.gram_affinity_update_(on_gpu, gradients, on, **options, observed=counts)
            ops.gram_affinity_update_(not_counted, gradients, on, **options)
            with ops.use_backend(None):
                ops.gram_affinity_update_(matrix, host, losses, **options, observed=observed)
        scale = matrix.abs().max().item()
        torch.testing.assert_close(on_gpu.cpu(), matrix, rtol=1e-5, atol=2e-6 * scale)
        assert torch.equal(on_gpu, not_counted)
        assert torch.equal(counts.cpu(), observed)

    def test_no_more_launches_than_the_gram_matrix(self, native):
        gradients = random(11)
        losses, matrix = torch.ones(11, device=GPU), torch.zeros(11, 11, device=GPU)
        counts = torch.zeros(11, 11, dtype=torch.int32, device=GPU)
        own = launches(
            lambda: ops.gram_affinity_update_(matrix, gradients, losses, 0.1, observed=counts)
        )
        assert own <= launches(lambda: ops.task_gram(gradients))

    def test_two_launches_where_the_gradients_fit_one_table(self):
        gradients = [[row] for row in torch.randn(11, 50_000, device=GPU)]
        losses, matrix = torch.ones(11, device=GPU), torch.zeros(11, 11, device=GPU)
        counts = torch.zeros(11, 11, dtype=torch.int32, device=GPU)
        arguments = (matrix, gradients, losses, 0.1)
        with ops.use_backend("cuda"):
            assert launches(lambda: ops.gram_affinity_update_(*arguments, observed=counts)) == 2


def launches(run):
    """Kernels that ``run`` starts."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name
        for event in trace.events()
    )


def test_follows_the_current_stream():
    """Behind a long wait on a side stream: run anywhere else, the op would see zeros."""
    gradients = [[torch.zeros(100_000, device=GPU)] for _ in range(3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with ops.use_backend("cuda"), torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        for (gradient,) in gradients:
            gradient.fill_(1.0)
        gram = ops.task_gram(gradients)
        (total,) = ops.combine(gradients, torch.ones(3, device=GPU))
    side.synchronize()
    assert gram.eq(100_000).all()
    assert total.eq(3).all()


@pytest.mark.parametrize("n_tasks", [11, 40, 70])
def test_captured_in_a_graph(n_tasks):
    """Capture once, change the gradients in place, replay."""
    gradients = [[row] for row in torch.randn(n_tasks, 100_003, device=GPU)]
    weights, losses = torch.randn(n_tasks, device=GPU), torch.rand(n_tasks, device=GPU) + 0.5
    matrix = torch.zeros(n_tasks, n_tasks, device=GPU)
    affinity = torch.zeros(n_tasks, n_tasks, device=GPU)
    counts = torch.zeros(n_tasks, n_tasks, dtype=torch.int32, device=GPU)
    mask = torch.rand(n_tasks, device=GPU) < 0.5
    out = [torch.zeros(100_003, device=GPU)]

    def run():
        gram = ops.task_gram(gradients)
        ops.combine(gradients, weights, out=out)
        ops.gram_affinity_update_(matrix, gradients, losses, decay=1.0, observed=counts)
        ops.affinity_update_(affinity, losses, losses * weights.abs(), mask, 1.0, counts)
        return gram

    with ops.use_backend("cuda"):
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


@pytest.mark.parametrize("backend", NATIVE)
def test_compiles_without_a_break(backend):
    gradients = random(5, missing={(1, 0)})
    losses, weights = torch.ones(5, device=GPU), torch.randn(5, device=GPU)

    def run(gradients):
        matrix = torch.zeros(5, 5, device=GPU)
        ops.gram_affinity_update_(matrix, gradients, losses, 0.5)
        return ops.task_gram(gradients), ops.combine(gradients, weights), matrix

    with ops.use_backend(backend):
        torch.testing.assert_close(torch.compile(run, fullgraph=True)(gradients), run(gradients))


def test_gradients_on_two_devices_are_named():
    with pytest.raises(ValueError, match="task 1 on tensor 0 is on cpu, the first on cuda:0"):
        ops.task_gram([[torch.ones(2, device=GPU)], [torch.ones(2)]])


@pytest.mark.skipif("torch.cuda.device_count() < 2")
def test_another_device_than_the_current_one():
    gradients = [[torch.ones(1000, device="cuda:1")] for _ in range(3)]
    assert ops.task_gram(gradients).eq(1000).all()
