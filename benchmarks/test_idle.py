"""Whether the GPU idles while the host decides: the one wait of a batch, in a trace.

The peer is the same group steps written by hand, in a fixed order, with nothing observed.
"""

import gzip
import itertools
import shutil

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import taskgroup as tg
from benchmarks.record import results

TASKS = [f"task{k}" for k in range(11)]
BATCHES = 8
WIDTH, DEPTH, ROWS = 2048, 8, 4096


def make(device):
    torch.manual_seed(0)
    layers = [(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH)]
    encoder = nn.Sequential(*itertools.chain.from_iterable(layers))
    heads = {task: nn.Linear(WIDTH, 16) for task in TASKS}
    model = tg.MultiTaskModel(encoder, heads).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    return model, optimizer, torch.randn(ROWS, WIDTH, device=device)


def losses_of(outputs):
    return {task: out.square().mean() + 1 for task, out in outputs.items()}


def busy(run):
    """Milliseconds of a trace, the part in which no kernel ran, and the longest such gap."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    end, gaps = spans[0][1], []
    for start, stop in spans:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    return trace, (end - spans[0][0]) / 1e3, sum(gaps) / 1e3, max(gaps, default=0) / 1e3


def test_idle(device, capsys, request):
    if device.type != "cuda":
        pytest.skip("with --device cuda")
    model, optimizer, x = make(device)
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=0.1), warmup=1)

    def learned():
        for _ in range(BATCHES):
            for group in groups:
                losses = losses_of(model(x, group=group))
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()

    def by_hand(partition):
        for _ in range(BATCHES):
            for members in partition:
                features = model.encoder(x)
                detached = features.detach()
                outputs = {t: model.heads[t](features) for t in members}
                with torch.no_grad():
                    outputs |= {t: model.heads[t](detached) for t in TASKS if t not in members}
                losses = losses_of(outputs)
                optimizer.zero_grad()
                torch.stack([losses[t] for t in members]).sum().backward()
                optimizer.step()

    learned()
    partition = groups.partition
    by_hand(partition)
    lines = {}
    for name, run in (("by hand", lambda: by_hand(partition)), ("taskgroup", learned)):
        trace, span, idle, longest = busy(run)
        lines[name] = (
            f"{name:>10}: {span:7.1f} ms for {BATCHES} batches of {len(partition)} steps, "
            f"GPU idle {100 * idle / span:.1f}%, longest gap {longest:.2f} ms"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines.values()))
    if request.config.getoption("save"):
        folder = results(device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "idle.txt").write_text("\n".join(lines.values()) + "\n")
        plain = folder / "trace.json"
        trace.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(folder / "trace.json.gz", "wb") as packed:
            shutil.copyfileobj(source, packed)
        plain.unlink()
