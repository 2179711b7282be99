import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import taskgroup as tg
from taskgroup import __main__ as doctor
from taskgroup.lab.cli import app
from taskgroup.ops import _backend

OPS = ["affinity_propagation", "affinity_update_", "combine", "gram_affinity_update_", "task_gram"]


@pytest.fixture
def report(capsys):
    """Run the doctor; return its exit status and its output, with and without line breaks."""

    def run():
        status = doctor.main()
        said = capsys.readouterr().out
        return status, said, " ".join(said.split())

    return run


def test_good_installation(report, monkeypatch):
    monkeypatch.delenv("TASKGROUP_BACKEND", raising=False)
    status, said, _ = report()
    assert status == 0
    assert said.endswith("Nothing is broken.\n")
    for version in (tg.__version__, torch.__version__, sys.version.split()[0]):
        assert version in said
    for op in OPS:
        assert re.search(rf"^  {op} +cpp on cpu", said, re.MULTILINE), op
    assert re.search(r"^  CPU +gradients are read with (AVX|portable)", said, re.MULTILINE)
    assert re.search(r"^  train +complete$", said, re.MULTILINE)
    assert all(len(line) <= 80 for line in said.splitlines() if "/" not in line)


def test_command():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "Nothing is broken." in result.output


def test_another_backend(report, monkeypatch):
    monkeypatch.setenv("TASKGROUP_BACKEND", "reference")
    with tg.ops.use_backend("reference"):
        status, said, _ = report()
    assert status == 0
    assert "override   TASKGROUP_BACKEND=reference" in said
    for op in OPS:
        assert re.search(rf"^  {op} +reference on cpu", said, re.MULTILINE), op


def test_backend_of_gpus_without_one(report, monkeypatch):
    with tg.ops.use_backend("triton"):
        status, _, text = report()
    assert status == 0
    assert "not run: triton needs a GPU, and there is none" in text
    assert "installed, but there is no GPU" in text


def test_backend_that_there_is_not(report, monkeypatch):
    monkeypatch.setattr(_backend, "_requested", "cuba")
    status, _, text = report()
    assert status == 1
    assert text.count("Broken: ") == 1
    assert "no backend 'cuba' (TASKGROUP_BACKEND" in text
    assert "task_gram broken on cpu" in text
    assert "Unset it" in text


def test_torch_that_is_too_old(report, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    status, _, text = report()
    assert status == 1
    assert "Broken: torch 2.9.1+cu128 is too old: pip install --upgrade 'torch>=2.10'." in text


def test_extra_that_is_not_installed(report, monkeypatch):
    version = importlib.metadata.version

    def without(package):
        if package == "torchjd":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    status, _, text = report()
    assert status == 0
    assert "compare pip install 'taskgroup[compare]' installs torchjd" in text


def test_gpu_without_kernels_for_it(report, monkeypatch):
    """The machine has no GPU, so the ops of the GPU do not run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(8, 6), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    monkeypatch.setattr(torch.ops.taskgroup, "cuda_architectures", lambda: [80, 90])
    monkeypatch.setattr(doctor, "_ops", lambda broken: [("", "")])
    status, _, text = report()
    assert status == 1
    assert "GPU 0 a GPU, compute capability 8.6" in text
    assert text.count("Broken: ") == 1
    assert "compiled for 8.0, 9.0, and GPU 1 has 7.5" in text
    assert "CUDAARCHS=75" in text


@pytest.fixture
def copied(tmp_path):
    """A copy of the package, and its doctor in a new process."""
    copy = tmp_path / "taskgroup"
    shutil.copytree(
        Path(tg.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "vision")
    )

    def run(**environment):
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-m", "taskgroup"],
            cwd=tmp_path,
            env={**inherited, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr
        assert str(copy) in done.stdout
        return done.returncode, " ".join(done.stdout.split())

    return copy, run


def test_installation_without_native_code(copied):
    package, run = copied
    for path in package.glob("*.so"):
        path.unlink()
    status, text = run()
    assert status == 0
    assert "cpp off: this installation was made without native code; to have it" in text
    assert "C++17 compiler" in text
    assert "task_gram reference on cpu" in text
    assert "affinity_propagation reference on cpu" in text


def test_instruction_set_that_is_asked_for(copied):
    _, run = copied
    status, text = run(TASKGROUP_CPU_ISA="portable")
    assert status == 0
    assert "read with portable vectors, because TASKGROUP_CPU_ISA=portable; unset it" in text


def test_instruction_set_that_there_is_not(copied):
    _, run = copied
    status, text = run(TASKGROUP_CPU_ISA="sse9")
    assert status == 1
    assert "cpp broken: see the end" in text
    assert "task_gram broken on cpu" in text
    assert text.count("Broken: ") == 1
    assert "Broken: taskgroup: TASKGROUP_CPU_ISA=sse9 names no instruction set" in text


@pytest.mark.parametrize("name", ["_ops", "_host"])
def test_library_that_does_not_load(copied, name):
    package, run = copied
    (library,) = package.glob(f"{name}.*so")
    library.write_bytes(b"not a library" * 1000)
    status, text = run()
    assert status == 1
    assert "cpp broken: see the end" in text
    assert "task_gram broken on cpu" in text
    assert text.count("Broken: ") == 1
    assert text.count("build it again from the sources") == 1
    assert name in text.partition("Broken: ")[2]
    # Plain PyTorch goes on, and the library is as broken as before.
    status, text = run(TASKGROUP_BACKEND="reference")
    assert status == 1
    assert "task_gram reference on cpu" in text
