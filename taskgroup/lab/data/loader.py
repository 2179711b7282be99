"""Batches of a data set, in worker processes: an endless stream to train on, or all of it once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils.collate import default_collate

from taskgroup.lab.data.dense_dataset import DenseDataset
from taskgroup.lab.data.files import BadSampleError
from taskgroup.lab.data.processes import begin_worker
from taskgroup.lab.data.samples import Samples

__all__ = ["all_batches", "collate", "training_batches"]

Bad = tuple[str, ...]  # what was wrong with samples that are left out


class _Endless(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed): a pure function of the seed and of the number of the batch.

    Every epoch is a permutation of its own; what is left of it after the last whole batch is left
    out, as in the published runs. A data set smaller than a batch is repeated within it.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int) -> None:
        self._length, self._batch_size = length, batch_size
        self._seed, self._start = seed, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = max(1, self._length // self._batch_size)
        epoch, within = divmod(self._start, per_epoch)
        for number in count(epoch):
            rng = np.random.default_rng((self._seed, number))
            order = rng.permutation(self._length)
            order = np.resize(order, max(len(order), self._batch_size))
            seeds = rng.integers(2**63, size=len(order))
            pairs = list(zip(order.tolist(), seeds.tolist(), strict=True))
            for batch in range(within, per_epoch):
                yield pairs[batch * self._batch_size : (batch + 1) * self._batch_size]
            within = 0


def training_batches(
    dataset: DenseDataset, batch_size: int, *, seed: int, start: int = 0, workers: int = 0
) -> Iterator[Samples]:
    """An endless stream of training batches.

    Batch n is the same for one seed, however many workers there are and from wherever the stream
    starts: which is all that a resumed run needs.

    Args:
        dataset: whose transform makes samples of one size.
        batch_size: samples per batch; fewer where ``dataset.bad`` is ``"skip"`` and some are bad.
        seed: of the order and the augmentation.
        start: number of the first batch.
        workers: processes that read and augment; 0 is this one.

    Raises:
        BadSampleError: for a bad sample, if those are not to be skipped; and if a whole epoch has
            no good one.
    """
    sampler = _Endless(len(dataset), batch_size, seed, start)
    batches = _load(dataset, sampler, workers)
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
    """All samples once, in order.

    Args:
        dataset: whose transform makes samples of one size.
        batch_size: samples per batch, fewer in the last one.
        limit: this many samples alone, evenly spread over the data set; None is all.
        workers: processes that read; 0 is this one.

    Raises:
        BadSampleError: for a bad sample, if those are not to be skipped.
    """
    n_samples = len(dataset)
    chosen: Sequence[int] = range(n_samples)
    if limit is not None and limit < n_samples:
        chosen = [int(k) for k in np.linspace(0, n_samples - 1, limit).round()]
    # The seed is of no use to a transform that draws nothing; it makes one that does repeatable.
    pairs = iter((index, index) for index in chosen)
    batches = list(iter(lambda: list(islice(pairs, batch_size)), []))
    yield from (batch for batch in _load(dataset, batches, workers) if batch is not None)


def collate(samples: Sequence[Samples | BadSampleError]) -> tuple[Samples | None, Bad]:
    """Samples as a batch, None of none; and what the bad ones among them say."""
    good = [sample for sample in samples if not isinstance(sample, BadSampleError)]
    bad = tuple(str(sample) for sample in samples if isinstance(sample, BadSampleError))
    return (default_collate(good) if good else None), bad


def _load(
    dataset: DenseDataset,
    batches: Sampler[list[tuple[int, int]]] | list[list[tuple[int, int]]],
    workers: int,
) -> Iterator[Samples | None]:
    # Bad samples come back as what they say: raised in a worker, an error would bring along the
    # worker's traceback in its words.
    tolerant = copy.copy(dataset)
    tolerant.bad = "skip"
    loader: DataLoader[Samples] = DataLoader(
        tolerant,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_initialized(),  # by the network that is trained
        worker_init_fn=begin_worker,
        # A generator of its own: the global one, which resume keeps, is left alone.
        generator=torch.Generator(),
    )
    said: set[str] = set()
    with torch.device("cpu"):  # whatever the default: the iterator draws from that generator
        loaded = iter(loader)
    for batch, bad in loaded:
        if bad and dataset.bad == "stop":
            raise BadSampleError(bad[0])
        for sentence in bad:
            if sentence not in said:
                said.add(sentence)
                warnings.warn(f"A sample is left out: {sentence}", stacklevel=3)
        yield batch
