"""The heads of a multi-task model, run one by one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from taskgroup._arguments import listed
from taskgroup.nn.norm import statistics_once
from taskgroup.nn.step import Step
from taskgroup.ops._sharded import is_sharded

__all__ = ["TaskHeads", "kind_of"]


CURE = "give MultiTaskModel the heads in a plain dict."


class TaskHeads(nn.Module, Mapping[str, nn.Module]):
    """A mapping from task to head that is a module; task names may hold dots."""

    __eq__ = object.__eq__  # by identity, as other modules; Mapping compares contents
    __hash__ = object.__hash__

    def __init__(self, heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        super().__init__()
        checked = _checked_heads(heads)
        # The name of a module may not hold a dot, which separates names in a state_dict's keys.
        self._module_name = {task: task.replace(".", "/") for task in checked}
        if len(set(self._module_name.values())) < len(checked):
            raise ValueError(
                f"Two of the tasks {listed(checked)} differ only in '.' and '/'; rename one."
            )
        for task, head in checked.items():
            # add_module() would refuse a task called "keys" or "type".
            self._modules[self._module_name[task]] = head

    def __getitem__(self, task: str) -> nn.Module:
        head = self._modules[self._module_name[task]]
        assert head is not None
        return head

    def __iter__(self) -> Iterator[str]:
        return iter(self._module_name)

    def __len__(self) -> int:
        return len(self._module_name)

    def forward(
        self, features: Any, group: Step | None = None, graph_for_all: bool = False
    ) -> dict[str, Any]:
        """Run the heads that a step needs, or all of them, on the output of the encoder.

        The heads of ``group.graph`` run with a graph, the other observed heads without one on
        detached features, and the rest not at all. With ``graph_for_all``, the other observed heads
        run with a graph as well, but with frozen parameters, so that derivatives of their outputs
        can be taken.
        """
        if group is None:
            return self.run(self, features)
        return self.run_group(features, group, graph_for_all)

    def run(self, tasks: Collection[str], features: Any) -> dict[str, Any]:
        """Run the heads of ``tasks``, and return their outputs in the order of ``tasks``."""
        return {task: self[task](features) for task in tasks}

    def run_group(self, features: Any, group: Step, graph_for_all: bool) -> dict[str, Any]:
        """Run the heads that a step needs, with a graph and without."""
        outputs = {}
        learned, observed = set(group.graph), set(group.observed)
        graph = observed if graph_for_all else learned
        constant = detached(features) if observed > graph else None
        # In the order of the heads for every group, so that replayed dropout draws the same masks.
        wanted = (task for task in self if task in graph or task in observed)
        for inside, tasks in itertools.groupby(wanted, graph.__contains__):
            given = features if inside else constant
            running: list[str] = []
            with nullcontext() if inside else without_graph(running):
                for task in tasks:
                    running[:] = [task]
                    head = self[task]
                    frozen = inside and task not in learned
                    with statistics_once(head, group):
                        outputs[task] = (frozen_head(head) if frozen else head)(given)
        return outputs


def twin(
    module: nn.Module, tensors: Mapping[int, Tensor], made: dict[int, nn.Module] | None = None
) -> nn.Module:
    """Copy a module with other tensors in place of its parameters; the copy shares the rest.

    ``tensors`` holds the tensor that replaces each parameter, by the parameter's id; ``made`` the
    copies of parts of the module that exist already, by the part's id.
    """
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    other = made[id(module)] = object.__new__(type(module))
    vars(other).update(vars(module))
    vars(other)["_parameters"] = {
        name: None if parameter is None else tensors[id(parameter)]
        for name, parameter in module._parameters.items()
    }
    vars(other)["_modules"] = {
        name: None if part is None else twin(part, tensors, made)
        for name, part in module._modules.items()
    }
    vars(other).pop("_compiled_call_impl", None)  # it calls the module
    if isinstance(module, nn.RNNBase):  # which lists its parameters once more
        weights = module._flat_weights
        vars(other)["_flat_weights"] = [tensors.get(id(own), own) for own in weights]
    return other


def frozen_head(head: nn.Module) -> nn.Module:
    """Copy a head with detached parameters: gradients pass through, the parameters get none."""
    parameters = [*head.parameters()]
    if any(map(is_sharded, parameters)):  # FSDP gathers them when the head itself is called
        return head
    return twin(head, {id(own): own.detach() for own in parameters})


def detached(features: Any) -> Any:
    if isinstance(features, Tensor):  # the usual case, without torch's slow walk through trees
        return features.detach()
    return tree_map_only(Tensor, Tensor.detach, features)


def without_graph(tasks: Collection[str]) -> AbstractContextManager[None]:
    """Like ``torch.no_grad()``, but an error of a head that takes a derivative says what to do.

    ``tasks`` are those whose heads run, at the time of the error.
    """
    return torch.no_grad() if torch.compiler.is_compiling() else _explained_no_grad(tasks)


@contextmanager
def _explained_no_grad(tasks: Collection[str]) -> Iterator[None]:
    try:
        with torch.no_grad():
            yield
    except RuntimeError as error:
        if "not require grad" not in str(error) and "differentiated Tensors" not in str(error):
            raise
        raise RuntimeError(
            f"The head of {listed(sorted(tasks))} takes a derivative, and heads outside the group "
            "run without a graph; call the model whole, model(x) instead of model(x, group=group), "
            "or give it inputs that require a gradient."
        ) from error


def _checked_heads(heads: object) -> dict[str, nn.Module]:
    """The heads by task, with task names as plain strings."""
    wanted = "heads must be {task: module}, with tasks named by strings as in TaskGroups"
    if not isinstance(heads, Mapping | nn.ModuleDict):
        raise TypeError(
            f"{wanted}, got {type(heads).__name__}; name the task of each head, "
            '{"depth": module, "edges": module}.'
        )
    if not heads:
        raise ValueError("MultiTaskModel needs at least one head, got none.")
    checked = {}
    for task, head in heads.items():
        if not isinstance(task, str) or not task:
            raise TypeError(f"{wanted}, got the task {task!r}; name it, as in {{'depth': module}}.")
        if not isinstance(head, nn.Module):
            raise TypeError(
                f"The head of task {task!r} must be a module, got {type(head).__name__}."
            )
        checked[str.__str__(task)] = head  # NumPy strings and string enums are subclasses of str
    return checked


def kind_of(module: nn.Module) -> str:
    """A description that is equal for modules that differ in the values of parameters alone."""
    of_every_module = vars(nn.Module()).keys()
    numbers: dict[int, int] = {}  # of modules and parameters, by id: shows which are shared

    def number(thing: object) -> int:
        return numbers.setdefault(id(thing), len(numbers))

    return repr(
        [
            (
                path,
                number(part),
                type(part),
                part.training,
                {
                    name: value if _is_plain(value) else id(value)
                    for name, value in vars(part).items()
                    if name not in of_every_module
                },
                [
                    (name, number(own), own.shape, own.dtype, own.device, own.requires_grad)
                    for name, own in (*part._parameters.items(), *part._buffers.items())
                    if own is not None
                ],
            )
            for path, part in module.named_modules(remove_duplicate=False)
        ]
    )


def _is_plain(value: object) -> bool:
    """Whether the ``repr`` of a value describes it completely."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)
