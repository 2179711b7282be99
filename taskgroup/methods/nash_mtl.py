"""Nash-MTL: the tasks bargain for the step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from taskgroup.methods.gradient_space import GramMethod

__all__ = ["NashMTL"]

_MADE = ("_nash", "_problem")
_REMEMBERED = ("prvs_alpha", "normalization_factor", "step")  # by TorchJD


class NashMTL(GramMethod):
    r"""Nash-MTL: the Nash bargaining solution, at which all gain the same relative to their weight.

    .. math::
        G w = 1 / w, \qquad \text{then shortened to} \quad
        \Bigl\lVert \sum_k w_k g_k \Bigr\rVert \le n

    with G divided by its norm, by a sequence of convex problems (ECOS) that starts from the weights
    of the step before. From "Multi-Task Learning as a Bargaining Game" (Navon et al., ICML 2022),
    by TorchJD. Where the solver finds nothing the weights of the step before stay, as in the
    published code, and ``unsolved`` counts it; where it has never found any,
    :meth:`~JointMethod.backward` raises: published numbers of this method were equal
    weights by accident.

    Args:
        shared: the parameters that the tasks share, or the module that holds them.
        tasks: the K task names.
        max_norm: the length n at most; 0 is no limit. The published code's 1.
        update_weights_every: steps that keep their weights; 1 weighs anew in each.
        optim_niter: convex problems in a step at most; the published code's 20.

    Attributes:
        unsolved: steps that kept the weights of the one before, for want of a solution.

    Raises:
        ImportError: if TorchJD, cvxpy or ecos is missing.
        ValueError: if nothing is shared, the tasks are not K different names, or an option is out
            of its range.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = NashMTL([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": 3 * x[1]})
        >>> x.grad.round(decimals=2)  # both gain the same
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
        self._options = max_norm, update_weights_every, optim_niter
        self._make()
        self._found = False  # whether any problem was ever solved
        self.unsolved = 0

    def _make(self) -> None:
        from torchjd.aggregation import NashMTL as Aggregator

        # TorchJD gives the weighting no public name, makes its problem when step is 0, and swallows
        # what the solver says: so the problem is made here, watched, and the steps are counted from
        # one whole period, which changes nothing else.
        n_tasks = len(self._tasks)
        aggregator = Aggregator(n_tasks, *self._options)
        self._nash = cast(Any, aggregator.weighting)
        self._nash.prvs_alpha = np.ones(n_tasks)
        self._nash._init_optim_problem()
        _, self._nash.step, _ = self._options
        self._problem = self._nash.prob = _Watched(self._nash.prob)

    def _weigh(self, gram: Tensor) -> Tensor:
        # Of the matrix of gradients TorchJD uses G alone, so any root of it will do.
        values, vectors = torch.linalg.eigh(gram.double())
        self._problem.tried = self._problem.solved = 0
        before = self._nash.prvs_alpha, self._nash.step
        try:
            weights: Tensor = self._nash(vectors * values.clamp(min=0).sqrt())
            if self._problem.tried and not (self._problem.solved or self._found):
                raise ArithmeticError(f"ECOS failed: {self._problem.said}")
        except Exception:
            self._nash.prvs_alpha, self._nash.step = before  # the next step tries again
            raise
        self._found |= self._problem.solved > 0
        self.unsolved += self._problem.tried > 0 and not self._problem.solved
        return weights

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes a problem of its own: copies of cvxpy's do not survive. No tensor is made
        # here: one that is gone before a spawned process reads it would take its file with it.
        kept = {key: value for key, value in vars(self).items() if key not in _MADE}
        return kept | {name: getattr(self._nash, name) for name in _REMEMBERED}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        vars(self).update({key: value for key, value in kept.items() if key not in _REMEMBERED})
        self._make()
        for name in _REMEMBERED:
            setattr(self._nash, name, kept[name])

    def _state(self) -> dict[str, Any]:
        return {
            "alpha": _float64(self._nash.prvs_alpha),
            "normalization": _float64(self._nash.normalization_factor),
            "step": int(self._nash.step),
            "found": self._found,
            "unsolved": self.unsolved,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._nash.prvs_alpha = state["alpha"].numpy(force=True).copy()
        self._nash.normalization_factor = state["normalization"].numpy(force=True).copy()
        self._nash.step = state["step"]
        self._found = state["found"]
        self.unsolved = state["unsolved"]


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class _Watched:
    """A problem of cvxpy's that counts how often it was solved."""

    def __init__(self, problem: Any) -> None:
        self._problem = problem
        self.tried = 0
        self.solved = 0
        self.said: object = ""

    def solve(self, **options: Any) -> None:
        self.tried += 1
        try:
            with warnings.catch_warnings():
                # Of speed alone: the problem is made anew for each solve, which is small.
                warnings.filterwarnings("ignore", ".*not DPP", UserWarning)
                self._problem.solve(**options)
        except Exception as error:
            self.said = error
            raise
        values = [variable.value for variable in self._problem.variables()]
        if all(value is not None and np.isfinite(value).all() for value in values):
            self.solved += 1
        else:
            self.said = self._problem.status
