"""Nash-MTL: the step is the solution of a bargaining game between the tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taskgroup.methods.gradient_space import GramMethod

__all__ = ["NashMTL"]


class NashMTL(GramMethod):
    r"""Nash-MTL: takes the Nash bargaining solution as the step.

    .. math::
        G w = 1 / w, \qquad \text{then shortened to} \quad
        \Bigl\lVert \sum_k w_k g_k \Bigr\rVert \le n

    with G divided by its norm. A sequence of convex problems, which starts from the weights of the
    last step, is solved by ECOS. From "Multi-Task Learning as a Bargaining Game" (Navon et al.,
    ICML 2022), computed by TorchJD. If the solver finds no solution, the weights of the last step
    stay, as in the published code, and ``unsolved`` counts the step. If it has never found one,
    :meth:`~JointMethod.backward` raises: otherwise the weights would silently be equal, as in some
    published results.

    Args:
        max_norm: the maximal length n of the step; 0 is no limit. The published code uses 1.
        update_weights_every: the number of steps that share their weights; 1 computes new weights
            in every step.
        optim_niter: the maximal number of convex problems in a step; the published code uses 20.

    Attributes:
        unsolved: the number of steps that kept the weights of the last one, because the solver
            found no solution.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = NashMTL([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": 3 * x[1]})
        >>> x.grad.round(decimals=2)  # both tasks gain the same
        tensor([0.7100, 0.7100])
    """

    _requires: ClassVar[tuple[str, ...]] = ("torchjd", "cvxpy", "ecos")

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        max_norm: float = 1.0,
        update_weights_every: int = 1,
        optim_niter: int = 20,
    ) -> None:
        super().__init__(shared, tasks)
        from taskgroup.methods._torchjd import NashMTLWeighting

        self._weighting: NashMTLWeighting = NashMTLWeighting(
            len(self._tasks), max_norm, update_weights_every, optim_niter
        )
        self._found = False  # whether the solver has ever found a solution
        self.unsolved = 0

    def _weigh(self, gram: Tensor) -> Tensor:
        # TorchJD uses only the Gram matrix of the Jacobian, so any square root of G can stand in
        # for the Jacobian.
        values, vectors = torch.linalg.eigh(gram.double())
        before = self._weighting.memory
        try:
            weights = self._weighting(vectors * values.clamp(min=0).sqrt())
            solver = self._weighting.watched
            if solver.tried and not (solver.solved or self._found):
                raise ArithmeticError(f"ECOS failed: {solver.said}")
        except Exception:
            self._weighting.memory = before  # the next step tries again
            raise
        self._found |= solver.solved > 0
        self.unsolved += solver.tried > 0 and not solver.solved
        return weights

    def _state(self) -> dict[str, Any]:
        alpha, normalization, step = self._weighting.memory
        return {
            "alpha": _float64(alpha),
            "normalization": _float64(normalization),
            "step": step,
            "found": self._found,
            "unsolved": self.unsolved,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        alpha, normalization = (
            state[name].numpy(force=True).copy() for name in ("alpha", "normalization")
        )
        self._weighting.memory = alpha, normalization, state["step"]
        self._found = state["found"]
        self.unsolved = state["unsolved"]


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")
