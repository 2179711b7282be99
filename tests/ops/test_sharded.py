"""Gradients that are spread over ranks give what the whole ones give."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import taskgroup as tg
from tests.ranks import on_ranks

SHAPES = [(5, 3), (1,), (4, 2), ()]  # 5 rows on 2 ranks are uneven, 1 leaves a rank empty
SPREAD = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()]]


def whole(n_tasks=3):
    """Gradients ``[K][T]``; the last task does not reach the first parameter."""
    generator = torch.Generator().manual_seed(0)
    gradients = [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(n_tasks)
    ]
    gradients[-1][0] = None
    return gradients


def sharded(mesh, plain=()):
    return [
        [
            g if g is None or t in plain else distribute_tensor(g, mesh, SPREAD[t])
            for t, g in enumerate(own)
        ]
        for own in whole()
    ]


def everything(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, plain in (("all", ()), ("mixed", (2,))):
        gradients = sharded(mesh, plain)
        out = [torch.full_like(g, 7) for g in gradients[0]]
        combined = tg.combine(gradients, [1.0, -2.0, 0.5])
        returned = tg.combine(gradients, [1.0, -2.0, 0.5], out=out)
        assert [type(g) for g in combined] == [type(g) for g in gradients[0]]
        assert all(a is b for a, b in zip(returned, out, strict=True))
        losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        matrix, observed = torch.ones(3, 3), torch.zeros(3, 3, dtype=torch.int32)
        found[name] = {
            "gram": tg.task_gram(gradients),
            "combined": [full(g) for g in combined],
            "out": [full(g) for g in out],
            "affinity": tg.gram_affinity_update_(
                matrix, gradients, losses, 0.25, observed=observed
            ),
            "observed": observed,
        }
    # A sum over ranks that is still to be carried out, beside one that is.
    partial = DTensor.from_local(torch.full((2,), float(rank + 1)), mesh, [Partial()])
    settled = distribute_tensor(torch.ones(2), mesh, [Replicate()])
    found["partial"] = tg.task_gram([[partial], [settled]])
    with pytest.raises(ValueError, match="must all be DTensors, or none of them"):
        tg.task_gram([[settled], [torch.ones(2)]])
    return found


def full(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_what_the_whole_gives(world):
    ranks = on_ranks(everything, world, world=world)
    gradients = whole()
    gram = tg.task_gram(gradients)
    combined = tg.combine(gradients, [1.0, -2.0, 0.5])
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    affinity = tg.gram_affinity_update_(torch.ones(3, 3), gradients, losses, 0.25)
    for found in ranks:
        for name in ("all", "mixed"):
            torch.testing.assert_close(found[name]["gram"], gram, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[name]["affinity"], affinity, rtol=1e-6, atol=0)
            assert found[name]["observed"].eq(1).all()
            for key in ("combined", "out"):
                torch.testing.assert_close(found[name][key], combined, rtol=1e-12, atol=0)
        total = sum(range(1, world + 1))
        expected = torch.tensor([[2.0 * total**2, 2.0 * total], [2.0 * total, 2.0]])
        torch.testing.assert_close(found["partial"], expected, rtol=1e-6, atol=0)
        assert torch.equal(found["all"]["gram"], ranks[0]["all"]["gram"])


def tensor_parallel(rank):
    """FSDP over tensor parallelism, and replicas of shards; two by two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    layer = nn.Linear(4, 6, bias=False).double()
    weight = layer.weight.detach().clone()
    parallelize_module(layer, mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))
    fully_shard(layer, mesh=mesh["data"])
    x = torch.arange(8.0, dtype=torch.float64).view(2, 4)
    parameters = list(layer.parameters())
    with pytest.raises(ValueError, match="list the parameters before the forward"):
        tg.task_gradients([layer(x).clone().sum()], layer.parameters())
    layer.zero_grad()
    out = layer(x).clone()
    gradients = tg.task_gradients([out[:, :3].square().sum(), out.sum()], parameters)

    whole_weight = weight.requires_grad_()
    out = x @ whole_weight.t()
    expected = tg.task_gradients([out[:, :3].square().sum(), out.sum()], [whole_weight])
    kinds = {type(p).__name__ for p in gradients[0][0].placements}

    replicas = [
        [distribute_tensor(g, mesh, [Replicate(), Shard(0)]) for g in own] for own in expected
    ]
    return [tg.task_gram(g) for g in (gradients, replicas, expected)], kinds


def test_two_dimensions_of_ranks():
    for (gram, of_replicas, expected), kinds in on_ranks(tensor_parallel, world=4):
        assert "_StridedShard" in kinds  # which does not call itself a shard
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(of_replicas, expected, rtol=1e-12, atol=0)
