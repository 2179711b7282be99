"""The affinity to first order, from inner products of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from taskgroup._arguments import parameters_of, whole_number
from taskgroup._generator import HostGenerator
from taskgroup.affinity.base import Affinity
from taskgroup.gradients.per_task import task_gradients
from taskgroup.gradients.row_tasks import row_task_gradients
from taskgroup.gradients.through_grad import gradients_through_grad
from taskgroup.ops._gradient_list import MOST_TASKS
from taskgroup.ops._sharded import any_sharded, put_shards_back
from taskgroup.ops.gram_affinity_update import gram_affinity_update_

__all__ = ["GradientAffinity"]


class GradientAffinity(Affinity):
    r"""The affinity to first order, from the gradients of single tasks.

    A small gradient step on task :math:`i` lowers the loss of task :math:`k` by the step size times
    :math:`\langle g_i, g_k \rangle`, with the gradients on the shared parameters; relative to that
    loss,

    .. math::
        A_{ik} \leftarrow (1 - \beta) A_{ik} + \beta \, \langle g_i, g_k \rangle / L_k

    The step size is left out, because it cancels when the matrix is normalised for clustering. An
    entry does not change if a gradient or loss is not finite, or the loss not positive.

    This affinity needs no second step in a batch and tells the tasks of a group apart. It costs a
    backward pass through the shared parameters for every measured task, in the first step of every
    ``every``-th round. With ``sample``, a random sample of the tasks is measured, so that the cost
    does not grow with K. If batches have labels of some tasks only, a task is measured in every
    ``every``-th of the rounds that begin with a batch that has its label. The losses of the
    measured tasks must carry a graph: :class:`MultiTaskModel` keeps it for the tasks in
    ``group.graph``, and a model called whole always has it. A compiled model needs
    ``torch._functorch.config.donated_buffer = False``. Where each row of the batch belongs to one
    task, ``group.loss(losses, rows=rows)`` makes one backward pass of the K.

    In data-parallel training the gradients are averaged over the ranks, with one all-reduce for
    each measured task. With FSDP2, call the :class:`MultiTaskModel` with ``group=group`` and make
    this object after ``fully_shard()``. With gradient accumulation, the first micro-batch is
    measured. ``observe_every`` has no effect.

    Args:
        shared: the parameters that the tasks share, or the module that holds them (the encoder).
        decay: the weight :math:`\beta` of a new observation, in (0, 1].
        every: number of rounds from one measurement to the next.
        sample: number of tasks to measure at a time, 2 to 1024; None for all of them.

    Raises:
        ValueError: if an argument is out of its range, or ``shared`` is empty; for more than 1024
            tasks without ``sample``; in the loop, if no loss depends on the shared parameters.

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
        # Without duplicates, which would count twice.
        self._shared = list(dict.fromkeys(parameters_of("shared", shared)))
        if not self._shared:
            raise ValueError("shared is empty: name the parameters that the tasks share.")
        self.every = whole_number("every", every, at_least=1)
        self._sample = None
        if sample is not None:
            self._sample = whole_number("sample", sample, at_least=2)
            if self._sample > MOST_TASKS:
                raise ValueError(f"sample must be at most {MOST_TASKS}, got {sample}.")

    def start(self, tasks: tuple[str, ...]) -> None:
        """Set the affinity of these tasks to zero."""
        if self._sample is None and len(tasks) > MOST_TASKS:
            raise ValueError(
                f"GradientAffinity measures at most {MOST_TASKS} tasks at a time, and there "
                f"are {len(tasks)}: pass sample=, the number of tasks to measure at a time, such "
                "as GradientAffinity(shared, sample=8)."
            )
        super().start(tasks)
        # The total weight of the observations of each entry. A pair is drawn less often than a
        # task, so without it the zero that the average starts from would bias pairs more.
        self._weight = torch.zeros_like(self._matrix)
        self._generator = HostGenerator(seed=0)  # the same on every rank

    @property
    def matrix(self) -> Tensor:
        """Float32 ``[K, K]``, a copy; the average of the observations, 0 where there were none."""
        if self._sample is None:
            return super().matrix
        return self._matrix / torch.where(self._weight > 0, self._weight, 1.0)

    def to(self, device: torch.device) -> None:
        """Move to the device of the losses, without waiting for it."""
        super().to(device)
        self._weight = self._weight.to(device, non_blocking=True)

    def draw(self, present: Sequence[int]) -> tuple[int, ...]:
        """The tasks to measure: all of those present, or a random sample of them."""
        if self._sample is None or self._sample >= len(present):
            return tuple(present)
        drawn = self._generator.permutation(len(present))[: self._sample]
        return tuple(sorted(present[k] for k in drawn))

    def measure(
        self,
        losses: dict[int, Tensor],
        values: Tensor,
        average: Callable[[list[list[Tensor | None]], list[Tensor]], None] | None = None,
        model: nn.Module | None = None,
        rows: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take in the gradients of some tasks; see :meth:`Affinity.measure`.

        Raises:
            ValueError: if no task reaches any of the shared parameters.
            RuntimeError: if the parameters are sharded and the model is not known.
        """
        self.to(values.device)
        if rows is not None:
            of_row, tasks = rows
            place = tasks.new_full((len(self._matrix) + 1,), -1)  # the last is for rows of no task
            place[list(losses)] = torch.arange(len(losses), dtype=place.dtype, device=place.device)
            found = row_task_gradients(of_row, place[tasks], self._shared, len(losses))
        elif not any_sharded(self._shared):
            found = task_gradients(list(losses.values()), self._shared, retain_graph=True)
        elif model is None:
            raise RuntimeError(
                "GradientAffinity on sharded parameters must know the model, whose .grad it "
                "restores: call the MultiTaskModel with group=group."
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
        for parameter, *column in zip(self._shared, *found, strict=True):
            if any(gradient is not None and gradient.is_sparse for gradient in column):
                raise ValueError(
                    f"The shared parameter of shape {list(parameter.shape)} has sparse gradients, "
                    "which GradientAffinity does not take: leave the embedding out, as in "
                    "GradientAffinity(the other shared parameters), or make it with sparse=False."
                )
        if average is not None:
            average(found, self._shared)
        self._take_in(list(losses), found, values)

    def _take_in(
        self, measured: list[int], gradients: list[list[Tensor | None]], values: Tensor
    ) -> None:
        """Update the entries of the n measured tasks."""
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
        """The tensors that :meth:`state_dict` copies."""
        return {
            **super().tensors(),
            "weight": self._weight,
            "generator": self._generator.get_state(),
        }

    def _load(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])
        super()._load(state)
        self._weight = state["weight"]
