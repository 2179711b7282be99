"""Compiles one module in place.

``nn.Module.compile`` has three limits that matter for an encoder with K heads:

- It leaves modules of torch's own, such as ``nn.Sequential``, uncompiled without a message.
- Under FSDP it compiles the hooks of the module too.
- torch counts the graphs of a code object and gives up after eight. The same code object calls
  every module, so the heads would share these eight graphs.

This module therefore compiles the forward of the class alone, and calls it from one code object for
each kind of module. ``torch.compile(..., isolate_recompiles=True)`` would replace the latter; torch
2.10, which the package supports, does not have it.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from torch import nn

from taskgroup.nn.heads import kind_of

__all__ = ["compile_in_place"]


def compile_in_place(
    module: nn.Module, codes: dict[str, CodeType], *args: Any, **kwargs: Any
) -> None:
    """Compile a module in place; the calls of the module then run the compiled forward.

    ``codes`` holds the code object that calls each kind of module. Modules that share this dict
    share the graphs of their kind. The other arguments are those of ``torch.compile``.
    """

    def forward(*inputs: Any, **named: Any) -> Any:
        return type(module).forward(module, *inputs, **named)

    # A forward that was set on the object, as Accelerate does, is compiled in place of the class's.
    patch = vars(module).get("forward")
    forward.__code__ = codes.setdefault(kind_of(module), forward.__code__.replace())
    compiled = torch.compile(forward if patch is None else patch, *args, **kwargs)

    def call(*inputs: Any, **named: Any) -> Any:
        if vars(module).get("forward") not in (patch, compiled):  # set since then
            return module._call_impl(*inputs, **named)
        vars(module)["forward"] = compiled  # for this call alone: copies must not take it along
        try:
            return module._call_impl(*inputs, **named)
        finally:
            vars(module).pop("forward", None)
            if patch is not None:
                vars(module)["forward"] = patch

    module._compiled_call_impl = call
