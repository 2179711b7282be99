"""How stepping one task affects another: measured on the steps, or from gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taskgroup.arguments import whole_number
from taskgroup.distributed import Ranks
from taskgroup.generator import HostGenerator
from taskgroup.gradients import gradients_through_grad, task_gradients
from taskgroup.ops import gram_affinity_update_
from taskgroup.ops._sharded import any_sharded, put_shards_back
from taskgroup.ops.affinity_update import update_checked_

__all__ = ["Affinity", "GradientAffinity", "ProximalAffinity"]

# What task_gram takes in one call.
_MOST_MEASURED = 1024


class Affinity:
    """A moving average of the effect of every task on every other: base of the affinities.

    Args:
        decay: the weight of a new observation, in (0, 1].

    Attributes:
        matrix: float32 ``[K, K]``, a copy; row i is the effect of stepping task i, column k the
            effect on task k. Zero at the start; on the device of the losses once they have been
            seen.
        observed: int64 ``[K, K]``, a copy on the same device: how often each entry was observed;
            0 where it never was.
        decay: the weight of a new observation.
        every: rounds of a task from one measurement of its gradient to the next; None for an
            affinity that takes no gradients.
        reads_steps: True where :class:`taskgroup.TaskGroups` must show it what a step did,
            which takes two steps in a batch.
    """

    reads_steps = False
    every: int | None = None
    _matrix: Tensor
    _observed: Tensor  # int32 [K, K]
    _complete: bool  # every entry was observed, as far as is known

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
        """The matrix with NaN where nothing was observed, as groupings that take NaN read it."""
        if self._complete:
            return self.matrix
        observed = self._observed > 0
        if observed.device.type == "cpu":  # elsewhere it would have to be waited for
            self._complete = bool(observed.all())
        return torch.where(observed, self.matrix, math.nan)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Begin with zeros for these tasks; :class:`TaskGroups` calls it once.

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
        """Move to ``device``, the one of the losses, without waiting for it."""
        if self._matrix.device != device:
            self._matrix = self._matrix.to(device, non_blocking=True)
            self._observed = self._observed.to(device, non_blocking=True)

    def draw(self, present: Sequence[int]) -> tuple[int, ...]:
        """Which of the tasks at these positions to measure by their gradients, now that it is due.

        Called only where :attr:`every` is a number.
        """
        return tuple(present)

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`state_dict` copies, on the devices where it lies."""
        return {"matrix": self._matrix, "observed": self._observed}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: copies, on the CPU."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, for the same number of tasks.

        Raises:
            ValueError: if ``state`` is not of such an affinity, or of other tasks. Nothing has
                changed then.
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
        """Take over copies that have been checked."""
        self._matrix = state["matrix"]
        self._observed = state["observed"]
        self._complete = False


class ProximalAffinity(Affinity):
    r"""The proximal inter-task affinity, read off the training steps themselves.

    A step on group :math:`S` changes the loss of task :math:`k` on the same batch from
    :math:`L_k` to :math:`L_k'`. The relative gain :math:`1 - L_k' / L_k`, shared among the tasks of
    the group, is what entry :math:`(i, k)`, :math:`i \in S`, of the matrix follows:

    .. math::
        r_k = \operatorname{clamp}(1 - L_k' / L_k, -1, 1) / |S|, \qquad
        A_{ik} \leftarrow (1 - \beta) A_{ik} + \beta\, o_{ik}

    where :math:`o_{ik} = r_k` for :math:`k \notin S`. Inside the group the shares cannot be told
    apart, so signs decide: :math:`o_{ii} = r_i`, only if :math:`r_i \ge 0`; for
    :math:`k \in S, k \ne i`, :math:`o_{ik} = r_k` if :math:`r_i r_k \ge 0`, else
    :math:`-\max(r_i, r_k)`. From "Selective Task Group Updates for Multi-Task Optimization"
    (ICLR 2025, arXiv 2502.11986), with the change credited to the group whose step caused it.

    Args:
        decay: the weight :math:`\beta` of a new observation, in (0, 1]. The paper uses 1e-3 and
            1e-4 over 40,000 batches; short runs want more.

    Raises:
        ValueError: if ``decay`` is outside (0, 1].

    Example:
        >>> affinity = ProximalAffinity(decay=0.5)
        >>> affinity.start(("depth", "normal"))
        >>> before, after = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
        >>> affinity.observe(before, after, torch.tensor([True, False]))   # a step on depth
        >>> affinity.matrix        # served depth by a half, harmed normal by a half
        tensor([[ 0.2500, -0.2500],
                [ 0.0000,  0.0000]])
    """

    reads_steps = True

    def __init__(self, decay: float = 1e-3) -> None:
        super().__init__(decay)

    def observe(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Take in the effect of one step.

        Args:
            before: losses of all tasks before the step, ``[K]``; NaN for a task not measured.
            after: the same after the step, ``[K]``.
            mask: bool ``[K]``, True for the tasks of the group that was stepped.
        """
        self.to(after.device)
        update_checked_(self._matrix, before, after, mask, self.decay, self._observed)


class GradientAffinity(Affinity):
    r"""The affinity to first order, from the gradients of single tasks.

    A small gradient step on task :math:`i` lowers the loss of task :math:`k` by the step size times
    :math:`\langle g_i, g_k \rangle`, with the gradients on the shared parameters; relative to that
    loss,

    .. math::
        A_{ik} \leftarrow (1 - \beta) A_{ik} + \beta \, \langle g_i, g_k \rangle / L_k

    The step size is left out: it cancels where the matrix is normalised for clustering. Where a
    gradient or loss is not finite, or the loss not positive, the entry stays.

    It needs no second step in a batch and tells the tasks of a group apart, at the price of a
    backward pass through the shared parameters for every measured task: in the first step of every
    ``every``-th round, for all tasks or a random ``sample`` of them, so that the price need not
    grow with K. Where batches have labels of some tasks only, every task is measured in every
    ``every``-th of the rounds that begin with a label of it, so that data sets that take turns are
    all measured. The losses of the measured tasks must then carry a graph: :class:`MultiTaskModel`
    keeps it for the tasks in ``group.graph``, a model called whole has it anyway. A compiled model
    needs ``torch._functorch.config.donated_buffer = False``.

    In data-parallel training gradients are averaged over the ranks, one all-reduce for each
    measured task; for parameters that FSDP2 shards, call the :class:`MultiTaskModel` with
    ``group=group`` and make this object after ``fully_shard()``. With gradient accumulation the
    first micro-batch is measured. ``observe_every`` plays no part.

    Args:
        shared: the parameters that the tasks share, or the module that holds them (the encoder).
        decay: the weight :math:`\beta` of a new observation, in (0, 1].
        every: rounds from one measurement to the next.
        sample: how many tasks to measure at a time, 2 to 1024; None is all of them.

    Raises:
        ValueError: if an argument is out of its range, or nothing is shared; for more than 1024
            tasks without ``sample``; in the loop, if no task reaches what is shared.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> target = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([3.0, -1.0])}
        >>> import taskgroup as tg
        >>> groups = tg.TaskGroups(list(target), affinity=GradientAffinity([x], decay=1.0))
        >>> for group in groups:
        ...     losses = {t: (x - target[t]).square().sum() for t in group.observed}
        ...     group.loss(losses).backward()
        >>> groups.affinity.matrix
        tensor([[4.0000, 3.2000],
                [3.2000, 4.0000]])
    """

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        decay: float = 1e-2,
        every: int = 1,
        sample: int | None = None,
    ) -> None:
        super().__init__(decay)
        found = shared.parameters() if isinstance(shared, nn.Module) else shared
        self._shared = list(dict.fromkeys(found))  # each once, or it would count twice
        if not self._shared:
            raise ValueError("shared is empty: name the parameters that the tasks share.")
        for parameter in self._shared:
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    "shared takes a module or its parameters, model.encoder for instance; got a "
                    f"{type(parameter).__name__} among them."
                )
        self.every = whole_number("every", every, at_least=1)
        self._sample = None
        if sample is not None:
            self._sample = whole_number("sample", sample, at_least=2)
            if self._sample > _MOST_MEASURED:
                raise ValueError(f"sample must be at most {_MOST_MEASURED}, got {sample}.")

    def start(self, tasks: tuple[str, ...]) -> None:
        """Begin with zeros for these tasks; :class:`TaskGroups` calls it once."""
        if self._sample is None and len(tasks) > _MOST_MEASURED:
            raise ValueError(
                f"GradientAffinity measures at most {_MOST_MEASURED} tasks at a time, and there "
                f"are {len(tasks)}: pass sample=, the number of tasks to measure at a time, such "
                "as GradientAffinity(shared, sample=8)."
            )
        super().start(tasks)
        # How much of each entry has been observed: a pair is drawn less often than a task, and the
        # zero that the average starts from would pull it down further.
        self._weight = torch.zeros_like(self._matrix)
        self._generator = HostGenerator(seed=0)  # the same on every rank

    @property
    def matrix(self) -> Tensor:
        """Float32 ``[K, K]``, a copy; the average over what was observed, 0 where nothing was."""
        if self._sample is None:
            return super().matrix
        return self._matrix / torch.where(self._weight > 0, self._weight, 1.0)

    def to(self, device: torch.device) -> None:
        """Move to ``device``, the one of the losses, without waiting for it."""
        super().to(device)
        self._weight = self._weight.to(device, non_blocking=True)

    def draw(self, present: Sequence[int]) -> tuple[int, ...]:
        """Which of the tasks at these positions to measure: all, or a random sample of them."""
        if self._sample is None or self._sample >= len(present):
            return tuple(present)
        drawn = self._generator.permutation(len(present))[: self._sample]
        return tuple(sorted(present[k] for k in drawn))

    def measure(
        self,
        losses: dict[int, Tensor],
        values: Tensor,
        ranks: Ranks,
        model: nn.Module | None = None,
    ) -> None:
        """Take in the gradients of some tasks; their graph is kept.

        Args:
            losses: scalars with a graph, by the position of the task.
            values: losses of all tasks, ``[K]``, without a graph; NaN for a task not measured.
            ranks: those whose gradients are averaged.
            model: that gave the losses; None where it is not known.

        Raises:
            ValueError: if no task reaches any of the shared parameters.
            RuntimeError: if these are sharded and the model is not known.
        """
        self.to(values.device)
        if not any_sharded(self._shared):
            found = task_gradients(list(losses.values()), self._shared, retain_graph=True)
        elif model is None:
            raise RuntimeError(
                "GradientAffinity on sharded parameters must know the model, whose .grad it puts "
                "back: call the MultiTaskModel with group=group."
            )
        else:
            put_shards_back(model)
            found = gradients_through_grad(
                list(losses.values()), self._shared, model.parameters(), retain_graph=True
            )
        if all(gradient is None for own in found for gradient in own):
            raise ValueError(
                "No task reaches any of the shared parameters that GradientAffinity was given. If "
                "the model has got others since, from fully_shard() for instance, make the "
                "GradientAffinity after that; if gradients are accumulated under FSDP, keep "
                "set_requires_gradient_sync(True) in the first micro-batch, which is measured."
            )
        if ranks.number > 1:
            ranks.mean_gradients(found, self._shared)
        self._take_in(list(losses), found, values)

    def _take_in(
        self, measured: list[int], gradients: list[list[Tensor | None]], values: Tensor
    ) -> None:
        """The inner products of n tasks, at their places in the matrix."""
        if len(measured) == len(self._matrix) and self._sample is None:
            gram_affinity_update_(
                self._matrix, gradients, values, self.decay, observed=self._observed
            )
            return
        index = torch.tensor(measured, dtype=torch.int64, device="cpu")
        index = index.to(values.device, non_blocking=True)
        at = (index[:, None], index)
        matrix, observed = self._matrix[at], self._observed[at]
        gram_affinity_update_(matrix, gradients, values[index], self.decay, observed=observed)
        if self._sample is not None:
            weight = self._weight[at]
            more = weight + self.decay * (1 - weight)
            self._weight[at] = torch.where(observed > self._observed[at], more, weight)
        self._matrix[at], self._observed[at] = matrix, observed

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`state_dict` copies; the state of the generator is a copy already."""
        return {
            **super().tensors(),
            "weight": self._weight,
            "generator": self._generator.get_state(),
        }

    def _load(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
        super()._load(state)
        self._weight = state["weight"]
