"""The update of the affinity by one step, compared with the published code.

Both are called from Python with the losses of a step on a group of four tasks.
"""

from functools import partial

import pytest
import torch

import taskgroup as tg
from benchmarks.ours import backends, check_affinity, launches, on
from benchmarks.published import PublishedTaskAffinity

GOAL = {11: 30, 200: 100}
DECAY = 1e-3
PEER = "published code"


@pytest.mark.parametrize("n_tasks", [11, 200, 1000])
def test_affinity_update(record, device, n_tasks):
    tasks = [f"task{k}" for k in range(n_tasks)]
    group = tasks[:4]
    mask = (torch.arange(n_tasks) < 4).to(device)
    generator = torch.Generator().manual_seed(0)
    before, after = (
        (1 + 0.1 * torch.rand(n_tasks, generator=generator)).to(device) for _ in range(2)
    )
    named = [dict(zip(tasks, losses.unbind(), strict=True)) for losses in (before, after)]
    peer = PublishedTaskAffinity(tasks, {"group": group}, DECAY)
    peer.update("group", named[0])
    peer.update("group", named[1])  # its credit is right here, since both steps are on one group

    ours = {}
    for backend in backends(device):
        matrix = torch.zeros(n_tasks, n_tasks, device=device)
        ours[backend] = on(
            backend, partial(tg.affinity_update_, matrix, before, after, mask, DECAY)
        )
        ours[backend]()
        check_affinity(f"affinity_update_ on {backend}", matrix, peer.affinity_map, 1e-7)

    step = 0

    def published():
        nonlocal step
        step += 1
        peer.update("group", named[step % 2])

    least = record.least_seconds({**ours, PEER: published})
    first = backends(device)[0]
    for backend, call in ours.items():
        record.add(
            "affinity_update_",
            n_tasks,
            least[backend],
            {PEER: least[PEER]} if backend == first else {first: least[first]},
            backend=backend,
            launches=launches(call) if device.type == "cuda" else None,
            goals={PEER: GOAL[n_tasks]} if device.type == "cpu" and n_tasks in GOAL else None,
        )
