"""The walls of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

import taskgroup as tg

PACKAGE = Path(tg.__file__).parent
STANDS_ON = {  # what each part of the core may import of the others
    "ops": set(),
    "gradients": {"ops"},
    "grouping": {"ops"},
    "affinity": {"ops", "gradients"},
    "nn": {"ops"},
    "methods": {"ops", "gradients"},
    "loop": {"ops", "gradients", "grouping", "affinity", "nn"},
    "costs": {"ops", "affinity", "nn", "loop"},
    "recording": {"ops", "gradients", "methods", "loop"},
    "integrations": {"loop", "nn", "recording"},
}
# The parts of the lab, from the bottom to the top: each may import those that come before it.
LAB = (
    *("words", "user_code", "processes", "recipe", "importing", "streams", "problem", "templates"),
    *("mlp", "molecules", "vision", "data", "train", "report", "studies", "commands", "cli"),
)


def imports():
    """``{module: modules of the package that it imports}``, including those for type checking."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    found = {}
    for module, path in files.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                named.update(inside or {node.module})
        found[module] = (named & files.keys()) - {module}
    return found


IMPORTS = imports()


def is_lab(module):
    return module == "taskgroup.lab" or module.startswith("taskgroup.lab.")


def part(module):
    """The part of the core, such as ``"ops"`` for ``taskgroup.ops.combine``; None at the top."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in STANDS_ON else None


def test_the_core_never_imports_the_lab():
    wrong = {m: sorted(filter(is_lab, named)) for m, named in IMPORTS.items() if not is_lab(m)}
    assert not {m: named for m, named in wrong.items() if named}


def test_the_lab_imports_of_the_core_the_package_alone():
    core = {m: {n for n in named if not is_lab(n)} for m, named in IMPORTS.items() if is_lab(m)}
    assert not {m: named for m, named in core.items() if named - {"taskgroup"}}


@pytest.mark.parametrize("name", STANDS_ON)
def test_the_parts_of_the_core_stand_on_each_other_one_way(name):
    for module, named in IMPORTS.items():
        if part(module) == name:
            others = {part(other) for other in named} - {None, name}
            assert others <= STANDS_ON[name], f"{module} imports {others - STANDS_ON[name]}"


def test_nothing_imports_the_integrations():
    """They import the libraries of trainers, which are optional."""
    for module, named in IMPORTS.items():
        if part(module) != "integrations":
            assert not [other for other in named if part(other) == "integrations"], module


@pytest.mark.parametrize("name", LAB)
def test_the_parts_of_the_lab_stand_on_each_other_one_way(name):
    of_lab = {m: m.split(".")[2] for m in IMPORTS if m.startswith("taskgroup.lab.")}
    assert set(of_lab.values()) == set(LAB)
    below = LAB[: 1 + LAB.index(name)]
    for module in (module for module, of in of_lab.items() if of == name):
        above = {m for m in IMPORTS[module] if m in of_lab and of_lab[m] not in below}
        assert not above, f"{module} imports {above}"


def test_no_imports_in_a_circle():
    done, on_the_way = set(), []

    def follow(module):
        assert module not in on_the_way, " -> ".join([*on_the_way, module])
        if module not in done:
            on_the_way.append(module)
            for other in sorted(IMPORTS[module]):
                follow(other)
            done.add(on_the_way.pop())

    for module in IMPORTS:
        follow(module)
