"""Tests that need a GPU: `make gpu` runs them. Their logic runs on the host in the other tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _free():
    yield
    torch.cuda.empty_cache()
