"""The overhead of a batch besides model, loss, backward pass and optimizer, for 5 to 1000 tasks.

The losses exist already, as ``{task: scalar}``, and the groups are learned from about K / 4 planted
clusters. Our side is everything that :class:`taskgroup.TaskGroups` does in a batch. The peer is the
tracking and the clustering of the published code on the same losses, without its logging and its
loop. Memory is the peak of the process in that batch, minus its memory before it made the groups.
"""

import ctypes
import multiprocessing
import re
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from benchmarks.training import learned_groups, planted_affinity, published_tracking, ready_losses

SIZES = [5, 11, 26, 50, 100, 200, 1000]
MOST_FOR_PEER = 200  # unless --full
PEER = "published tracking and clustering"


@pytest.mark.parametrize("n_tasks", SIZES)
def test_scaling(record, device, n_tasks):
    tasks = [f"task{k}" for k in range(n_tasks)]
    _, labels = planted_affinity(n_tasks)
    groups = learned_groups(tasks)
    our_losses = ready_losses(tasks, device)

    def ours():
        for group in groups:
            group.loss(next(our_losses))

    peer = published_tracking(tasks)
    their_losses = ready_losses(tasks, device)

    def published():
        peer.init_pre_loss()
        peer.next_groups()
        for name in peer.order():
            peer.update(name, next(their_losses))

    ours()
    theirs = published if n_tasks <= MOST_FOR_PEER or record.full else "with --full"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published code warns
        least = record.least_seconds({"ours": ours, PEER: theirs})
    planted = {
        tuple(task for task, own in zip(tasks, labels, strict=True) if own == label)
        for label in set(labels.tolist())
    }
    assert set(groups.partition) == planted
    record.add("a batch, all groups", n_tasks, least["ours"], {PEER: least[PEER]})


def resident(what):
    """The memory of this process in bytes: ``"VmRSS"`` is the current, ``"VmHWM"`` the peak."""
    kilobytes = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes[1]) * 1024


def peak_of_a_batch(n_tasks):
    """The peak memory of a batch in bytes, measured in a new process."""
    tasks = [f"task{k}" for k in range(n_tasks)]
    losses = ready_losses(tasks, torch.device("cpu"))
    planted_affinity(n_tasks)
    before = resident("VmRSS")
    groups = learned_groups(tasks)
    # Loading the affinity copies it: give that memory back, and reset the peak.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        for group in groups:
            group.loss(next(losses))
    return resident("VmHWM") - before


def test_memory(record):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, whose /proc tells the peak memory of a process")
    floats = []
    for n_tasks in (1000, 2000):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_of_a_batch, (n_tasks,))
        floats.append(peak / 4 / n_tasks**2)
        record.remark(
            f"Memory with {n_tasks} tasks: {peak / 1e6:.0f} MB at the peak of a batch, "
            f"{floats[-1]:.0f} K^2 floats."
        )
    assert floats[1] < 1.25 * floats[0] < 25
