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
from taskgroup.nn.heads import _CURE, TaskHeads, _detached, _twin, _without_graph, kind_of
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

    def run(self, tasks: Collection[str], features: Any, hold: bool = False) -> dict[str, Any]:
        """The outputs of the heads of ``tasks``, those of one kind in one run.

        Args:
            tasks: whose heads run.
            features: of the encoder.
            hold: keep the parameters out of the graph.
        """
        run_all = self._run_all
        if torch.compiler.is_compiling():
            # Traced, it would be settled then and for good whose outputs are used. Not a decorator:
            # that would import the compiler with the package.
            run_all = torch.compiler.disable(run_all)
        return run_all(tasks, features, hold)

    def run_group(self, features: Any, group: Step, graph_for_all: bool) -> dict[str, Any]:
        """The outputs of the heads that a step needs, with a graph and without."""
        graph = set(group.graph)
        others = set(group.observed) - graph
        outputs = self.run(graph, features)
        if graph_for_all:
            return outputs | self.run(others, features, hold=True)
        with _without_graph(others):
            return outputs | self.run(others, _detached(features))

    def _run_all(self, tasks: Collection[str], features: Any, hold: bool) -> dict[str, Any]:
        parameters = None if self._sorted is None else self._sorted.parameters(self, tasks)
        if self._sorted is None or parameters is None:
            self._sorted = _Sorted(self)
            parameters = self._sorted.parameters(self, tasks) or {}
        outputs: dict[str, Any] = {}
        for kind in self._sorted.kinds:
            own = {task: parameters[task] for task in kind if task in parameters}
            if own:
                outputs.update(self._run_as_one(kind, own, features, hold))
        return {task: outputs[task] if task in outputs else self[task](features) for task in tasks}

    def _run_as_one(
        self, kind: list[str], own: dict[str, list[Tensor]], features: Any, hold: bool
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
            run = _as_one(first, list(own.values()), features, dtypes, hold=hold)
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
                raise ValueError(f"The head of task {task!r} has {obstacle} {_CURE}")
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
    stacks: tuple[Tensor, ...]  # the parameters
    leaves: list[Tensor]  # the tensors in the outputs, of all heads


def _as_one(
    head: nn.Module,
    own: list[list[Tensor]],
    features: Any,
    dtypes: _Dtypes | None,
    *,
    hold: bool = False,
) -> _Run:
    """Run heads of one kind as one.

    Args:
        head: one of the kind.
        own: the parameters of each head that runs.
        features: for all of them.
        dtypes: of the tensors in the output; None leaves them as they come.
        hold: keep the parameters out of the graph.
    """
    used, ids = (
        _Used(),
        [id(parameter) for module in head.modules() for parameter in module.parameters(False)],
    )
    flat = [parameter for same in zip(*own, strict=True) for parameter in same]
    if hold:
        flat = [parameter.detach() for parameter in flat]
    anchor, *stacks = _Stack.apply(used, len(own), *flat)  # type: ignore[no-untyped-call]
    layout: list[Any] = []

    def run(stacks: list[Tensor]) -> tuple[Tensor, ...]:
        # A twin of the head, in which the stacks stand for the parameters: nothing is exchanged in
        # the head itself, so that nothing of it can get lost.
        twin = _twin(head, dict(zip(ids, stacks, strict=True)), {})
        leaves, structure = tree_flatten(twin(features))
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
    if len(leaves) > 1 and anchor.requires_grad:
        used.reached = _reached(leaves, anchor.grad_fn, features)
    structure, values, places = layout
    parts = [
        _Unstack.apply(used, n, anchor, leaf)  # type: ignore[no-untyped-call]
        for n, leaf in enumerate(leaves)
    ]
    outputs = []
    for k in range(len(own)):
        for place, part in zip(places, parts, strict=True):
            values[place] = part[k]
        outputs.append(tree_unflatten(list(values), structure))
    return _Run(outputs, tuple(stacks), leaves)


def _reached(leaves: list[Tensor], start: Any, features: Any) -> list[set[int]]:
    """By parameter, which of the tensors in the output depend on it.

    Args:
        leaves: the tensors in the output.
        start: the node of :class:`_Stack`, at which the parameters come in.
        features: at which the graph of the heads ends as well.
    """
    reached: list[set[int]] = [set() for _ in start.next_functions]
    ends = {leaf.grad_fn for leaf in tree_leaves(features) if isinstance(leaf, Tensor)}
    for place, leaf in enumerate(leaves):
        seen = {None, start, *ends}
        todo: list[Any] = [leaf.grad_fn]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for following, number in node.next_functions:
                if following is start:
                    reached[number - 1].add(place)
                todo.append(following)
    return reached


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
            f"{_CURE}"
        )
    reason = reason if len(reason) <= 200 else f"{reason[:200]} ..."
    return RuntimeError(
        f"The heads of {listed(tasks)} cannot run as one ({reason.rstrip('.')}); {_CURE}"
    )


class _Used:
    """By backward pass, whose outputs it uses.

    A pass is known by the number that the engine gives it: passes over the same graph, nested ones
    and those that ended with an exception are kept apart.

    Attributes:
        reached: by parameter, the tensors in the outputs that depend on it; None is all.
    """

    def __init__(self) -> None:
        self.reached: list[set[int]] | None = None
        # By the pass, and by the place of a tensor in the outputs, the numbers of the heads.
        self._passes: dict[int, dict[int, set[int]]] = {}

    def add(self, place: int, heads: Iterable[int]) -> None:
        """The pass at hand uses the tensor at this place in the outputs of these heads."""
        places = self._passes.setdefault(torch._C._current_graph_task_id(), {})
        places.setdefault(place, set()).update(heads)

    def of(self, parameter: int) -> set[int]:
        """The heads whose parameter of this number gets a gradient in the pass at hand."""
        places = self._passes.get(torch._C._current_graph_task_id(), {})
        reached = places if self.reached is None else self.reached[parameter]
        return set().union(*(heads for place, heads in places.items() if place in reached))


class _Stack(torch.autograd.Function):
    """Parameters of n heads, those of one name after the other, as a stack for each name.

    Back, a head gets a gradient only if its output was used: zero, as ``torch.stack`` gives, would
    let momentum and weight decay move heads outside the group. The first output is the anchor of
    :class:`_Mark`.
    """

    @staticmethod
    def forward(ctx: Any, used: _Used, n_heads: int, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.used, ctx.n_heads = used, n_heads
        names = range(0, len(flat), n_heads)
        stacks = [torch.stack(flat[start : start + n_heads]) for start in names]
        return stacks[0].new_empty((), dtype=torch.float32), *stacks

    @staticmethod
    def backward(ctx: Any, _: None, *stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for n, stack in enumerate(stacks):
            if stack is None:
                parts += [None] * ctx.n_heads
                continue
            own, used = stack.unbind(), ctx.used.of(n)
            parts += [own[k] if k in used else None for k in range(ctx.n_heads)]
        return (None, None, *parts)


class _Unstack(torch.autograd.Function):
    """The tensors of single heads at one place of their outputs; back, notes whose were used."""

    @staticmethod
    def forward(
        ctx: Any, used: _Used, place: int, anchor: Tensor, stack: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.used, ctx.place, ctx.anchor = used, place, anchor
        # Tensors of their own, laid out as those of a single head: they may be written to, and
        # viewed. One copy for all, and no view of it, which autograd would not let be written to.
        whole = stack.clone(memory_format=torch.contiguous_format)
        return tuple(part.data for part in whole.unbind())

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [part for part in parts if part is not None]
        if not found:
            return None, None, None, None
        tasks = [k for k, part in enumerate(parts) if part is not None]
        ctx.used.add(ctx.place, tasks)
        nothing = torch.zeros_like(found[0])
        stack = torch.stack([nothing if part is None else part for part in parts])
        if torch.is_grad_enabled():  # of this gradient a gradient will be taken
            stack = _Mark.apply(ctx.used, ctx.place, tasks, ctx.anchor, stack)  # type: ignore[no-untyped-call]
        return None, None, None, stack


class _Mark(torch.autograd.Function):
    """A gradient as it is; a backward pass through it uses the same outputs.

    Such a pass does not come through :class:`_Unstack`. It comes through here, before it comes to
    :class:`_Stack`, whose output the anchor is.
    """

    @staticmethod
    def forward(
        ctx: Any, used: _Used, place: int, tasks: list[int], anchor: Tensor, gradient: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.used, ctx.place, ctx.tasks = used, place, tasks
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.used.add(ctx.place, ctx.tasks)
        return None, None, None, None, gradient
