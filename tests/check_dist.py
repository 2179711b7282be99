"""Check the files that `make dist` wrote to dist/: `make check-dist`.

Clean environments contain links to the installed torch and numpy, so nothing is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.timeout(900)  # the tests compile the package
ROOT = Path(__file__).parents[1]
KINDS = ["dist", "without CUDA", "pure"]

PROGRAM = """
import shutil, sys
import torch
import taskgroup as tg

assert not [tool for tool in "cc c++ gcc g++ clang nvcc cmake ninja".split() if shutil.which(tool)]
try:
    import rich
except ImportError:
    pass
else:
    raise AssertionError("not alone with torch and numpy")
assert tg.__file__.startswith(sys.prefix), tg.__file__

torch.manual_seed(0)
model = tg.MultiTaskModel(torch.nn.Linear(4, 8), {t: torch.nn.Linear(8, 1) for t in "abcd"})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
groups = tg.TaskGroups(list("abcd"), warmup=2)
x = torch.randn(32, 4)
y = {"a": x[:, :1], "b": x[:, :1] * 2, "c": x[:, 1:2], "d": x[:, 1:2] * 2}
for _ in range(10):
    for group in groups:
        losses = {t: (out - y[t]).square().mean() for t, out in model(x, group=group).items()}
        optimizer.zero_grad()
        group.loss(losses).backward()
        optimizer.step()
assert sorted(t for group in groups.partition for t in group) == list("abcd")
assert groups.affinity.matrix.diagonal().gt(0).all()
"""

# A type checker must accept this program.
TYPED = """
import torch
from typing_extensions import assert_type

import taskgroup as tg

model = tg.MultiTaskModel(torch.nn.Linear(2, 2), {"a": torch.nn.Linear(2, 1)})
groups = tg.TaskGroups(["a"], warmup=3, affinity=tg.ProximalAffinity(decay=1e-2))
for group in groups:
    assert_type(group, tg.Group)
    losses = {"a": torch.zeros(())}
    assert_type(group.loss(losses), torch.Tensor)
assert_type(groups.partition, list[tuple[str, ...]])
assert_type(groups.affinity.matrix, torch.Tensor)
assert_type(tg.task_gram(tg.task_gradients(losses, model.parameters())), torch.Tensor)
groups.attach(torch.optim.SGD(model.parameters(), lr=0.1), model.heads, outside="coast")
"""
# A type checker must report an error in each line of this program.
UNTYPED = """
import taskgroup as tg

tg.TaskGroups(["a"], warm_up=3)
tg.TaskGroups("a", reduction="some").attach(1)
tg.AffinityPropagation().no_such_thing
"""


@pytest.fixture(scope="session")
def sdist():
    paths = list(ROOT.glob("dist/*.tar.gz"))
    assert len(paths) == 1, "dist/ holds no source distribution, or several: run make dist first"
    return paths[0]


@pytest.fixture(scope="session")
def wheels(sdist, tmp_path_factory):
    """The wheel in dist/, and those built from the source distribution: without CUDA, and pure."""

    def build(**environment):
        folder = tmp_path_factory.mktemp("wheels")
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        done = subprocess.run(
            [*command, "--no-index", "--wheel-dir", folder, sdist],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = folder.iterdir()
        return wheel

    (built,) = ROOT.glob("dist/*.whl")
    return dict(
        zip(KINDS, [built, build(TASKGROUP_CUDA="0"), build(TASKGROUP_PURE="1")], strict=True)
    )


@pytest.fixture(scope="session")
def library(wheels, tmp_path_factory):
    """The library of tensor ops in the wheel in dist/."""
    with zipfile.ZipFile(wheels["dist"]) as archive:
        return archive.extract("taskgroup/_ops.abi3.so", tmp_path_factory.mktemp("library"))


def tracked(*paths):
    listed = subprocess.run(
        ["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_source_distribution_holds_what_builds_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in held if name.startswith("taskgroup.egg-info/")}
    made |= {"PKG-INFO", "setup.cfg"}
    files = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
    assert held - made == tracked("csrc", "taskgroup", *files)


@pytest.mark.parametrize("kind", KINDS)
def test_wheel_holds_the_package_and_nothing_else(wheels, kind):
    names = zipfile.ZipFile(wheels[kind]).namelist()
    held = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if kind == "pure":
        assert wheels[kind].name.endswith("-py3-none-any.whl")
    else:
        assert f"-{python}-{python}-" in wheels[kind].name
        native = {name for name in held if name.endswith(".so")}
        assert {name.split(".")[0] for name in native} == {"taskgroup/_ops", "taskgroup/_host"}
        held -= native
    assert held == tracked("taskgroup")


@pytest.mark.parametrize("kind", KINDS)
def test_any_torch_from_2_10_on_will_do(wheels, kind):
    """The wheel does not require the torch that built it: a CPU build runs with a CUDA torch."""
    with zipfile.ZipFile(wheels[kind]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10", "numpy>=1.24"]
    assert "+" not in metadata["Version"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_library_keeps_to_the_stable_abi_of_torch(library):
    symbols = output("nm", "--dynamic", "--undefined-only", library).splitlines()
    # Symbols of the system carry a version; weak symbols may be missing.
    asked = {line.split()[-1] for line in symbols if "@" not in line and line.split()[0] == "U"}
    assert "aoti_torch_library_impl" in asked or "torch_library_impl" in asked
    assert not {name for name in asked if not re.match(r"(aoti_)?torch_[a-z]", name)}


def test_library_keeps_to_the_stable_abi_of_python(library):
    command = [sys.executable, "-m", "abi3audit", "--strict", "--report", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_library_needs_the_system_and_torch_for_the_cpu_alone(library):
    dynamic = output("readelf", "--dynamic", "--wide", library)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    system = {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
    # libtorch_cpu is in every torch; the CUDA runtime is inside the library.
    assert needed - system - {"ld-linux-x86-64", "ld-linux-aarch64"} == {"libtorch_cpu"}
    assert not re.search(r"R(UN)?PATH", dynamic)


def link_torch_and_numpy(into):
    """Link the installed torch and numpy, and all packages that they need, into a folder."""
    wanted, seen = ["torch", "numpy"], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        for path in found.files:
            top = path.parts[0]
            if top not in ("..", "__pycache__") and not (into / top).exists():
                (into / top).symlink_to(found.locate_file(top))
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)  # noqa: PERF401 (it grows while it is read)


def clean_environment(folder):
    """Make an environment with torch and numpy, and return its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    shutil.rmtree(packages / "setuptools", ignore_errors=True)  # torch needs another version
    for path in packages.glob("setuptools-*"):
        shutil.rmtree(path)
    link_torch_and_numpy(packages)
    return packages


def test_type_checkers_know_the_installed_package(wheels, tmp_path):
    packages = clean_environment(tmp_path / "venv")
    zipfile.ZipFile(wheels["pure"]).extractall(packages)
    python = tmp_path / "venv" / "bin" / "python"
    options = ["--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache"]

    def check(program):
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", *options, "program.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = check(TYPED)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = check(UNTYPED).stdout
    for words in ('"warm_up" for "TaskGroups"', '"reduction"', '"attach"', '"no_such_thing"'):
        assert words in errors


@pytest.mark.parametrize("kind", KINDS)
def test_installs_and_runs_without_a_compiler(wheels, kind, tmp_path):
    clean_environment(tmp_path / "venv")

    def python(*arguments):
        return subprocess.run(
            [tmp_path / "venv" / "bin" / "python", *arguments],
            cwd=tmp_path,
            env={"PATH": str(tmp_path / "venv" / "bin"), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    for arguments in (
        ["-m", "pip", "install", "--no-index", "--no-cache-dir", wheels[kind]],
        ["-m", "pip", "check"],
        ["-c", PROGRAM],
        ["-m", "taskgroup"],
    ):
        done = python(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    backend = "reference" if kind == "pure" else "cpp"
    assert said.count(f" {backend} on cpu (of ") == 5
    if kind == "without CUDA":
        assert "its native code was built without CUDA kernels" in said
    elif kind == "dist" and shutil.which("nvcc") and os.environ.get("TASKGROUP_CUDA") != "0":
        assert re.search(r"cuda (on|installed, [\w ]+): CUDA kernels, for compute capability", said)
