"""The flat list in which the ops take the gradients of K tasks on T parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = Sequence[Sequence[Tensor | None]]  # [K] tasks of [T] parameters

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_TASKS = 1024  # that the ops take in one call


class GradientList(NamedTuple):
    """The gradients that are not None, in one flat list."""

    flat: list[Tensor]  # sorted by slot
    slots: list[int]  # parameter * K + task, for each gradient; empty if none is missing
    n_tasks: int

    def tasks(self) -> list[int]:
        """The task of each gradient."""
        return [slot % self.n_tasks for slot in self._slots()]

    def parameters(self) -> list[int]:
        """The parameter of each gradient."""
        return [slot // self.n_tasks for slot in self._slots()]

    def _slots(self) -> Sequence[int]:
        return self.slots or range(len(self.flat))


def flatten(gradients: Gradients) -> GradientList:
    """Returns the gradients in one flat list, parameter by parameter."""
    wanted = "gradients takes one list of gradients per task, as task_gradients() returns; got"
    if not isinstance(gradients, Sequence):
        raise TypeError(f"{wanted} a {type(gradients).__name__}.")
    for own in gradients:
        if not isinstance(own, Sequence):
            raise TypeError(f"{wanted} a {type(own).__name__} as one.")
    n_tasks = len(gradients)
    check_number_of_tasks(n_tasks)
    n_parameters = len(gradients[0])
    for k, own in enumerate(gradients):
        if len(own) != n_parameters:
            raise ValueError(
                f"gradients must hold one entry per parameter for every task: task {k} has "
                f"{len(own)}, task 0 has {n_parameters}. Put None where a task does not reach."
            )
    if n_parameters == 0:
        raise ValueError("gradients must hold at least one parameter per task, got empty lists.")
    flat = []
    slots = []
    slot = 0
    for t in range(n_parameters):
        for own in gradients:
            gradient = own[t]
            if gradient is not None:
                flat.append(gradient)
                slots.append(slot)
            slot += 1
    return GradientList(flat, [] if len(flat) == slot else slots, n_tasks)


def check_number_of_tasks(n_tasks: int) -> None:
    """Raises a ValueError unless the ops take the gradients of this number of tasks."""
    if not 1 <= n_tasks <= MOST_TASKS:
        raise ValueError(
            f"gradients must hold one list per task, 1 to {MOST_TASKS} of them, got {n_tasks}."
        )


def check(gradients: GradientList) -> None:
    """Raises a ValueError that names the first gradient that the ops do not take."""
    first_of: dict[int, tuple[int, Tensor]] = {}  # by parameter, its first task and gradient
    for task, t, gradient in zip(
        gradients.tasks(), gradients.parameters(), gradients.flat, strict=True
    ):
        name = f"The gradient of task {task} on tensor {t}"
        if not isinstance(gradient, Tensor):
            raise ValueError(f"{name} must be a Tensor or None, got {type(gradient).__name__}.")
        if gradient.layout != torch.strided:
            raise ValueError(
                f"{name} has layout {gradient.layout}: call .to_dense() on it, or make the "
                "embedding with sparse=False."
            )
        if gradient.is_complex():
            raise ValueError(
                f"{name} is {gradient.dtype}, and gradients must be real: call "
                "torch.view_as_real() on it."
            )
        if gradient.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {gradient.dtype}: it must be float32, float64, bfloat16 or float16."
            )
        device = gradients.flat[0].device
        if gradient.device != device:
            raise ValueError(
                f"{name} is on {gradient.device}, the first on {device}: move them to one device."
            )
        other, first = first_of.setdefault(t, (task, gradient))
        if gradient.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(gradient.shape)}, that of task {other} "
                f"{list(first.shape)}: they must be of the same parameter."
            )
        if gradient.dtype != first.dtype:
            raise ValueError(
                f"{name} is {gradient.dtype}, that of task {other} {first.dtype}: "
                "convert one of them."
            )


def gram_dtype(gradients: list[Tensor]) -> torch.dtype:
    """The dtype of the Gram matrix: float64 if any gradient is float64, else float32."""
    wide = any(gradient.dtype == torch.float64 for gradient in gradients)
    return torch.float64 if wide else torch.float32


def reference_gram(gradients: GradientList) -> Tensor:
    """The inner products in plain PyTorch, float64 ``[K, K]``, parameter by parameter."""
    check(gradients)
    first = gradients.flat[0]
    gram = torch.zeros(
        gradients.n_tasks, gradients.n_tasks, dtype=torch.float64, device=first.device
    )
    parameters = gradients.parameters()
    tasks = gradients.tasks()
    begin = 0
    while begin < len(parameters):
        end = begin
        while end < len(parameters) and parameters[end] == parameters[begin]:
            end += 1
        rows = torch.stack([gradient.flatten().double() for gradient in gradients.flat[begin:end]])
        index = torch.tensor(tasks[begin:end], dtype=torch.int64, device="cpu")
        index = index.to(first.device, non_blocking=True)
        gram.index_put_((index[:, None], index[None, :]), rows @ rows.t(), accumulate=True)
        begin = end
    return gram.triu() + gram.triu(1).t()  # a matrix product may not be symmetric bitwise


def fake_gram(gradients: list[Tensor], slots: list[int], n_tasks: int) -> Tensor:
    """The Gram matrix of tensors without data; checks the arguments."""
    check(GradientList(gradients, slots, n_tasks))
    return gradients[0].new_empty(n_tasks, n_tasks, dtype=gram_dtype(gradients))
