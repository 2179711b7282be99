"""The private parts of TorchJD that the methods need; no other file touches them.

This file is written for TorchJD ``WRITTEN_FOR``. It imports TorchJD, which is optional, so a method
imports this file only when it is created.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchjd import aggregation
from torchjd.aggregation._nash_mtl import _NashMTLWeighting

__all__ = ["WRITTEN_FOR", "GradVacWeighting", "NashMTLWeighting", "Watched"]

WRITTEN_FOR = "0.18"


class GradVacWeighting(aggregation.GradVacWeighting):
    """GradVac whose averages, float64 ``[K, K]``, exist from the start."""

    def __init__(self, beta: float, n_tasks: int) -> None:
        super().__init__(beta)
        phi = torch.zeros(n_tasks, n_tasks, dtype=torch.float64, device="cpu")
        self._phi_t = phi  # type: ignore[assignment]
        self._state_key = (n_tasks, phi.dtype)

    @property
    def phi(self) -> Tensor:
        """The moving averages themselves, not a copy."""
        assert isinstance(self._phi_t, Tensor)
        return self._phi_t


class NashMTLWeighting(_NashMTLWeighting):
    """Nash-MTL that can be copied and reports what the solver did.

    TorchJD creates the convex problem when the step count is 0, and hides the errors of the solver.
    Here the problem is created by the constructor and watched. To keep TorchJD from creating it
    again, the step count starts at ``update_weights_every``, which has the same effect as 0.
    """

    prvs_alpha: Any
    prob: Any
    watched: Watched  # the solver's record of the last call

    def __init__(
        self, n_tasks: int, max_norm: float, update_weights_every: int, optim_niter: int
    ) -> None:
        super().__init__(n_tasks, max_norm, update_weights_every, optim_niter)
        self.prvs_alpha = np.ones(n_tasks)
        self.step = update_weights_every
        self._init_optim_problem()
        self.problem = self.prob

    def forward(self, matrix: Tensor, /) -> Tensor:
        """Compute the weights ``[K]`` from a square root ``[K, K]`` of the Gram matrix."""
        self.watched = self.prob = Watched(self.problem)
        return super().forward(matrix)

    @property
    def memory(self) -> tuple[Any, Any, int]:
        """The last weights, the norm of the last Gram matrix, and the number of steps."""
        return self.prvs_alpha, self.normalization_factor, int(self.step)

    @memory.setter
    def memory(self, memory: tuple[Any, Any, int]) -> None:
        self.prvs_alpha, self.normalization_factor, self.step = memory

    # A copy creates its own problem, because copies of CVXPY problems do not work. No tensor is
    # pickled: its file would be gone if it were deleted before a spawned process reads it.
    def __reduce__(self) -> tuple[Any, ...]:
        options = self.n_tasks, self.max_norm, self.update_weights_every, self.optim_niter
        return type(self), options, self.memory

    def __setstate__(self, memory: Any) -> None:
        self.memory = memory


class Watched:
    """A CVXPY problem that counts how often it was tried and how often solved."""

    def __init__(self, problem: Any) -> None:
        self._problem = problem
        self.tried = 0
        self.solved = 0
        self.said: object = ""  # the solver's last error or status

    def solve(self, **options: Any) -> None:
        """Solve the problem and count it."""
        self.tried += 1
        try:
            with warnings.catch_warnings():
                # The warning is about speed, and the problem is small.
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
