"""Endless streams of training batches that can begin anywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from taskgroup.lab.processes import begin_worker

__all__ = ["endless"]


def endless(loader: DataLoader[Any], seed: int, start: int = 0) -> Iterator[Any]:
    """The batches of a loader, epoch after epoch, seeded so that batch n is always the same.

    Batch n depends on the seed and n alone, whatever the number of workers and the start of the
    stream. The order of every epoch is the one that the loader's sampler draws after its random
    state was set, and so are the random choices of the data set and the collate function: those of
    torch, NumPy and Python's ``random``. The random state of the caller does not change.

    Args:
        loader: a loader of a data set whose samples are read by an index. Its sampler, batch size,
            collate function and workers are used.
        seed: seed of the order and of the augmentation.
        start: number of the first batch.

    Raises:
        ValueError: if the loader has no batches, or reads an ``IterableDataset``, which cannot
            begin in the middle.

    Example:
        >>> loader = DataLoader(range(6), batch_size=2, shuffle=True)
        >>> stream = endless(loader, seed=0)
        >>> batches = [next(stream).tolist() for _ in range(5)]
        >>> next(endless(loader, seed=0, start=4)).tolist() == batches[4]
        True
    """
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "The loader reads an IterableDataset, which cannot begin in the middle; define "
            "batches(batch_size, seed, start) in place of loader(batch_size)."
        )
    if len(loader) == 0:
        raise ValueError(
            "The loader has no batches: its data set is empty, or smaller than a batch while "
            "drop_last is True."
        )
    return _stream(loader, seed, start)


def _stream(loader: DataLoader[Any], seed: int, start: int) -> Iterator[Any]:
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": partial(_begin, loader.worker_init_fn),
        }
    reader: DataLoader[Any] = DataLoader(
        _Batches(loader),
        batch_size=None,
        sampler=_Order(loader, seed, start),
        collate_fn=_same,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        # With a generator of its own, the global one, which resume restores, is left alone.
        generator=torch.Generator(),
        **workers,
    )
    with torch.device("cpu"):  # the iterator draws from that generator, whatever the default device
        batches = iter(reader)
    yield from batches


class _Order:
    """The batches of all epochs from one on, as pairs of a seed and what the sampler drew."""

    def __init__(self, loader: DataLoader[Any], seed: int, start: int) -> None:
        self._loader = loader
        self._seed = seed
        self._start = start

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        loader = self._loader
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        number = self._start
        epoch, passed = divmod(number, len(loader))
        while True:
            with _seeded(_mixed(self._seed, epoch, 0)) as mixed, torch.device("cpu"):
                for one in (loader, sampler, loader.sampler):
                    generator = getattr(one, "generator", None)
                    if isinstance(generator, torch.Generator):
                        generator.manual_seed(mixed)
                    if hasattr(one, "set_epoch"):
                        one.set_epoch(epoch)
                drawn = list(sampler)
            if len(drawn) != len(loader):
                raise ValueError(
                    f"The sampler of the loader drew {len(drawn)} batches in an epoch, and its "
                    f"length is {len(loader)}; a stream that begins in the middle needs epochs of "
                    "one length. Define batches(batch_size, seed, start) in place of loader()."
                )
            for indices in drawn[passed:]:
                yield _mixed(self._seed, number, 1), indices
                number += 1
            epoch, passed = epoch + 1, 0


class _Batches(Dataset[Any]):
    """The batches of a loader by ``(seed, indices)``."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._dataset: Any = loader.dataset
        self._collate = loader.collate_fn
        self._whole = loader.batch_sampler is not None

    def __getitem__(self, drawn: tuple[int, Any]) -> Any:
        seed, indices = drawn
        with _seeded(seed):
            if not self._whole:
                return self._collate(self._dataset[indices])
            many = getattr(self._dataset, "__getitems__", None)
            samples = many(indices) if many else [self._dataset[index] for index in indices]
            return self._collate(samples)


def _same(batch: Any) -> Any:
    return batch


def _begin(user: Any, worker: int) -> None:
    """Set up a worker, and then as the user wants it."""
    begin_worker(worker)
    if user is not None:
        user(worker)


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, in 63 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _seeded(seed: int) -> Iterator[int]:
    """Seed the CPU's global generators of torch, NumPy and Python, and restore them afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield seed
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
