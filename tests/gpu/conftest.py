"""Tests that need a GPU: `make gpu` runs them. Their logic runs on the host in the other tests."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU; `make gpu` is for one with"))


@pytest.fixture(autouse=True)
def _free():
    yield
    torch.cuda.empty_cache()
