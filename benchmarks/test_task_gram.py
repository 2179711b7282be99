"""Gram matrices of gradients, compared with other ways to write them."""

from functools import partial

import pytest
import torch

import taskgroup as tg
from benchmarks import gradient_peers as peer
from benchmarks.limits import Limits
from benchmarks.ours import backends, check_affinity, check_gram, on
from benchmarks.shapes import parameter_count, random_gradients

PAIRWISE = "(a * b).sum() for all pairs"
CONCATENATED = "stack(cat), then mm"
READY = "mm on a ready matrix"
OP = "task_gram"
MOST_PAIRWISE = {"cpu": 16, "cuda": 5}  # tasks, unless --full
DECAY = 1e-3
# Goals on an H100 and on an H200, as a share of the speed of a copy, above 50 million parameters.
ON_A_GPU = {
    **{(n_tasks, torch.float32): (0.95, 0.9) for n_tasks in (2, 5, 11, 16)},
    **{(n_tasks, torch.float32): (0.85, 0.75) for n_tasks in (26, 64)},
    (11, torch.bfloat16): (0.9, 0.85),
    (64, torch.bfloat16): (0.75, 0.65),
}


def goals_of(case, device):
    """The goals: times as fast as each peer, and the share of the limit (on a GPU, of a copy)."""
    model, n_tasks, dtype = case
    if device.type == "cuda":
        if parameter_count(model) < 50e6:
            return {}, None
        h100, h200 = ON_A_GPU.get((n_tasks, dtype), (None, None))
        return {}, h200 if "H200" in torch.cuda.get_device_name(device) else h100
    if case == ("ViT-T", 11, torch.float32):
        return {CONCATENATED: 10, READY: 6}, 0.6
    if case == ("ViT-T", 64, torch.float32):
        return {READY: 1.5}, None
    return {}, None


def gram_peers(gradients, n_bytes, room, full):
    """Functions that compute the Gram matrix, or why they are not run."""
    n_tasks = len(gradients)
    rows = peer.ready_rows(gradients)
    grams = {PAIRWISE: "with --full", CONCATENATED: "no room", READY: lambda: peer.row_gram(rows)}
    if n_tasks <= MOST_PAIRWISE[rows.device.type] or full:
        grams[PAIRWISE] = lambda: peer.pairwise_gram(gradients)
    if 4 * n_bytes <= room:
        grams[CONCATENATED] = lambda: peer.row_gram(peer.concatenated(gradients))
    weights = torch.ones(n_tasks, device=gradients[0][0].device)
    return {**grams, **peer.torchjd_sides(gradients, weights, combines=False, room=room)}


@pytest.mark.parametrize("op", [OP, "gram_affinity_update_"])
def test_task_gram(record, device, case, op):
    model, n_tasks, dtype = case
    on_a_gpu = device.type == "cuda"
    if op != OP and not (record.full or on_a_gpu or case[1:] == (11, torch.float32)):
        pytest.skip("with --full")
    n_elements = n_tasks * parameter_count(model)
    n_bytes = n_elements * dtype.itemsize
    room = record.room_for(2 * n_bytes)
    gradients = random_gradients(model, n_tasks, dtype, device)
    losses = torch.linspace(0.5, 1.5, n_tasks, device=device)
    ours = {}
    for backend in backends(device):
        with tg.ops.use_backend(backend):
            gram = tg.task_gram(gradients)
        check_gram(f"task_gram on {backend}", gram, gradients)
        matrix = torch.zeros(n_tasks, n_tasks, device=device)
        ours[backend] = on(backend, lambda: tg.task_gram(gradients))
        if op != OP:
            update = partial(tg.gram_affinity_update_, matrix, gradients, losses, DECAY)
            ours[f"task_gram, {backend}"] = ours[backend]
            ours[backend] = on(backend, update)
            expected = DECAY * gram.double() / losses
            tolerance = 2e-6 * expected.abs().max().item()
            name = f"gram_affinity_update_ on {backend}, {model}, {dtype}"
            check_affinity(name, ours[backend](), expected.float(), tolerance)

    peers = {}
    if op == OP:
        peers = gram_peers(gradients, n_bytes, room, record.full)
        if on_a_gpu and n_elements >= 2**31:
            too_many = f"{n_elements:.1e} elements: torch's products of such matrices are not safe"
            peers.update({name: too_many for name in (CONCATENATED, READY) if name in peers})
        if not isinstance(peers[READY], str):
            norm = gram.diagonal().sqrt()
            error = ((peers[READY]() - gram).abs() / (norm[:, None] * norm)).max().item()
            # mm rounds to bfloat16, or adds millions of squares in float32.
            if not error < 1e-2:
                peers[READY] = f"wrong by {error:.0e}"
    elif not on_a_gpu:
        matrix = torch.zeros(n_tasks, n_tasks, device=device)
        peers = {
            name: reason_or_update(gram, matrix, losses)
            for name, gram in gram_peers(gradients, n_bytes, room, record.full).items()
            if name in (PAIRWISE, CONCATENATED, READY)
        }

    # Products of bfloat16 are added in float32, and a CPU has no faster units for that.
    limits = Limits(device, dtype if on_a_gpu else torch.float32)
    # Measure the limits right after ours, since the speed of a shared machine changes.
    least = record.least_seconds({**ours, **limits.sides(), **peers})
    flops = n_elements * (n_tasks + 1)
    limit = limits.of(least, n_bytes, flops)
    rates = limits.rates(least)
    record.remark(f"{op}, K = {n_tasks}, {model}, {dtype}: limits {limit}; {rates}")
    goals, goal = goals_of(case, device) if op == OP else ({}, None)
    first = backends(device)[0]
    for backend in backends(device):
        theirs = {name: least[name] for name in peers} if backend == first else {}
        if op != OP:
            theirs = {OP: least[f"task_gram, {backend}"], **theirs}
            more = least[backend].median - least[f"task_gram, {backend}"].median
            what = f"{op}, K = {n_tasks}, {model}, {dtype}, {backend}"
            record.remark(f"{what}: {more * 1e6:.1f} µs more than {OP}")
        record.add(
            op,
            n_tasks,
            least[backend],
            theirs if backend == first else {first: least[first], **theirs},
            model=model,
            dtype=dtype,
            backend=backend,
            limit=limit.seconds,
            share=record.share(backend, lambda seconds: limits.of(seconds, n_bytes, flops).seconds),
            share_of_copy=record.share(
                backend, lambda seconds: limits.of(seconds, n_bytes).seconds
            ),
            rates=rates,
            goals=goals,
            limit_goal=goal,
        )


def reason_or_update(gram, matrix, losses):
    """A function that updates an affinity from this peer's Gram matrix, or why it is not run."""
    if isinstance(gram, str):
        return gram
    return lambda: peer.updated_affinity(matrix, gram(), losses, DECAY)
