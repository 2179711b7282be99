"""Runs the C++ tests of the kernels, and checks the compiled CUDA kernels. Needs no GPU."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from torch.utils import cpp_extension

from tests.backends import instruction_sets

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGET = HERE / "cuda_budget.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def tool(name):
    found = shutil.which(name)
    assert found, f"{name} is needed to test the native code: install it"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.full)]
)
def test_cpp(sanitizer):
    # The folder is kept between runs, so that only changed files are compiled again.
    directory = ROOT / "build" / "csrc-tests" / sanitizer.replace(",", "-")
    cmake = tool("cmake")
    run(cmake, "-S", HERE, "-B", directory, "-G", "Ninja", f"-DSANITIZE={sanitizer}")
    run(cmake, "--build", directory, "--parallel", os.environ.get("MAX_JOBS", "2"))
    told = run(tool("ctest"), "--test-dir", directory, "--verbose", "--timeout", 120)
    # Two tests must run on every instruction set of this processor.
    ran = sorted(re.findall(r"ran on (\w+)", told))
    assert ran == sorted(instruction_sets() * 2)


class Kernel(NamedTuple):
    """A compiled kernel: the resources that it uses, and its code."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    sass: list[str]  # the instructions, without their addresses


def compile_kernels(nvcc, architecture, directory):
    """Compile the kernels; returns them by their names without namespaces."""
    kernels = {}
    includes = [
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem={path}" for path in cpp_extension.include_paths()),
    ]
    for source in sorted((ROOT / "csrc/ops/cuda").glob("*.cu")):
        cubin = directory / "kernels.cubin"
        told = run(
            *(nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "--keep"),
            *("--keep-dir", directory, "-cubin", "-o", cubin, source),
            *includes,
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        )
        ptx = split_by(r"\.entry (\w+)", (directory / f"{source.stem}.ptx").read_text())
        sass = split_by(r"Function : (\w+)", run(CUOBJDUMP, "--dump-sass", cubin))
        for mangled, told_of_it in split_by(r"Compiling entry function '(\w+)'", told).items():
            numbers = [
                int(m[1]) if (m := re.search(pattern, told_of_it)) else 0
                for pattern in (
                    r"Used (\d+) registers",
                    r"(\d+) bytes spill stores",
                    r"(\d+) bytes smem",
                )
            ]
            name = run(tool("c++filt"), mangled).strip()
            name = re.sub(r"\(anonymous namespace\)::|taskgroup::|^void |\(.*", "", name)
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass[mangled])
            kernels[name] = Kernel(*numbers, ptx[mangled], instructions)
    return kernels


def split_by(pattern, text):
    """The text after each match of a pattern, up to the next match, by the group of the match."""
    parts = re.split(pattern, text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def nvcc():
    found = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(
        "/usr/local/cuda/bin/nvcc"
    )
    if found is None:
        pytest.skip("there is no nvcc, so the compiled CUDA kernels cannot be checked")
    return found


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, nvcc, tmp_path_factory):
    """The architecture and its kernels."""
    return request.param, compile_kernels(nvcc, request.param, tmp_path_factory.mktemp("cuda"))


@pytest.mark.full
def test_cuda_budget(nvcc, compiled):
    """Each kernel uses exactly the registers and the shared memory that the budget allows."""
    architecture, kernels = compiled
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0, f"{name} spills {kernel.spilled_bytes} bytes"

    written = json.loads(BUDGET.read_text())
    (version,) = re.findall(r"release (\d+\.\d+)", run(nvcc, "--version"))
    if version != written["nvcc"]:
        return  # other compilers use other numbers of registers
    budget = written[architecture]
    told = []
    for name in sorted(budget.keys() | kernels.keys()):
        if name not in kernels:
            told.append(f"{name} no longer exists: delete it")
            continue
        kernel = kernels[name]
        used = {"registers": kernel.registers, "shared bytes": kernel.shared_bytes}
        for what, number in used.items():
            allowed = budget.get(name, {}).get(what, 0)
            if number > allowed:
                told.append(f"{name} uses {number} {what}, {allowed} are allowed")
            elif number < allowed:
                told.append(f"{name} uses only {number} {what}: lower the {allowed}")
    assert not told, f"{BUDGET.name}, {architecture}:\n" + "\n".join(told)


def most_at_once(sass, load, words):
    """The most loads, of this many registers, that are in flight before a wait or a jump."""
    most, waited_for, count = 0, set(), 0
    for instruction in sass:
        operands = [int(n) for n in re.findall(r"\bR(\d+)\b", instruction)]
        is_load = re.search(load, instruction)
        if waited_for.intersection(operands) or re.search(r"\b(BRA|CALL|RET|EXIT)\b", instruction):
            waited_for, count = set(), 0
        if is_load:
            waited_for.update(range(operands[0], operands[0] + words))
            count += 1
            most = max(most, count)
    return most


@pytest.mark.full
def test_the_hot_loops(compiled):
    """The loops use wide loads, keep many in flight, and convert nothing without need."""
    architecture, kernels = compiled
    hopper = architecture == "sm_90"
    for name, kernel in kernels.items():
        dtype = name.partition("<")[2].rstrip("> ").split(",")[0]
        assert ("mma.sync.aligned.m16n8k16" in kernel.ptx) == name.startswith("gram_mma"), name
        bulk = name.startswith("gram_fma_float") and hopper
        assert any("UBLKCP" in i for i in kernel.sass) == bulk, name
        if name.startswith("combine"):
            # The rows of a group are loaded together and stored once, without converting weights.
            assert most_at_once(kernel.sass, r"LDG\.E\S*\.128", 4) >= 3, name
            (store,) = [n for n, i in enumerate(kernel.sass) if "STG.E.128" in i]
            loads = [n for n, i in enumerate(kernel.sass) if re.search(r"LDG\.E\S*\.128", i)]
            loop = kernel.sass[loads[0] : store]
            assert not [i for i in loop if "F2F.F" in i and "64" in i], name
        elif name.startswith("gram_mma"):
            rows = 8 if "rectangle" in name else int(name.rstrip(">").split()[-1]) // 8
            at_once = rows * (4 if rows <= 2 else 2 if rows <= 4 else 1)
            assert most_at_once(kernel.sass, r"LDG\.E\S*\.128", 4) >= at_once, name
            products = [n for n, i in enumerate(kernel.sass) if "HMMA" in i]
            loop = kernel.sass[products[0] : products[-1]]
            assert not [i for i in loop if re.search(r"\b(BRA|CALL|F2F|LDL|STL)\b", i)], name
            if dtype != "float":  # tensor cores take 16-bit numbers as they are in memory
                assert not [i for i in loop if re.search(r"F2FP|HADD2|F2F|PRMT", i)], name
        elif bulk:
            tasks = int(name.rstrip(">").partition("<")[2])
            # With 16 tasks the last load reuses a register that holds its address.
            assert most_at_once(kernel.sass, r"LDS\.128", 4) >= min(tasks, 15), name
        elif name.startswith("gram_finish"):
            assert most_at_once(kernel.sass, r"LDG\.E\.64", 2) >= 15, name
