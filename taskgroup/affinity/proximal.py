"""The proximal inter-task affinity of the paper, read off the training steps."""

from __future__ import annotations

from torch import Tensor

from taskgroup.affinity.base import Affinity
from taskgroup.ops.affinity_update import update_checked_

__all__ = ["ProximalAffinity"]


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
            1e-4 over 40,000 batches; shorter runs need more.

    Raises:
        ValueError: if ``decay`` is outside (0, 1].

    Example:
        >>> import torch
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

    def observe(
        self, before: Tensor, after: Tensor, mask: Tensor, following: Tensor | None = None
    ) -> None:
        """Take in the effect of one step; see :meth:`Affinity.observe`."""
        self.to(after.device)
        update_checked_(self._matrix, before, after, mask, self.decay, self._observed)
