"""What a data set offers to a training run, and the one that a recipe names."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from taskgroup.lab.importing import check_unchanged, find
from taskgroup.lab.recipe import PROBLEMS, ProblemSettings, Recipe
from taskgroup.lab.streams import endless
from taskgroup.lab.user_code import in_words
from taskgroup.lab.words import kind_of, listed

__all__ = ["Batch", "Problem", "make_problem", "measure"]

#: A batch of a data set: a tuple, list or dict of tensors. Only the data set knows which.
Batch: TypeAlias = Any


class Problem:
    """A data set with its tasks, network, losses and metrics. Derive from it.

    A problem sets ``tasks`` and ``better``, and defines :meth:`model`, :meth:`losses`,
    :meth:`evaluate`, and either :meth:`loader` or :meth:`batches`. Everything else has a default.
    It is made with the settings of data and network, ``MyProblem(settings)``; a class whose
    ``__init__`` takes no argument is made without. The runs of a process share an object if these
    settings are equal, so that the data are in memory once; its methods must not change it.

    Attributes:
        tasks: the names of the tasks, or ``{name: name as shown}``.
        better: ``"lower"`` or ``"higher"`` metrics are better; ``{task: word}`` if that differs
            from task to task.
        metrics: the name of the metric, as shown; ``{task: name}`` if that differs.
        splits: what :meth:`evaluate` is called with: ``"held_out"``, the default; also ``"train"``
            (fixed training data) and ``"validation"``, if the problem has them.
        score: a function from ``{task: loss}`` to ``{task: score}`` in (0, 1), higher is better,
            which the method DTP needs; None, the default, if the losses give no such score.
        published: ``{method: Δm in percent}`` of publications, to be shown beside the comparison at
            equal batches. The methods are named as in ``taskgroup compare --methods``, joint
            training ``"gd"``. The numbers are as most papers print them: **positive is worse**. The
            tables turn the sign, because positive is better in them.
        published_note: a sentence that says where the published numbers are from, and what differs.
    """

    tasks: Sequence[str] | Mapping[str, str] = ()
    better: str | Mapping[str, str] = ""
    metrics: str | Mapping[str, str] = "metric"
    splits: Sequence[str] = ("held_out",)
    score: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None
    published: Mapping[str, float] = MappingProxyType({})
    published_note: str = ""

    def __init__(self, settings: ProblemSettings) -> None:
        """Take the settings of the run; the default ignores them."""

    def model(self, tasks: Sequence[str]) -> nn.Module:
        """A new network, initialised by torch's global generator.

        It returns ``{task: output}``. Its layers that belong to one task are in ``model.heads``,
        ``{task: module}``, as those of :class:`taskgroup.MultiTaskModel` are; all other parameters
        are shared. A ``forward`` with an argument ``group`` gets the group of the step.

        Args:
            tasks: those that it is trained on, in the order of the data set. Outputs and heads of
                further tasks are left aside.
        """
        raise NotImplementedError

    def heads(self, model: nn.Module) -> Mapping[str, nn.Module | Sequence[nn.Parameter]]:
        """``{task: module or parameters}`` of each task alone; the default is ``model.heads``."""
        heads = getattr(model, "heads", None)
        if not isinstance(heads, Mapping | nn.ModuleDict):
            raise ValueError(
                f"model() of {_name(self)} returns a {type(model).__name__} without an attribute "
                "'heads', {task: module}. Return taskgroup.MultiTaskModel(encoder, heads), keep "
                "the layers of each task in self.heads = nn.ModuleDict(...) of the model, or "
                "define heads(model) in the problem; all other parameters are shared."
            )
        return dict(heads.items())

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """The training data as an ordinary loader, of which the default :meth:`batches` is made.

        Shuffling, samplers, workers and random augmentation of the loader are kept. They are
        seeded, so that a run can be resumed exactly; see :func:`~taskgroup.lab.streams.endless`.
        """
        raise NotImplementedError

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """An endless stream of training batches that begins with batch ``start``.

        Batch n depends on the seed and n alone. Its tensors are on the CPU. The default is the
        loader, epoch after epoch.
        """
        loader = self.loader(batch_size)
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"loader() of {_name(self)} must return a torch.utils.data.DataLoader, got "
                f"{kind_of(loader)}."
            )
        return endless(loader, seed, start)

    def inputs(self, batch: Batch) -> Any:
        """The part of a batch that the model is called with.

        A tensor is passed as ``model(x)``, a tuple or list as ``model(*x)``, and a dict as
        ``model(**x)``. The default is ``batch[0]``. Of a dict it is all entries but ``"labels"``
        and those that are named as a task.
        """
        if not isinstance(batch, Mapping):
            return batch[0]
        left_out = {"labels", *self.titles}
        return {key: value for key, value in batch.items() if key not in left_out}

    def losses(self, outputs: Mapping[str, Any], batch: Batch) -> dict[str, Tensor]:
        """``{task: scalar loss}`` for the tasks of the outputs, which may be some of all tasks."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: str) -> Mapping[str, float]:
        """``{task: metric}`` over all of a split, for the tasks that the model is trained on.

        The model is in evaluation mode, and no graph is recorded. The data must be sent to the
        model's device.
        """
        raise NotImplementedError

    def evaluate_quickly(self, model: nn.Module, split: str) -> Mapping[str, float]:
        """The same during training; may leave out tasks whose metric is slow."""
        return self.evaluate(model, split)

    def draw(self, model: nn.Module, folder: Path) -> None:
        """Write pictures of what the model predicts; the default writes none."""

    def keep(self, model: nn.Module, folder: Path) -> None:
        """Write what is needed, besides the settings, to build the network again."""

    def predict(self, model: nn.Module, image: Path, out: Path) -> None:
        """Write a picture of what the model predicts for an image file.

        Raises:
            ValueError: by default, because not all data are images.
        """
        raise ValueError(
            f"taskgroup predict draws what a network predicts for an image, and {_name(self)} does "
            "not define predict(model, image, out)."
        )

    @property
    def titles(self) -> dict[str, str]:
        """``{task: name as shown}`` for all tasks, in their order."""
        return dict(self.tasks) if isinstance(self.tasks, Mapping) else {t: t for t in self.tasks}

    @property
    def lower_is_better(self) -> dict[str, bool]:
        """``{task: whether a smaller metric is better}``."""
        return {task: word == "lower" for task, word in self._by_task(self.better).items()}

    @property
    def metric_names(self) -> dict[str, str]:
        """``{task: name of its metric}``."""
        return {**dict.fromkeys(self.titles, "metric"), **self._by_task(self.metrics)}

    def _by_task(self, words: str | Mapping[str, str]) -> dict[str, str]:
        return dict.fromkeys(self.titles, words) if isinstance(words, str) else dict(words)


#: What a problem must have, and what to say of it where it is missing.
_REQUIRED = {
    "tasks": "tasks, the names of its tasks",
    "better": "better, 'lower' or 'higher', or {task: 'lower' or 'higher'}",
    "model": "model(tasks), which returns a network that returns {task: output}",
    "losses": "losses(outputs, batch), which returns {task: scalar loss}",
    "evaluate": "evaluate(model, split), which returns {task: metric}",
    "loader": "loader(batch_size), which returns a DataLoader of training data (or batches())",
}


def make_problem(recipe: Recipe) -> Problem:
    """The data set that a recipe names, with the recipe's settings.

    Raises:
        ValueError: if a problem of the user's own is not found, or lacks something; the sentence
            says what, and what it must return.
        ImportError: if a library that it needs is missing; the sentence says what to install.
    """
    if recipe.data in PROBLEMS:
        # Imported when it is asked for: each data set needs libraries of its own.
        problem: Problem = pkgutil.resolve_name(f"taskgroup.lab.data.{PROBLEMS[recipe.data]}")(
            recipe
        )
        return problem
    return in_words(f"{recipe.data} cannot be set up", lambda: _own_problem(recipe))


def _own_problem(recipe: Recipe) -> Problem:
    """The problem of the user's own that a recipe names."""
    name = recipe.data
    found = find(name)
    check_unchanged(name)
    if isinstance(found, type) and not issubclass(found, Problem):
        raise ValueError(f"{name} must derive from taskgroup.lab.Problem: class X(lab.Problem).")
    made = found
    if not isinstance(found, Problem):
        if not callable(found):
            raise ValueError(
                f"{name} must be a class that derives from taskgroup.lab.Problem, an object of "
                f"one, or a function that returns one; it is {kind_of(found)}."
            )
        if isinstance(found, type):
            _check_whole(found, name)
        # model() is told which tasks are trained, so that runs on some of them share the data too.
        own = {field: getattr(recipe, field) for field in ProblemSettings.model_fields}
        made = _call(found, ProblemSettings(**{**own, "tasks": None}), name)
    if not isinstance(made, Problem):
        raise ValueError(
            f"{name} must return an object of a class that derives from taskgroup.lab.Problem; "
            f"it returned {kind_of(made)}."
        )
    _check_whole(made, name)
    _check_words(made, name)
    return made


def measure(
    problem: Problem, model: nn.Module, tasks: Sequence[str], split: str, quick: bool = False
) -> dict[str, float]:
    """``{task: metric}`` of a model on a split, for some tasks; ``quick`` may leave out slow ones.

    The problem sees the model in evaluation mode and without a graph. Afterwards the modes of its
    modules and torch's random state are as before.

    Raises:
        ValueError: if the problem returns anything but one number for each task.
    """
    modes = [(module, module.training) for module in model.modules()]
    gpus = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(list(gpus)):
            evaluate = problem.evaluate_quickly if quick else problem.evaluate
            found = evaluate(model, split)
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(found, Mapping):
        raise ValueError(
            f"evaluate() of {_name(problem)} must return {{task: metric}}, got {kind_of(found)}."
        )
    if unknown := [task for task in found if task not in problem.titles]:
        raise ValueError(
            f"evaluate() of {_name(problem)} names {listed(unknown)}; its tasks are "
            f"{listed(problem.titles)}."
        )
    return {task: _number(found[task], task, problem) for task in tasks if task in found}


def _number(value: Any, task: str, problem: Problem) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"evaluate() of {_name(problem)} must return one number for each task, got "
            f"{kind_of(value)} for {task!r}."
        ) from None


@lru_cache(maxsize=2)
def _call(found: Callable[..., Any], settings: ProblemSettings, name: str) -> Any:
    """Call a class or function with the settings, or with nothing if it takes nothing."""
    signature = inspect.signature(found)
    for arguments in ((settings,), ()):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return found(*arguments)
    raise ValueError(f"{name}{signature} must take one argument, the settings of the run, or none.")


def _check_whole(problem: Problem | type[Problem], name: str) -> None:
    """Raise if the problem lacks what has no default.

    A class may set attributes when it is made, so of a class only the methods are looked at.
    """
    own = problem if isinstance(problem, type) else type(problem)
    lacking = []
    for attribute, words in _REQUIRED.items():
        if attribute in ("tasks", "better"):
            missing = not isinstance(problem, type) and not getattr(problem, attribute)
        else:
            names = ("loader", "batches") if attribute == "loader" else (attribute,)
            missing = all(getattr(own, n) is getattr(Problem, n) for n in names)
        if missing:
            lacking.append(words)
    if lacking:
        raise ValueError(f"{name} lacks {'; '.join(lacking)}.")


def _check_words(problem: Problem, name: str) -> None:
    """Raise if names of tasks, directions or splits are wrong."""
    if isinstance(problem.tasks, str) or not all(
        isinstance(task, str) and task for task in problem.tasks
    ):
        raise ValueError(
            f"tasks of {name} must be names, such as ['depth', 'edges'], or {{name: name as "
            f"shown}}; got {problem.tasks!r}."
        )
    tasks = list(problem.tasks)
    if twice := {task for task in tasks if tasks.count(task) > 1}:
        raise ValueError(f"tasks of {name} has {listed(sorted(twice))} more than once.")
    if unfit := [task for task in tasks if set(task) & set("/\\,")]:
        raise ValueError(
            f"{name} has the tasks {listed(unfit)}; names of tasks are parts of file names and of "
            "lists, so they cannot hold a slash or a comma."
        )
    for attribute in ("better", "metrics"):
        words = getattr(problem, attribute)
        if not isinstance(words, str | Mapping):
            raise ValueError(
                f"{attribute} of {name} must be a word or {{task: word}}, got {kind_of(words)}."
            )
        if not isinstance(words, str) and (unknown := [t for t in words if t not in tasks]):
            raise ValueError(
                f"{attribute} of {name} names {listed(unknown)}; its tasks are {listed(tasks)}."
            )
    if lacking := [task for task in tasks if task not in problem.lower_is_better]:
        raise ValueError(
            f"better of {name} lacks {listed(lacking)}; say 'lower' or 'higher' for every task."
        )
    words = problem.better
    for task, word in (dict.fromkeys(tasks, words) if isinstance(words, str) else words).items():
        if word not in ("lower", "higher"):
            raise ValueError(
                f"better of {name} must be 'lower' or 'higher', got {word!r} for task {task!r}."
            )
    if not isinstance(problem.published, Mapping) or not all(
        isinstance(value, int | float) and math.isfinite(value)
        for value in problem.published.values()
    ):
        raise ValueError(
            f"published of {name} must be {{method: Δm in percent}}, such as {{'gd': 3.5}}; got "
            f"{problem.published!r}."
        )
    if isinstance(problem.splits, str) or "held_out" not in problem.splits:
        raise ValueError(
            f"splits of {name} must hold 'held_out', as in ('train', 'held_out'); got "
            f"{problem.splits!r}."
        )


def _name(problem: Problem) -> str:
    return type(problem).__name__
