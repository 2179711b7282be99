"""Processes for tests: forks of one that has imported what they need, so that they start soon."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "torch._dynamo",  # of every first step of an optimizer
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "taskgroup",
        "pytest",
    ]
)
