"""The settings of a training run, checked by pydantic and read from YAML.

The settings come in sections, one class each: :class:`DataSettings`, :class:`NetworkSettings`,
:class:`OptimizerSettings`, :class:`GroupSettings`. A :class:`Recipe` inherits from all of them and
adds the settings of the run itself. No two sections share a name, so every setting is one flat key,
spelled the same in YAML files, in ``--set``, in the ``config.yaml`` of a run and in Python:
``recipe.lr``. A function that needs one section alone says so in its signature.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import ErrorDetails

import taskgroup as tg
from taskgroup.lab.words import nearest

__all__ = [
    "CHANGEABLE",
    "GROUP_WEIGHTS",
    "PROBLEMS",
    "DataSettings",
    "GroupSettings",
    "NetworkSettings",
    "OptimizerSettings",
    "ProblemSettings",
    "Recipe",
    "is_own",
    "parse_changes",
    "read_recipe",
    "recipe_names",
]

#: The settings that may change when a run is resumed or evaluated; they do not affect the training.
CHANGEABLE = (
    *("root", "bad", "workers", "device"),
    *("checkpoint_every", "evaluate_every", "conflicts_every", "baseline"),
)

#: The data sets that ship with the package: the module in ``taskgroup.lab.data`` and the class.
PROBLEMS = {
    "motorcycle": "image_problems:MotorcycleProblem",
    "yeast": "yeast:Yeast",
    "qm9": "qm9:QM9",
    "nyud-v2": "image_problems:BenchmarkProblem",
    "pascal-context": "image_problems:BenchmarkProblem",
    "taskonomy": "image_problems:BenchmarkProblem",
}

_MOLECULES = ("mlp", "message-passing")  # the backbones of QM9
_OF_FOLDERS = ("root", "subset", "bad", "workers")  # of images that are read from a folder
_OF_IMAGES = ("size", "patch", "attention_heads", "decoder", "drop_path")
#: Settings that a data set has no use for.
_UNUSED = {
    "motorcycle": (*_OF_FOLDERS, "regime", "backbone", "drop_path", "head_depth"),
    "yeast": (*_OF_FOLDERS, "regime", *_OF_IMAGES, "backbone"),
    "qm9": (*_OF_FOLDERS[1:], *_OF_IMAGES),
    **dict.fromkeys(("nyud-v2", "pascal-context", "taskonomy"), ("regime", "head_depth")),
}
#: The methods that can weigh the losses inside the groups of selective updates.
GROUP_WEIGHTS = tuple(
    name
    for name, method in tg.methods.METHODS.items()
    if name != "gd" and issubclass(method, tg.methods.WeighingMethod)
)

_SHIPPED = Path(__file__).parent / "recipes"
#: Settings of a problem that is named without a recipe: for a run of a few hundred batches.
_OWN = {"batch_size": 32, "lr": 3e-3, "decay": 0.05, "warmup": 10}


def is_own(data: str) -> bool:
    """Whether a name is ``MODULE:NAME`` or ``FILE.py:NAME``, a problem of the user's own."""
    return re.fullmatch(r"[^:\s](.*\S)?:[^\W\d][\w.]*", data) is not None


def _known_data(data: str) -> str:
    """The name of a data set that ships with the package, or of a problem of the user's own."""
    if data in PROBLEMS or is_own(data):
        return data
    raise ValueError(
        f"data must be {', '.join(map(repr, PROBLEMS))} or a problem of your own, such as "
        f"'my_package.my_module:MyProblem'; got {data!r}."
    )


def _number(value: object) -> object:
    """The number that a string spells: YAML 1.1 reads ``1e-3`` as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # pydantic refuses it


def _sides(value: Any) -> tuple[int, int]:
    """Height and width of ``64``, ``"64x48"`` or ``[64, 48]``."""
    sides = str(value).split("x") if isinstance(value, int | str) else value
    try:
        height, width = map(int, 2 * sides if len(sides) == 1 else sides)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"size must be a number of pixels or HxW, as 448x576; got {value!r}.")
    return height, width


def _words(value: object) -> tuple[str, ...]:
    """The words of ``"a, b"`` or ``["a", "b"]``."""
    words = value.split(",") if isinstance(value, str) else value
    if isinstance(words, list | tuple) and words and all(isinstance(word, str) for word in words):
        return tuple(word.strip() for word in words)
    raise ValueError(f"tasks must be a list of words, got {value!r}.")


_Number = Annotated[float, BeforeValidator(_number)]
_Rate = Annotated[_Number, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1)]


class _Section(pydantic.BaseModel):
    """Settings that are checked when they are made, and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except pydantic.ValidationError as error:
            known = list(type(self).model_fields)
            raise ValueError(" ".join(_sentence(e, known) for e in error.errors())) from None


def _sentence(error: ErrorDetails, known: list[str]) -> str:
    """Say what pydantic found wrong with a setting."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])  # a sentence already, of a validator in this file
    key = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(known)}."
        return f"Unknown setting {key!r}; {hint}"
    return f"{error['msg'].replace('Input should', f'{key} must')}, got {error['input']!r}."


class DataSettings(_Section):
    """What is trained on.

    Attributes:
        data: the data set: ``"motorcycle"`` (the embedded photograph), ``"yeast"``, ``"qm9"``, one
            that is read from ``root`` (``"nyud-v2"``, ``"pascal-context"``, ``"taskonomy"``), or a
            :class:`~taskgroup.lab.problem.Problem` of your own, as ``"my_package.my_module:name"``
            or ``"folder/file.py:name"``.
        root: folder of a data set that is read from disk; for QM9, the folder of its CSV files, if
            they are not those of the installed qm9pack.
        regime: what is planted among the tasks of QM9: ``"clean"``, nothing; ``"negatives"``, two
            tasks that compete with the others; or ``"scales"``, factors of the losses over three
            decades. See :func:`taskgroup.lab.molecules.regimes.plant`.
        subset: which of Taskonomy's buildings: ``"tiny"``, ``"medium"`` or ``"fullplus"``.
        tasks: the tasks to train, in the order of the data set; None trains all.
        size: height and width of the network's input, pixels: one number, or ``"HxW"``.
        batch_size: samples per batch.
        batch_repeats: batches in a row that hold the same samples; 1 draws new ones for each.
        bad: what to do about a sample whose file is missing or broken: ``"stop"``, or ``"skip"`` it
            with a warning.
        workers: processes that read the data, at most one per core; with 0 the training process
            reads it between the steps.
    """

    data: Annotated[str, AfterValidator(_known_data)] = "motorcycle"
    root: str | None = None
    regime: Literal["clean", "negatives", "scales"] = "clean"
    subset: Literal["tiny", "medium", "fullplus"] = "tiny"
    tasks: Annotated[tuple[str, ...], BeforeValidator(_words)] | None = None
    size: Annotated[tuple[int, int], BeforeValidator(_sides)] = (64, 64)
    batch_size: _Count = 8
    batch_repeats: _Count = 1
    bad: Literal["stop", "skip"] = "stop"
    workers: int = Field(0, ge=0)


class NetworkSettings(_Section):
    """Which network is trained, and where it runs.

    Attributes:
        backbone: encoder of an image network: ``"tiny"`` is a random ViT of the five settings that
            follow; ``"vit-t"``, ``"vit-s"``, ``"vit-b"``, ``"vit-l"``; or anything else that
            :func:`taskgroup.lab.vision.backbones.backbone` takes. Of molecules: ``"mlp"`` on
            Coulomb matrices, or ``"message-passing"`` on coordinates.
        patch: side of a ViT patch, pixels.
        dim: width of the network.
        depth: blocks of the ViT, a multiple of 4, or layers of the MLP.
        attention_heads: attention heads of a block.
        dropout: probability of dropout in the network.
        head_depth: hidden layers of the heads of QM9 and yeast; with 0 the heads are linear.
        head_width: width of the hidden layers of heads, and channels of ``decoder: conv``; None
            takes ``dim``, and 256 channels.
        weights: weights of a backbone other than ``"tiny"``: None takes its pretrained ones from
            the Hugging Face hub; ``"random"``; or a folder.
        decoder: head of every task: ``"linear"``, a 1x1 convolution, or ``"conv"``: 3x3, BatchNorm
            and ReLU before it.
        drop_path: probability of stochastic depth in the last block of such a backbone.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU where there is one.
        precision: of the forward pass: ``"float32"``, or ``"bfloat16"`` under autocast.
    """

    backbone: str = "tiny"
    patch: _Count = 8
    dim: _Count = 96
    depth: _Count = 4
    attention_heads: _Count = 4
    dropout: _Number = Field(0.0, ge=0, le=1)
    head_depth: int = Field(0, ge=0)
    head_width: _Count | None = None
    weights: str | None = None
    decoder: Literal["linear", "conv"] = "linear"
    drop_path: _Number = Field(0.0, ge=0, lt=1)
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _no_weights_for_small_networks(self) -> NetworkSettings:
        if self.backbone in ("tiny", *_MOLECULES) and self.weights not in (None, "random"):
            raise ValueError(
                "weights are loaded into a backbone such as vit-t; "
                f"backbone: {self.backbone} has random ones."
            )
        return self


class ProblemSettings(NetworkSettings, DataSettings):
    """What a problem is made with: the settings of the data and of the network."""


class OptimizerSettings(_Section):
    """How long Adam trains, and at which learning rates.

    Attributes:
        batches: length of the run.
        lr: learning rate of the encoder at the start, and of the parameters that a method learns.
        head_lr: learning rate of the heads at the start; None takes that of the encoder.
        head_lr_times: factor on the learning rate of the heads: ``"1"``; ``"sqrt(M)"`` or ``"M"``
            with the current number of groups M; or ``"K"``, the number of tasks.
        weight_decay: of Adam.
        poly_power: the learning rate falls as ``(1 - batch / batches) ** poly_power``.
    """

    batches: _Count = 300
    lr: _Rate = 1e-3
    head_lr: _Rate | None = None
    head_lr_times: Annotated[Literal["1", "sqrt(M)", "M", "K"], BeforeValidator(str)] = "1"
    weight_decay: _Rate = 1e-6
    poly_power: _Rate = 0.9


class GroupSettings(_Section):
    """Which method updates the tasks, and how selective updates group them.

    Attributes:
        method: ``"selective"``; ``"joint"``: all tasks in one step; or one of
            :data:`taskgroup.methods.METHODS`.
        grouping: how selective updates group: ``"affinity-propagation"``, ``"heterogeneous"``,
            ``"singletons"``, ``"together"``, ``"graph-coloring"``, or with a number of groups M
            ``"random:M"``, ``"kmeans:M"``, ``"spectral:M"``, ``"exhaustive:M"``.
        affinity: what the groups are learned from: ``"proximal"`` or ``"gradient"``.
        preference: of affinity propagation; None is the median.
        credit: which group a change of loss is credited to: ``"step"``, the one whose step caused
            it, or ``"published"``, the one about to be stepped on, as the published code does.
        group_weights: method that weighs the losses inside the groups of selective updates:
            ``"uw"``, ``"imtl-l"``, ``"dwa"``, ``"famo"``, ``"si"`` or ``"rlw"``; None sums them.
        outside: what a step does to the heads of other groups: ``"hold"`` or ``"coast"``.
        shared_state: what state Adam keeps for the encoder: ``"all"``: one for all groups; or
            ``"group"``: one for each group, M times the memory; see
            :meth:`taskgroup.TaskGroups.attach`.
        decay: of the affinity.
        warmup: rounds before the first grouping; see :class:`taskgroup.TaskGroups`, as for the
            three that follow.
        regroup_every: rounds between regroupings.
        groups_per_batch: groups dealt to a batch; None deals all.
        observe_every: batches between observations.
    """

    method: str = "selective"
    grouping: str = "affinity-propagation"
    affinity: Literal["proximal", "gradient"] = "proximal"
    preference: _Number | None = None
    credit: Literal["step", "published"] = "step"
    group_weights: str | None = None
    outside: Literal["hold", "coast"] = "hold"
    shared_state: Literal["all", "group"] = "all"
    decay: _Number = 1e-3
    warmup: int = 100
    regroup_every: int = 1
    groups_per_batch: int | None = None
    observe_every: int = 1

    @pydantic.field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        known = ["selective", "joint", *tg.methods.METHODS]
        if method not in known:
            near = nearest(method, known)
            raise ValueError(f"There is no method {method!r}; the methods are {near}.")
        return method

    @model_validator(mode="after")
    def _known_group_weights(self) -> GroupSettings:
        name = self.group_weights
        if name is not None and name not in GROUP_WEIGHTS:
            raise ValueError(
                f"group_weights must be None or one of {', '.join(GROUP_WEIGHTS)}, which can weigh "
                f"the losses of some of the tasks; got {name!r}."
            )
        if name is not None and self.method != "selective":
            raise ValueError(
                f"group_weights: {name} weighs the losses inside the groups of method: selective; "
                f"method: {self.method} has no groups, so leave group_weights out."
            )
        return self

    @model_validator(mode="after")
    def _published_credit_is_proximal(self) -> GroupSettings:
        if self.credit == "published" and (self.affinity != "proximal" or self.observe_every > 1):
            raise ValueError(
                "credit: published is a rule of the proximal affinity, observed in every batch; "
                "leave affinity and observe_every as they are."
            )
        return self


# Pydantic collects the fields of the last base first: data, network, optimizer, groups, the run.
class Recipe(GroupSettings, OptimizerSettings, ProblemSettings):
    """All settings of a run: those of the four sections it inherits from, and of the run itself.

    Attributes:
        seed: of the weights, the crops and the order of groups.
        checkpoint_every: batches between checkpoints.
        evaluate_every: batches between evaluations on held-out data, without edges, whose metric is
            slow; None evaluates at the end alone.
        conflicts_every: batches between measurements of the cosines of the tasks' gradients, which
            the report shows. A measurement takes a forward and a backward pass per task, and
            changes nothing; None measures none.
        baseline: what Δm is computed against: a finished run, or a YAML file of ``task: metric``;
            None computes no Δm.

    Raises:
        ValueError: if a key is unknown, or a value has the wrong type or is out of range. There is
            a sentence on each wrong setting.
    """

    seed: int = Field(0, ge=0, lt=2**62)  # comparisons count on from it
    checkpoint_every: _Count = 100
    evaluate_every: _Count | None = None
    conflicts_every: _Count | None = None
    baseline: str | None = None

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> Recipe:
        for name in _UNUSED.get(self.data, ()):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not a setting of {self.data}; leave it out.")
        if self.data == "qm9" and self.backbone not in _MOLECULES:
            raise ValueError(
                f"backbone of qm9 must be {' or '.join(map(repr, _MOLECULES))}, got "
                f"{self.backbone!r}."
            )
        if self.data in PROBLEMS and self.data != "qm9" and self.backbone in _MOLECULES:
            raise ValueError(f"backbone {self.backbone!r} is a network of molecules, for qm9.")
        if self.data == "qm9" and self.backbone == "message-passing" and self.dropout:
            raise ValueError("dropout is a setting of the backbone mlp; leave it out.")
        linear = self.head_depth == 0 and self.decoder == "linear"
        if self.data in PROBLEMS and self.head_width is not None and linear:
            raise ValueError(
                "head_width is the width of the hidden layers of heads, and linear heads have "
                "none; set head_depth (yeast, qm9) or decoder: conv (images) as well."
            )
        self.make_grouping()
        return self

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with other settings, checked as a new one is.

        A change to a method without groups leaves ``group_weights`` out.
        """
        if changes.get("method", "selective") != "selective":
            changes = {"group_weights": None, **changes}
        return Recipe(**{**dict(self), **changes})

    def make_grouping(self) -> tg.Grouping:
        """The grouping that ``method`` and ``grouping`` name.

        Raises:
            ValueError: if there is none of that name.
        """
        if self.method == "joint":
            return tg.Together()
        made: dict[str, Callable[..., tg.Grouping]] = {
            "affinity-propagation": lambda: tg.AffinityPropagation(preference=self.preference),
            "heterogeneous": tg.Heterogeneous,
            "singletons": tg.Singletons,
            "together": tg.Together,
            "graph-coloring": tg.GraphColoring,
            "random:M": lambda m: tg.RandomGroups(m, seed=self.seed),
            "exhaustive:M": tg.Exhaustive,
            "kmeans:M": tg.KMeans,
            "spectral:M": tg.Spectral,
        }
        name, colon, count = self.grouping.partition(":")
        if not colon and name in made:
            return made[name]()
        if count.isdigit() and f"{name}:M" in made:
            return made[f"{name}:M"](int(count))
        raise ValueError(
            f"grouping must be one of {', '.join(made)} with a number M of groups, got "
            f"{self.grouping!r}."
        )


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def read_recipe(name: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        name: a recipe that ships with the package, the path of a YAML file, or a problem of your
            own, as in ``data``; a problem is trained for 300 batches of 32 unless ``changes`` say
            otherwise.
        changes: ``{key: value}``, settings that override those of the recipe.

    Raises:
        ValueError: if there is no such recipe, or a key or value is wrong. The sentence names the
            key, and the file if the file is wrong.

    Example:
        >>> read_recipe("motorcycle", parse_changes(["lr=3e-4", "method=joint"])).lr
        0.0003
    """
    path = _SHIPPED / f"{name}.yaml" if str(name) in recipe_names() else Path(name)
    if not path.is_file():
        if is_own(str(name)):
            return Recipe(**{"data": str(name), **_OWN, **(changes or {})})
        raise ValueError(
            f"There is no recipe {str(name)!r}; name a YAML file, a problem of your own as "
            f"MODULE:NAME, or one of: {', '.join(recipe_names())}."
        )
    if path.suffix == ".py":
        raise ValueError(
            f"{name} is a Python file; name the problem in it as well: {name}:YourProblem."
        )
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must hold lines 'key: value', got {type(settings).__name__}.")
    settings = {str(key): value for key, value in settings.items()}
    try:
        return Recipe(**{**settings, **(changes or {})})
    except ValueError:
        try:
            Recipe(**settings)
        except ValueError as error:  # the file is wrong without the changes too
            raise ValueError(f"{name}: {error}") from None
        raise


def parse_changes(changes: Iterable[str]) -> dict[str, Any]:
    """``["key=value", ...]`` as ``{key: value}``; a ValueError if a value is not YAML."""
    parsed = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes key=value, got {change!r}.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {key}: {value!r} is not valid YAML.") from None
    return parsed
