"""A shared encoder with a head per task, of which a step runs no more than it needs."""

from __future__ import annotations

from collections.abc import Mapping
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from taskgroup._arguments import listed
from taskgroup.nn.batched import BatchedHeads
from taskgroup.nn.heads import TaskHeads, kind_of
from taskgroup.nn.norm import statistics_once
from taskgroup.nn.step import Step

__all__ = ["MultiTaskModel"]


class MultiTaskModel(nn.Module):
    """An encoder whose features feed one head per task.

    Called with a :class:`~taskgroup.Group`, it runs the encoder once, the heads of ``group.graph``
    with a graph, the other observed heads without one on detached features, and leaves out the
    rest. Heads outside the group get no gradient, so they stay where they are, and their backward
    pass is never paid for. Running statistics (BatchNorm) move once per batch then, see
    :func:`statistics_once`.

    Where the inputs hang on a tensor that requires a gradient and is no parameter (coordinates of a
    physics-informed loss, positions for forces, a gradient penalty), derivatives of the outputs are
    taken: all observed heads then run with a graph, which leaves out the parameters of those
    outside the group. To take derivatives with respect to anything else, call the model whole,
    ``model(x)``.

    ``DistributedDataParallel`` wants ``find_unused_parameters=True``: the heads that a step leaves
    out have no gradient to wait for.

    Args:
        encoder: any module; its output may be any nesting of tuples, lists and dicts of tensors.
        heads: ``{task: module}``, a dict or ``nn.ModuleDict`` with tasks named by strings; each
            takes the output of the encoder. Many small ones run faster as :class:`BatchedHeads`.
            A layer that two heads share moves with either task.

    Attributes:
        encoder: the encoder.
        heads: a mapping from task to head. In the keys of the ``state_dict`` a dot in a task name
            becomes a slash.

    Raises:
        TypeError: if the encoder is no module or ``heads`` is not ``{task: module}``.
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
        """The outputs of the tasks.

        Args:
            *args: to the encoder.
            group: the step this forward is for; None runs every head with a graph.
            **kwargs: to the encoder.

        Returns:
            ``{task: output}``; with a group those of ``group.observed``, in that order.

        Raises:
            ValueError: if the group has a task without a head.
            RuntimeError: under ``DistributedDataParallel`` without ``find_unused_parameters=True``.
        """
        if group is None:
            return cast(dict[str, Any], self.heads(self.encoder(*args, **kwargs)))
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
        """Compile the encoder and each head apart, in place, with ``torch.compile``'s arguments.

        One graph for the encoder and two per head, with and without gradients, then serve every
        sequence of groups: at most 1 + 2K for inputs of one shape; heads of one kind share theirs.
        A copy of the model, or one that was pickled, is not compiled; compile it again.
        """
        codes: dict[str, CodeType] = {}
        heads = () if isinstance(self.heads, BatchedHeads) else self.heads.values()
        for module in (self.encoder, *heads):
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

    # What is set on the object instead of its class, as Accelerate does, is compiled in its place.
    patch = vars(module).get("forward")
    forward.__code__ = codes.setdefault(kind_of(module), forward.__code__.replace())
    compiled = torch.compile(forward if patch is None else patch, *args, **kwargs)

    def call(*inputs: Any, **named: Any) -> Any:
        if vars(module).get("forward") not in (patch, compiled):  # set since then
            return module._call_impl(*inputs, **named)
        vars(module)["forward"] = compiled  # for this call: a copy of the module has its own
        try:
            return module._call_impl(*inputs, **named)
        finally:
            vars(module).pop("forward", None)
            if patch is not None:
                vars(module)["forward"] = patch

    module._compiled_call_impl = call


def _is_derived(inputs: object, features: object) -> bool:
    """Whether the inputs, or the features, hang on a tensor of which one takes derivatives.

    That is a leaf that requires a gradient and is no parameter: nothing else can be made of it.
    Only the graph in front of the encoder is walked, as a rule there is none.
    """
    leaves = [leaf for leaf in tree_leaves(features) if isinstance(leaf, Tensor) and leaf.is_leaf]
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    learned = [tensor for tensor in (*leaves, *given) if tensor.requires_grad]
    if any(tensor.is_leaf and not isinstance(tensor, nn.Parameter) for tensor in learned):
        return True
    todo: list[Any] = [tensor.grad_fn for tensor in learned]
    seen: set[Any] = {None}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and not isinstance(
            node.variable, nn.Parameter
        ):
            return True
        todo += [following for following, _ in node.next_functions]
    return False


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
