"""What is compared: the methods, and the ablations of the paper."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import taskgroup as tg
from taskgroup.lab.train.recipe import Recipe

__all__ = ["JOINT", "PRESETS", "REFERENCE", "Variant", "preset", "variants_by_name"]

#: The variant whose time is the budget, where it is compared.
REFERENCE = "selective"
#: The variant that costs and gains are relative to.
JOINT = "gd"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a comparison.

    Attributes:
        name: unique; what files and ``--methods`` call it.
        title: what tables call it.
        settings: ``{setting: value}`` on top of the recipe.
        against: name of the joint variant it is measured against.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    against: str = JOINT


_TITLES = {
    "gd": "GD (joint)",
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
_GD = Variant(JOINT, _TITLES[JOINT], {"method": "gd"})
_SELECTIVE = Variant(REFERENCE, "Selective", {"method": "selective"})
_CHEAP = Variant(
    "selective-cheap",
    "Selective, a group a batch",
    {"method": "selective", "groups_per_batch": 1, "observe_every": 10},
)


def _selective(name: str, title: str, **settings: Any) -> Variant:
    return Variant(name, title, {"method": "selective", **settings})


def _methods(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    joint = [Variant(m, _TITLES.get(m, m), {"method": m}) for m in tg.methods.METHODS]
    return [*joint, _SELECTIVE, _CHEAP]


def _grouping(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    random = [
        _selective(f"random-{m}", f"Random, {m} groups", grouping=f"random:{m}")
        for m in range(2, len(tasks))
    ]
    return [
        _GD,
        _SELECTIVE,
        _selective("published-credit", "Credit as published", credit="published"),
        _selective("heterogeneous", "Heterogeneous", grouping="heterogeneous"),
        *random,
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
    return [_GD, _SELECTIVE, *rules, joint]


def _preference(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    return [
        _GD,
        _SELECTIVE,
        _selective("preference-median", "Preference: median", preference=None),
        _selective("preference-0", "Preference: 0", preference=0.0),
        _selective("preference--1", "Preference: -1", preference=-1.0),
    ]


def _decay(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    decays = (1e-3, 1e-2, 0.05, 0.2, 1.0)
    return [
        _GD,
        _SELECTIVE,
        *(_selective(f"decay-{d:g}", f"Decay {d:g}", decay=d) for d in decays),
    ]


def _batch_size(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    variants = [_GD, _SELECTIVE]
    for size in sorted({max(1, recipe.batch_size // 2), 2 * recipe.batch_size}):
        settings = {"batch_size": size}
        joint = f"gd-batch-{size}"
        variants += [
            Variant(joint, f"GD, batch {size}", {"method": "gd", **settings}, against=joint),
            Variant(
                f"selective-batch-{size}",
                f"Selective, batch {size}",
                {"method": "selective", **settings},
                against=joint,
            ),
        ]
    return variants


def _warmup(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    warmups = sorted({1, max(1, recipe.warmup // 3), 3 * recipe.warmup, recipe.batches // 2})
    return [
        _GD,
        _SELECTIVE,
        *(_selective(f"warmup-{w}", f"Warm-up {w}", warmup=w) for w in warmups),
    ]


def _cheap(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    return [
        _GD,
        _SELECTIVE,
        _selective("observe-10", "Observed every 10", observe_every=10),
        _selective("one-a-batch", "A group a batch", groups_per_batch=1),
        _CHEAP,
    ]


def _three_tasks(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    some = tuple(tasks[k * len(tasks) // 3] for k in range(3))  # not all of one kind
    joint = "gd-three"
    return [
        _GD,
        _SELECTIVE,
        Variant(joint, "Three tasks, GD", {"method": "gd", "tasks": some}, against=joint),
        *(
            Variant(
                f"{name}-three",
                f"Three tasks, {title}",
                {"method": "selective", "tasks": some, **settings},
                against=joint,
            )
            for name, title, settings in (
                ("selective", "selective", {}),
                ("singletons", "one per task", {"grouping": "singletons"}),
            )
        ),
    ]


#: From a recipe and its tasks to the variants of a comparison.
PRESETS: dict[str, Callable[[Recipe, Sequence[str]], list[Variant]]] = {
    "methods": _methods,
    "grouping": _grouping,
    "heads": _heads,
    "preference": _preference,
    "decay": _decay,
    "batch-size": _batch_size,
    "warmup": _warmup,
    "cheap": _cheap,
    "three-tasks": _three_tasks,
}


def preset(name: str, recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    """The variants that a preset compares.

    Args:
        name: of the preset.
        recipe: what the variants start from.
        tasks: of the recipe.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=len(PRESETS), cutoff=0.0)
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(near)}.")
    return _without_doubles(PRESETS[name](recipe, tasks), recipe)


def _without_doubles(variants: list[Variant], recipe: Recipe) -> list[Variant]:
    """Each only once: what has the recipe's own setting is the reference, under another title."""
    kept: dict[Recipe, Variant] = {}
    for variant in variants:
        made = recipe.replace(**variant.settings)
        if made in kept:
            kept[made] = dataclasses.replace(kept[made], title=variant.title)
        else:
            kept[made] = variant
    return list(kept.values())


def variants_by_name(names: list[str], variants: list[Variant]) -> list[Variant]:
    """Some of the variants, in the order of the names, each after what it is measured against.

    Raises:
        ValueError: for an unknown name; the sentence lists the known ones, the nearest first.
    """
    known = {variant.name: variant for variant in variants}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
            raise ValueError(f"There is no method {name!r} here; there are {', '.join(near)}.")
    wanted = [both for name in names for both in (known[name].against, name)]
    return [known[name] for name in dict.fromkeys(wanted)]
