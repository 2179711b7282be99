"""Every CUDA kernel a few times, to be run under compute-sanitizer."""

import torch

import taskgroup as tg
from tests.gpu.device import GPU
from tests.random_gradients import exact_gram, large

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Aligned, and of so many tiles that the ring of bulk copies takes every stage several times.
MANY = [(1_000_003,), (976, 1024), (1,)] if GPU == "cuda" else [(20_003,), (20, 1024), (1,)]


def small(n_tasks, dtype):
    """Not all aligned, not all there."""
    shapes = [(9001,), (33, 7), (1,)]
    gradients = large(n_tasks, shapes, dtype, seed=n_tasks, device=GPU)
    gradients[0][1] = None
    if n_tasks > 1:
        gradients[1][0] = torch.randn(9002, device=GPU).to(dtype)[1:]
    return gradients


def run(gradients):
    """All ops on these gradients."""
    n_tasks = len(gradients)
    losses = torch.rand(n_tasks, device=GPU) + 0.5
    matrix = torch.zeros(n_tasks, n_tasks, device=GPU)
    observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32, device=GPU)
    mask = torch.rand(n_tasks, device=GPU) < 0.5
    gram = tg.task_gram(gradients)
    tg.combine(gradients, losses)
    for counts in (None, observed):
        tg.gram_affinity_update_(matrix, gradients, losses, 0.5, observed=counts)
        tg.affinity_update_(matrix, losses, losses * 0.9, mask, 0.5, counts)
    # On the host: a library's own kernels are not what is looked at.
    exact = exact_gram([[None if g is None else g.cpu() for g in own] for own in gradients])
    norm = exact.diagonal().sqrt()
    assert ((gram.cpu() - exact).abs() <= 1e-6 * norm[:, None] * norm).all()
    assert matrix.isfinite().all()
    # Every task was measured; then the rows of the group were observed again.
    assert torch.equal(observed, 1 + mask.int()[:, None].expand_as(observed))


def main():
    torch.manual_seed(0)
    for n_tasks in (2, 5, 11, 16, 20, 64):
        run(large(n_tasks, MANY, torch.float32, device=GPU))
    for n_tasks in (11, 64):
        run(large(n_tasks, MANY, torch.bfloat16, device=GPU))
    for dtype in DTYPES:
        for n_tasks in (1, 3, 11, 16, 17, 40, 64, 70):
            run(small(n_tasks, dtype))


if __name__ == "__main__":
    with tg.ops.use_backend("cuda" if GPU == "cuda" else "cpp"):
        main()
