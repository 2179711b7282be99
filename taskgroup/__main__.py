"""The doctor: reports what is installed, what runs on this machine, and why the rest does not.

``python -m taskgroup`` needs torch and numpy alone; ``taskgroup doctor`` is the same command.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

import taskgroup
from taskgroup import ops
from taskgroup.ops import (
    _backend,
    affinity_propagation,
    affinity_update,
    combine,
    gram_affinity_update,
    task_gram,
)

__all__ = ["main"]

_WIDTH = 80


def main() -> int:
    """Prints the report.

    Returns:
        The exit status, which is 1 if something is broken, that is, installed but not working, and
        else 0. What is not installed is not broken; its row says how to install it.
    """
    broken: list[str] = []
    _print("Versions", _versions(broken))
    _print("Hardware", _hardware(broken))
    _print("Backends, in order of preference", _backends(broken))
    _print("Backend in use, of each op", _ops(broken))
    _print("Extras", _extras())
    for sentence in broken or ["Nothing is broken."]:
        print(_fill(f"Broken: {sentence}" if broken else sentence))
    return 1 if broken else 0


def _print(title: str, rows: Collection[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, text in rows:
        print(_fill(text, first=f"  {name:{width}}  ", other=" " * (width + 4)))
    print()


def _fill(text: str, first: str = "", other: str = "  ") -> str:
    # Lines never break inside a word, so that paths and options can be copied.
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    """The requirements in the metadata of the installation; empty if there is no metadata."""
    try:
        return importlib.metadata.requires("taskgroup") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _versions(broken: list[str]) -> list[tuple[str, str]]:
    for line in _requirements():
        wanted = re.match(r"torch>=(\d+)\.(\d+)", line)
        here = re.match(r"(\d+)\.(\d+)", torch.__version__)
        if wanted and here and tuple(map(int, here.groups())) < tuple(map(int, wanted.groups())):
            broken.append(
                f"torch {torch.__version__} is too old: pip install --upgrade '{wanted.group()}'."
            )
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return [
        ("taskgroup", f"{taskgroup.__version__} in {Path(taskgroup.__file__).parent}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {cuda}"),
        ("numpy", numpy.__version__),
        ("triton", _version("triton") or "not installed"),
    ]


def _hardware(broken: list[str]) -> list[tuple[str, str]]:
    native = _backend.native.problem is None
    rows = []
    if native:
        names = {
            "amx": "AVX-512 and AMX",
            "avx512bf16": "AVX-512 with bfloat16",
            "avx512": "AVX-512",
            "avx2": "AVX2",
            "portable": "portable vectors",
        }
        used = torch.ops.taskgroup.cpu_instruction_set()
        asked = os.environ.get("TASKGROUP_CPU_ISA")
        chosen = f", because TASKGROUP_CPU_ISA={asked}; unset it to use the best" if asked else ""
        rows.append(("CPU", f"gradients are read with {names[used]}{chosen}"))
    compiled = torch.ops.taskgroup.cuda_architectures() if native else []
    for index, device in enumerate(_gpus()):
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        rows.append((f"GPU {index}", name))
        wanted = os.environ.get("TASKGROUP_BACKEND", "cuda")
        if wanted == "cuda" and compiled and not covers(compiled, major, minor):
            broken.append(
                f"The CUDA kernels were compiled for {_numbers(compiled)}, and GPU {index} has "
                f"{major}.{minor}: build them again from the sources (CUDAARCHS={major}{minor} "
                "TASKGROUP_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation .), "
                "or set TASKGROUP_BACKEND=triton."
            )
    if not _gpus():
        why = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
        rows.append(("GPU", f"none: {why}; if this machine has one, install a torch for CUDA"))
    return rows


def _gpus() -> list[torch.device]:
    if not torch.cuda.is_available():  # this warns if the driver is too old, for example
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def covers(compiled: list[int], major: int, minor: int) -> bool:
    """Whether kernels compiled for these architectures run on a GPU of this compute capability.

    Example:
        >>> covers([80, 90], 8, 6), covers([80, 90], 7, 5), covers([80, 90], 12, 0)
        (True, False, True)
    """
    # Machine code runs on GPUs with the same major number and an equal or larger minor number. The
    # library also has PTX for the last architecture, which the driver compiles for newer GPUs.
    own = any(number // 10 == major and number % 10 <= minor for number in compiled)
    return own or 10 * major + minor >= max(compiled)


def _numbers(architectures: list[int]) -> str:
    return ", ".join(f"{number // 10}.{number % 10}" for number in architectures)


def _backends(broken: list[str]) -> list[tuple[str, str]]:
    native = _backend.native
    if native.broken:
        broken.append(f"taskgroup: {native.problem}.")
    compiled = [] if native.problem else torch.ops.taskgroup.cuda_architectures()
    what = {
        "cpp": "C++, for the CPU",
        "cuda": f"CUDA kernels, for compute capability {_numbers(compiled)}",
        "triton": "Triton kernels, compiled at their first use",
        "reference": "plain PyTorch and NumPy, on any device",
    }
    rows = []
    for name, problem in ops.backends().items():
        if native.broken and problem == native.problem:
            rows.append((name, "broken: see the end"))
        elif problem:
            rows.append((name, f"off: {problem}"))
        elif name in ("cuda", "triton") and not _gpus():
            rows.append((name, f"installed, but there is no GPU: {what[name]}"))
        else:
            rows.append((name, f"on: {what[name]}"))
    for variable in ("TASKGROUP_BACKEND", "TRITON_INTERPRET"):
        if value := os.environ.get(variable):
            rows += [("override", f"{variable}={value}; unset it to use the choice above")]
    return rows


def _small_calls(device: torch.device) -> list[tuple[ModuleType, str, tuple[Any, ...]]]:
    """A small call of each op: its module, its name and its arguments."""
    matrix, ones = torch.zeros(2, 2, device=device), torch.ones(2, device=device)
    gradients = [[ones], [ones]]
    return [
        (affinity_propagation, "affinity_propagation", (matrix,)),
        (affinity_update, "affinity_update_", (matrix, ones, ones, ones.bool(), 0.5)),
        (combine, "combine", (gradients, [0.5, 0.5])),
        (gram_affinity_update, "gram_affinity_update_", (matrix, gradients, ones, 0.5)),
        (task_gram, "task_gram", (gradients,)),
    ]


def _ops(broken: list[str]) -> list[tuple[str, str]]:
    # Run every op: only that shows that it works.
    rows = []
    requested = _backend.requested()
    only = _backend.BACKENDS[requested].devices if requested in _backend.BACKENDS else None
    devices = [torch.device("cpu"), *_gpus()]
    devices = [device for device in devices if only is None or device.type in only]
    if not devices:
        return [("", f"not run: {requested} needs a GPU, and there is none")]
    failures: dict[str, list[str]] = {}
    for calls in zip(*map(_small_calls, devices), strict=True):
        where = []
        for device, (module, name, arguments) in zip(devices, calls, strict=True):
            implementations = module.IMPLEMENTATIONS
            try:
                getattr(module, name)(*arguments)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:  # of any kind: the report names it
                failures.setdefault(" ".join(str(error).split()), []).append(f"{name} on {device}")
                where.append(f"broken on {device}")
                continue
            # Clustering runs on the host for tensors on any device.
            ran_on = device if "cuda" in implementations else torch.device("cpu")
            where.append(f"{_backend.preferred(ran_on.type, implementations)} on {ran_on}")
        places = ", ".join(dict.fromkeys(where))
        rows.append((name, f"{places} (of {', '.join(implementations)})"))
    # If the native code does not load, every op fails with the same message: report it once.
    for text, failed in failures.items():
        if not (_backend.native.broken and str(_backend.native.problem) in text):
            broken.append(f"{', '.join(failed)}: {text}")
    return rows


def _extras() -> list[tuple[str, str]]:
    extras: dict[str, list[str]] = {}
    for line in _requirements():
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)", line)
        python = re.search(r"python_version >= ['\"](\d+)\.(\d+)", line)
        if name and extra and not (python and sys.version_info < tuple(map(int, python.groups()))):
            extras.setdefault(extra[1], []).append(name[0])
    rows = []
    for title in extras.keys() - {"dev", "docs"}:  # which are for the development of taskgroup
        missing = [package for package in extras[title] if _version(package) is None]
        cure = f"pip install 'taskgroup[{title}]' installs {', '.join(missing)}"
        rows.append((title, cure if missing else "complete"))
    return sorted(rows) or [("", "unknown: taskgroup is not installed, it runs from its sources")]


if __name__ == "__main__":
    raise SystemExit(main())
