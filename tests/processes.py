"""Processes for tests, forked from a server that has imported the packages, so they start fast."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "torch._dynamo",  # imported by the first step of an optimizer
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "taskgroup",
        "pytest",
    ]
)
