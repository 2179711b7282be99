"""Two ranks on GPUs train as one process on the host does, and so does one rank with NCCL."""

import pytest
import torch

from taskgroup.loop.ranks import Ranks
from tests.gpu.device import GPU
from tests.gpu.test_loop import no_waiting
from tests.loop.test_ranks import AFFINITIES, assert_alike, train
from tests.ranks import on_ranks

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


def exchange(rank):
    """What ranks exchange in a batch, which a single one leaves out; by NCCL alone on a GPU."""
    ranks = Ranks(None)
    ranks.join()
    ranks.check_alike({name: name for name in "abcde"}, n_tasks=3)
    counts = ranks.count([True, False, True], 1)
    losses = torch.tensor([1.0, 2.0, torch.nan], device=GPU)
    mask = torch.tensor([True, False, False], device=GPU)
    gradients = [[torch.ones(4, device=GPU)], [None]]
    params = [torch.zeros(4, device=GPU, requires_grad=True)]
    with no_waiting():
        mean, votes = ranks.mean(losses, mask, 1)
        ranks.mean_gradients(gradients, params)
    ranks.check_votes(votes.tolist(), ("a",))
    return counts, mean.tolist(), [own[0].tolist() for own in gradients]


def test_the_exchanges_of_ranks():
    backend = "nccl" if GPU == "cuda" else "gloo"
    ((counts, mean, gradients),) = on_ranks(exchange, backend=backend, world=1)
    assert counts == [1, 0, 1]
    assert mean == pytest.approx([1.0, 2.0, torch.nan], nan_ok=True)
    assert gradients == [[1.0] * 4, [0.0] * 4]
