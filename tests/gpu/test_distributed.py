"""Two ranks on GPUs train as one process on the host does, and so does one rank with NCCL."""

import pytest
import torch

from tests.gpu.device import GPU
from tests.ranks import on_ranks
from tests.test_distributed import AFFINITIES, assert_alike, train

# A backend, the device of each rank, and what wraps the model. NCCL and FSDP want a GPU for each
# rank.
if GPU == "cuda":
    WAYS = [("cpu:gloo,cuda:gloo", [0, 0], "ddp"), ("cpu:gloo,cuda:nccl", [0], "ddp")]
    if torch.cuda.device_count() > 1:
        WAYS += [("cpu:gloo,cuda:nccl", [0, 1], how) for how in ("ddp", "fsdp")]
else:
    WAYS = [("gloo", [0, 1], "ddp"), ("gloo", [0], "ddp")]


def train_on(rank, devices, how, affinity):
    device = GPU
    if GPU == "cuda":
        torch.cuda.set_device(devices[rank])
        device = f"cuda:{devices[rank]}"
    arguments = (affinity, None, torch.float64, 40, "group", None, len(devices))
    return train(rank, how, *arguments, device=device)


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize(("backend", "devices", "how"), WAYS)
def test_ranks_train_as_one_process_on_the_host(backend, devices, how, affinity):
    one = train(0, None, affinity, None, torch.float64, 40)
    world = len(devices)
    for found in on_ranks(train_on, devices, how, affinity, world=world, backend=backend):
        assert_alike(found, one, 1e-9)
