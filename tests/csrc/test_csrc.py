"""The kernels' own tests in C++, and what the compiler makes of the CUDA kernels. No GPU needed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests.backends import instruction_sets

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGET = HERE / "cuda_budget.json"


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
    # Kept between runs, so that only what changed is compiled again.
    directory = ROOT / "build" / "csrc-tests" / sanitizer.replace(",", "-")
    cmake = tool("cmake")
    run(cmake, "-S", HERE, "-B", directory, "-G", "Ninja", f"-DSANITIZE={sanitizer}")
    run(cmake, "--build", directory, "--parallel", os.environ.get("MAX_JOBS", "2"))
    told = run(tool("ctest"), "--test-dir", directory, "--verbose", "--timeout", 120)
    # Two tests run on every instruction set that this processor has: none may be left out.
    ran = sorted(re.findall(r"ran on (\w+)", told))
    assert ran == sorted(instruction_sets() * 2)


def compile_kernels(nvcc, architecture, directory):
    """Of each kernel, by name: what ptxas says of it, and its PTX."""
    kernels = {}
    includes = [
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem={path}" for path in cpp_extension.include_paths()),
    ]
    for source in sorted((ROOT / "csrc/ops/cuda").glob("*.cu")):
        told = run(
            *(nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "--keep"),
            *("--keep-dir", directory, "-cubin", "-o", directory / "kernels.cubin", source),
            *includes,
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        )
        ptx = (directory / f"{source.stem}.ptx").read_text()
        bodies = re.split(r"\.entry (\w+)", ptx)
        bodies = dict(zip(bodies[1::2], bodies[2::2], strict=True))
        entries = re.split(r"Compiling entry function '(\w+)'", told)
        for mangled, told_of_it in zip(entries[1::2], entries[2::2], strict=True):
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
            kernels[name] = (
                dict(zip(("registers", "spilled bytes", "shared bytes"), numbers, strict=True)),
                bodies[mangled],
            )
    return kernels


@pytest.fixture(scope="module")
def nvcc():
    found = shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(
        "/usr/local/cuda/bin/nvcc"
    )
    if found is None:
        pytest.skip("there is no nvcc: what it makes of the CUDA kernels cannot be looked at")
    return found


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cuda_budget(nvcc, architecture, tmp_path):
    """Registers and shared memory of each kernel: no more, and no fewer, than is written down."""
    kernels = compile_kernels(nvcc, architecture, tmp_path)
    for name, (used, ptx) in kernels.items():
        assert used["spilled bytes"] == 0, f"{name} spills {used['spilled bytes']} bytes"
        assert ("mma.sync.aligned.m16n8k16" in ptx) == name.startswith("gram_mma"), name
        bulk = name.startswith("gram_fma_float") and architecture == "sm_90"
        assert ("cp.async.bulk" in ptx) == bulk, name

    written = json.loads(BUDGET.read_text())
    (version,) = re.findall(r"release (\d+\.\d+)", run(nvcc, "--version"))
    if version != written["nvcc"]:
        return  # another compiler uses other numbers
    budget = written[architecture]
    told = []
    for name in sorted(budget.keys() | kernels.keys()):
        if name not in kernels:
            told.append(f"{name} is no more: delete it")
            continue
        used = kernels[name][0]
        for what in ("registers", "shared bytes"):
            number, allowed = used[what], budget.get(name, {}).get(what, 0)
            if number > allowed:
                told.append(f"{name} uses {number} {what}, {allowed} are allowed")
            elif number < allowed:
                told.append(f"{name} uses {number} {what} only: lower the {allowed}")
    assert not told, f"{BUDGET.name}, {architecture}:\n" + "\n".join(told)
