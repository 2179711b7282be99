"""The affinity matrix, and what the loop asks of every affinity."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taskgroup._losses import Losses

__all__ = ["Affinity", "Losses"]


class Affinity:
    """A moving average of the effect of every task on every other: the base of all affinities.

    To define an affinity of your own, set ``reads_steps`` and define :meth:`observe`, or set
    ``every`` and define :meth:`measure`. Either passes what it has observed to :meth:`update`.
    :class:`TaskGroups` then makes these calls:

    - ``start(tasks)``, once.
    - In a batch that observes, if ``reads_steps``: ``observe`` in every step but the first,
      with the losses before it and those before the step before it. Such a batch takes at least
      two steps.
    - Every ``every`` rounds, unless that is None: ``draw`` at the beginning of a batch, and
      ``measure`` before the backward pass of its first step.
    - ``known()`` whenever the tasks are regrouped.

    Losses are ``[K]``, in task order, float32 or float64, on the device of the losses and without
    a graph. With several ranks they are the means over all ranks, the same on each.

    Args:
        decay: the weight of a new observation, in (0, 1].

    Attributes:
        matrix: float32 ``[K, K]``, a copy; row i is the effect of stepping task i, column k the
            effect on task k. Zero at the start; on the device of the losses once they have been
            seen.
        observed: int64 ``[K, K]``, a copy on the same device: how often each entry was observed;
            0 where it never was.
        decay: the weight of a new observation.
        reads_steps: whether ``observe`` is called; False by default.
        every: rounds from one call of ``measure`` to the next; None, the default, for no calls.

    Example:
        >>> class Signs(Affinity):
        ...     "Counts the losses that fall or rise, however far."
        ...     reads_steps = True
        ...
        ...     def observe(self, before, after, mask, following=None):
        ...         sign = (before - after).sign()  # [K]
        ...         self.update(torch.where(mask[:, None], sign, torch.nan))  # rows of the group
        >>> import taskgroup as tg
        >>> x = torch.ones(2, requires_grad=True)
        >>> groups = tg.TaskGroups(["a", "b"], affinity=Signs(decay=0.5))
        >>> for group in groups:
        ...     (gradient,) = torch.autograd.grad(group.loss(x.square() + x.sum()), x)
        ...     _ = x.data.sub_(0.1 * gradient)
        >>> groups.affinity.matrix  # of two steps the first was seen; both losses fell
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """

    reads_steps = False
    every: int | None = None
    _matrix: Tensor
    _observed: Tensor  # int32 [K, K]
    _complete: bool  # whether every entry is known to have been observed

    def __init__(self, decay: float) -> None:
        name = type(self).__name__
        if isinstance(decay, bool) or not isinstance(decay, int | float | np.floating):
            raise TypeError(f"{name} takes decay as a number in (0, 1], got {decay!r}.")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}.")
        if 0.9 <= decay < 1.0:
            warnings.warn(
                f"{name}(decay={decay:g}) gives the newest observation a weight of {decay:g} and "
                f"nearly forgets all others. To keep {decay:g} of the average at every "
                f"observation, as in momentum={decay:g}, write decay={1 - decay:.4g}.",
                stacklevel=3,
            )
        self.decay = float(decay)

    @property
    def matrix(self) -> Tensor:  # noqa: D102 (documented by the class)
        return self._matrix.clone()

    @property
    def observed(self) -> Tensor:  # noqa: D102 (documented by the class)
        return self._observed.long()

    def known(self) -> Tensor:
        """The matrix that groupings are given, with NaN where nothing was observed."""
        if self._complete:
            return self.matrix
        observed = self._observed > 0
        if observed.device.type == "cpu":  # on a GPU the host would have to wait
            self._complete = bool(observed.all())
        return torch.where(observed, self.matrix, math.nan)

    def note_known(self, known: Tensor) -> None:
        """Note what :meth:`known` gave, on the host: a GPU need not look for gaps that are gone."""
        self._complete = self._complete or math.isfinite(known.sum())

    def observe(
        self, before: Tensor, after: Tensor, mask: Tensor, following: Tensor | None = None
    ) -> None:
        """Take in the effect of one step. Called if ``reads_steps``.

        Args:
            before: losses of all tasks before the step, ``[K]``; NaN for a task not measured.
            after: the same after the step, ``[K]``.
            mask: bool ``[K]``, True for the tasks of the group that was stepped on.
            following: bool ``[K]``, the same of the group to be stepped on next, on the same batch.
        """
        raise NotImplementedError(f"{type(self).__name__} must define observe().")

    def measure(
        self,
        losses: dict[int, Tensor],
        values: Tensor,
        average: Callable[[list[list[Tensor | None]], list[Tensor]], None] | None = None,
        model: nn.Module | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take in the gradients of some tasks. Called if ``every`` is a number.

        Args:
            losses: scalars with a graph, which must be kept, by the position of the task.
            values: losses of all tasks, ``[K]``; NaN for a task not measured.
            average: replaces gradients ``[n][T]`` of n tasks on T parameters, given with these
                parameters, by their mean over the ranks; None with one rank.
            model: the :class:`MultiTaskModel` that gave the losses; None if it is not known.
            rows: where each row of the batch belongs to one task, the losses of the rows with their
                graph and the position of the task of each row. It is passed only if the loop calls
                ``group.loss(losses, rows=rows)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define measure().")

    def draw(self, present: Sequence[int]) -> tuple[int, ...]:
        """The tasks to measure, out of the positions of the present ones, ascending; default all.

        Called if ``every`` is a number.
        """
        return tuple(present)

    def update(self, values: Tensor) -> None:
        """Update the average with an observation, without waiting for its device.

        Args:
            values: ``[K, K]``; an entry that is NaN was not observed and stays as it was.
        """
        self.to(values.device)
        moved = (1 - self.decay) * self._matrix + self.decay * values
        seen = ~values.isnan()
        self._matrix.copy_(torch.where(seen, moved, self._matrix))
        self._observed += seen

    def start(self, tasks: tuple[str, ...]) -> None:
        """Set the affinity of these tasks to zero.

        Raises:
            RuntimeError: if another :class:`TaskGroups` uses this object already.
        """
        if hasattr(self, "_matrix"):
            raise RuntimeError(
                f"This {type(self).__name__} already belongs to a TaskGroups; make a new one for "
                "each."
            )
        shape = (len(tasks), len(tasks))
        self._matrix = torch.zeros(shape, dtype=torch.float32, device="cpu")
        self._observed = torch.zeros(shape, dtype=torch.int32, device="cpu")
        self._complete = False

    def to(self, device: torch.device) -> None:
        """Move to the device of the losses, without waiting for it."""
        if self._matrix.device != device:
            self._matrix = self._matrix.to(device, non_blocking=True)
            self._observed = self._observed.to(device, non_blocking=True)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that :meth:`state_dict` copies, on the devices where they lie."""
        return {"matrix": self._matrix, "observed": self._observed}

    def state_dict(self) -> dict[str, Any]:
        """Return copies on the CPU of everything that an exact resume needs."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that :meth:`state_dict` returned.

        Raises:
            ValueError: if ``state`` is of another kind of affinity, or of another number of tasks.
                Nothing has changed then.
        """
        kept = self.tensors()
        for name, value in kept.items():
            other = state.get(name)
            if (
                set(state) != set(kept)
                or not isinstance(other, Tensor)
                or other.shape != value.shape
                or other.dtype != value.dtype
            ):
                raise ValueError(
                    f"The state of a {type(self).__name__} holds a {value.dtype} {name} of shape "
                    f"{list(value.shape)}, got keys {sorted(state)}; load the checkpoint with the "
                    "affinity that wrote it."
                )
        self._load({name: value.detach().to("cpu", copy=True) for name, value in state.items()})

    def _load(self, state: dict[str, Tensor]) -> None:
        """Take over checked copies on the CPU."""
        self._matrix = state["matrix"]
        self._observed = state["observed"]
        self._complete = False
