"""Heads of one kind, run as one module."""

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
    r"""Heads that run as one module where they are of one kind: for many small ones.

    A thousand linear heads are two thousand calls to torch forth and back. Those of the same kind
    (classes, settings and shapes) run as one here: their parameters are stacked and the module
    mapped over them (``torch.func.vmap``). Every head keeps parameters of its own: optimizers,
    checkpoints and :meth:`TaskGroups.attach` see no difference, and a head whose output a step does
    not use gets no gradient, so it stays where it is. Outputs are those of the single heads to
    rounding, in their dtypes, under autocast as well. The first forward of a kind runs two heads
    one by one and as one, and raises if the outputs differ.

    Losses that are computed one by one would cost as much again: join the outputs, which come in
    the order of ``group.observed``, and give :meth:`Group.loss` one tensor.

    It pays for hundreds of heads whose cost is the calls, not the arithmetic; convolutions on
    feature maps are better run one by one. :meth:`MultiTaskModel.compile` compiles the encoder and
    leaves these as they are, and so does ``torch.compile`` of the whole. With FSDP2 they are
    sharded as one: ``fully_shard(model.heads)``.

    Args:
        heads: ``{task: module}``, of one or several kinds; a head that is the only one of its kind
            runs by itself. Heads may be edited, frozen or switched to ``eval()`` one by one; they
            are then sorted by kind again. They may not have buffers (running statistics would not
            move), dropout (masks would depend on the group), recurrent layers, sparse embeddings,
            hooks, parametrizations, uninitialized parameters or compiled parts, nor take what
            ``vmap`` cannot map.

    Raises:
        ValueError: if a head has one of these. The sentence names the head. What is added later is
            refused by the next forward.
        RuntimeError: in a forward, if the heads cannot run as one, with the reason.

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

    # What __init__ found, not copied or saved with the module: None is "to be found again".
    _sorted: _Sorted | None = None

    def __init__(self, heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        super().__init__(heads)
        self._sorted = _Sorted(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sorted": None}  # type: ignore[no-untyped-call]

    def run(self, tasks: Collection[str], features: Any, frozen: bool = False) -> dict[str, Any]:
        """The outputs of the heads of ``tasks``, those of one kind in one run.

        Args:
            tasks: whose heads run.
            features: of the encoder.
            frozen: detach the parameters, so that they get no gradient.
        """
        run_all = self._run_all
        if torch.compiler.is_compiling():
            # Traced, it would be settled then and for good whose outputs are used. Not a decorator:
            # that would import the compiler with the package.
            run_all = torch.compiler.disable(run_all)
        return run_all(tasks, features, frozen)

    def run_group(self, features: Any, group: Step, graph_for_all: bool) -> dict[str, Any]:
        """The outputs of the heads that a step needs, with a graph and without."""
        own, observed = set(group.tasks), set(group.observed)
        # Of heads that run as one, those that the loss leaves out would get gradients of zero. So
        # the ones outside the group, which may be measured or differentiated, run frozen.
        graph = observed if graph_for_all else set(group.graph)
        outputs = self.run(own, features) | self.run(graph - own, features, frozen=True)
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
                first(features)  # an error of the head's own is raised as it is
            raise _cannot_run(own, error) from error
        return dict(zip(own, run.outputs, strict=True))


_Dtypes = list[torch.dtype]  # of the tensors in the output of a head


class _Sorted:
    """The heads sorted by kind, and what to compare them with to see that they were edited.

    Attributes:
        kinds: the tasks of the heads that run as one. The rest run one by one.
        dtypes: of the outputs of a single head, by the kind and the setting it runs in.

    Raises:
        ValueError: if a head cannot run as one with others.
        RuntimeError: if a head is sharded by itself.
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
        """Of those of the tasks that run as one, the parameters; None if a head was edited."""
        # Inside another transform of torch.func there is no autograd to tell what was used.
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
    """A head as it is now, to see later whether it was edited."""

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
        """Its parameters, or None if it was edited: a thousand heads are asked in every forward."""
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
            except (RuntimeError, ValueError):  # of new attributes with no equality to speak of
                return None
            found += [p for p in parameters if p is not None]
        return found


_hooks_of = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)


def _obstacle(head: nn.Module) -> str | None:
    """What keeps a head from running as one with others, and why."""
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
    """What the dtypes of a head's output depend on, and whether it has a graph."""
    device = parameters[0].device.type
    autocast = (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device)
    )
    given = [leaf.dtype for leaf in tree_leaves(features) if isinstance(leaf, Tensor)]
    return torch.is_grad_enabled(), autocast, parameters[0].dtype, *given


class _Run(NamedTuple):
    """Heads that have run as one."""

    outputs: list[Any]  # of each head
    stacks: list[Tensor]  # the parameters
    leaves: list[Tensor]  # the tensors in the outputs, of all heads


def _as_one(
    head: nn.Module,
    own: list[list[Tensor]],
    features: Any,
    dtypes: _Dtypes | None,
    *,
    frozen: bool = False,
) -> _Run:
    """Run heads of one kind as one.

    Args:
        head: one of the kind.
        own: the parameters of each head that runs.
        features: for all of them.
        dtypes: of the tensors in the output; None leaves them as they come.
        frozen: detach the parameters.
    """
    ids = [id(parameter) for module in head.modules() for parameter in module.parameters(False)]
    stacks = [torch.stack(same) for same in zip(*own, strict=True)]
    if frozen:
        stacks = [stack.detach() for stack in stacks]
    layout: list[Any] = []

    def run(stacks: list[Tensor]) -> tuple[Tensor, ...]:
        # A twin of the head, in which the stacks stand for the parameters: nothing is exchanged in
        # the head itself, so that nothing of it can get lost.
        stacked = twin(head, dict(zip(ids, stacks, strict=True)))
        leaves, structure = tree_flatten(stacked(features))
        for leaf in leaves:
            if not isinstance(leaf, Tensor | int | float | complex | str | None):
                raise TypeError(f"an output holds a {type(leaf).__name__}")
        layout[:] = structure, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        layout.append([n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)])
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    # The map must not draw random numbers, lest the masks depend on who is in the group.
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
    """Run two heads of a kind alone and as one, forth and back.

    Args:
        tasks: of the kind.
        first: a head of it.
        last: another one.
        features: for both.

    Returns:
        The dtypes of the tensors in the output of a single head.

    Raises:
        RuntimeError: if they cannot run as one, or that gives something else.
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
        if learned and leaves:  # activation checkpointing, say, fails here
            torch.autograd.grad(
                leaves, learned, [torch.ones_like(leaf) for leaf in leaves], allow_unused=True
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _cannot_run(tasks, error) from error
    return [leaf.dtype for leaf in tree_leaves(alone[0]) if isinstance(leaf, Tensor)]


def _aside() -> AbstractContextManager[None]:
    """Around what is run besides the forward: it is none of an outer activation checkpoint's.

    That counts the tensors that are saved, which are no more when it runs the forward again.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)


def _check_close(one: Any, other: Any) -> None:
    """Raise if outputs are of another structure, or differ by more than any rounding does."""
    (ones, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    if structure != other_structure:
        raise RuntimeError("the outputs are of another structure than those of the single heads")
    for a, b in zip(ones, others, strict=True):
        if not isinstance(a, Tensor):
            alike = not isinstance(b, Tensor) and (a == b or a != a)
        elif a.shape != b.shape:
            alike = False
        elif a.is_floating_point() and type(a) is Tensor and a.device.type != "meta":
            a, b = a.detach().double(), b.detach().double()
            finite = a.isfinite()
            # Of the mean: a value at the edge of a step function may fall on either side.
            error = torch.where(finite, a - b, 0).abs().mean()
            alike = bool(error <= 0.1 * torch.where(finite, a, 0).abs().mean() + 1e-3)
        else:
            alike = True
        if not alike:
            raise RuntimeError("the outputs are not those of the single heads")


def _cannot_run(tasks: Collection[str], error: Exception) -> RuntimeError:
    """The error to raise where heads cannot run as one."""
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
