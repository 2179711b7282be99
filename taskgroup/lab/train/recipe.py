"""The settings of a training run: a flat dataclass, read from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

import taskgroup as tg
from taskgroup.lab.train.problem import IN_MEMORY, Problem, data_names, where

__all__ = ["CHANGEABLE", "Recipe", "parse_changes", "read_recipe", "recipe_names"]

#: Settings that decide where and how a run goes on, and not what comes of it.
CHANGEABLE = (
    *("root", "bad", "workers", "device"),
    *("checkpoint_every", "evaluate_every", "conflicts_every", "baseline"),
)

# By name, and with a number behind a colon: the number of groups.
GROUPINGS: dict[str, Callable[[], tg.Grouping]] = {
    "heterogeneous": tg.Heterogeneous,
    "singletons": tg.Singletons,
    "together": tg.Together,
    "graph-coloring": tg.GraphColoring,
}
COUNTED: dict[str, Callable[[int], tg.Grouping]] = {
    "exhaustive": tg.Exhaustive,
    "kmeans": tg.KMeans,
    "spectral": tg.Spectral,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides how a run goes.

    Attributes:
        data: the data set: ``"motorcycle"`` (the embedded photograph), ``"yeast"``, or one read
            from ``root``: ``"nyud-v2"``, ``"pascal-context"``, ``"taskonomy"``.
        root: folder of a data set that is read from disk.
        subset: of Taskonomy's buildings: ``"tiny"``, ``"medium"`` or ``"fullplus"``.
        tasks: those to train, in the order of the data set; None is all.
        size: height and width of what the network sees, pixels: one number, or ``"HxW"``.
        batch_size: samples per batch.
        bad: what to do about a sample whose file is missing or broken: ``"stop"``, or ``"skip"`` it
            with a warning.
        workers: processes that read the data, one per core at most; 0 reads between the steps.
        backbone: of an image network: ``"tiny"`` is a random ViT of the five settings that follow;
            ``"vit-t"``, ``"vit-s"``, ``"vit-b"``, ``"vit-l"``; or what
            :func:`taskgroup.lab.vision.backbones.backbone` takes besides.
        patch: side of a ViT patch, pixels.
        dim: width of the network.
        depth: blocks of the ViT, a multiple of 4, or layers of the MLP.
        attention_heads: attention heads of a block.
        dropout: probability of dropout in the network.
        weights: of a backbone other than ``"tiny"``: None takes its pretrained ones from the hub;
            ``"random"``; or a folder.
        decoder: of every task: ``"linear"``, a 1x1 convolution, or ``"conv"``: 3x3, BatchNorm and
            ReLU before it.
        drop_path: probability of stochastic depth in the last block of such a backbone.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU where there is one.
        precision: of the network's forward: ``"float32"``, or ``"bfloat16"`` under autocast.
        batches: length of the run.
        lr: learning rate of the encoder, at the start; and of what a method learns besides.
        head_lr: learning rate of the heads, at the start; None is that of the encoder.
        head_lr_times: what the learning rate of the heads is multiplied with: ``"1"``, or
            ``"sqrt(M)"``, ``"M"`` with today's number of groups, or ``"K"``.
        weight_decay: of Adam.
        poly_power: the learning rate falls as ``(1 - batch / batches) ** poly_power``.
        method: ``"selective"``; ``"joint"``: all tasks in one step; or one of
            :data:`taskgroup.methods.METHODS`.
        grouping: how selective updates group: ``"affinity-propagation"``, ``"heterogeneous"``,
            ``"singletons"``, ``"together"``, ``"graph-coloring"``, or with a number of groups M
            ``"random:M"``, ``"kmeans:M"``, ``"spectral:M"``, ``"exhaustive:M"``.
        affinity: what the groups are learned from: ``"proximal"`` or ``"gradient"``.
        preference: of affinity propagation; None is the median.
        credit: to which group a change of loss is credited: ``"step"``, the one whose step caused
            it, or ``"published"``, the one about to be stepped on, as the published code does.
        outside: what a step does to the heads of other groups: ``"hold"`` or ``"coast"``.
        decay: of the affinity.
        warmup: see :class:`taskgroup.TaskGroups`, as for the three that follow.
        regroup_every: rounds between regroupings.
        groups_per_batch: groups dealt to a batch; None is all.
        observe_every: batches between observations.
        seed: of the weights, the crops and the order of groups.
        checkpoint_every: batches between checkpoints.
        evaluate_every: batches between evaluations on held-out data, without edges, whose metric
            takes long; None evaluates at the end alone.
        conflicts_every: batches between measurements of the cosines of the tasks' gradients, which
            the report shows: a forward and a backward pass per task each, that change nothing; None
            measures none.
        baseline: what Δm is computed against: a finished run, or a YAML file of ``task: metric``;
            None for no Δm.

    Raises:
        ValueError: for a value of the wrong type or outside its range.
    """

    data: str = "motorcycle"
    root: str | None = None
    subset: Literal["tiny", "medium", "fullplus"] = "tiny"
    tasks: tuple[str, ...] | None = None
    size: tuple[int, int] = (64, 64)
    batch_size: int = 8
    bad: Literal["stop", "skip"] = "stop"
    workers: int = 0
    backbone: str = "tiny"
    patch: int = 8
    dim: int = 96
    depth: int = 4
    attention_heads: int = 4
    dropout: float = 0.0
    weights: str | None = None
    decoder: Literal["linear", "conv"] = "linear"
    drop_path: float = 0.0
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    batches: int = 300
    lr: float = 1e-3
    head_lr: float | None = None
    head_lr_times: Literal["1", "sqrt(M)", "M", "K"] = "1"
    weight_decay: float = 1e-6
    poly_power: float = 0.9
    method: str = "selective"
    grouping: str = "affinity-propagation"
    affinity: Literal["proximal", "gradient"] = "proximal"
    preference: float | None = None
    credit: Literal["step", "published"] = "step"
    outside: Literal["hold", "coast"] = "hold"
    decay: float = 1e-3
    warmup: int = 100
    regroup_every: int = 1
    groups_per_batch: int | None = None
    observe_every: int = 1
    seed: int = 0
    checkpoint_every: int = 100
    evaluate_every: int | None = None
    conflicts_every: int | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _typed(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name in (
            *("batch_size", "patch", "dim", "depth", "attention_heads"),
            *("batches", "checkpoint_every"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("evaluate_every", "conflicts_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}.")
        if not 0 <= self.seed < 2**62:  # comparisons count on from it
            raise ValueError(f"seed must be a number from 0 to 2**62, got {self.seed}.")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be in [0, 1], got {self.dropout}.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}.")
        for name in ("lr", "head_lr", "weight_decay", "poly_power"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {value}.")
        if self.data not in data_names():
            raise ValueError(f"data must be one of {', '.join(data_names())}, got {self.data!r}.")
        self._check_network()
        if self.method not in ("selective", "joint"):
            _check_method(self.method)
        if self.credit == "published" and (self.affinity != "proximal" or self.observe_every > 1):
            raise ValueError(
                "credit: published is a rule of the proximal affinity, observed in every batch; "
                "leave affinity and observe_every as they are."
            )
        self.make_grouping()

    def _check_network(self) -> None:
        """Refuse settings that would be passed over."""
        if self.data in IN_MEMORY:
            for name, default in (("root", None), ("backbone", "tiny"), ("decoder", "linear")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is a setting of data sets that are read from a folder; "
                        f"{self.data} is not."
                    )
        if self.backbone == "tiny" and self.weights not in (None, "random"):
            raise ValueError(
                "weights are loaded into a backbone such as vit-t; backbone: tiny has random ones."
            )

    def make_grouping(self) -> tg.Grouping:
        """The grouping that ``method`` and ``grouping`` name.

        Raises:
            ValueError: if there is none of that name.
        """
        if self.method == "joint":
            return tg.Together()
        if self.grouping == "affinity-propagation":
            return tg.AffinityPropagation(preference=self.preference)
        if self.grouping in GROUPINGS:
            return GROUPINGS[self.grouping]()
        kind, _, count = self.grouping.partition(":")
        if count.isdigit() and kind == "random":
            return tg.RandomGroups(int(count), seed=self.seed)
        if count.isdigit() and kind in COUNTED:
            return COUNTED[kind](int(count))
        known = [*GROUPINGS, *(f"{name}:M" for name in ("random", *COUNTED))]
        raise ValueError(
            f"grouping must be one of affinity-propagation, {', '.join(known)} with a number M of "
            f"groups, got {self.grouping!r}."
        )


def _check_method(name: str) -> None:
    known = ["selective", "joint", *tg.methods.METHODS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
        raise ValueError(f"There is no method {name!r}; the methods are {', '.join(near)}.")


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    folder = resources.files("taskgroup.lab.train") / "recipes"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir())


def read_recipe(name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: of a recipe that ships with the package, or the path of a YAML file.
        changes: ``{key: value}``, settings that override it.

    Raises:
        ValueError: if there is no such recipe, or a key or value is wrong; the sentence names it.

    Example:
        >>> read_recipe("motorcycle", parse_changes(["lr=3e-4", "method=joint"])).lr
        0.0003
    """
    path = Path(name)
    if str(name) in recipe_names():
        text = (resources.files("taskgroup.lab.train") / "recipes" / f"{name}.yaml").read_text()
    elif path.is_file():
        text = path.read_text()
    else:
        raise ValueError(
            f"There is no recipe {str(name)!r}; name a YAML file or one of: "
            f"{', '.join(recipe_names())}."
        )
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must hold lines 'key: value', got {type(settings).__name__}.")
    settings |= changes or {}
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(known)}."
            raise ValueError(f"Unknown setting {key!r}; {hint}")
    return Recipe(**settings)


def parse_changes(changes: Iterable[str]) -> dict[str, Any]:
    """``["key=value", ...]`` as ``{key: value}``, the values read as YAML.

    Raises:
        ValueError: for a string without a ``=``, or whose value is not YAML.
    """
    parsed = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {change!r}.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {key}: {value!r} is no value.") from None
    return parsed


def _size(name: str, value: Any) -> tuple[int, int]:
    """One number, ``"HxW"`` or two numbers, as a pair."""
    sides = str(value).split("x") if isinstance(value, int | str) else value
    if isinstance(sides, list) and len(sides) == 1:
        sides = 2 * sides
    try:
        height, width = (int(side) for side in sides)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be a number of pixels or HxW, as 448x576; got {value!r}.")
    return height, width


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value as the annotation has it: YAML reads 1e-3 as a string and 1 as an integer."""
    if kind.startswith("Literal"):
        choices = [choice.strip("\"' ") for choice in kind[len("Literal[") : -1].split(",")]
        if str(value) not in choices:  # a YAML 1 is no string
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")
        return str(value)
    if value is None and kind.endswith("| None"):
        return None
    if kind == "tuple[int, int]":
        return _size(name, value)
    if kind.startswith("tuple"):
        if isinstance(value, str):
            value = [word.strip() for word in value.split(",")]
        if isinstance(value, list | tuple) and value and all(isinstance(w, str) for w in value):
            return tuple(value)
        raise ValueError(f"{name} must be a list of words, got {value!r}.")
    if kind.startswith("float"):
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif type(value) is {"int": int, "str": str}[kind.split(" ")[0]]:  # and no bool
        return value
    wanted = {"float": "a number", "int": "a whole number", "str": "a word"}[kind.split(" ")[0]]
    raise ValueError(f"{name} must be {wanted}, got {value!r}.")


def make_problem(recipe: Recipe) -> Problem:
    """The data set that a recipe names, with the recipe's settings.

    Raises:
        ImportError: if a library that it needs is missing; the sentence says what to install.
    """
    module, name = where(recipe.data)
    problem: Problem = getattr(importlib.import_module(module), name)(recipe)
    return problem
