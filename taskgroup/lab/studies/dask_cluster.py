"""Workers of an existing dask cluster, as an executor."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from taskgroup.lab.recipe import Recipe
from taskgroup.lab.studies.probe import check_workers, probe
from taskgroup.lab.words import counted

__all__ = ["dask_cluster"]

T = TypeVar("T")

_TIMEOUT = "30s"  # for the scheduler's answer


@contextmanager
def dask_cluster(
    address: str, recipe: Recipe, say: Callable[[str], None] = print
) -> Iterator[Executor]:
    """Connect to a dask cluster, and check that all of its workers can train a recipe.

    Leaving the block cancels what is not finished, and disconnects; the cluster goes on. If a
    worker is lost, the scheduler sends its runs to other workers.

    Args:
        address: of the scheduler, such as ``"tcp://10.0.0.5:8786"``, or its scheduler file.
        recipe: what will be trained.
        say: gets a sentence about the workers.

    Yields:
        The executor, for :meth:`~taskgroup.lab.studies.comparison.Comparison.run`.

    Raises:
        ImportError: if dask's ``distributed`` is not installed.
        ValueError: if no scheduler answers.
        RuntimeError: if a worker cannot train the recipe, or if the workers differ.
    """
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise ImportError(
            "A dask cluster needs the library distributed; install it with: "
            "pip install 'taskgroup[dask]'"
        ) from None
    by_file = Path(address).is_file()
    try:
        client = distributed.Client(
            address=None if by_file else address,
            scheduler_file=address if by_file else None,
            set_as_default=False,
            timeout=_TIMEOUT,
        )
    except Exception as error:
        raise ValueError(
            f"No dask scheduler answers at {address} ({error}); give the address that `dask "
            "scheduler` prints, such as tcp://10.0.0.5:8786, or its scheduler file."
        ) from None
    with client:
        # Calls are not pure: one that failed is called again when the comparison continues.
        executor = _SentAsBytes(client.get_executor(pure=False))
        if not client.nthreads():
            say(f"Waiting for a worker at {address}; Ctrl-C stops.")
        executor.submit(os.getpid).result()  # a cluster that adapts starts its first worker now
        found = client.run(pickle.loads, _as_bytes(probe, recipe), on_error="return")
        check_workers(recipe, {f"The worker {worker}": had for worker, had in found.items()})
        threads = client.nthreads()
        say(f"Training on {counted(len(threads), 'worker')} at {address}.")
        if any(count > 1 for count in threads.values()):
            say(
                "Some workers have several threads. A process trains one run at a time, so start "
                "workers with --nthreads 1, and more of them with --nworkers."
            )
        yield executor


class _SentAsBytes(Executor):
    """Sends every call as bytes that only the worker unpickles.

    Dask's scheduler unpickles the calls that pass through it. It would have to import taskgroup and
    torch, and a worker that cannot import them would close instead of saying so.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return self._executor.submit(pickle.loads, _as_bytes(function, *args, **kwargs))


class _Call:
    """A call whose unpickling makes it, and gives its result."""

    def __init__(self, function: Callable[..., object], *args: Any) -> None:
        self._reduced = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return self._reduced


def _as_bytes(function: Callable[..., object], *args: Any, **kwargs: Any) -> bytes:
    return pickle.dumps(_Call(partial(function, **kwargs), *args))
