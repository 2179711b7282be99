"""Weighted sums of gradients, compared with other ways to write them.

Also the Gram matrix followed by the combination, which is what a method that uses inner products
needs, compared with TorchJD's way from the Jacobian to the gradient.
"""

import torch

import taskgroup as tg
from benchmarks import gradient_peers as peer
from benchmarks.limits import Limits
from benchmarks.ours import backends, check_combination, on
from benchmarks.shapes import parameter_count, random_gradients

SUM = "sum of w * g, task by task"
CONCATENATED = "stack(cat), then w @ matrix"
READY = "w @ ready matrix"
GOAL = {"cpu": 0.7, "cuda": 0.93}  # of what a copy moves; on a GPU from 50 million parameters


def test_combine(record, device, case):
    model, n_tasks, dtype = case
    count = parameter_count(model)
    n_bytes = n_tasks * count * dtype.itemsize
    room = record.room_for(2 * n_bytes)
    gradients = random_gradients(model, n_tasks, dtype, device)
    weights = torch.linspace(0.5, 1.5, n_tasks, device=device)
    out = [torch.empty_like(gradient) for gradient in gradients[0]]
    on_a_gpu = device.type == "cuda"

    def gram_and_combine():
        tg.task_gram(gradients)
        return tg.combine(gradients, weights)

    calls = {
        "combine": lambda: tg.combine(gradients, weights),
        "combine, out=": lambda: tg.combine(gradients, weights, out=out),
        "task_gram, combine": gram_and_combine,
    }
    ours = {}  # by op and backend
    for backend in backends(device):
        for op, call in calls.items():
            ours[op, backend] = on(backend, call)
        name = f"combine on {backend}"
        check_combination(name, ours["combine", backend](), gradients, weights)
        check_combination(f"{name}, out=", ours["combine, out=", backend](), gradients, weights)

    rows = peer.ready_rows(gradients)
    flat_out = torch.empty_like(rows[0])

    def concatenated():
        return peer.split(peer.row_combination(peer.concatenated(gradients), weights), gradients[0])

    new = {
        SUM: lambda: peer.summed(gradients, weights),
        CONCATENATED: concatenated if 4 * n_bytes <= room else "no room",
        READY: lambda: peer.split(peer.row_combination(rows, weights), gradients[0]),
    }
    into = {f"{READY}, out=": lambda: peer.row_combination(rows, weights, flat_out)}
    both = peer.torchjd_sides(gradients, weights, combines=True, room=room)
    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(new[READY](), calls["combine"](), **tolerance)

    limits = Limits(device, dtype if on_a_gpu else torch.float32)
    sides = {op: call for op, call in ours.items() if op[0] != "task_gram, combine"}
    least = record.least_seconds({**sides, **limits.sides(), **ours, **new, **into, **both})
    moved = n_bytes * (n_tasks + 1) / n_tasks

    def combine(seconds):
        return limits.of(seconds, moved).seconds

    def gram(seconds):
        return limits.of(seconds, n_bytes, count * n_tasks * (n_tasks + 1)).seconds

    def gram_then_combine(seconds):
        return gram(seconds) + combine(seconds)

    rates = limits.rates(least)
    record.remark(f"K = {n_tasks}, {model}, {dtype}: {rates}")
    first = backends(device)[0]
    for op, backend in ours:
        peers = {"combine": new, "combine, out=": into, "task_gram, combine": both}[op]
        limit = gram_then_combine if op == "task_gram, combine" else combine
        goal = GOAL[device.type] if op == "combine, out=" else None
        if on_a_gpu and count < 50e6:
            goal = None
        theirs = {name: least[name] for name in peers}
        record.add(
            op,
            n_tasks,
            least[op, backend],
            theirs if backend == first else {first: least[op, first]},
            model=model,
            dtype=dtype,
            backend=backend,
            limit=limit(least),
            share=record.share((op, backend), limit),
            share_of_copy=record.share((op, backend), combine) if limit is combine else None,
            rates=rates,
            limit_goal=goal,
        )
