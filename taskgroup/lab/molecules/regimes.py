"""Planted regimes: tasks that compete with the others, and losses of unequal sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from taskgroup.lab.words import counted, kind_of, listed

__all__ = ["PLANTED", "REGIMES", "loss_factors", "plant"]

#: What is planted, by the name of the regime.
REGIMES = {
    "clean": "nothing",
    "negatives": "two tasks that compete with the others: shuffled and negated",
    "scales": "factors of the losses, spread over three decades",
}
#: The tasks that the regime "negatives" adds, in their order.
PLANTED = ("shuffled", "negated")


def plant(
    targets: Tensor, names: Sequence[str], regime: str, seed: int
) -> tuple[Tensor, tuple[str, ...]]:
    """Add the tasks of a regime to a table of targets.

    The regime ``"negatives"`` adds two tasks that compete with the others for the encoder:

    ============  ==================================================================================
    task          target
    ============  ==================================================================================
    ``shuffled``  The first target, of another molecule: the rows are permuted. It says nothing
                  about the molecule, so its gradients are noise of the size that this target's own
                  gradients have at the start. The best head predicts the median, and then little
                  of the noise reaches the encoder; what does, makes it memorise.
    ``negated``   The first target where the last one is at least 0, its mean, and minus the first
                  target elsewhere. The molecule determines it, so its gradients do not fade. No
                  linear head serves both kinds of molecules; on one of them, every head pulls the
                  encoder away from what the first target needs.
    ============  ==================================================================================

    A target with its sign changed on **all** molecules would harm nobody: its own head changes the
    sign too, and the encoder gets the gradients of the target itself, which then counts twice.
    How much the planted tasks harm depends on the network, the heads and the weights of the losses;
    training with the regime ``"clean"`` shows it.

    The other regimes add nothing; ``"scales"`` acts on losses, see :func:`loss_factors`.

    Args:
        targets: [N, K] of one split, floating point, standardised over the training split.
        names: names of the K tasks.
        regime: one of ``REGIMES``.
        seed: seed of the permutation, which stays within the split.

    Returns:
        The targets, [N, K] or [N, K + 2], as a tensor of their own in the dtype and on the device
        of those given, and the names.

    Raises:
        ValueError: if the regime is unknown, or the targets or names do not fit.

    Example:
        >>> targets = torch.tensor([[1.0, -1.0], [2.0, 1.0], [3.0, 2.0]])
        >>> planted, names = plant(targets, ["dipole", "energy"], "negatives", seed=0)
        >>> names
        ('dipole', 'energy', 'shuffled', 'negated')
        >>> planted[:, 3]
        tensor([-1.,  2.,  3.])
    """
    _check(names, regime)
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or targets.ndim != 2:
        raise ValueError(f"targets must be a floating-point tensor [N, K], got {kind_of(targets)}.")
    if targets.shape[1] != len(names):
        raise ValueError(
            f"targets has {counted(targets.shape[1], 'column')}, and names has "
            f"{counted(len(names), 'task')}: {listed(names)}."
        )
    if regime != "negatives":
        return targets.clone(), tuple(names)
    if len(names) < 2:
        raise ValueError(f"the regime 'negatives' needs two tasks at least; names is {[*names]}.")
    if taken := [name for name in PLANTED if name in names]:
        raise ValueError(f"names has {listed(taken)}, which the regime 'negatives' would add.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator, device="cpu").to(targets.device)
    first, last = targets[:, 0], targets[:, -1]
    negated = torch.where(last < 0, -first, first)
    planted = torch.stack([first[order], negated], dim=1)
    return torch.cat([targets, planted], dim=1), (*names, *PLANTED)


def loss_factors(names: Sequence[str], regime: str, seed: int) -> dict[str, float]:
    """The factors by which a regime multiplies the losses of training; metrics stay as they are.

    In the regime ``"scales"``, the factors of K tasks are evenly spaced on a logarithmic scale from
    10^-1.5 to 10^1.5, in an order drawn from the seed; their geometric mean is 1. In other regimes
    all are 1. A factor goes through the whole training: the methods of training see the scaled
    losses, as if a task were measured in another unit.

    Args:
        names: names of all K tasks of the data, also where a run trains some of them only, so that
            a task has the same factor in every run.
        regime: one of ``REGIMES``.
        seed: seed of the order.

    Returns:
        ``{task: factor}``, in the order of the names.

    Raises:
        ValueError: if the regime is unknown or a name comes twice.

    Example:
        >>> factors = loss_factors(["dipole", "homo", "cv"], "scales", seed=0)
        >>> sorted(round(factor, 3) for factor in factors.values())
        [0.032, 1.0, 31.623]
        >>> loss_factors(["dipole", "homo"], "clean", seed=0)
        {'dipole': 1.0, 'homo': 1.0}
    """
    _check(names, regime)
    if regime != "scales" or len(names) == 1:
        return dict.fromkeys(names, 1.0)
    factors = np.logspace(-1.5, 1.5, len(names))
    drawn = np.random.default_rng(seed).permutation(factors)
    return dict(zip(names, drawn.tolist(), strict=True))


def _check(names: Sequence[str], regime: str) -> None:
    """Raise if the regime is unknown, or a name is taken."""
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}; got {regime!r}.")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"names has {listed(twice)} more than once.")
