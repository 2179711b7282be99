"""Builds the native code with CMake. All other settings are in pyproject.toml.

``TASKGROUP_PURE=1`` installs without native code. ``TASKGROUP_CUDA=0`` builds without the CUDA
kernels, and ``TASKGROUP_CUDA=1`` requires them; by default they are built if there is an nvcc.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PURE = os.environ.get("TASKGROUP_PURE", "0") not in ("", "0")
CUDA = os.environ.get("TASKGROUP_CUDA", "")


def stop(sentence):
    # SystemExit, because pip and setuptools print a long traceback for any other exception.
    raise SystemExit(
        f"taskgroup: {sentence}, or set TASKGROUP_PURE=1 to install without native code."
    )


def build_tool(name):
    """Import a build requirement that is a Python package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        stop(
            f"{name} is needed to build the native code and cannot be imported ({error}): install "
            f"it with `{Path(sys.executable).name} -m pip install {name}`"
        )


def executable(name):
    """The path of cmake or ninja: in the pip package first, whose scripts may not be on PATH."""
    directory = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name]
    try:
        path = getattr(importlib.import_module(name), directory)
    except (ImportError, AttributeError):
        path = None
    found = (path and shutil.which(name, path=path)) or shutil.which(name)
    return found or stop(
        f"{name} is needed to build the native code and was not found: install it with "
        f"`{Path(sys.executable).name} -m pip install {name}`"
    )


def check_compiler():
    named = os.environ.get("CXX")
    # CXX may contain a launcher or flags, as in "ccache g++".
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        stop(
            "no C++17 compiler was found ("
            + (f"CXX={named}" if named else "looked for " + ", ".join(candidates))
            + "): install GCC 9 or later or Clang 10 or later (Debian and Ubuntu: apt install g++)"
            + (", correct CXX" if named else "")
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        stop(
            "Python.h is missing: install the headers of this Python "
            f"(Debian and Ubuntu: apt install python{sysconfig.get_python_version()}-dev)"
        )


def nvcc():
    """The path of the CUDA compiler, found as CMake finds it, or None."""
    if CUDA not in ("", "0", "1"):
        stop(f"TASKGROUP_CUDA must be 0, 1 or empty, got {CUDA!r}")
    named = os.environ.get("CUDACXX")
    directories = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")]
    directories = [str(Path(directory) / "bin") for directory in directories if directory]
    path = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), *directories, "/usr/local/cuda/bin"]
    )
    found = shutil.which(named.split()[0] if named else "nvcc", path=path)
    if CUDA == "1" and found is None:
        stop(
            "TASKGROUP_CUDA=1 requires the CUDA kernels, and no nvcc was found"
            + (f" (CUDACXX={named})" if named else "")
            + ": install the CUDA toolkit 12.1 or later, or set CUDACXX to its nvcc, or leave "
            "TASKGROUP_CUDA empty to build without them"
        )
    return found


class CMakeBuild(build_ext):
    """Builds all extensions in one run of CMake."""

    def build_extensions(self):
        check_compiler()
        cmake, ninja = executable("cmake"), executable("ninja")
        build_tool("torch")
        torch = build_tool("torch.utils.cpp_extension")
        pybind11 = build_tool("pybind11")

        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "ON",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_INCLUDE_DIRS": ";".join(torch.include_paths()),
            "TORCH_LIBRARY_DIRS": ";".join(torch.library_paths()),
            "TASKGROUP_CUDA": CUDA,
        }
        compiler = nvcc()
        if compiler is not None:
            os.environ["CUDACXX"] = compiler  # CMake looks here first
        # The folder stays, one for each Python, so that the next build compiles only what changed.
        build_dir = (
            ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        )
        build_dir.mkdir(parents=True, exist_ok=True)
        # CMake reads the environment in its first run only. If any input differs from the last
        # build, start from an empty folder; otherwise CMake would silently keep the old compiler
        # or torch.
        names = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDAARCHS")
        environment = {name: os.environ.get(name) for name in names}
        given = json.dumps([str(ROOT), cmake, options, environment], indent=1)
        record = build_dir / "given.json"
        if not record.is_file() or record.read_text() != given:
            shutil.rmtree(build_dir)
            build_dir.mkdir()
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        self.cmake(cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", *definitions)
        record.write_text(given)
        jobs = os.environ.get("MAX_JOBS")
        self.cmake(cmake, "--build", build_dir, *(["--parallel", jobs] if jobs else []))

        for extension in self.extensions:
            built = build_dir / f"{extension.name.rpartition('.')[2]}.so"
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built), str(target))

    @staticmethod
    def cmake(*command):
        try:
            subprocess.run([str(word) for word in command], check=True)
        except subprocess.CalledProcessError:
            stop("the native code did not build: correct the error that CMake shows above")


setup(
    cmdclass={"build_ext": CMakeBuild},
    ext_modules=[]
    if PURE
    else [
        # torch loads this library; it is not imported, so it works with any Python.
        Extension("taskgroup._ops", sources=[], py_limited_api=True),
        Extension("taskgroup._host", sources=[]),
    ],
)
