"""Dynamic task prioritization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from taskgroup.methods.loss_space import LossMethod

__all__ = ["DTP", "Score"]

Score = Callable[[dict[str, Tensor]], Mapping[str, float | Tensor]]


class DTP(LossMethod):
    r"""Dynamic task prioritization: gives more weight to tasks with a lower score.

    .. math::
        w_k = -(1 - \kappa_k)^\gamma \log \kappa_k, \qquad
        \kappa_k \leftarrow (1 - \beta) \kappa_k + \beta \, s_k

    with a score :math:`s_k` in (0, 1), where higher is better; the average starts at the first
    score. From "Dynamic Task Prioritization for Multitask Learning" (Guo et al., ECCV 2018). Scores
    are read on the host, which waits for the device. With a ``GradScaler``, losses that are not
    finite are not scored: the average does not change, and all weights are 1 if there is no average
    yet.

    Args:
        score: a function from the detached losses of a batch, ``{task: loss}``, to
            ``{task: score}``. It may use other numbers, such as the accuracy on this batch. If the
            method is pickled, this must be a function of a module, not a lambda.
        gamma: how strongly tasks with a low score are preferred; 0 or more. The paper leaves the
            choice to the user.
        decay: the weight :math:`\beta` of a new score, in (0, 1]. The paper leaves the choice to
            the user.

    Raises:
        ValueError: if there is no score, or an option is out of range.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> likelihood = lambda losses: {task: loss.neg().exp() for task, loss in losses.items()}
        >>> method = DTP([x], ["a", "b"], score=likelihood)
        >>> method.backward({"a": x.sum(), "b": 0.5 * x.sum()})
        tensor([1.7293, 0.6321])
    """

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        score: Score | None = None,
        gamma: float = 1.0,
        decay: float = 0.1,
    ) -> None:
        super().__init__(shared, tasks)
        if not callable(score):
            raise ValueError(
                "DTP needs a score in (0, 1) per task, such as accuracy or exp(-cross entropy): "
                "pass score=f, where f({task: loss}) returns {task: score}."
            )
        if not gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {gamma!r}.")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}.")
        self._score = score
        self._gamma = gamma
        self._decay = decay
        self._average = torch.full(
            (len(self._tasks),), torch.nan, dtype=torch.float64, device="cpu"
        )

    def _weigh(self, values: Tensor, scaler: GradScaler | None) -> Tensor:
        if scaler is None or values.isfinite().all():
            self._take_in(values)
        weights = -((1 - self._average) ** self._gamma) * self._average.log()
        return weights.nan_to_num(nan=1.0).float()

    def _take_in(self, values: Tensor) -> None:
        scores = self._score(dict(zip(self._tasks, values.unbind(), strict=True)))
        if not isinstance(scores, Mapping) or set(scores) != set(self._tasks):
            raise ValueError(
                f"score must return {{task: score}} for the tasks {list(self._tasks)}, got "
                f"{list(scores) if isinstance(scores, Mapping) else type(scores).__name__}."
            )
        found = [float(scores[task]) for task in self._tasks]
        for task, score in zip(self._tasks, found, strict=True):
            if not 0 < score < 1:
                raise ValueError(
                    f"The score of task {task!r} is {score}, but must be in (0, 1); if it can "
                    "reach 0 or 1, clamp it."
                )
        new = torch.tensor(found, dtype=torch.float64, device="cpu")
        first = self._average.isnan()
        self._average = torch.where(first, new, self._average.lerp(new, self._decay))

    def _state(self) -> dict[str, Any]:
        return {"average": self._average.clone()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._average = state["average"].to("cpu", copy=True)
