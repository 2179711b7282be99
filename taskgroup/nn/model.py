"""A shared encoder with one head per task; a step runs only the heads that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from taskgroup._arguments import listed
from taskgroup._graph import graph_leaves
from taskgroup.nn.batched import BatchedHeads
from taskgroup.nn.compiled import compile_in_place
from taskgroup.nn.heads import TaskHeads
from taskgroup.nn.norm import statistics_once
from taskgroup.nn.step import Step, check_step

__all__ = ["MultiTaskModel"]


class MultiTaskModel(nn.Module):
    """An encoder whose features feed one head per task.

    Called with a :class:`~taskgroup.Group`, it runs the encoder once, the heads of ``group.graph``
    with a graph, and the other observed heads without a graph on detached features. The remaining
    heads do not run. Heads outside the group get no gradient, so they stay where they are, and they
    cost no backward pass. Running statistics (BatchNorm) are updated once per batch, see
    :func:`statistics_once`.

    If the inputs depend on a tensor that requires a gradient and is not a parameter (coordinates of
    a physics-informed loss, positions for forces, a gradient penalty), derivatives of the outputs
    can be taken: all observed heads then run with a graph, in which the parameters of the heads
    outside the group are constants. To take derivatives with respect to anything else, call the
    model without the group, ``model(x)``.

    ``DistributedDataParallel`` needs ``find_unused_parameters=True``, because the heads that a step
    leaves out have no gradient.

    Args:
        encoder: any module; its output may be any nesting of tuples, lists and dicts of tensors.
        heads: ``{task: module}``, a dict or ``nn.ModuleDict`` with task names as keys. Each head
            takes the output of the encoder. Many small heads run faster as :class:`BatchedHeads`.
            A layer that two heads share moves in the steps of both tasks;
            :meth:`TaskGroups.attach` refuses it.

    Attributes:
        encoder: the encoder.
        heads: a mapping from task to head. In the keys of the ``state_dict`` a dot in a task name
            becomes a slash.

    Raises:
        TypeError: if the encoder is not a module or ``heads`` is not ``{task: module}``.
        ValueError: if there are no heads, or two names differ only in ``.`` and ``/``.

    Example:
        >>> heads = {"depth": nn.Linear(4, 1), "edge": nn.Identity()}
        >>> model = MultiTaskModel(nn.Linear(3, 4), heads)
        >>> {task: tuple(output.shape) for task, output in model(torch.ones(2, 3)).items()}
        {'depth': (2, 1), 'edge': (2, 4)}
    """

    def __init__(self, encoder: nn.Module, heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                f"The encoder must be a module, got {type(encoder).__name__}; write "
                "MultiTaskModel(encoder, {task: head, ...})."
            )
        self.encoder = encoder
        self.heads = heads if isinstance(heads, TaskHeads) else TaskHeads(heads)

    def forward(self, *args: Any, group: Step | None = None, **kwargs: Any) -> dict[str, Any]:
        """Compute the outputs of the tasks.

        Args:
            *args: positional arguments of the encoder.
            group: the step that this forward pass is for; None runs every head with a graph.
            **kwargs: keyword arguments of the encoder.

        Returns:
            ``{task: output}``; with a group, for the tasks of ``group.observed`` in that order.

        Raises:
            ValueError: if the group has a task without a head.
            RuntimeError: under ``DistributedDataParallel`` without ``find_unused_parameters=True``.
        """
        if group is None:
            return cast(dict[str, Any], self.heads(self.encoder(*args, **kwargs)))
        check_step(group)
        graph, observed = set(group.graph), set(group.observed)
        if headless := sorted(observed.difference(self.heads)):
            raise ValueError(
                f"The group needs tasks {listed(headless)}, which have no head; the heads are "
                f"{listed(self.heads)}."
            )
        learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if learns and len(graph) < len(self.heads):
            _check_that_ddp_finds_unused_parameters()
        group.ran(self)
        with statistics_once(self.encoder, group):
            features = self.encoder(*args, **kwargs)
        graph_for_all = learns and observed > graph and _is_derived((args, kwargs), features)
        outputs = self.heads(features, group, graph_for_all)
        return {task: outputs[task] for task in group.observed}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the encoder and each head separately, in place.

        One graph for the encoder and two for each head, with and without gradients, serve every
        sequence of groups: at most 1 + 2K graphs for inputs of one shape. Heads of one kind share
        their graphs. A copy of the model is not compiled, and neither is a model that was pickled;
        compile it again.

        Args:
            *args: positional arguments of ``torch.compile``.
            **kwargs: keyword arguments of ``torch.compile``.
        """
        codes: dict[str, CodeType] = {}
        heads = () if isinstance(self.heads, BatchedHeads) else self.heads.values()
        for module in (self.encoder, *heads):
            compile_in_place(module, codes, *args, **kwargs)


def _is_derived(inputs: object, features: object) -> bool:
    """Whether the inputs or the features depend on a leaf that is not a parameter.

    A leaf that requires a gradient and is not a parameter is there to take derivatives with respect
    to it. This walks the graph in front of the encoder alone; usually there is none.
    """
    leaves = [tensor for tensor in _tensors(features) if tensor.is_leaf]
    learned = [tensor for tensor in (*leaves, *_tensors(inputs)) if tensor.requires_grad]
    return any(not isinstance(leaf, nn.Parameter) for leaf in graph_leaves(learned))


def _tensors(values: object) -> Iterator[Tensor]:
    """All tensors in nested values."""
    if isinstance(values, Tensor):
        yield values
    elif type(values) is tuple or type(values) is dict:  # the usual ones, without torch's slow walk
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
    else:
        yield from (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _check_that_ddp_finds_unused_parameters() -> None:
    """Raise if this forward pass is inside a DistributedDataParallel that would wait for them."""
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    if ddp.static_graph:
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) needs the same parameters in every step, "
            "and the groups change: wrap the model with find_unused_parameters=True instead."
        )
    if not ddp.find_unused_parameters:
        raise RuntimeError(
            "DistributedDataParallel would wait for the gradients of the heads outside the group: "
            "wrap the model with find_unused_parameters=True."
        )
