"""Workers of an existing dask cluster, as an executor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taskgroup.lab.recipe import Recipe
from taskgroup.lab.studies.probe import check_workers, probe
from taskgroup.lab.words import counted

__all__ = ["dask_cluster"]

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
        The executor, for :meth:`Comparison.run`.

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
        executor = client.get_executor(pure=False)
        if not client.nthreads():
            say(f"Waiting for a worker at {address}; Ctrl-C stops.")
        executor.submit(probe, recipe).exception()  # a cluster that adapts now starts a worker
        check_workers(
            recipe,
            {
                f"The worker {worker}": found
                for worker, found in client.run(probe, recipe, on_error="return").items()
            },
        )
        threads = client.nthreads()
        say(f"Training on {counted(len(threads), 'worker')} at {address}.")
        if any(count > 1 for count in threads.values()):
            say(
                "Some workers have several threads. A process trains one run at a time, so start "
                "workers with --nthreads 1, and with --nworkers to have more of them."
            )
        yield executor
