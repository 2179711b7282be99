"""An ordinary loader as an endless stream: whole epochs, and batch n of the seed and n alone."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from taskgroup.lab.streams import endless


class Augmented(Dataset):
    """Samples that draw from all three global generators."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        drawn = [torch.rand(()), np.random.rand(), random.random()]  # noqa: NPY002
        return {"index": torch.tensor(index), "noise": torch.tensor(drawn, dtype=torch.float64)}


class ManyAtOnce(Augmented):
    """As data sets of Hugging Face, it is asked for a batch at a time."""

    def __getitem__(self, index):
        raise AssertionError("asked for one")

    def __getitems__(self, indices):
        return [Augmented.__getitem__(self, index) for index in indices]


def take(loader, n, seed=0, start=0):
    return list(islice(endless(loader, seed, start), n))


def alike(one, other):
    if isinstance(one, dict):
        return all(torch.equal(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def weighted(generator=None):
    sampler = WeightedRandomSampler([1.0] * 5 + [9.0] * 5, 10, generator=generator)
    return DataLoader(Augmented(), batch_size=3, sampler=sampler)


LOADERS = {
    "shuffled": lambda: DataLoader(Augmented(), batch_size=3, shuffle=True),
    "drop_last": lambda: DataLoader(Augmented(), batch_size=3, shuffle=True, drop_last=True),
    "in order": lambda: DataLoader(Augmented(), batch_size=4),
    "weighted": weighted,
    "own generator": lambda: weighted(torch.Generator()),
    "many at once": lambda: DataLoader(ManyAtOnce(), batch_size=3, shuffle=True),
    "unbatched": lambda: DataLoader(Augmented(), batch_size=None, shuffle=True),
    "batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(SequentialSampler(range(10)), 4, False)
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_stream_can_begin_anywhere(kind):
    loader = LOADERS[kind]()
    whole = take(loader, 9)
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    for start in (0, 2, len(loader) - 1, len(loader), 8):
        if start < 9:
            begun = take(LOADERS[kind](), 9 - start, start=start)
            assert all(map(alike, whole[start:], begun))
    assert not all(map(alike, whole, take(loader, 9, seed=1)))


def test_workers_change_nothing():
    """Whatever the number of processes that read, as for a run that is resumed elsewhere."""
    alone = take(DataLoader(Augmented(), batch_size=3, shuffle=True), 6)
    helped = take(DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=2), 6)
    assert all(map(alike, alone, helped))


def test_every_epoch_has_all_samples_in_an_order_of_its_own():
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=4, shuffle=True)
    epochs = [torch.cat([x for (x,) in take(loader, 3, start=3 * n)]) for n in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(12)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_noise_differs_from_batch_to_batch_and_from_epoch_to_epoch():
    noise = torch.cat([batch["noise"] for batch in take(LOADERS["in order"](), 6)])
    assert len(noise.unique()) == noise.numel()


def test_the_random_state_of_the_caller_stays():
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = state()
    take(LOADERS["shuffled"](), 5)
    assert state() == before


class Endless(IterableDataset):
    def __iter__(self):
        yield from range(10)


class Varying(BatchSampler):
    def __len__(self):
        return 5


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (DataLoader(Endless()), "IterableDataset, which cannot begin in the middle; define batch"),
        (
            DataLoader(range(3), batch_size=4, drop_last=True),
            "has no batches: .* drop_last is True",
        ),
        (
            DataLoader(range(9), batch_sampler=Varying(SequentialSampler(range(9)), 4, False)),
            "drew 3 batches in an epoch, and its length is 5",
        ),
    ],
    ids=["iterable", "empty", "varying"],
)
def test_loaders_that_cannot_begin_anywhere(loader, said):
    with pytest.raises(ValueError, match=said):
        take(loader, 1)
