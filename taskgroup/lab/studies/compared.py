"""``taskgroup compare`` from Python: one call that returns the numbers."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from taskgroup.lab.importing import forget, name_of
from taskgroup.lab.problem import Problem, make_problem
from taskgroup.lab.recipe import Recipe, read_recipe
from taskgroup.lab.studies import comparison_report
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.presets import JOINT, Variant, preset, variants_by_name
from taskgroup.lab.studies.results import Table
from taskgroup.lab.studies.workers import Listener
from taskgroup.lab.train.trainer import task_names

__all__ = ["Compared", "compare"]


class Compared(Table):
    """What a comparison found: a :class:`~taskgroup.lab.studies.results.Table` and its Markdown.

    ``rows`` has an object per method, and ``records()`` the same numbers as flat dicts. A notebook
    shows the tables.
    """

    def markdown(self) -> str:
        """The tables of ``taskgroup compare`` as Markdown."""
        return comparison_report.markdown(self)

    def _repr_markdown_(self) -> str:
        return self.markdown()


def compare(
    problem: str | Path | Recipe | Problem | type[Problem] | Callable[..., Problem],
    methods: Sequence[str | Variant] | None = None,
    *,
    seeds: int = 5,
    budgets: Iterable[str] = ("batches", "time"),
    rates: Sequence[float] = (),
    batch_sizes: Sequence[int] = (),
    tune: Collection[str] | None = None,
    out: str | Path | None = None,
    executor: Executor | None = None,
    jobs: int | None = None,
    listen: Listener = lambda *_: None,
    **settings: Any,
) -> Compared:
    """Compare methods on a problem over several seeds, as ``taskgroup compare`` does.

    The problem is checked on one batch of every method before the first run. Processes on this
    machine train the runs. They import the problem, so it must be in a module. A problem that is
    defined in a notebook, in the program that was started, or inside of a function is trained in
    this process, one run after another, and a warning says so. A program that calls this function
    does so under ``if __name__ == "__main__":``, because the processes import the program.

    Args:
        problem: a :class:`~taskgroup.lab.problem.Problem`, as a class, an object, a function that
            returns one, or a name such as ``"my_package.my_module:MyProblem"``; a recipe, or the
            name of one.
        methods: names, as of ``taskgroup compare --methods``, or variants with settings of their
            own; joint training (``"gd"``) is always among them. None compares all methods that
            work on the problem.
        seeds: number of runs of each method.
        budgets: what every method gets the same amount of: ``"batches"``; ``"time"``, that of the
            selective run; ``"tuned"``, the same with the best of several learning rates and batch
            sizes.
        rates: the learning rates of ``"tuned"``, besides that of the recipe.
        batch_sizes: the batch sizes of ``"tuned"``, besides that of the recipe; each is tried with
            every rate.
        tune: names of the methods that ``"tuned"`` is for, besides joint training; None tunes all.
        out: a folder that keeps finished runs, so that the next call goes on from them; None keeps
            none.
        executor: where to train instead of in processes on this machine.
        jobs: number of processes; None is one per core, or one per GPU.
        listen: called after every run with the stage, the runs done, the runs in all, the run and
            its result.
        **settings: settings of the recipe that differ from its own, such as ``batches=1000``.

    Returns:
        The table of all methods; ``failed`` lists the errors of runs that failed.

    Raises:
        ValueError: if the problem lacks something, or an argument or setting is wrong.
        RuntimeError: if worker processes died, or if the call is not under
            ``if __name__ == "__main__":``.

    Example:
        >>> table = compare("my_package.my_module:MyProblem", ["selective"])  # doctest: +SKIP
        >>> pandas.DataFrame(table.records())  # doctest: +SKIP
    """
    _check_caller()
    for argument, given in (("methods", methods), ("budgets", budgets), ("tune", tune)):
        if isinstance(given, str):
            raise ValueError(f"{argument} takes a list of names, got {given!r}; write [{given!r}].")
    recipe, importable = _recipe_of(problem, settings)
    with ExitStack() as stack:
        if not importable:
            stack.callback(forget, recipe.data)
            if executor is not None and not isinstance(executor, ThreadPoolExecutor):
                raise ValueError(
                    f"Other processes cannot import {recipe.data}; put the problem in a module, or "
                    "leave executor out to train in this process."
                )
            if executor is None:
                warnings.warn(
                    f"Other processes cannot import {recipe.data}, so its runs are trained in this "
                    "one, one after another. Put the problem in a module to use all cores.",
                    stacklevel=2,
                )
                executor = stack.enter_context(ThreadPoolExecutor(1))
        chosen = _variants(methods, recipe)
        folder = out if out is not None else stack.enter_context(tempfile.TemporaryDirectory())
        comparison = Comparison(
            recipe,
            chosen,
            seeds,
            folder,
            budgets=budgets,
            rates=rates,
            batch_sizes=batch_sizes,
            tune=tune,
            strict=methods is not None,
        )
        table = comparison.run(listen, jobs, executor)
    if table.failed:
        warnings.warn(
            f"{len(table.failed)} runs failed and are missing in the table. The first error: "
            f"{table.failed[0]}",
            stacklevel=2,
        )
    return Compared(**vars(table))


def _recipe_of(problem: Any, settings: dict[str, Any]) -> tuple[Recipe, bool]:
    """The recipe of a problem, and whether other processes can import it."""
    if isinstance(problem, Recipe):
        return problem.replace(**settings), True
    if isinstance(problem, str | Path):
        return read_recipe(problem, settings), True
    name, importable = name_of(problem)
    return read_recipe(name, settings), importable


def _variants(methods: Sequence[str | Variant] | None, recipe: Recipe) -> list[Variant]:
    known = preset("methods", recipe, task_names(recipe, make_problem(recipe)))
    if methods is None:
        return known
    given = [method for method in methods if isinstance(method, Variant)]
    names = [method if isinstance(method, str) else method.name for method in methods]
    by_name = {variant.name: variant for variant in [*known, *given]}
    return variants_by_name([JOINT, *names], list(by_name.values()))


def _check_caller() -> None:
    """Raise in a worker process that imports the program, which would call this once more."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_globals.get("__name__") == "__mp_main__" and frame.f_code.co_name == "<module>":
            raise RuntimeError(
                "compare() starts processes that import this program, which calls compare() again; "
                'put the call under: if __name__ == "__main__":'
            )
