"""A shared encoder with a head per task, of which a step runs no more than it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from taskgroup.statistics import statistics_once

if TYPE_CHECKING:
    from taskgroup.schedule import Group

__all__ = ["MultiTaskModel"]


class TaskHeads(nn.Module, Mapping[str, nn.Module]):
    """A mapping from task to head that is a module; task names may hold dots."""

    __eq__ = object.__eq__  # a module is itself, whatever its contents
    __hash__ = object.__hash__

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("MultiTaskModel needs at least one head, got none.")
        # Module names may hold no dot: it separates them in the keys of a state_dict.
        self._module_name = {task: task.replace(".", "/") for task in heads}
        if len(set(self._module_name.values())) < len(heads):
            raise ValueError(
                f"Two of the tasks {list(heads)} differ only in '.' and '/'; rename one."
            )
        for task, head in heads.items():
            if not isinstance(head, nn.Module):
                raise TypeError(
                    f"The head of task {task!r} must be a module, got {type(head).__name__}."
                )
            # Not by add_module(), which refuses a task called "keys" or "type".
            self._modules[self._module_name[task]] = head

    def __getitem__(self, task: str) -> nn.Module:
        head = self._modules[self._module_name[task]]
        assert head is not None
        return head

    def __iter__(self) -> Iterator[str]:
        return iter(self._module_name)

    def __len__(self) -> int:
        return len(self._module_name)


class MultiTaskModel(nn.Module):
    """An encoder whose features feed one head per task.

    Called with a :class:`~taskgroup.Group`, it runs the encoder once, the heads of ``group.graph``
    with a graph, the other observed heads without one on detached features, and leaves out the
    rest. Heads outside the group get no gradient, so they stay where they are, and their backward
    pass is never paid for. Running statistics (BatchNorm) move once per batch then, see
    :func:`statistics_once`.

    ``DistributedDataParallel`` wants ``find_unused_parameters=True``: the heads that a step leaves
    out have no gradient to wait for.

    Args:
        encoder: any module; its output may be any nesting of tuples, lists and dicts of tensors.
        heads: ``{task: module}``; each takes the output of the encoder.

    Attributes:
        encoder: the encoder.
        heads: a mapping from task to head. In the keys of the ``state_dict`` a dot in a task name
            becomes a slash.

    Example:
        >>> heads = {"depth": nn.Linear(4, 1), "edge": nn.Identity()}
        >>> model = MultiTaskModel(nn.Linear(3, 4), heads)
        >>> {task: tuple(output.shape) for task, output in model(torch.ones(2, 3)).items()}
        {'depth': (2, 1), 'edge': (2, 4)}
    """

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = TaskHeads(heads)

    def forward(self, *args: Any, group: Group | None = None, **kwargs: Any) -> dict[str, Any]:
        """The outputs of the tasks.

        Args:
            *args: to the encoder.
            group: the step this forward is for; None runs every head with a graph.
            **kwargs: to the encoder.

        Returns:
            ``{task: output}``; with a group only the tasks in ``group.observed``.

        Raises:
            ValueError: if the group has a task without a head.
            RuntimeError: under ``DistributedDataParallel`` without ``find_unused_parameters=True``.
        """
        if group is None:
            features = self.encoder(*args, **kwargs)
            return {task: head(features) for task, head in self.heads.items()}
        graph, observed = set(group.graph), set(group.observed)
        if headless := sorted(observed.difference(self.heads)):
            raise ValueError(
                f"The group needs tasks {headless}, which have no head; the heads are "
                f"{list(self.heads)}."
            )
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and len(graph) < len(self.heads) and not compiling:
            _check_that_ddp_finds_unused_parameters()
        group.model = self
        with statistics_once(self.encoder, group):
            features = self.encoder(*args, **kwargs)
        detached = None
        outputs = {}
        # In the order of the heads, whatever the group: replayed dropout then draws the same masks.
        for task, head in self.heads.items():
            if task in graph:
                with statistics_once(head, group):
                    outputs[task] = head(features)
            elif task in observed:
                if detached is None:
                    detached = tree_map_only(Tensor, Tensor.detach, features)
                with torch.no_grad(), statistics_once(head, group):
                    outputs[task] = head(detached)
        return outputs

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the encoder and each head apart, in place, with ``torch.compile``'s arguments.

        One graph for the encoder and two per head, with and without gradients, then serve every
        sequence of groups: at most 1 + 2K for inputs of one shape; heads of one kind share theirs.
        """
        codes: dict[str, CodeType] = {}
        for module in (self.encoder, *self.heads.values()):
            _compile(module, codes, *args, **kwargs)


def _compile(module: nn.Module, codes: dict[str, CodeType], *args: Any, **kwargs: Any) -> None:
    """As ``module.compile()``, but for two things that torch 2.13 does without a word.

    It leaves modules of its own (``nn.Sequential``) uncompiled, and others under FSDP, whose hooks
    it would compile as well; and since it counts graphs by the code that calls the module, it gives
    up after eight, in all heads together.

    Args:
        module: compiled in place.
        codes: by the kind of module, the code that calls it.
        *args: to ``torch.compile``.
        **kwargs: to ``torch.compile``.
    """

    def forward(*inputs: Any, **named: Any) -> Any:
        return type(module).forward(module, *inputs, **named)

    forward.__code__ = codes.setdefault(_kind(module), forward.__code__.replace())
    compiled = torch.compile(forward, *args, **kwargs)

    def call(*inputs: Any, **named: Any) -> Any:
        module.__dict__["forward"] = compiled  # for this call: a copy of the module has its own
        try:
            return module._call_impl(*inputs, **named)
        finally:
            del module.__dict__["forward"]

    module._compiled_call_impl = call


def _kind(module: nn.Module) -> str:
    """The same for modules that one compiled graph can serve."""
    plain = (bool, int, float, str, tuple, type(None))
    of_every_module = vars(nn.Module()).keys()
    return repr(
        [
            (
                type(part),
                {
                    name: value if isinstance(value, plain) else id(value)
                    for name, value in vars(part).items()
                    if name not in of_every_module
                },
                [
                    (name, tensor.shape, tensor.dtype)
                    for name, tensor in (*part._parameters.items(), *part._buffers.items())
                    if tensor is not None
                ],
            )
            for part in module.modules()
        ]
    )


def _check_that_ddp_finds_unused_parameters() -> None:
    """Raise if the forward at hand is inside a DistributedDataParallel that would wait for them."""
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    if ddp.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) wants the same parameters in every step, "
            "and the groups change: wrap the model with find_unused_parameters=True instead."
        )
    if not ddp.find_unused_parameters:
        raise RuntimeError(
            "DistributedDataParallel would wait for the gradients of the heads outside the group: "
            "wrap the model with find_unused_parameters=True."
        )
