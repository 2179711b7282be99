"""What a group's step did to every task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskgroup.ops import affinity_update_

__all__ = ["ProximalAffinity"]


class ProximalAffinity:
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

    Attributes:
        matrix: float32 ``[K, K]``; row i is the effect of stepping task i, column k the effect on
            task k. Zero at the start; on the device of the losses once they have been seen.

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

    matrix: Tensor

    def __init__(self, decay: float = 1e-3) -> None:
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}.")
        self.decay = float(decay)

    def start(self, tasks: tuple[str, ...]) -> None:
        """Forget everything and follow these tasks; :class:`TaskGroups` calls it once.

        Raises:
            RuntimeError: if another :class:`TaskGroups` uses this object already.
        """
        if hasattr(self, "matrix"):
            raise RuntimeError(
                "This ProximalAffinity already belongs to a TaskGroups; make a new one for each."
            )
        self.matrix = torch.zeros(len(tasks), len(tasks))

    def observe(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Take in the effect of one step.

        Args:
            before: losses of all tasks before the step, ``[K]``; NaN for a task not measured.
            after: the same after the step, ``[K]``.
            mask: bool ``[K]``, True for the tasks of the group that was stepped.
        """
        self.to(after.device)
        affinity_update_(self.matrix, before, after, mask, self.decay)

    def to(self, device: torch.device) -> None:
        """Move the matrix to ``device``, the one of the losses."""
        if self.matrix.device != device:
            self.matrix = self.matrix.to(device)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on exactly: a copy of the matrix."""
        return {"matrix": self.matrix.detach().to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, for the same number of tasks.

        Raises:
            ValueError: if ``state`` holds no float32 matrix of the right shape.
        """
        matrix = state.get("matrix")
        shape = tuple(self.matrix.shape)
        if (
            set(state) != {"matrix"}
            or not isinstance(matrix, Tensor)
            or tuple(matrix.shape) != shape
            or matrix.dtype != torch.float32
        ):
            raise ValueError(
                f"The state of a ProximalAffinity holds one float32 matrix of shape {list(shape)}, "
                f"got keys {sorted(state)}; load the checkpoint with the affinity that wrote it."
            )
        self.matrix = matrix.detach().to("cpu", copy=True)
