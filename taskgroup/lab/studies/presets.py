"""What is compared: the methods, and the ablations of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import taskgroup as tg
from taskgroup.lab.recipe import GROUP_WEIGHTS, Recipe
from taskgroup.lab.words import nearest

__all__ = ["JOINT", "PRESETS", "REFERENCE", "Variant", "preset", "variants_by_name"]

#: The variant whose time all others get.
REFERENCE = "selective"
#: The variant that costs and gains are relative to.
JOINT = "gd"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a comparison: ``settings`` that replace those of the recipe.

    The name is unique; file names and ``--methods`` use it. ``against`` is the name of the joint
    variant that it is measured against.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    against: str = JOINT


_TITLES = {
    "gd": "GD (joint)",
    "si": "SI",
    "rlw": "RLW",
    "uw": "UW",
    "dtp": "DTP",
    "dwa": "DWA",
    "famo": "FAMO",
    "imtl-l": "IMTL-L",
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "graddrop": "GradDrop",
    "imtl-g": "IMTL-G",
    "aligned-mtl": "Aligned-MTL",
    "nash-mtl": "Nash-MTL",
    "upgrad": "UPGrad",
    "fairgrad": "FairGrad",
    "gradvac": "GradVac",
}


def _selective(name: str, title: str, against: str = JOINT, **settings: Any) -> Variant:
    return Variant(name, title, {"method": "selective", **settings}, against)


def _joint(name: str, title: str, **settings: Any) -> Variant:
    """Joint training that other variants are measured against."""
    return Variant(name, title, {"method": "gd", **settings}, against=name)


_GD = _joint(JOINT, _TITLES[JOINT])
_SELECTIVE = _selective(REFERENCE, "Selective")
_CHEAP = _selective(
    "selective-cheap", "Selective, 1 group per batch", groups_per_batch=1, observe_every=10
)


def _methods(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    joint = [Variant(m, _TITLES.get(m, m), {"method": m}) for m in tg.methods.METHODS]
    return [*joint, _SELECTIVE, _CHEAP, *_weighted()]


def _weighted() -> list[Variant]:
    """Selective updates, with each method that can weigh the losses inside the groups."""
    return [
        _selective(f"{REFERENCE}-{m}", f"Selective, {_TITLES.get(m, m)} inside", group_weights=m)
        for m in GROUP_WEIGHTS
    ]


def _grouping(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    return [
        _selective("published-credit", "Credit as published", credit="published"),
        _selective("heterogeneous", "Heterogeneous", grouping="heterogeneous"),
        *(
            _selective(f"random-{m}", f"Random, {m} groups", grouping=f"random:{m}")
            for m in range(2, len(tasks))
        ),
        _selective("singletons", "One per task", grouping="singletons"),
        _selective("graph-coloring", "Graph colouring", grouping="graph-coloring"),
        _selective("kmeans-3", "k-means, 3 groups", grouping="kmeans:3"),
        _selective("spectral-3", "Spectral, 3 groups", grouping="spectral:3"),
        _selective("exhaustive-3", "Exhaustive, up to 3 groups", grouping="exhaustive:3"),
        _selective("gradient", "From gradients", affinity="gradient"),
    ]


def _heads(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    rules = [
        _selective(
            f"{outside}-{times}",
            f"Heads {outside}, rate x {times}",
            outside=outside,
            head_lr_times=times,
        )
        for outside in ("hold", "coast")
        for times in ("1", "sqrt(M)", "M", "K")
    ]
    joint = Variant("gd-K", "GD, head rate x K", {"method": "gd", "head_lr_times": "K"})
    return [*rules, joint]


def _preference(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    values = {"median": None, "0": 0.0, "-1": -1.0}
    return [
        _selective(f"preference-{name}", f"Preference: {name}", preference=value)
        for name, value in values.items()
    ]


def _decay(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    decays = (1e-3, 1e-2, 0.05, 0.2, 1.0)
    return [_selective(f"decay-{d:g}", f"Decay {d:g}", decay=d) for d in decays]


def _batch_size(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    variants = []
    for size in sorted({max(1, recipe.batch_size // 2), 2 * recipe.batch_size}):
        joint = _joint(f"gd-batch-{size}", f"GD, batch {size}", batch_size=size)
        name, title = f"selective-batch-{size}", f"Selective, batch {size}"
        variants += [joint, _selective(name, title, joint.name, batch_size=size)]
    return variants


def _warmup(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    warmups = sorted({1, max(1, recipe.warmup // 3), 3 * recipe.warmup, recipe.batches // 2})
    return [_selective(f"warmup-{w}", f"Warm-up {w}", warmup=w) for w in warmups]


def _cheap(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    return [
        _selective("observe-10", "Observed every 10", observe_every=10),
        _selective("one-a-batch", "One group per batch", groups_per_batch=1),
        _CHEAP,
    ]


def _shared_state(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    """Each way of grouping, with one optimizer state for all groups and with one for each."""
    groupings = {
        "learned": ("Learned groups", "affinity-propagation"),
        "random-3": ("Random, 3 groups", "random:3"),
        "heterogeneous": ("Heterogeneous", "heterogeneous"),
        "singletons": ("One per task", "singletons"),
    }
    return [
        _selective(
            f"{name}-{state}",
            f"{title}, {'one state' if state == 'all' else 'state per group'}",
            grouping=grouping,
            shared_state=state,
        )
        for name, (title, grouping) in groupings.items()
        for state in ("all", "group")
    ]


def _three_tasks(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    some = tuple(tasks[k * len(tasks) // 3] for k in range(3))  # not all of one kind
    joint = _joint("gd-three", "Three tasks, GD", tasks=some)
    single = {"grouping": "singletons", "tasks": some}
    return [
        joint,
        _selective("selective-three", "Three tasks, selective", joint.name, tasks=some),
        _selective("singletons-three", "Three tasks, one per task", joint.name, **single),
    ]


#: From a recipe and its tasks to variants; all but "methods" are compared with GD and Selective.
PRESETS: dict[str, Callable[[Recipe, Sequence[str]], list[Variant]]] = {
    "methods": _methods,
    "grouping": _grouping,
    "heads": _heads,
    "preference": _preference,
    "decay": _decay,
    "batch-size": _batch_size,
    "warmup": _warmup,
    "cheap": _cheap,
    "shared-state": _shared_state,
    "three-tasks": _three_tasks,
}


def preset(name: str, recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    """The variants that a preset compares, starting from a recipe that trains these tasks.

    A variant that has the recipe's own settings is not listed twice: the first one gets its title.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; there are {nearest(name, PRESETS)}.")
    variants = PRESETS[name](recipe, tasks)
    kept: dict[Recipe, Variant] = {}
    for variant in variants if name == "methods" else [_GD, _SELECTIVE, *variants]:
        made = recipe.replace(**variant.settings)
        same = kept.get(made, variant)
        kept[made] = dataclasses.replace(same, title=variant.title)
    return list(kept.values())


def variants_by_name(names: list[str], variants: list[Variant]) -> list[Variant]:
    """Some of the variants in the order of the names, each after the one it is measured against.

    Raises:
        ValueError: if a name is unknown; the sentence lists the known ones, the nearest first.
    """
    known = {variant.name: variant for variant in variants}
    for name in names:
        if name not in known:
            near = nearest(name, known)
            raise ValueError(f"There is no method {name!r} here; there are {near}.")
    wanted = [both for name in names for both in (known[name].against, name)]
    return [known[name] for name in dict.fromkeys(wanted)]
