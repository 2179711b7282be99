"""Objects that are named as ``my_package.my_module:name``, and the source that defines them."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from taskgroup.lab.user_code import is_of_user
from taskgroup.lab.words import listed, nearest

__all__ = ["check_unchanged", "differing", "find", "forget", "name_of", "sources"]

# Objects that no name leads to, such as a class of a notebook, by the name that they were given.
_GIVEN: dict[str, Any] = {}
# What was found by each name, and the sources at that time.
_FOUND: dict[str, tuple[Any, dict[str, str]]] = {}


def find(name: str) -> Any:
    """The object that ``"my_package.my_module:name"`` or ``"folder/file.py:name"`` names.

    Modules are also looked for in the current folder, which becomes part of ``sys.path``, as with
    ``python -m``; so does the folder of a file.

    Raises:
        ValueError: if there is no such module, file or attribute. The sentence lists what is like
            it.
        ImportError: if the module cannot be imported, because it imports something that is missing.
    """
    if name in _GIVEN:
        return _GIVEN[name]
    place, _, attribute = name.rpartition(":")
    module = _import(place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = {key: value for key, value in vars(found).items() if not key.startswith("_")}
            own = [key for key in public if _home(public[key]) == module.__name__]
            near = f"; it has {nearest(part, own or public)}" if public else ""
            raise ValueError(f"{place} has no {part!r}{near}.")
        found = getattr(found, part)
    return found


def name_of(thing: Any) -> tuple[str, bool]:
    """A name under which :func:`find` finds an object, and whether other processes find it too.

    They do if it is a class, a function or a variable of a module that can be imported. They do not
    if it was defined in a notebook, in the program that was started, or inside of a function.
    """
    kind = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    module, label = kind.__module__, kind.__qualname__
    if module != "__main__" and (loaded := sys.modules.get(module)) is not None:
        for attribute in dict.fromkeys((label, *vars(loaded))):
            if vars(loaded).get(attribute) is thing:
                return f"{module}:{attribute}", True
    # A lambda is called <lambda>, which is no name.
    name = f"{module}:{re.sub(r'[^0-9A-Za-z_]', '', label.rpartition('.')[2])}"
    _GIVEN[name] = thing
    return name, False


def forget(name: str) -> None:
    """Let a name of :func:`name_of` that stood for an object stand for what the module has."""
    _GIVEN.pop(name, None)


def sources(name: str) -> dict[str, str]:
    """Digests of the source files behind a name: ``{file: digest}``, without comments and layout.

    These are the file that defines the object and the files beside it that this file imports,
    directly or not; installed packages are left out. Empty if there is no source, as in a notebook.
    """
    thing = find(name)
    place = name.rpartition(":")[0]
    own = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    if name in _GIVEN:
        place = own.__module__
    elif place.endswith(".py"):
        place = Path(place).stem
    module = sys.modules.get(place)
    file = _file(module)
    if module is None or file is None:
        try:
            return {place: _digest(inspect.getsource(own))}
        except (OSError, TypeError, SyntaxError):
            return {}
    is_package = file.name == "__init__.py"
    root = file.parents[module.__name__.count(".") + is_package]
    found: dict[str, str] = {}
    modules = [module]
    while modules:
        module = modules.pop()
        file = _file(module)
        if file is None or not file.is_relative_to(root) or not is_of_user(file):
            continue
        label = file.relative_to(root).as_posix()
        if label not in found:
            text = file.read_text("utf-8")
            found[label] = _digest(text)
            modules += _imported(text, module)
    return dict(sorted(found.items()))


def differing(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files whose digests differ, or that one of two results of :func:`sources` lacks."""
    return [file for file in sorted({*then, *now}) if then.get(file) != now.get(file)]


def check_unchanged(name: str) -> None:
    """Raise if the source behind a name has changed since this process first found it.

    A process keeps what it has imported. One that lives long, such as a worker of a cluster or a
    notebook, would train the old version while the file holds the new one.

    Raises:
        ValueError: if it has changed; the sentence names the files.
    """
    thing, now = find(name), sources(name)
    seen, then = _FOUND.setdefault(name, (thing, now))
    if seen is not thing:  # imported again
        _FOUND[name] = thing, now
    elif changed := differing(then, now):
        raise ValueError(
            f"{listed(changed)} changed after this process imported {name}, so it would use the "
            "old version; start the process (the notebook, or the workers of the cluster) again."
        )


def _import(place: str) -> ModuleType:
    """Import a module by its name, or by its path if that ends in ``.py``."""
    if not place.endswith(".py"):
        _add_path(Path.cwd())
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise ImportError(f"{place} cannot be imported: {error}.") from error
            raise ValueError(_no_module(place, error.name)) from None
        except ImportError as error:
            raise ImportError(f"{place} cannot be imported: {error}.") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {place} (in {Path.cwd()}) to read a problem from.")
    if not path.stem.isidentifier():
        raise ValueError(
            f"{place} cannot be imported, because {path.stem!r} is no name for a Python module; "
            "rename the file, for example with _ in place of -."
        )
    _add_path(path.parent)
    try:
        module = importlib.import_module(path.stem)
    except ImportError as error:
        raise ImportError(f"{place} cannot be imported: {error}.") from error
    file = _file(module)
    if file is None or not file.samefile(path):
        raise ValueError(
            f"{place} cannot be imported, because another module is called {path.stem!r} "
            f"({file or 'built in'}); rename the file."
        )
    return module


def _no_module(place: str, missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    folders = getattr(sys.modules[parent], "__path__", []) if parent else [str(Path.cwd())]
    there = [module.name for module in pkgutil.iter_modules(folders)]
    near = difflib.get_close_matches(last, there, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    where = f"in {parent}" if parent else f"in the current folder, {Path.cwd()}, or installed"
    return (
        f"There is no module {last!r} {where}, to import {place} from; start the command in the "
        f"folder that holds {missing.partition('.')[0]}, or install it.{hint}"
    )


def _add_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def _home(thing: object) -> object:
    """The name of the module that defines an object; imported objects have another."""
    return getattr(thing, "__module__", None)


def _file(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file and file.endswith(".py") else None


def _digest(text: str) -> str:
    code = ast.unparse(ast.parse(textwrap.dedent(text)))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _imported(text: str, module: ModuleType) -> Iterator[ModuleType]:
    """The loaded modules that a source text imports, and the packages that hold them."""
    package = module.__package__ or ""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                try:
                    base = importlib.util.resolve_name("." * node.level + base, package)
                except ImportError:  # it has not run
                    continue
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            for n in range(1, len(parts) + 1):
                if (loaded := sys.modules.get(".".join(parts[:n]))) is not None:
                    yield loaded
