"""The cost of batches of group steps, predicted from the times of encoder and heads."""

from __future__ import annotations

import dataclasses
import math
import textwrap

from taskgroup._arguments import whole_number

__all__ = ["WORTH_TRYING", "StepCosts"]

#: Group steps are worth trying if a batch of ``GROUPS`` (3) groups with ``observe_every=10`` costs
#: fewer joint steps than this. That is the case if the heads take more than about nine tenths of a
#: joint step. Measured on QM9: at such a cost they were level with joint training at equal time,
#: and at every higher cost they were behind.
WORTH_TRYING = 1.2
#: The number of groups that the advice reckons with, or K if that is less.
GROUPS = 3
#: The setting that the advice reckons with.
OBSERVE_EVERY = 10


@dataclasses.dataclass(frozen=True)
class StepCosts:
    r"""The times of the parts of a joint step, and what group steps cost in joint steps.

    :func:`step_costs` measures them. Every time includes its part of the optimizer's step.

    Attributes:
        encoder: seconds of the encoder, forward and backward, and of what every step takes.
        heads_forward: seconds of all heads and losses, forward.
        heads_backward: seconds of all heads and losses, backward.
        n_tasks: K, the number of tasks.
        skips_heads: whether the heads that a step does not need are skipped. If not, every step
            runs all heads forward.
        clock: what the seconds are, such as ``"processor time of one thread"``.
        remark: what could not be measured, in a sentence.

    Example:
        Heads that take 80% of a joint step:

        >>> costs = StepCosts(encoder=2.0, heads_forward=3.0, heads_backward=5.0, n_tasks=11)
        >>> costs.joint, costs.head_share
        (10.0, 0.8)
        >>> costs.of(3), costs.of(3, observe_every=10)
        (2.0, 1.46)
        >>> print(costs)
        A joint step takes 10 s: encoder 20%, heads forward 30%, heads backward 50%.
        A batch of group steps costs, in joint steps:
        <BLANKLINE>
          groups  observe_every=1  observe_every=10
               1             2.00              1.10
               2             1.50              1.23
               3             2.00              1.46
              11             6.00              3.30
        <BLANKLINE>
        Train jointly if training time is what limits you: a batch of 3 groups with
        observe_every=10 costs 1.46 joint steps, and group steps that cost so much have never
        won at equal time. They gain at equal batches, where data is scarcer than time.
    """

    encoder: float
    heads_forward: float
    heads_backward: float
    n_tasks: int
    skips_heads: bool = True
    clock: str = ""
    remark: str = ""

    def __post_init__(self) -> None:
        for name in ("encoder", "heads_forward", "heads_backward"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more, got {seconds!r}.")
        if self.joint <= 0:
            raise ValueError(
                "A joint step takes 0 seconds, so nothing can be given in joint steps: measure "
                "with a finer clock, clock=time.perf_counter, or with larger batches."
            )
        whole_number("n_tasks", self.n_tasks, at_least=1)

    @property
    def joint(self) -> float:
        """Seconds of a joint step, a step on all tasks."""
        return self.encoder + self.heads_forward + self.heads_backward

    @property
    def head_share(self) -> float:
        """The share of a joint step that the heads take, from 0 to 1."""
        return (self.heads_forward + self.heads_backward) / self.joint

    def of(self, groups: int, observe_every: int = 1, groups_per_batch: int | None = None) -> float:
        r"""The mean cost of a batch of M groups, in joint steps.

        Let e be the time of the encoder, f and b those of all heads forward and backward, and
        n = ``observe_every``. Every group has K/M tasks in the mean. A batch that steps on s of the
        groups costs

        .. math::
            s e + \tfrac{s}{M} (f + b) \quad \text{or, if it observes,} \quad
            s' (e + f) + \tfrac{s'}{M} b

        where :math:`s' = \max(s, 2)`, since a batch that observes takes two steps at least. Every
        n-th batch observes. With all groups in every batch (s = M > 1) the mean is
        M e + f + b + (M - 1) f / n. A model that does not skip heads runs all of them forward in
        every step, so a batch that does not observe costs s (e + f) + s b / M.

        The overhead of the loop over the groups is a part of e, as :func:`step_costs` measures it;
        that of regrouping is not.

        Args:
            groups: M, from 1 to K. One group that is the whole partition costs
                1 + 1/n joint steps; groupings that do not learn, such as ``Together()``, take one.
            observe_every: n, as for :class:`TaskGroups`.
            groups_per_batch: as for :class:`TaskGroups`; None is all groups. Where it does not
                divide M, the last batch of a round has fewer groups.

        Raises:
            ValueError: if a number is not a positive integer, or there are more groups than tasks.
        """
        groups = whole_number("groups", groups, at_least=1)
        if groups > self.n_tasks:
            raise ValueError(
                f"groups must be at most {self.n_tasks}, the number of tasks, got {groups}."
            )
        n = whole_number("observe_every", observe_every, at_least=1)
        most = groups
        if groups_per_batch is not None:
            most = min(groups, whole_number("groups_per_batch", groups_per_batch, at_least=1))
        batches = [most] * (groups // most) + [groups % most] * (groups % most > 0)
        unobserved = sum(self._batch(s, groups, observes=False) for s in batches)
        observed = sum(self._batch(max(s, 2), groups, observes=True) for s in batches)
        return ((n - 1) * unobserved + observed) / n / len(batches) / self.joint

    def _batch(self, steps: int, groups: int, *, observes: bool) -> float:
        """Seconds of a batch of so many steps, each on one of so many groups."""
        whole = steps * self.encoder + steps / groups * self.heads_backward
        all_heads = observes or not self.skips_heads
        return whole + (steps if all_heads else steps / groups) * self.heads_forward

    def advice(self) -> str:
        """Whether group steps are worth trying, and with which setting.

        They are if a batch of ``GROUPS`` (3) groups with ``observe_every=10`` costs fewer than
        ``WORTH_TRYING`` (1.2) joint steps.
        """
        groups = min(GROUPS, self.n_tasks)
        cost = self.of(groups, OBSERVE_EVERY)
        skipping = dataclasses.replace(self, skips_heads=True).of(groups, OBSERVE_EVERY)
        batch = f"a batch of {groups} groups with observe_every={OBSERVE_EVERY}"
        if cost < WORTH_TRYING:
            return (
                f"Group steps are worth trying: {batch} costs {cost:.2f} joint steps, because the "
                f"heads take {self.head_share:.0%} of a joint step. Use tg.TaskGroups(tasks, "
                f"observe_every={OBSERVE_EVERY}), and compare with joint training at equal time."
            )
        if skipping < WORTH_TRYING:
            return (
                f"Train jointly with this model: {batch} costs {cost:.2f} joint steps, because all "
                f"heads run forward in every step. It would cost {skipping:.2f} with a "
                "tg.MultiTaskModel that is called with group=group, and group steps would be worth "
                "trying."
            )
        return (
            f"Train jointly if training time is what limits you: {batch} costs {cost:.2f} joint "
            "steps, and group steps that cost so much have never won at equal time. They gain at "
            "equal batches, where data is scarcer than time."
        )

    def table(self) -> str:
        """The cost of a batch of 1, 2, 3 and K groups, in joint steps."""
        every = (1, OBSERVE_EVERY)
        rows = [["groups", *(f"observe_every={n}" for n in every)]]
        rows += (
            [f"{groups}", *(f"{self.of(groups, n):.2f}" for n in every)]
            for groups in sorted({*range(1, min(GROUPS, self.n_tasks) + 1), self.n_tasks})
        )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(["", *(cell.rjust(w) for cell, w in zip(row, widths, strict=True))])
            for row in rows
        )

    def __str__(self) -> str:
        parts = {
            "encoder": self.encoder,
            "heads forward": self.heads_forward,
            "heads backward": self.heads_backward,
        }
        shares = ", ".join(f"{name} {s / self.joint:.0%}" for name, s in parts.items())
        clock = f" ({self.clock})" if self.clock else ""
        paragraphs = [
            f"A joint step takes {_duration(self.joint)}{clock}: {shares}. {self.remark}",
            "A batch of group steps costs, in joint steps:",
            "",
            self.table(),
            "",
        ]
        if not self.skips_heads:
            paragraphs.append(
                "The model does not take the group, so every step runs all heads forward, whether "
                "or not it observes."
            )
        paragraphs.append(self.advice())
        return "\n".join(
            text if "\n" in text else textwrap.fill(text, _WIDTH) for text in paragraphs
        )


_WIDTH = 88  # characters of a line


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
