"""Objects by name: found, not found, and the digest of their source."""

import importlib

import pytest

from taskgroup.lab.importing import find, name_of, sources


def write(folder, **files):
    """Write modules; two underscores stand for a slash, and ``init`` for ``__init__``."""
    for name, text in files.items():
        place = name.replace("__", "/")
        path = folder / f"{place.removesuffix('init')}{'__init__' * place.endswith('init')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_module_of_the_current_folder(folder):
    write(folder, plain_one="class Thing:\n    part = 3\n", package_one__inside="value = 4\n")
    assert find("plain_one:Thing").__name__ == "Thing"
    assert find("plain_one:Thing.part") == 3
    assert find("package_one.inside:value") == 4


def test_a_file_that_imports_its_neighbour(folder):
    write(folder, deep__file_one="from neighbour_one import value\n", deep__neighbour_one="value=5")
    assert find("deep/file_one.py:value") == 5
    assert find(f"{folder}/deep/file_one.py:value") == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "wether_two:Thing",
            r"no module 'wether_two' in the current folder, .*Did you mean weather",
        ),
        ("package_two.insid:value", r"no module 'insid' in package_two, .*Did you mean inside"),
        ("weather_two:Thin", "weather_two has no 'Thin'; it has Thing"),
        ("weather_two:Thing.part", "weather_two has no 'part'"),
        ("deep/none.py:Thing", r"There is no file deep/none.py \(in .*\) to read a problem from"),
        ("my-file.py:Thing", "'my-file' is no name for a Python module; rename the file"),
        ("json.py:Thing", "another module is called 'json' .*; rename the file"),
    ],
)
def test_what_is_not_found(name, said, folder):
    write(folder, weather_two="class Thing: ...\n", package_two__inside="value = 4\n", json="")
    write(folder, package_two__init="")
    (folder / "my-file.py").write_text("")
    with pytest.raises(ValueError, match=said):
        find(name)


def test_what_a_module_imports_is_missing(folder):
    write(folder, broken_three="import nowhere_three\n")
    with pytest.raises(ImportError, match="broken_three cannot be imported: No module named 'now"):
        find("broken_three:Thing")


def test_errors_of_a_module_are_its_own(folder):
    write(folder, faulty_four="1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        find("faulty_four:Thing")


def test_a_name_for_an_object(folder):
    write(folder, named_five="class Thing: ...\nthing = Thing()\ndef make(): return Thing()\n")
    module = importlib.import_module("named_five") if find("named_five:Thing") else None
    assert name_of(module.Thing) == ("named_five:Thing", True)
    assert name_of(module.thing) == ("named_five:thing", True)
    assert name_of(module.make) == ("named_five:make", True)
    for unnamed in (module.Thing(), type("Thing", (), {"__module__": "named_five"}), lambda: 3):
        name, importable = name_of(unnamed)
        assert not importable
        assert find(name) is unnamed


def test_sources_are_the_files_that_are_imported_without_comments(folder):
    write(folder, package_six__init="", package_six__base="SIZE = 3\n", aside_six="x = 1\n")
    text = "import json\nfrom . import base\nfrom .base import SIZE\n\n\nclass Thing: ...\n"
    write(folder, package_six__main=text)
    find("aside_six:x")  # imported by something else
    find("package_six.main:Thing")
    before = sources("package_six.main:Thing")
    assert list(before) == ["package_six/__init__.py", "package_six/base.py", "package_six/main.py"]
    write(folder, package_six__main=f"# more\n{text}  # words\n".replace("SIZE\n\n", "SIZE\n"))
    assert sources("package_six.main:Thing") == before
    write(folder, package_six__base="SIZE = 4\n")
    after = sources("package_six.main:Thing")
    assert {name for name in before if after[name] != before[name]} == {"package_six/base.py"}


def test_sources_of_a_file_and_of_an_object_without_a_name(folder):
    write(folder, deep__file_seven="class Thing:\n    ...\n")
    thing = find("deep/file_seven.py:Thing")()
    assert list(sources("deep/file_seven.py:Thing")) == ["file_seven.py"]
    assert sources(name_of(thing)[0]) == sources("deep/file_seven.py:Thing")
    nowhere = type("Nowhere", (), {"__module__": "nowhere_seven"})
    assert sources(name_of(nowhere)[0]) == {}
