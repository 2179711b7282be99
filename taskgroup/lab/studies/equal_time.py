"""How many batches of each variant take the time of the selective run, from measured costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

import taskgroup as tg
from taskgroup.lab.recipe import Recipe
from taskgroup.lab.studies.presets import JOINT, REFERENCE, Variant
from taskgroup.lab.studies.workers import Workers

__all__ = ["EqualTime"]


class EqualTime:
    """The costs of variants, at one batch size or several, and the batches that take equal time.

    Costs and batches are kept in the folder, because a budget must stay the same when the
    comparison continues. A variant at another batch size than its own has entries of its own.

    Args:
        out: the folder.
        recipe: what all variants start from.
        variants: those of the comparison, by name.
        steps: the steps per batch of a variant in the runs at equal batches; NaN if none is known.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        variants: Mapping[str, Variant],
        steps: Callable[[Variant], float],
    ) -> None:
        self._out = out
        self._recipe = recipe
        self._variants = variants
        self._steps = steps
        #: The variant whose time all others get: selective updates, or else joint training.
        self.reference = variants.get(REFERENCE, variants[JOINT])
        which = "" if self.reference.name == REFERENCE else f"-{self.reference.name}"
        self._batches_file = f"batches{which}.yaml"
        self.load()

    def load(self) -> None:
        """Read what the folder holds by now."""
        self._costs: dict[str, float] = self._read("costs.yaml")
        self._batches: dict[str, int] = self._read(self._batches_file)

    def measure(
        self, workers: Workers, variants: Iterable[Variant], batch_size: int | None = None
    ) -> None:
        """Measure the steps of variants whose cost is not known, side by side with joint training.

        At a batch size that is given, the costs are relative to joint training at its own too.
        """
        recipes = {self._key(v, batch_size): self.recipe_of(v, batch_size) for v in variants}
        missing = {key: recipe for key, recipe in recipes.items() if key not in self._costs}
        if missing:
            joint = self.recipe_of(self._variants[JOINT])
            seconds = workers.measure({JOINT: joint, **missing})
            self._costs |= {key: seconds[key] / seconds[JOINT] for key in missing}
            self._write("costs.yaml", self._costs)

    def recipe_of(self, variant: Variant, batch_size: int | None = None) -> Recipe:
        """The settings of a variant, at another batch size if one is given."""
        size = {} if batch_size is None else {"batch_size": batch_size}
        return self._recipe.replace(**{**variant.settings, **size})

    def cost(self, variant: Variant, batch_size: int | None = None) -> float:
        """Time per batch relative to joint training; NaN if it is not known.

        This is the cost of a step times the steps per batch, the median over the seeds, because the
        number of groups differs from seed to seed. At another batch size, the cost of a step is
        measured there, and the steps per batch are taken to be as many as at the variant's own.
        """
        return self.cost_of(variant, self._steps(variant), batch_size)

    def cost_of(self, variant: Variant, steps: float, batch_size: int | None = None) -> float:
        """Time of a batch that takes so many steps, relative to joint training; NaN if unknown."""
        step = self._costs.get(self._key(variant, batch_size), math.nan)
        return step * (steps if math.isnan(steps) else max(1.0, steps))

    def batches(self, variant: Variant, batch_size: int | None = None) -> int:
        """The batches that take the time of the reference."""
        key = self._key(variant, batch_size)
        if key not in self._batches:
            ratio = self.cost(self.reference) / self.cost(variant, batch_size)
            if math.isnan(ratio):  # all of its runs diverged, or none is finished
                return self._recipe.batches
            self._batches[key] = max(2, round(self._recipe.batches * ratio))
            self._write(self._batches_file, self._batches)
        return self._batches[key]

    def _key(self, variant: Variant, batch_size: int | None) -> str:
        if batch_size is None or batch_size == self.recipe_of(variant).batch_size:
            return variant.name
        return f"{variant.name}, batch size {batch_size}"

    def _read(self, name: str) -> dict[str, Any]:
        file = self._out / name
        return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}

    def _write(self, name: str, values: dict[str, Any]) -> None:
        tg.recording.write_text(self._out / name, yaml.safe_dump(values, sort_keys=False))
