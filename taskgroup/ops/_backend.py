"""Chooses the implementation of an op.

Every op has a ``reference`` in plain PyTorch or NumPy that runs anywhere. The other backends are
faster, and need certain devices or libraries. An op passes its implementations to :func:`choose`
and calls the one that it returns; it knows nothing else about backends.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Collection
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGE = __name__.split(".")[0]


class _Native(NamedTuple):
    """The compiled libraries of the package."""

    host: Any = None  # the module of what runs on the host
    problem: str | None = None  # the reason why they are not loaded
    broken: bool = False  # they were built, but do not load


def _load_native() -> _Native:
    # Search the folder of this package alone: the finder of an editable installation would find the
    # libraries of another copy.
    beside = [str(Path(__file__).parents[1])]
    found = {name: PathFinder.find_spec(f"{_PACKAGE}.{name}", beside) for name in ("_ops", "_host")}
    if not any(found.values()):
        return _Native(
            problem=(
                "this installation was made without native code; to have it, build it from the "
                "sources with a C++17 compiler (TASKGROUP_PURE=0 pip install --force-reinstall "
                "--no-deps --no-build-isolation .)"
            )
        )
    try:
        for name, spec in found.items():
            if spec is None:
                raise ImportError(f"{name} is missing for this Python")
            if name == "_ops":
                torch.ops.load_library(spec.origin)
        host = importlib.import_module(f"{_PACKAGE}._host")
        instruction_sets = host.cpu_instruction_set, torch.ops.taskgroup.cpu_instruction_set
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        # The first use raises this error. The import of the package must not fail because of its
        # extension: the reference works without it.
        return _Native(
            broken=True,
            problem=(
                f"its native code does not load under torch {torch.__version__} and Python "
                f"{platform.python_version()} ({' '.join(str(error).split())}); build it again "
                f"from the sources (pip install --force-reinstall --no-deps --no-build-isolation .)"
                f", install without it (TASKGROUP_PURE=1), or continue in plain PyTorch "
                f"(TASKGROUP_BACKEND=reference)"
            ),
        )
    try:
        # Both libraries read TASKGROUP_CPU_ISA now, so that a later change cannot make them differ.
        for instruction_set in instruction_sets:
            instruction_set()
    except RuntimeError as error:
        return _Native(broken=True, problem=str(error).rstrip("."))
    return _Native(host=host)


native = _load_native()


class Backend(NamedTuple):
    """Where a backend runs, and whether it is available."""

    devices: tuple[str, ...] | None = None  # the types of device that it runs on; None: all
    problem: str | None = None  # the reason why it is not available
    broken: bool = False  # it should be available: no other backend takes its place silently
    on_request: bool = False  # it runs only if the user asks for it


def _triton() -> Backend:
    # Find it without importing it: the import takes a second, and is left to the first use.
    problem = None
    if importlib.util.find_spec("triton") is None:
        problem = "Triton is not installed (a torch for CUDA brings it; pip install triton)"
    # Triton's interpreter runs kernels in NumPy, for tests. It cannot read addresses on a device,
    # and it is slow, so it runs on request alone.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return Backend(("cpu" if interpreted else "cuda",), problem, on_request=interpreted)


def _cuda_problem() -> str | None:
    if native.problem is not None or torch.ops.taskgroup.cuda_architectures():
        return native.problem
    return (
        "its native code was built without CUDA kernels; build it again with nvcc "
        "(TASKGROUP_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation .)"
    )


# In order of preference.
BACKENDS = {
    "cpp": Backend(("cpu",), native.problem, native.broken),
    "cuda": Backend(("cuda",), _cuda_problem(), native.broken),
    "triton": _triton(),
    "reference": Backend(),
}

_requested: str | None = os.environ.get("TASKGROUP_BACKEND") or None


def backends() -> dict[str, str | None]:
    """Lists the backends, and why some are not available.

    Returns:
        A dict in order of preference, from the name of each backend to ``None`` if the backend is
        available, or to the reason if it is not.

    Example:
        >>> import taskgroup
        >>> list(taskgroup.ops.backends())
        ['cpp', 'cuda', 'triton', 'reference']
    """
    return {name: backend.problem for name, backend in BACKENDS.items()}


def _check_available(name: str) -> None:
    if name in BACKENDS and BACKENDS[name].problem is None:
        return
    available = ", ".join(n for n, backend in BACKENDS.items() if backend.problem is None)
    missing = [f"{n}: {backend.problem}" for n, backend in BACKENDS.items() if backend.problem]
    if name not in BACKENDS:
        raise ValueError(
            f"taskgroup has no backend {name!r} (TASKGROUP_BACKEND or use_backend asked for it). "
            + "; ".join([f"Available: {available}", *missing])
            + ". Unset it, or choose one of these."
        )
    raise RuntimeError(
        f"taskgroup cannot use its backend {name!r}: {BACKENDS[name].problem}. "
        f"Available: {available}." + (" Unset TASKGROUP_BACKEND." if name == _requested else "")
    )


class use_backend:  # noqa: N801 (users call it as a function, like torch.no_grad)
    """Runs the ops on one backend, from now on or within a ``with`` statement.

    Ops without this backend still choose by themselves; clustering, for example, runs on the host
    alone. The setting applies to all threads of the process and overrides the environment variable
    ``TASKGROUP_BACKEND``.

    Args:
        name: ``"cpp"`` (for the CPU), ``"cuda"`` or ``"triton"`` (for a GPU), or
            ``"reference"``; ``None`` lets every op choose by the device of its arguments.

    Raises:
        ValueError: If there is no backend of that name; the message lists the backends.
        RuntimeError: If the backend is not available; the message says why.

    Example:
        >>> import torch, taskgroup
        >>> with taskgroup.ops.use_backend("reference"):
        ...     taskgroup.affinity_propagation(torch.eye(2))
        tensor([0, 1])
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        if name is not None:
            _check_available(name)
        self._previous = _requested
        _requested = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _requested
        _requested = self._previous


def requested() -> str | None:
    """Returns the backend that ``TASKGROUP_BACKEND`` or :class:`use_backend` names, if any."""
    return _requested


def preferred(device: str, implemented: Collection[str]) -> str:
    """Returns the name of the backend that runs an op for arguments on a type of device.

    ``implemented`` are the backends that the op has; ``reference`` is one of them. Raises an error
    if the requested backend does not exist or cannot run here, or the one that would run is broken.
    """
    if _requested is not None:
        _check_available(_requested)
        if _requested in implemented:
            devices = BACKENDS[_requested].devices
            if devices is not None and device not in devices:
                raise RuntimeError(
                    f"taskgroup's backend {_requested!r} runs on {' and '.join(devices)}, and the "
                    f"arguments are on {device}: move them, unset TASKGROUP_BACKEND, or choose "
                    "another with use_backend."
                )
            return _requested
    for name, backend in BACKENDS.items():
        fits = backend.devices is None or device in backend.devices
        if backend.on_request or not fits or name not in implemented:
            continue
        if backend.problem is None or backend.broken:
            _check_available(name)
            return name
    raise AssertionError("every op has a reference")


def choose(device: str, **implementations: Callable[P, T]) -> Callable[P, T]:
    """Chooses the implementation of an op for arguments on a device, as :func:`preferred` does."""
    return implementations[preferred(device, implementations)]
