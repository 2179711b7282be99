"""Gradients of tasks from rows on the GPU, whose layers have other backward passes."""

import pytest
import torch

import taskgroup as tg
from tests.gpu.device import GPU
from tests.gradients import test_row_tasks as rows


@pytest.mark.parametrize("name", rows.NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_and_gram(name, dtype):
    model, x, tasks = rows.setting(name, dtype=dtype)
    model, x, tasks = model.to(GPU), x.to(GPU), tasks.to(GPU)
    params = list(model.parameters())
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3  # TF32 and atomic sums
    for _ in range(2):
        losses = rows.row_losses(model, x)
        found = tg.row_task_gradients(losses, tasks, model)
        wanted = rows.expected(losses, tasks, params)
        rows.assert_same(found, wanted, params, tolerance)
        gram = tg.row_task_gram(losses, tasks, model)
        torch.testing.assert_close(gram, tg.task_gram(found), rtol=tolerance, atol=1e-6)


def test_mixed_precision():
    model, x, tasks = rows.setting("ViT", dtype=torch.float32)
    model, x, tasks = model.to(GPU), x.to(GPU), tasks.to(GPU)
    with torch.autocast(GPU, torch.bfloat16):
        losses = rows.row_losses(model, x).float()
    params = list(model.parameters())
    found = tg.row_task_gradients(losses, tasks, model)
    rows.assert_same(found, rows.expected(losses, tasks, params), params, 2e-2)
