"""Runs the heads of one kind as one module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from taskgroup._arguments import listed
from taskgroup.nn.heads import (
    CURE,
    TaskHeads,
    detached,
    frozen_head,
    kind_of,
    twin,
    without_graph,
)
from taskgroup.nn.step import Step
from taskgroup.ops._sharded import is_sharded

__all__ = ["BatchedHeads"]


class BatchedHeads(TaskHeads):
    r"""Heads for many small tasks: those of one kind run as one module.

    A thousand linear heads take two thousand calls to torch in the forward and the backward pass.
    This module runs the heads of one kind (same classes, settings and shapes) together: it stacks
    their parameters and maps the module over the stack with ``torch.func.vmap``. Every head keeps
    its own parameters, so optimizers, checkpoints and :meth:`TaskGroups.attach` work as with single
    heads. The outputs equal those of the single heads up to rounding and have the same dtypes, also
    under autocast. The first forward pass of each kind runs two heads both ways, and raises an
    error if the outputs differ.

    Call the model with ``group=group``: the heads outside the group then get no gradient and stay
    where they are. Without a group all heads run, and a backward pass gives a gradient of zero to
    every head of a kind whose output it does not use; :meth:`TaskGroups.attach` keeps these heads
    where they are.

    Computing the losses one by one would cost as much again. The outputs come in the order of
    ``group.observed``: stack them, and pass one tensor to :meth:`Group.loss`.

    This is faster for hundreds of heads whose cost is the calls, not the arithmetic. Heads of
    convolutions on feature maps are faster one by one. :meth:`MultiTaskModel.compile` compiles the
    encoder alone, and ``torch.compile(model)`` leaves these heads uncompiled as well. With FSDP2,
    shard them as one: ``fully_shard(model.heads)``.

    Args:
        heads: ``{task: module}``, of one or several kinds. A head that is the only one of its kind
            runs by itself. You may edit single heads later, freeze them or switch them to
            ``eval()``; the next forward pass sorts them by kind again. Heads may not have buffers
            (running statistics would not be updated), dropout (the masks would depend on the
            group), recurrent layers, sparse embeddings, hooks, parametrizations, uninitialized
            parameters, compiled parts, or operations that ``vmap`` does not support.

    Raises:
        ValueError: if a head has one of these; the message names the head. The next forward pass
            raises it for what was added later.
        RuntimeError: in a forward pass, if the heads cannot run as one; the message says why.

    Example:
        >>> import taskgroup as tg
        >>> heads = tg.BatchedHeads({task: nn.Linear(4, 1) for task in ("a", "b", "c")})
        >>> model = tg.MultiTaskModel(nn.Linear(3, 4), heads)
        >>> place = {"a": 0, "b": 1, "c": 2}
        >>> targets = torch.zeros(3, 2, 1)      # of every task
        >>> for group in tg.TaskGroups(list(heads)):
        ...     outputs = model(torch.ones(2, 3), group=group)      # {task: [2, 1]}
        ...     errors = torch.stack([*outputs.values()]) - targets[[place[t] for t in outputs]]
        ...     group.loss(errors.square().mean((1, 2))).backward()
    """

    # The heads by kind. Not copied or saved with the module; None: the next forward sorts them.
    _sorted: _Sorted | None = None

    def __init__(self, heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        super().__init__(heads)
        self._sorted = _Sorted(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sorted": None}  # type: ignore[no-untyped-call]

    def run(self, tasks: Collection[str], features: Any, frozen: bool = False) -> dict[str, Any]:
        """Run the heads of ``tasks``, and return their outputs in the order of ``tasks``.

        With ``frozen``, the parameters are detached, so that they get no gradient.
        """
        run_all = self._run_all
        if torch.compiler.is_compiling():
            # It breaks the graph many times. Not a decorator: that would import the compiler with
            # the package.
            run_all = torch.compiler.disable(run_all)
        return run_all(tasks, features, frozen)

    def run_group(self, features: Any, group: Step, graph_for_all: bool) -> dict[str, Any]:
        """Run the heads that a step needs, with a graph and without."""
        own, observed = set(group.tasks), set(group.observed)
        # The loss leaves out the tasks outside the group, so that their heads would get gradients
        # of zero, where they run as one with heads of the group. They run frozen instead.
        graph = observed if graph_for_all else set(group.graph)
        outputs = self.run(own, features)
        if graph > own:
            outputs |= self.run(graph - own, features, frozen=True)
        with without_graph(observed - graph):
            return outputs | self.run(observed - graph, detached(features))

    def _run_all(self, tasks: Collection[str], features: Any, frozen: bool) -> dict[str, Any]:
        parameters = None if self._sorted is None else self._sorted.parameters(self, tasks)
        if self._sorted is None or parameters is None:
            self._sorted = _Sorted(self)
            parameters = self._sorted.parameters(self, tasks) or {}
        outputs: dict[str, Any] = {}
        for kind in self._sorted.kinds:
            own = {task: parameters[task] for task in kind if task in parameters}
            if own:
                outputs.update(self._run_as_one(kind, own, features, frozen))
        for task in tasks:
            if task not in outputs:
                outputs[task] = (frozen_head(self[task]) if frozen else self[task])(features)
        return {task: outputs[task] for task in tasks}

    def _run_as_one(
        self, kind: list[str], own: dict[str, list[Tensor]], features: Any, frozen: bool
    ) -> dict[str, Any]:
        assert self._sorted is not None
        first = self[kind[0]]
        setting = kind[0], *_setting(next(iter(own.values())), features)
        dtypes = self._sorted.dtypes.get(setting)
        if dtypes is None:
            with _aside():
                dtypes = _compare(kind, first, self[kind[-1]], features)
            self._sorted.dtypes[setting] = dtypes
        try:
            run = _as_one(first, list(own.values()), features, dtypes, frozen=frozen)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            with _aside():
                first(features)  # where the head itself raises an error, this is that error
            raise _cannot_run(own, error) from error
        return dict(zip(own, run.outputs, strict=True))


_Dtypes = list[torch.dtype]  # one for each tensor in the output of a head


class _Sorted:
    """The heads sorted by kind, with a record of their state that shows later edits.

    Making one raises an error if a head cannot run as one with others.

    Attributes:
        kinds: for each kind of several heads, their tasks. The other heads run one by one.
        dtypes: the dtypes of the outputs of a single head, by kind and setting.
    """

    def __init__(self, heads: TaskHeads) -> None:
        kinds: dict[str, list[str]] = {}
        for task, head in heads.items():
            if any(is_sharded(parameter) for parameter in head.parameters()):
                raise RuntimeError(
                    "BatchedHeads reads the parameters of all heads at once, and each head is "
                    "sharded by itself: shard them as one, fully_shard(model.heads)."
                )
            if obstacle := _obstacle(head):
                raise ValueError(f"The head of task {task!r} has {obstacle} {CURE}")
            if any(True for _ in head.parameters()):
                kinds.setdefault(kind_of(head), []).append(task)
        self.kinds = [tasks for tasks in kinds.values() if len(tasks) > 1]
        self.dtypes: dict[object, _Dtypes] = {}
        self._heads = [*heads.values()]
        self._seen = {task: _Seen(heads[task]) for kind in self.kinds for task in kind}

    def parameters(self, heads: TaskHeads, tasks: Iterable[str]) -> dict[str, list[Tensor]] | None:
        """The parameters of those heads that run as one, by task; None if a head was edited."""
        # Another transform of torch.func may hand in parameters that were never compared.
        if torch._C._are_functorch_transforms_active():
            return {}
        if self._heads != [*heads.values()]:
            return None
        found = {}
        for task in tasks:
            if (seen := self._seen.get(task)) is not None:
                own = seen.parameters()
                if own is None:
                    return None
                found[task] = own
        return found


class _Seen:
    """A record of the state of a head, which shows later whether it was edited."""

    def __init__(self, head: nn.Module) -> None:
        self._parts = [
            (
                part,
                type(part),
                [*vars(part).values()],
                [*part._modules.values()],
                [*part._parameters],
                [p is not None and p.requires_grad for p in part._parameters.values()],
            )
            for part in head.modules()
        ]

    def parameters(self) -> list[Tensor] | None:
        """The parameters of the head, or None if it was edited.

        Every forward pass calls this for every head, so it must be fast.
        """
        found: list[Tensor] = []
        for part, kind, values, modules, names, learned in self._parts:
            now = vars(part)
            own = now["_parameters"]
            parameters = [*own.values()]
            try:
                if (
                    type(part) is not kind
                    or [*now.values()] != values
                    or [*now["_modules"].values()] != modules
                    or [*own] != names
                    or [p is not None and p.requires_grad for p in parameters] != learned
                    or now["_forward_hooks"]
                    or now["_forward_pre_hooks"]
                    or now["_backward_hooks"]
                    or now["_backward_pre_hooks"]
                    or any(buffer is not None for buffer in now["_buffers"].values())
                ):
                    return None
            except (RuntimeError, ValueError):  # new attributes that == does not compare
                return None
            found += [p for p in parameters if p is not None]
        return found


_hooks_of = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)


def _obstacle(head: nn.Module) -> str | None:
    """The first thing in a head that keeps it from running as one with others, and why."""
    for path, part in head.named_modules():
        name = f"{type(part).__name__}{f' at {path!r}' if path else ''}"
        for buffer in (own for own, tensor in part._buffers.items() if tensor is not None):
            whole = f"{path}.{buffer}" if path else buffer
            return f"the buffer {whole!r}, which would not be updated where heads run as one;"
        if (
            isinstance(part, torch.jit.ScriptModule)
            or getattr(part, "_compiled_call_impl", None) is not None
            or hasattr(part, "_orig_mod")
        ):
            return f"the compiled {name}, which cannot be mapped over its parameters;"
        if parametrize.is_parametrized(part):
            return f"parametrizations of {name}, which would be computed for one head only;"
        if any(_hooks_of(part)):
            return f"hooks on {name}, which would be called for one head only;"
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in part.parameters(False)):
            return f"uninitialized parameters in {name}; run it once before, or"
        if getattr(part, "sparse", False) and isinstance(part, nn.Embedding | nn.EmbeddingBag):
            return f"the sparse {name}, whose gradients would be dense;"
    return None


def _setting(parameters: list[Tensor], features: Any) -> tuple[object, ...]:
    """What the dtypes of a head's outputs depend on, and whether they have a graph."""
    device = parameters[0].device.type
    autocast = (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device)
    )
    given = [leaf.dtype for leaf in tree_leaves(features) if isinstance(leaf, Tensor)]
    return torch.is_grad_enabled(), autocast, parameters[0].dtype, *given


class _Run(NamedTuple):
    """The result of heads that ran as one."""

    outputs: list[Any]  # one for each head
    stacks: list[Tensor]  # the stacked parameters
    leaves: list[Tensor]  # the tensors in the outputs, of all heads


def _as_one(
    head: nn.Module,
    own: list[list[Tensor]],
    features: Any,
    dtypes: _Dtypes | None,
    *,
    frozen: bool = False,
) -> _Run:
    """Run heads of one kind as one: ``head`` with the parameters ``own`` of each head that runs.

    The tensors in the output are converted to ``dtypes``; None leaves them as they are.
    """
    ids = [id(parameter) for module in head.modules() for parameter in module.parameters(False)]
    stacks = [torch.stack(same) for same in zip(*own, strict=True)]
    if frozen:
        stacks = [stack.detach() for stack in stacks]
    layout: list[Any] = []

    def run(stacks: list[Tensor]) -> tuple[Tensor, ...]:
        # A twin of the head holds the stacks in place of the parameters. The head itself stays as
        # it is, so an exception cannot leave it without its parameters.
        stacked = twin(head, dict(zip(ids, stacks, strict=True)))
        leaves, structure = tree_flatten(stacked(features))
        for leaf in leaves:
            if not isinstance(leaf, Tensor | int | float | complex | str | None):
                raise TypeError(f"an output holds a {type(leaf).__name__}")
        layout[:] = structure, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        layout.append([n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)])
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    # Random numbers are an error: the masks of dropout would depend on the group.
    leaves = list(vmap(run, randomness="error")(stacks))
    if dtypes is not None:
        leaves = [leaf.to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    structure, values, places = layout
    parts = [_Unstack.apply(leaf) for leaf in leaves]  # type: ignore[no-untyped-call]
    outputs = []
    for k in range(len(own)):
        for place, part in zip(places, parts, strict=True):
            values[place] = part[k]
        outputs.append(tree_unflatten(list(values), structure))
    return _Run(outputs, stacks, leaves)


def _compare(tasks: list[str], first: nn.Module, last: nn.Module, features: Any) -> _Dtypes:
    """Compare two heads of a kind that run one by one with the same heads run as one.

    Raise if they cannot run as one, or if their outputs differ; otherwise return the dtypes of the
    tensors in the output of a single head.
    """
    seen = [_Seen(first), _Seen(last)]
    alone = [first(features), last(features)]
    try:
        own = [parameters for head in seen if (parameters := head.parameters()) is not None]
        if len(own) < len(seen):
            raise RuntimeError("the forward changes attributes of the head")
        run = _as_one(first, own, features, None)
        for one, other in zip(alone, run.outputs, strict=True):
            _check_close(one, other)
        learned = [stack for stack in run.stacks if stack.requires_grad]
        leaves = [leaf for leaf in run.leaves if leaf.requires_grad]
        if learned and leaves:  # a backward pass: activation checkpointing, for one, fails here
            torch.autograd.grad(
                leaves, learned, [torch.ones_like(leaf) for leaf in leaves], allow_unused=True
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _cannot_run(tasks, error) from error
    return [leaf.dtype for leaf in tree_leaves(alone[0]) if isinstance(leaf, Tensor)]


def _aside() -> AbstractContextManager[None]:
    """Hide what runs in this context from an activation checkpoint around the forward pass.

    A checkpoint counts the saved tensors. It runs the forward pass again for the backward pass, and
    then expects the same number; the comparison is not repeated then.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def _check_close(one: Any, other: Any) -> None:
    """Raise if two outputs differ in structure, or by more than rounding can explain."""
    (ones, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    if structure != other_structure:
        raise RuntimeError("the outputs have another structure than those of the single heads")
    for a, b in zip(ones, others, strict=True):
        if not isinstance(a, Tensor):
            alike = not isinstance(b, Tensor) and (a == b or a != a)
        elif a.shape != b.shape:
            alike = False
        elif a.is_floating_point() and type(a) is Tensor and a.device.type != "meta":
            a, b = a.detach().double(), b.detach().double()
            finite = a.isfinite()
            # By the mean: single values at the edge of a step function may differ a lot.
            error = torch.where(finite, a - b, 0).abs().mean()
            alike = bool(error <= 0.1 * torch.where(finite, a, 0).abs().mean() + 1e-3)
        else:
            alike = True
        if not alike:
            raise RuntimeError("the outputs are not those of the single heads")


def _cannot_run(tasks: Collection[str], error: Exception) -> RuntimeError:
    """Make the error that says why heads cannot run as one."""
    reason = " ".join(str(error).split())
    if "random" in reason:
        return RuntimeError(
            f"The heads of {listed(tasks)} draw random numbers (dropout), which would differ "
            f"from group to group where heads run as one; leave the dropout to the encoder, or "
            f"{CURE}"
        )
    reason = reason if len(reason) <= 200 else f"{reason[:200]} ..."
    return RuntimeError(
        f"The heads of {listed(tasks)} cannot run as one ({reason.rstrip('.')}); {CURE}"
    )


class _Unstack(torch.autograd.Function):
    """A stack as tensors that autograd knows one by one.

    ``unbind`` returns views, and autograd refuses in-place operations on those of a whole tuple;
    ``unbind_copy`` launches one kernel for each head. This makes one copy.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        whole = stack.clone(memory_format=torch.contiguous_format)
        return tuple(part.data for part in whole.unbind())

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> Tensor | None:
        found = next((part for part in parts if part is not None), None)
        if found is None:
            return None
        zero = torch.zeros_like(found)
        return torch.stack([zero if part is None else part for part in parts])
