"""What the ops do with tensors without data, as ``torch.compile`` passes them.

All are registered in this one file, because torch searches all modules for every new file that
registers one, which takes a millisecond or two of ``import taskgroup``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskgroup.ops import _backend
from taskgroup.ops._gradient_list import GradientList, check, fake_gram


def _combine(gradients: list[Tensor], slots: list[int], weights: Tensor, out: list[Tensor]) -> None:
    """The op returns nothing, so there is nothing to do but to check its arguments."""
    check(GradientList(gradients, slots, len(weights)))


def _gram_affinity_update(
    matrix: Tensor, gradients: list[Tensor], slots: list[int], tasks: list[int], *rest: object
) -> None:
    """As for ``combine``."""
    check(GradientList(gradients, slots, len(tasks)))


if _backend.native.host is not None:
    torch.library.register_fake("taskgroup::combine", _combine)
    torch.library.register_fake("taskgroup::gram_affinity_update_", _gram_affinity_update)
    torch.library.register_fake("taskgroup::task_gram", fake_gram)
