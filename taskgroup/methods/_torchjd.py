"""What TorchJD keeps private and the methods need: the only file that touches it.

Written for the version in ``WRITTEN_FOR``. Importing this file imports TorchJD, which is optional:
a method imports it when it is made.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchjd import aggregation, scalarization
from torchjd.aggregation._nash_mtl import _NashMTLWeighting

__all__ = ["DWA", "FAMO", "WRITTEN_FOR", "GradVacWeighting", "NashMTLWeighting", "Watched"]

WRITTEN_FOR = "0.18"


class DWA(scalarization.DWA):
    """DWA with a history that can be read and replaced."""

    @property
    def history(self) -> tuple[Tensor | None, int, list[Tensor]]:
        """The sum of the losses ``[K]`` of this epoch, its batches, the means of up to two epochs.

        The sum is None before the first batch of an epoch.
        """
        return self._loss_sum, self._n_batches, self._previous_averages

    @history.setter
    def history(self, history: tuple[Tensor | None, int, list[Tensor]]) -> None:
        self._loss_sum, self._n_batches, self._previous_averages = history


class FAMO(scalarization.FAMO):
    """FAMO whose state has the same keys from the start: TorchJD makes Adam on its first use.

    Args:
        n_tasks: K.
        lr: of the logits.
        weight_decay: of the logits.
        device: of all that it remembers, in float32.
    """

    _optimizer: torch.optim.Adam
    _prev_losses: Tensor

    def __init__(self, n_tasks: int, lr: float, weight_decay: float, device: torch.device) -> None:
        super().__init__(n_tasks, lr=lr, weight_decay=weight_decay)
        self.to(device, torch.float32)
        zeros = torch.zeros_like(self._w, requires_grad=False)
        self._prev_losses = zeros
        self._optimizer = torch.optim.Adam([self._w], lr=lr, weight_decay=weight_decay)
        self._optimizer.state[self._w] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": zeros.clone(),
            "exp_avg_sq": zeros.clone(),
        }

    def memory(self) -> dict[str, Tensor]:
        """The tensors that it remembers, not copies; ``losses`` are those before the step."""
        adam: dict[str, Tensor] = self._optimizer.state[self._w]
        return {"logits": self._w.detach(), "losses": self._prev_losses, **adam}


class GradVacWeighting(aggregation.GradVacWeighting):
    """GradVac whose averages ``phi``, float64 ``[K, K]``, exist from the start."""

    def __init__(self, beta: float, n_tasks: int) -> None:
        super().__init__(beta)
        self.phi = torch.zeros(n_tasks, n_tasks, dtype=torch.float64, device="cpu")

    @property
    def phi(self) -> Tensor:
        """The moving averages of the cosines."""
        assert isinstance(self._phi_t, Tensor)
        return self._phi_t

    @phi.setter
    def phi(self, phi: Tensor) -> None:
        self._phi_t = phi  # type: ignore[assignment]
        self._state_key = (len(phi), phi.dtype)


class NashMTLWeighting(_NashMTLWeighting):
    """Nash-MTL that says what the solver did, and can be copied.

    TorchJD makes the convex problem in the step 0 and swallows the errors of the solver. Here the
    problem is made at once and watched, and the steps are counted from the end of the first period,
    which changes nothing else.
    """

    prvs_alpha: Any
    prob: Any

    def __init__(
        self, n_tasks: int, max_norm: float, update_weights_every: int, optim_niter: int
    ) -> None:
        super().__init__(n_tasks, max_norm, update_weights_every, optim_niter)
        self.prvs_alpha = np.ones(n_tasks)
        self.step = update_weights_every
        self._init_optim_problem()
        self.problem = self.prob

    def forward(self, matrix: Tensor, /) -> Tensor:
        """The weights ``[K]``, from a matrix ``[K, P]`` whose Gram matrix is that of the tasks."""
        self.prob = Watched(self.problem)
        return super().forward(matrix)

    @property
    def watched(self) -> Watched:
        """What the solver did in the last call."""
        found: Watched = self.prob
        return found

    @property
    def memory(self) -> tuple[Any, Any, int]:
        """The last weights, the norm of the last Gram matrix, and the number of steps."""
        return self.prvs_alpha, self.normalization_factor, int(self.step)

    @memory.setter
    def memory(self, memory: tuple[Any, Any, int]) -> None:
        self.prvs_alpha, self.normalization_factor, self.step = memory

    # A copy makes a problem of its own: copies of CVXPY's do not survive. No tensor is pickled: if
    # it is deleted before a spawned process reads it, its file is gone.
    def __reduce__(self) -> tuple[Any, ...]:
        options = self.n_tasks, self.max_norm, self.update_weights_every, self.optim_niter
        return type(self), options, self.memory

    def __setstate__(self, memory: Any) -> None:
        self.memory = memory


class Watched:
    """A CVXPY problem that counts how often it was tried and solved in one step."""

    def __init__(self, problem: Any) -> None:
        self._problem = problem
        self.tried = 0
        self.solved = 0
        self.said: object = ""  # by the solver, where it found nothing

    def solve(self, **options: Any) -> None:
        """Solve the problem and count it."""
        self.tried += 1
        try:
            with warnings.catch_warnings():
                # It is about speed alone, and the problem is small.
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
