"""Comparisons that take seconds, in this process."""

from concurrent.futures import Executor, Future

import pytest

from taskgroup.lab.recipe import read_recipe

# Of the extra [compare]; river needs Python 3.11.
pytest.importorskip("river")
pytest.importorskip("torchjd.aggregation")

SETTINGS = {
    "tasks": "class1,class2,class3",
    "dim": 4,
    "depth": 1,
    "batch_size": 8,
    "batches": 4,
    "warmup": 1,
}


def yeast(**changes):
    return read_recipe("yeast", {**SETTINGS, **changes})


def options(**changes):
    """The same for the command line."""
    settings = {**SETTINGS, **changes}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


class InThisProcess(Executor):
    """Runs at once; what it is made with says how many processes there would be."""

    jobs: int

    def __init__(self, jobs=1, *_):
        type(self).jobs = jobs

    def submit(self, function, /, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
