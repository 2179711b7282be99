"""Gram matrices of gradients, side by side with what one would otherwise write."""

import pytest
import torch

from benchmarks import gradient_peers as peer
from benchmarks.limits import Limits
from benchmarks.shapes import parameter_count, random_gradients
from taskgroup import ops

PAIRWISE = "(a * b).sum() for all pairs"
CONCATENATED = "stack(cat), then mm"
READY = "mm on a ready matrix"
MOST_PAIRWISE = 16  # tasks, unless --full
DECAY = 1e-3


def goals_of(case, device):
    """Times as fast as a peer, and the share of the limit."""
    model, n_tasks, _ = case
    if device.type == "cuda":  # of an H200
        if n_tasks <= 16 and parameter_count(model) >= 50e6:
            return {}, 0.85
        return {}, 0.6 if n_tasks == 64 else None
    if case == ("ViT-T", 11, torch.float32):
        return {CONCATENATED: 10, READY: 6}, 0.6
    if case == ("ViT-T", 64, torch.float32):
        return {READY: 1.5}, None
    return {}, None


def gram_peers(gradients, n_bytes, room, full):
    """Functions that make the Gram matrix, or why they are not run."""
    n_tasks = len(gradients)
    rows = peer.ready_rows(gradients)
    grams = {PAIRWISE: "with --full", CONCATENATED: "no room", READY: lambda: peer.row_gram(rows)}
    if n_tasks <= MOST_PAIRWISE or full:
        grams[PAIRWISE] = lambda: peer.pairwise_gram(gradients)
    if 4 * n_bytes <= room:
        grams[CONCATENATED] = lambda: peer.row_gram(peer.concatenated(gradients))
    weights = torch.ones(n_tasks, device=gradients[0][0].device)
    return {**grams, **peer.torchjd_sides(gradients, weights, combines=False, room=room)}


@pytest.mark.parametrize("op", ["task_gram", "gram_affinity_update_"])
def test_task_gram(record, device, case, op):
    model, n_tasks, dtype = case
    if op != "task_gram" and not record.full and case[1:] != (11, torch.float32):
        pytest.skip("with --full")
    n_elements = n_tasks * parameter_count(model)
    n_bytes = n_elements * dtype.itemsize
    room = record.room()
    if 2 * n_bytes > room:
        pytest.skip(f"needs {2 * n_bytes / 1e9:.0f} GB")
    gradients = random_gradients(model, n_tasks, dtype, device)
    grams = gram_peers(gradients, n_bytes, room, record.full)

    expected = grams[READY]().float()
    norm = expected.diagonal().sqrt()
    error = (ops.task_gram(gradients) - expected).abs() / (norm[:, None] * norm)
    assert error.max() < 1e-2  # mm rounds to bfloat16, or sums millions of squares in float32

    if op == "task_gram":
        peers, ours = grams, lambda: ops.task_gram(gradients)
    else:
        losses = torch.linspace(0.5, 1.5, n_tasks, device=device)
        matrix, theirs = (torch.zeros(n_tasks, n_tasks, device=device) for _ in range(2))
        peers = {
            name: reason_or_update(gram, theirs, losses)
            for name, gram in grams.items()
            if name in (PAIRWISE, CONCATENATED, READY)
        }

        def ours():
            return ops.gram_affinity_update_(matrix, gradients, losses, DECAY)

        scale = float((expected.abs() / losses).max()) * DECAY
        assert ((ours() - peers[READY]()).abs() / scale).max() < 1e-2

    # Products of bfloat16 are summed in float32, for which a CPU has no faster units.
    limits = Limits(device, dtype if device.type == "cuda" else torch.float32)
    # The limits right after ours: a shared machine is faster at some times than at others.
    least = record.least_seconds({"ours": ours, **limits.sides(), **peers})
    flops = n_elements * (n_tasks + 1)
    limit = limits.of(least, n_bytes, flops)
    record.remark(f"{op}, K = {n_tasks}, {model}, {dtype}: limits {limit}")
    goals, share = goals_of(case, device) if op == "task_gram" else ({}, None)
    record.add(
        op,
        n_tasks,
        least["ours"],
        {name: least[name] for name in peers},
        model=model,
        dtype=dtype,
        limit=limit.seconds,
        share=record.share("ours", lambda seconds: limits.of(seconds, n_bytes, flops).seconds),
        goals=goals,
        limit_goal=share,
    )


def reason_or_update(gram, matrix, losses):
    """The update of an affinity by a Gram matrix made in this way; or why it is not run."""
    if isinstance(gram, str):
        return gram
    return lambda: peer.updated_affinity(matrix, gram(), losses, DECAY)
