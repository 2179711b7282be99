"""Read batches in worker processes: an endless stream to train on, or the whole data set once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.collate import default_collate

from taskgroup.lab.data.dense_dataset import DenseDataset
from taskgroup.lab.data.files import BadSampleError
from taskgroup.lab.processes import begin_worker
from taskgroup.lab.vision.samples import Samples

__all__ = ["all_batches", "collate", "training_batches"]

Bad = tuple[str, ...]  # sentences on the samples that are left out
Pairs = list[tuple[int, int]]  # (index, seed) of the samples of a batch


def _endless(length: int, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
    """Endless batches, which depend on the seed and the batch number only.

    Every epoch is a new permutation. Samples after its last whole batch are left out, as in the
    published runs. A data set smaller than a batch is repeated within the batch.
    """
    per_epoch = max(1, length // batch_size)
    epoch, within = divmod(start, per_epoch)
    for number in count(epoch):
        rng = np.random.default_rng((seed, number))
        order = rng.permutation(length)
        order = np.resize(order, max(len(order), batch_size))
        seeds = rng.integers(2**63, size=len(order))
        pairs = list(zip(order.tolist(), seeds.tolist(), strict=True))
        for batch in range(within, per_epoch):
            yield pairs[batch * batch_size : (batch + 1) * batch_size]
        within = 0


def training_batches(
    dataset: DenseDataset, batch_size: int, *, seed: int, start: int = 0, workers: int = 0
) -> Iterator[Samples]:
    """An endless stream of training batches.

    With the same seed, batch n is always the same, whatever the number of workers and the start of
    the stream. A run can therefore be resumed exactly.

    Args:
        dataset: the data set; its transform makes samples of one size.
        batch_size: samples per batch; fewer if ``dataset.bad`` is ``"skip"`` and some are bad.
        seed: seed of the order and of the augmentation.
        start: number of the first batch.
        workers: number of processes that read and augment; 0 works in this process.

    Raises:
        BadSampleError: if a sample is bad and ``dataset.bad`` is not ``"skip"``, or if all samples
            of an epoch are bad.
    """
    batches = _load(dataset, _endless(len(dataset), batch_size, seed, start), workers)
    patience = max(1, len(dataset) // batch_size)
    empty = 0
    for batch in batches:
        empty = 0 if batch is not None else empty + 1
        if empty > patience:
            raise BadSampleError(
                f"No sample of {dataset.root}, split {dataset.split}, can be read; see taskgroup "
                f"data check {dataset.root}."
            )
        if batch is not None:
            yield batch


def all_batches(
    dataset: DenseDataset, batch_size: int, *, limit: int | None = None, workers: int = 0
) -> Iterator[Samples]:
    """Read all samples once, in order.

    Args:
        dataset: the data set; its transform makes samples of one size.
        batch_size: samples per batch; the last batch may be smaller.
        limit: read only this many samples, evenly spread over the data set; None reads all.
        workers: number of processes that read; 0 works in this process.

    Raises:
        BadSampleError: if a sample is bad and ``dataset.bad`` is not ``"skip"``.
    """
    n_samples = len(dataset)
    chosen: Sequence[int] = range(n_samples)
    if limit is not None and limit < n_samples:
        chosen = [int(k) for k in np.linspace(0, n_samples - 1, limit).round()]
    # The index serves as the seed, so that a random transform is repeatable too.
    pairs = iter((index, index) for index in chosen)
    batches = iter(lambda: list(islice(pairs, batch_size)), [])
    yield from (batch for batch in _load(dataset, batches, workers) if batch is not None)


def collate(samples: Sequence[Samples | BadSampleError]) -> tuple[Samples | None, Bad]:
    """Stack the good samples to a batch, or None, and collect the messages of the bad ones."""
    good = [sample for sample in samples if not isinstance(sample, BadSampleError)]
    bad = tuple(str(sample) for sample in samples if isinstance(sample, BadSampleError))
    return (default_collate(good) if good else None), bad


def _load(
    dataset: DenseDataset, batches: Iterable[Pairs], workers: int
) -> Iterator[Samples | None]:
    # Workers return the messages of bad samples: an error that is raised in a worker would have the
    # worker's traceback in its message.
    tolerant = copy.copy(dataset)
    tolerant.bad = "skip"
    loader: DataLoader[Samples] = DataLoader(
        tolerant,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_initialized(),  # if the network is on a GPU
        worker_init_fn=begin_worker,
        # With a generator of its own, the global one, which resume restores, is left alone.
        generator=torch.Generator(),
    )
    said: set[str] = set()
    with torch.device("cpu"):  # the iterator draws from that generator, whatever the default device
        loaded = iter(loader)
    for batch, bad in loaded:
        if bad and dataset.bad == "stop":
            raise BadSampleError(bad[0])
        for sentence in bad:
            if sentence not in said:
                said.add(sentence)
                warnings.warn(f"A sample is left out: {sentence}", stacklevel=3)
        yield batch
