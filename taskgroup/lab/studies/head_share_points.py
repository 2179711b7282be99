"""Networks with lighter and heavier heads, and the kinds of training that are compared there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from taskgroup.lab.recipe import Recipe, is_own, parse_changes
from taskgroup.lab.studies.presets import JOINT, Variant

__all__ = ["Point", "joint_sizes", "kinds", "parse_point", "shipped_points"]

_GROUPS = 3  # random ones, and steps on the same batch
_RARELY = 10  # batches between observations


@dataclasses.dataclass(frozen=True)
class Point:
    """A network: ``settings`` of the network that replace those of the recipe."""

    title: str
    settings: Mapping[str, Any]


def shipped_points(recipe: Recipe) -> list[Point]:
    """The points of a data set that ships with the package, from light to heavy heads.

    Raises:
        ValueError: for a problem of the user's own.
    """
    if is_own(recipe.data):
        raise ValueError(
            f"{recipe.data} is a problem of your own; say which settings make its heads light and "
            "heavy, with --point head_depth=0 --point head_depth=2,head_width=256 for instance."
        )
    large = {"dim": 2 * recipe.dim, "depth": 2 * recipe.depth}
    if recipe.data in ("qm9", "yeast"):
        hidden = [(1, 64), (2, 128), (2, 256), (3, 384)]
        linear: dict[str, Any] = {"head_depth": 0, "head_width": None}
        heavy = [
            Point(f"{depth} x {width}", {"head_depth": depth, "head_width": width})
            for depth, width in hidden
        ]
    else:
        linear = {"decoder": "linear", "head_width": None}
        heavy = [
            Point(f"3x3, {width} channels", {"decoder": "conv", "head_width": width})
            for width in (32, 96, 256)
        ]
    points = [Point("linear", linear), *heavy]
    if recipe.data == "qm9" or recipe.backbone == "tiny":
        points.insert(0, Point("linear, larger encoder", {**large, **linear}))
    return points


def parse_point(text: str) -> Point:
    """A point from ``"key=value,key=value"``.

    Raises:
        ValueError: if it is not of that form.

    Example:
        >>> parse_point("head_depth=2, head_width=256")
        Point(title='head_depth=2, head_width=256', settings={'head_depth': 2, 'head_width': 256})
    """
    parts = [part.strip() for part in text.split(",")]
    return Point(", ".join(parts), parse_changes(parts))


def kinds(recipe: Recipe, tasks: Sequence[str]) -> list[Variant]:
    """The kinds of training: joint at three batch sizes, groups, and repeated batches.

    Raises:
        ValueError: for fewer than three tasks.
    """
    if len(tasks) < 3:
        raise ValueError(
            f"Groups differ from single tasks if there are three tasks or more, got {len(tasks)}."
        )
    joint = {"method": "gd"}
    found = [Variant(JOINT, f"Joint, batch size {recipe.batch_size}", joint)]
    for part in (2, 4):
        if size := recipe.batch_size // part:
            settings = {**joint, "batch_size": size}
            found.append(Variant(f"{JOINT}-batch-{size}", f"Joint, batch size {size}", settings))
    m = min(_GROUPS, len(tasks) - 1)
    groupings = {
        "learned": ("Learned groups", recipe.grouping),
        "random": (f"Random groups ({m})", f"random:{m}"),
        "singletons": ("One group per task", "singletons"),
    }
    if not recipe.replace(method="selective").make_grouping().reads_affinity:
        raise ValueError(
            f"Grouping {recipe.grouping!r} learns no groups to compare; take affinity-propagation."
        )
    for every in (1, _RARELY):
        for name, (title, grouping) in groupings.items():
            settings = {"method": "selective", "grouping": grouping, "observe_every": every}
            observed = "every batch" if every == 1 else f"every {every}th batch"
            found.append(Variant(f"{name}-{every}", f"{title}, observed {observed}", settings))
    repeated = {**joint, "batch_repeats": _GROUPS}
    return [*found, Variant("repeated", f"Joint, each batch {_GROUPS} times", repeated)]


def joint_sizes(found: Sequence[Variant]) -> list[Variant]:
    """Of these kinds, joint training on batches that are used once; that of the recipe first."""
    return [kind for kind in found if kind.name.startswith(JOINT)]
