"""The overhead of taskgroup in a batch: the time of the host, and the time that the GPU is idle.

K = 11 tasks in M = 3 groups. The first test uses losses that exist already. It measures everything
that is not model, loss, backward pass or optimizer: dealing out the groups, replaying the random
state, reading, checking and summing the losses, the affinity update, and the clustering. The other
tests train real networks: a small one that is limited by kernel launches, and a ViT, where the GPU
hides the time of taskgroup.
"""

import time
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from sklearn.cluster import AffinityPropagation
from torch import nn
from torch.profiler import ProfilerActivity, profile

import taskgroup as tg
from benchmarks.record import results
from benchmarks.training import Training, learned_groups, planted_affinity, ready_losses
from taskgroup.loop.host_copy import HostCopy

TASKS = [f"task{k}" for k in range(11)]
GOAL = 1 / 0.15
PEER = "scikit-learn, clustering alone"
BY_HAND = "the same steps by hand"
STEP = "the rest of the step, on the host"
# Name; image size, patch size, width, blocks, attention heads; images per batch.
VITS = {"cuda": ("ViT-B", (224, 16, 768, 12, 12), 8), "cpu": ("ViT, tiny", (16, 8, 16, 4, 2), 2)}
BATCHES = {"cuda": 20, "cpu": 3}
TRACED = 4  # batches in the trace; more would make it large


def batch_of(losses):
    """TaskGroups with three learned groups, and a function that runs a batch on ready losses."""
    groups = learned_groups(TASKS, clusters=3)

    def batch():
        for group in groups:
            group.loss(next(losses))

    batch()
    return groups, batch


def test_cost_of_a_batch(record, device):
    batches = {
        kind: batch_of(ready_losses(TASKS, device, stacked=kind == "stacked"))
        for kind in ("dict", "stacked")
    }
    affinity = planted_affinity(len(TASKS), clusters=3)[0].double().numpy()
    similarity = (affinity + affinity.T) / 2  # its diagonal is one already
    peer = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0)
    sides = {kind: batch for kind, (_, batch) in batches.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        least = record.least_seconds({**sides, PEER: lambda: peer.fit(similarity)})
    for kind, (groups, _) in batches.items():
        assert len(groups.partition) == 3
        op = f"batch of 3 groups, {kind} losses"
        record.add(op, len(TASKS), least[kind], {PEER: least[PEER]}, goals={PEER: GOAL})


class ViT(nn.Module):
    """A plain ViT and the mean over its patches: [B, 3, S, S] to [B, width]."""

    def __init__(self, size, patch, width, blocks, heads):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.zeros((size // patch) ** 2, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.blocks(tokens)).mean(1)


def training_of(model, device):
    """Its name, a network with 11 linear heads of torch's own layers, and its groups."""
    torch.manual_seed(0)
    if model == "small":
        name, shape, width = "two linear layers", (64, 64), 64
        encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    else:
        name, settings, n_images = VITS[device.type]
        size, _, width, *_ = settings
        shape, encoder = (n_images, 3, size, size), ViT(*settings)
    network = tg.MultiTaskModel(encoder, {task: nn.Linear(width, 1) for task in TASKS}).to(device)
    training = Training(network, torch.randn(shape, device=device), losses_of, lr=1e-5)
    return name, training, learned_groups(TASKS, clusters=3)


def losses_of(outputs):
    return {task: out.square().mean() + 1 for task, out in outputs.items()}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Waits:
    """The one planned wait of a batch: its seconds, and its name in a trace."""

    name = "taskgroup waits"

    def __init__(self):
        self.seconds = 0.0

    @contextmanager
    def counted(self):
        wait = HostCopy.wait

        def timed(copy):
            start = time.perf_counter()
            with torch.profiler.record_function(self.name):
                found = wait(copy)
            self.seconds += time.perf_counter() - start
            return found

        with mock.patch.object(HostCopy, "wait", timed):
            yield self


@pytest.mark.parametrize("model", ["small", "ViT"])
def test_host_time_of_a_step(record, device, model):
    name, training, groups = training_of(model, device)
    batches = BATCHES[device.type]
    training.batch(groups)
    assert len(groups.partition) == 3
    training.by_hand(groups.partition)
    synchronize(device)
    training.inside, training.steps = 0.0, 0
    with Waits().counted() as waits:
        start = time.perf_counter()
        for _ in range(batches):
            training.batch(groups)
        host = time.perf_counter() - start
        synchronize(device)
        total = time.perf_counter() - start
    inside, step = training.inside / training.steps, total / training.steps
    added = (host - waits.seconds) / training.steps - inside
    start = time.perf_counter()
    for _ in range(batches):
        training.by_hand(groups.partition)
    synchronize(device)
    by_hand = time.perf_counter() - start

    record.add("host time added to a step", len(TASKS), added, {STEP: inside}, model=name)
    peers = {BY_HAND: by_hand / batches}
    record.add("batch", len(TASKS), total / batches, peers, model=name)
    record.remark(
        f"{name}: taskgroup adds {added * 1e6:.0f} µs of host time to a step of "
        f"{step * 1e6:.0f} µs, {100 * added / step:.1f}%; in a batch the host waits for the GPU "
        f"for {waits.seconds / batches * 1e6:.0f} µs"
    )


def spans_of(trace, device):
    """When kernels (on the CPU, operations) ran and when the host waited: [(start, end)], in ns."""
    kind = getattr(torch.autograd.DeviceType, device.type.upper())
    ran, waited = [], []
    # Read the raw events, because trace.events() takes seconds to nest them.
    for event in trace.profiler.kineto_results.events():
        span = event.start_ns(), event.start_ns() + event.duration_ns()
        on_host = event.device_type() == torch.autograd.DeviceType.CPU
        if event.name() == Waits.name and on_host:
            waited.append(span)
        elif event.device_type() == kind and not event.is_user_annotation():
            ran.append(span)
    return sorted(ran), sorted(waited)


def idle(ran, start, end):
    """The time between start and end in which nothing ran."""
    nothing, at = 0.0, start
    for begin, until in ran:
        if begin >= end:
            break
        nothing += max(0.0, begin - at)
        at = max(at, until)
    return nothing + max(0.0, end - at)


def test_idle(record, device, request):
    """The GPU has something to do while the host waits for it."""
    assert idle([(1, 3), (2, 4), (6, 7)], 0, 10) == 1 + 2 + 3
    assert idle([(1, 3), (2, 4), (6, 7)], 2, 5) == 1
    model, training, groups = training_of("ViT", device)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    seconds = {}  # idle seconds per batch
    for name, batch in (
        (BY_HAND, lambda: training.by_hand(groups.partition)),
        ("ours", lambda: training.batch(groups)),
    ):
        batch()
        synchronize(device)
        with Waits().counted(), profile(activities=activities) as trace:
            for _ in range(TRACED):
                batch()
            synchronize(device)
        ran, waited = spans_of(trace, device)
        begin, end = ran[0][0], max(until for _, until in ran)
        seconds[name] = idle(ran, begin, end) * 1e-9 / TRACED
    waits = sum(until - start for start, until in waited) * 1e-9 / TRACED
    idle_there = sum(idle(ran, start, until) for start, until in waited) * 1e-9 / TRACED
    if device.type != "cuda":  # nothing runs beside the host
        assert not waited
        return
    assert len(waited) >= TRACED  # some waits find a copy that has arrived already
    # A nanosecond stands for zero.
    for op, ours, peer, theirs in (
        ("idle in a batch", seconds["ours"], BY_HAND, seconds[BY_HAND]),
        ("idle while the host waits", idle_there, "the wait in a batch", waits),
    ):
        record.add(op, len(TASKS), max(ours, 1e-9), {peer: max(theirs, 1e-9)}, model=model)
    record.remark(
        f"{model}, under the profiler: in a batch of "
        f"{(end - begin) * 1e-3 / TRACED:.0f} µs the GPU is idle for "
        f"{seconds['ours'] * 1e6:.0f} µs; the host waits for {waits * 1e6:.0f} µs, in which the "
        f"GPU is idle for {idle_there * 1e6:.0f} µs"
    )
    if request.config.getoption("save"):
        folder = results(device)
        folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(folder / "trace.json.gz"))  # ui.perfetto.dev shows it
