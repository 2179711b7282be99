"""Every CUDA kernel once or twice on small inputs, to be run under compute-sanitizer."""

import torch

from taskgroup import ops

GPU = "cuda"


def main():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n_tasks in (1, 3, 11, 16, 17, 40, 64, 70):
            torch.manual_seed(n_tasks)
            shapes = [(9001,), (33, 7), (1,)]
            gradients = [
                [torch.randn(*shape, device=GPU).to(dtype) for shape in shapes]
                for _ in range(n_tasks)
            ]
            gradients[0][1] = None
            if n_tasks > 1:  # not aligned
                gradients[1][0] = torch.randn(9002, device=GPU).to(dtype)[1:]
            losses = torch.rand(n_tasks, device=GPU) + 0.5
            matrix = torch.zeros(n_tasks, n_tasks, device=GPU)
            observed = torch.zeros(n_tasks, n_tasks, dtype=torch.int32, device=GPU)
            mask = torch.rand(n_tasks, device=GPU) < 0.5
            gram = ops.task_gram(gradients)
            ops.combine(gradients, losses)
            for counts in (None, observed):
                ops.gram_affinity_update_(matrix, gradients, losses, 0.5, observed=counts)
                ops.affinity_update_(matrix, losses, losses * 0.9, mask, 0.5, counts)
            assert gram.isfinite().all()
            assert matrix.isfinite().all()
            # Every task was measured; then the rows of the group were observed again.
            assert torch.equal(observed, 1 + mask.int()[:, None].expand_as(observed))
    torch.cuda.synchronize()


if __name__ == "__main__":
    with ops.use_backend("cuda"):
        main()
