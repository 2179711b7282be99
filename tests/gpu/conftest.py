"""Tests that need a GPU: `make gpu` runs them. Their logic runs on the host in the other tests."""

import pytest
import torch

KEPT = 2**32  # bytes that a process may keep for its next test; the others run beside it


@pytest.fixture(autouse=True)
def _free():
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()
