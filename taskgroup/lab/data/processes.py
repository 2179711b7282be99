"""What the worker processes of a DataLoader have in common."""

from __future__ import annotations

import signal

import torch

__all__ = ["begin_worker"]


def begin_worker(worker: int) -> None:
    """In every worker: one thread, as there are many; and signals are the parent's business.

    Ctrl-C, and a scheduler's SIGTERM, go to all processes. The run ends its workers when it has
    saved; and a worker whose parent is gone ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
