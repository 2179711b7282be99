import shutil

import pytest

from taskgroup.vision.datasets import DATASETS
from taskgroup.vision.datasets.mini import write_mini


@pytest.fixture(scope="session")
def minis(tmp_path_factory):
    """A small tree of each data set; not to be changed."""
    folder = tmp_path_factory.mktemp("mini")
    for name in DATASETS:
        write_mini(name, folder / name)
    return folder


@pytest.fixture
def broken(minis, tmp_path):
    """A function that copies a tree, to be damaged."""

    def copy(name):
        return shutil.copytree(minis / name, tmp_path / name)

    return copy
