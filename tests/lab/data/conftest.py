import shutil

import pytest


@pytest.fixture
def broken(minis, tmp_path):
    """A function that copies a tree, to be damaged."""

    def copy(name):
        return shutil.copytree(minis / name, tmp_path / name)

    return copy
