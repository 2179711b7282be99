"""The heads of a model with many tasks: run one by one, or those of one kind as one batch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from taskgroup.ops._sharded import is_sharded
from taskgroup.sentences import listed
from taskgroup.statistics import statistics_once

if TYPE_CHECKING:
    from taskgroup.schedule import Group

__all__ = ["BatchedHeads", "TaskHeads", "kind_of"]


class TaskHeads(nn.Module, Mapping[str, nn.Module]):
    """A mapping from task to head that is a module; task names may hold dots.

    Args:
        heads: ``{task: module}``.

    Raises:
        ValueError: if there are none, or two names differ only in ``.`` and ``/``.
        TypeError: if a head is no module.
    """

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

    def forward(self, features: Any, group: Group | None = None) -> dict[str, Any]:
        """The outputs of the heads.

        Args:
            features: of the encoder, any nesting of tensors.
            group: the heads of ``group.graph`` run with a graph, the other observed ones without,
                on detached features, and the rest not at all; None runs all with a graph.

        Returns:
            ``{task: output}``.
        """
        return self.run(self, features) if group is None else self.run_group(features, group)

    def run(self, tasks: Collection[str], features: Any) -> dict[str, Any]:
        """The outputs of the heads of ``tasks``, in their order."""
        return {task: self[task](features) for task in tasks}

    def run_group(self, features: Any, group: Group) -> dict[str, Any]:
        """The outputs of the heads that a step needs, with a graph and without."""
        outputs = {}
        graph, observed = set(group.graph), set(group.observed)
        detached = _detached(features) if observed > graph else None
        # In the order of the heads, whatever the group: replayed dropout then draws the same masks.
        wanted = (task for task in self if task in graph or task in observed)
        for inside, tasks in itertools.groupby(wanted, graph.__contains__):
            with nullcontext() if inside else torch.no_grad():
                given = features if inside else detached
                for task in tasks:
                    head = self[task]
                    with statistics_once(head, group):
                        outputs[task] = head(given)
        return outputs


class BatchedHeads(TaskHeads):
    r"""Heads that run as one module where they are of one kind: for many small ones.

    A thousand linear heads are two thousand calls to torch forth and back. Those of the same kind
    (classes, settings and shapes) run as one here: their parameters are stacked and the module
    mapped over them (``torch.func.vmap``). Every head keeps parameters of its own: optimizers,
    checkpoints and :meth:`TaskGroups.attach` see no difference, and a head whose output a step does
    not use gets no gradient, so it stays where it is. Outputs are those of the single heads to
    rounding; under autocast they may be float32 where a single head gives bfloat16.

    Losses that are computed one by one would cost as much again: join the outputs, which come in
    the order of ``group.observed``, and give :meth:`Group.loss` one tensor.

    It pays for hundreds of heads whose cost is the calls, not the arithmetic; convolutions on
    feature maps are better run one by one. :meth:`MultiTaskModel.compile` compiles the encoder and
    leaves these as they are, and so does ``torch.compile`` of the whole. With FSDP2 they are
    sharded as one: ``fully_shard(model.heads)``.

    Args:
        heads: ``{task: module}``, of one or several kinds. Without buffers (running statistics
            would not move) and, in training, without dropout (masks would depend on the group).
            The first of a kind speaks for all: what is set on single heads afterwards (other
            layers, hooks, ``eval()``) is not seen.

    Raises:
        ValueError: if a head has buffers.

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

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__(heads)
        kinds: dict[str, list[str]] = {}
        for task, head in self.items():
            if names := [name for name, _ in head.named_buffers()]:
                raise ValueError(
                    f"The head of task {task!r} has the buffer {names[0]!r}, which would not be "
                    "updated where heads run as one; give MultiTaskModel the heads in a plain dict."
                )
            kinds.setdefault(kind_of(head), []).append(task)
        self._kinds = [*kinds.values()]

    def run(self, tasks: Collection[str], features: Any) -> dict[str, Any]:
        """The outputs of the heads of ``tasks``, those of one kind in one run."""
        run_as_one = self._run_as_one
        if torch.compiler.is_compiling():
            # Traced, it would be settled then and for good whose outputs are used. Not a decorator:
            # that would import the compiler with the package.
            run_as_one = torch.compiler.disable(run_as_one)
        wanted = set(tasks)
        outputs: dict[str, Any] = {}
        for kind in self._kinds:
            if own := [task for task in kind if task in wanted]:
                outputs.update(zip(own, run_as_one(own, features), strict=True))
        return {task: outputs[task] for task in tasks}

    def run_group(self, features: Any, group: Group) -> dict[str, Any]:
        """The outputs of the heads that a step needs, with a graph and without."""
        graph = set(group.graph)
        outputs = self.run(graph, features)
        with torch.no_grad():
            outputs |= self.run(set(group.observed) - graph, _detached(features))
        return outputs

    def _run_as_one(self, tasks: list[str], features: Any) -> list[Any]:
        heads = [self[task] for task in tasks]
        own = [_parameters(head) for head in heads]
        names = list(own[0])
        if not names:
            return [head(features) for head in heads]
        if is_sharded(own[0][names[0]]):
            raise RuntimeError(
                "BatchedHeads reads the parameters of all heads at once, and each head is sharded "
                "by itself: shard them as one, fully_shard(model.heads)."
            )
        used: set[int] = set()
        flat = [named[name] for name in names for named in own]
        stacks = _Stack.apply(used, len(heads), *flat)  # type: ignore[no-untyped-call]
        stacked = dict(zip(names, stacks, strict=True))

        def run(parameters: dict[str, Tensor]) -> Any:
            return functional_call(heads[0], parameters, (features,))

        try:
            # Each task's own: the map must not draw, lest the masks depend on who is in the group.
            together = vmap(run, randomness="error")(stacked)
        except RuntimeError as error:
            if "random" not in str(error):
                raise
            raise RuntimeError(
                f"The heads of {listed(tasks)} draw random numbers (dropout), which would differ "
                "from group to group where heads run as one; leave the dropout to the encoder, or "
                "give MultiTaskModel the heads in a plain dict."
            ) from error
        leaves, structure = tree_flatten(together)
        parts = [_Unstack.apply(used, leaf) for leaf in leaves]  # type: ignore[no-untyped-call]
        return [tree_unflatten(list(part), structure) for part in zip(*parts, strict=True)]


class _Stack(torch.autograd.Function):
    """Parameters of n heads, those of one name after the other, as a stack for each name.

    Back, a head gets a gradient only if its output was used: zero, as ``torch.stack`` gives, would
    let momentum and weight decay move heads outside the group.
    """

    @staticmethod
    def forward(ctx: Any, used: set[int], n_heads: int, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.used, ctx.n_heads = used, n_heads
        names = range(0, len(flat), n_heads)
        return tuple(torch.stack(flat[start : start + n_heads]) for start in names)

    @staticmethod
    def backward(ctx: Any, *stacks: Tensor) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for stack in stacks:
            own = stack.unbind()
            parts += [own[k] if k in ctx.used else None for k in range(ctx.n_heads)]
        return (None, None, *parts)


class _Unstack(torch.autograd.Function):
    """The outputs of single heads; back, notes whose were used."""

    @staticmethod
    def forward(ctx: Any, used: set[int], stack: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.used = used
        return stack.unbind()

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> tuple[None, Tensor | None]:
        found = [part for part in parts if part is not None]
        if not found:
            return None, None
        if not ctx.used:  # the first in this backward pass, of which there may be others
            torch.autograd.Variable._execution_engine.queue_callback(ctx.used.clear)
        ctx.used.update(k for k, part in enumerate(parts) if part is not None)
        nothing = torch.zeros_like(found[0])
        return None, torch.stack([nothing if part is None else part for part in parts])


def _parameters(head: nn.Module) -> dict[str, nn.Parameter]:
    if head._modules:
        return dict(head.named_parameters())
    # A linear layer, as a rule, and a thousand of them.
    return {name: own for name, own in head._parameters.items() if own is not None}


def _detached(features: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, features)


def kind_of(module: nn.Module) -> str:
    """The same for modules that differ in nothing but the values of their parameters."""
    of_every_module = vars(nn.Module()).keys()
    return repr(
        [
            (
                path,
                type(part),
                {
                    name: value if _is_plain(value) else id(value)
                    for name, value in vars(part).items()
                    if name not in of_every_module
                },
                [
                    (name, tensor.shape, tensor.dtype)
                    for name, tensor in (*part._parameters.items(), *part._buffers.items())
                    if tensor is not None
                ],
            )
            for path, part in module.named_modules()
        ]
    )


def _is_plain(value: object) -> bool:
    """Whether its ``repr`` says all."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)
