"""The methods that compute weights from inner products of gradients, without memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn

from taskgroup.methods.gradient_space import GramMethod

__all__ = ["IMTLG", "MGDA", "AlignedMTL", "CAGrad", "FairGrad", "PCGrad", "UPGrad"]


def _as_it_is(gram: Tensor) -> Tensor:
    """For weightings that estimate the rank: float64 would make rounding errors look like rank."""
    return gram


def _of_trace_one(gram: Tensor) -> Tensor:
    """Scaled to trace 1, for weightings that treat numbers below 1e-4 as zero."""
    return (gram / gram.diagonal().sum()).double()


class _StatelessMethod(GramMethod):
    """Creates a weighting of ``torchjd.aggregation`` by its name and options."""

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        weighting: str,
        **options: Any,
    ) -> None:
        super().__init__(shared, tasks)
        self._weighting = getattr(import_module("torchjd.aggregation"), weighting)(**options)


class MGDA(_StatelessMethod):
    r"""MGDA: takes the shortest convex combination of the gradients.

    .. math::
        \min_{w \ge 0,\ \sum_k w_k = 1} \Bigl\lVert \sum_k w_k g_k \Bigr\rVert^2

    solved by Frank-Wolfe. From "Multiple-gradient descent algorithm for multiobjective
    optimization" (Désidéri, 2012) and "Multi-Task Learning as Multi-Objective Optimization" (Sener
    and Koltun, NeurIPS 2018), computed by TorchJD.

    Args:
        epsilon: Frank-Wolfe stops when its step is smaller than this.
        max_iters: the maximal number of its iterations.

    Raises:
        ValueError: if an option is not positive.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = MGDA([x], ["a", "b"])
        >>> method.backward({"a": x[0] + x[1], "b": 2 * x[0] - x[1]})
        tensor([0.8000, 0.2000])
        >>> x.grad
        tensor([1.2000, 0.6000])
    """

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        epsilon: float = 1e-3,
        max_iters: int = 100,
    ) -> None:
        super().__init__(shared, tasks, "MGDAWeighting", epsilon=epsilon, max_iters=max_iters)


class PCGrad(_StatelessMethod):
    r"""PCGrad: projects away from each gradient what conflicts with the others, one by one.

    .. math::
        \hat g_i \leftarrow \hat g_i - \frac{\langle \hat g_i, g_j \rangle}{\lVert g_j \rVert^2} g_j
        \quad \text{where} \quad \langle \hat g_i, g_j \rangle < 0

    for all j in random order (torch's global generator). The step is the sum of all
    :math:`\hat g_i`. From "Gradient Surgery for Multi-Task Learning" (Yu et al., NeurIPS 2020),
    computed by TorchJD.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = PCGrad([x], ["a", "b"])
        >>> method.backward({"a": x[0], "b": x[1] - x[0]})
        tensor([2.0000, 1.5000])
        >>> x.grad
        tensor([0.5000, 1.5000])
    """

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks, "PCGradWeighting")


class CAGrad(_StatelessMethod):
    r"""CAGrad: searches near the mean gradient for what is best for the task that gains least.

    .. math::
        \max_d \min_k \langle g_k, d \rangle \quad \text{s.t.} \quad
        \lVert d - g_0 \rVert \le c \lVert g_0 \rVert, \qquad g_0 = \tfrac1K \sum_k g_k

    From "Conflict-Averse Gradient Descent for Multi-task Learning" (Liu et al., NeurIPS 2021),
    computed by TorchJD. At a Pareto-stationary point the weights are zero.

    Args:
        c: how far the direction may be from the mean, 0 or more; the paper uses 0.4.

    Raises:
        ValueError: if c is negative.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = CAGrad([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": 3 * x[1]})
        >>> weights.round(decimals=2)  # the smaller gradient gets more
        tensor([1.1300, 0.5000])
    """

    _requires: ClassVar[tuple[str, ...]] = ("torchjd", "cvxpy", "clarabel")
    _prepared = staticmethod(_of_trace_one)

    def __init__(
        self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str], c: float = 0.4
    ) -> None:
        super().__init__(shared, tasks, "CAGradWeighting", c=c)


class IMTLG(_StatelessMethod):
    r"""IMTL-G: takes the combination whose projections on all gradients are equal.

    .. math::
        \Bigl\langle \sum_j w_j g_j, \frac{g_k}{\lVert g_k \rVert} \Bigr\rangle
        \ \text{the same for all } k, \qquad \sum_k w_k = 1

    From "Towards Impartial Multi-task Learning" (Liu et al., ICLR 2021), computed by TorchJD; the
    gradients may be linearly dependent.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = IMTLG([x], ["a", "b"])
        >>> method.backward({"a": x[0], "b": 3 * x[1]})
        tensor([0.7500, 0.2500])
        >>> x.grad
        tensor([0.7500, 0.7500])
    """

    _prepared = staticmethod(_as_it_is)

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks, "IMTLGWeighting")


class AlignedMTL(_StatelessMethod):
    r"""Aligned-MTL: makes the gradients orthogonal and equally long, then averages them.

    .. math::
        w = \sqrt{\lambda_{\min}} \, V \Lambda^{-1/2} V^\top \tfrac1K \mathbf 1,
        \qquad G = V \Lambda V^\top

    over the nonzero eigenvalues. From "Independent Component Alignment for Multi-Task Learning"
    (Senushkin et al., CVPR 2023), computed by TorchJD.

    Args:
        scale_mode: how the common length follows from the eigenvalues: ``"min"`` (the paper's
            choice), ``"median"`` or ``"rmse"``.

    Raises:
        ValueError: if ``scale_mode`` is not one of these.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = AlignedMTL([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": 3 * x[1]})
        >>> x.grad
        tensor([0.5000, 0.5000])
    """

    _prepared = staticmethod(_as_it_is)

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        scale_mode: str = "min",
    ) -> None:
        if scale_mode not in ("min", "median", "rmse"):
            raise ValueError(f"scale_mode must be 'min', 'median' or 'rmse', got {scale_mode!r}.")
        super().__init__(shared, tasks, "AlignedMTLWeighting", scale_mode=scale_mode)


class UPGrad(_StatelessMethod):
    r"""UPGrad: projects each gradient to where it conflicts with none, then averages them.

    .. math::
        \frac1K \sum_k \operatorname*{argmin}_{x:\ \langle x, g_j \rangle \ge 0 \ \forall j}
        \lVert x - g_k \rVert

    From "Jacobian Descent for Multi-Objective Optimization" (Quinton and Rey, 2024, arXiv
    2406.16232), computed by TorchJD.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = UPGrad([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": x[1] - x[0]})
        >>> x.grad.round(decimals=2)
        tensor([0.2500, 0.7500])
    """

    _requires: ClassVar[tuple[str, ...]] = ("torchjd", "qpsolvers", "quadprog")
    _prepared = staticmethod(_of_trace_one)

    def __init__(self, shared: nn.Module | Iterable[Tensor], tasks: Sequence[str]) -> None:
        super().__init__(shared, tasks, "UPGradWeighting")


class FairGrad(_StatelessMethod):
    r"""FairGrad: divides the gain among the tasks by alpha-fairness.

    .. math::
        G w = w^{-1 / \alpha}

    From "Fair Resource Allocation in Multi-Task Learning" (Ban and Ji, ICML 2024), computed by
    TorchJD.

    Args:
        alpha: the fairness. 1 is proportional fairness, larger values approach max-min fairness;
            the published code uses 2.
        max_iters: the maximal number of evaluations by the solver; None is SciPy's default, 100 K.

    Raises:
        ValueError: if alpha is not positive.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, requires_grad=True)
        >>> method = FairGrad([x], ["a", "b"])
        >>> weights = method.backward({"a": x[0], "b": 8 * x[1]})
        >>> weights.round(decimals=3)  # (1, 64) to the power of -2/3
        tensor([1.0000, 0.0620])
    """

    _requires: ClassVar[tuple[str, ...]] = ("torchjd", "scipy")
    _prepared = staticmethod(_of_trace_one)

    def __init__(
        self,
        shared: nn.Module | Iterable[Tensor],
        tasks: Sequence[str],
        alpha: float = 2.0,
        max_iters: int | None = None,
    ) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha!r}.")
        super().__init__(shared, tasks, "FairGradWeighting", alpha=alpha, max_iters=max_iters)
        self._alpha = alpha

    def _weigh(self, gram: Tensor) -> Tensor:
        # The solver is accurate for numbers near 1, and the scale has a closed form.
        scale = gram.diagonal().sum().double() ** (-self._alpha / (self._alpha + 1))
        return super()._weigh(gram) * scale
