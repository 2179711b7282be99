"""The host time of an op, with tensors so small that the computation takes almost no time."""

import pytest
import torch

import taskgroup as tg
from taskgroup.ops import _plain

N_PARAMETERS = 150  # of a ViT's encoder
THROUGH_TORCH = "lists of tensors through torch"


@pytest.mark.parametrize("n_tasks", [2, 11, 64])
def test_host_time(record, device, n_tasks):
    gradients = [
        [torch.ones(2, device=device) for _ in range(N_PARAMETERS)] for _ in range(n_tasks)
    ]
    out = [torch.empty_like(gradient) for gradient in gradients[0]]
    weights = torch.ones(n_tasks, device=device)
    losses = torch.ones(n_tasks, device=device)
    matrix = torch.zeros(n_tasks, n_tasks, device=device)
    calls = {
        "task_gram": lambda: tg.task_gram(gradients),
        "combine": lambda: tg.combine(gradients, weights),
        "combine(out=)": lambda: tg.combine(gradients, weights, out=out),
        "gram_affinity_update_": lambda: tg.gram_affinity_update_(matrix, gradients, losses, 0.1),
    }
    reader = _plain._reader

    def through_torch(call):
        def run():
            _plain._reader = None
            try:
                call()
            finally:
                _plain._reader = reader

        return run

    for op, call in calls.items():
        least = record.least_seconds({"ours": call, THROUGH_TORCH: through_torch(call)})
        # On a GPU, compare the host times.
        host = {name: seconds.host or seconds for name, seconds in least.items()}
        record.add(
            op,
            n_tasks,
            host["ours"],
            {THROUGH_TORCH: host[THROUGH_TORCH]},
            model=f"T = {N_PARAMETERS}",
        )
