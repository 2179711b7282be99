"""Combinations of gradients, side by side with what one would otherwise write.

Also the Gram matrix and the combination together, all that a method on inner products does, side by
side with TorchJD's way from the Jacobian to the gradient.
"""

import pytest
import torch

from benchmarks import gradient_peers as peer
from benchmarks.limits import Limits
from benchmarks.shapes import parameter_count, random_gradients
from taskgroup import ops

SUM = "sum of w * g, task by task"
CONCATENATED = "stack(cat), then w @ matrix"
READY = "w @ ready matrix"
GOAL = 0.7  # of what a copy moves


def test_combine(record, device, case):
    model, n_tasks, dtype = case
    count = parameter_count(model)
    n_bytes = n_tasks * count * dtype.itemsize
    room = record.room()
    if 2 * n_bytes > room:
        pytest.skip(f"needs {2 * n_bytes / 1e9:.0f} GB")
    gradients = random_gradients(model, n_tasks, dtype, device)
    weights = torch.linspace(0.5, 1.5, n_tasks, device=device)
    rows = peer.ready_rows(gradients)
    out = [torch.empty_like(gradient) for gradient in gradients[0]]
    flat_out = torch.empty_like(rows[0])

    def concatenated():
        return peer.split(peer.row_combination(peer.concatenated(gradients), weights), gradients[0])

    def gram_and_combine():
        ops.task_gram(gradients)
        return ops.combine(gradients, weights)

    new = {
        SUM: lambda: peer.summed(gradients, weights),
        CONCATENATED: concatenated if 4 * n_bytes <= room else "no room",
        READY: lambda: peer.split(peer.row_combination(rows, weights), gradients[0]),
    }
    into = {f"{READY}, out=": lambda: peer.row_combination(rows, weights, flat_out)}
    both = peer.torchjd_sides(gradients, weights, combines=True, room=room)
    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ops.combine(gradients, weights), new[READY](), **tolerance)

    limits = Limits(device, dtype if device.type == "cuda" else torch.float32)
    least = record.least_seconds(
        {
            "new": lambda: ops.combine(gradients, weights),
            "into": lambda: ops.combine(gradients, weights, out=out),
            **limits.sides(),
            "both": gram_and_combine,
            **new,
            **into,
            **both,
        }
    )

    def combine(seconds):
        return limits.of(seconds, n_bytes * (n_tasks + 1) / n_tasks).seconds

    def gram(seconds):
        return limits.of(seconds, n_bytes, count * n_tasks * (n_tasks + 1)).seconds

    def gram_then_combine(seconds):
        return gram(seconds) + combine(seconds)

    for op, ours, peers, limit, goal in (
        ("combine", "new", new, combine, None),
        ("combine, out=", "into", into, combine, GOAL),
        ("task_gram, combine", "both", both, gram_then_combine, None),
    ):
        record.add(
            op,
            n_tasks,
            least[ours],
            {name: least[name] for name in peers},
            model=model,
            dtype=dtype,
            limit=limit(least),
            share=record.share(ours, limit),
            limit_goal=goal,
        )
