"""Where the tests in this folder run: on a GPU, or on the CPU in a dry run of `make gpu`."""

import os

import pytest

GPU = os.environ.get("TEST_GPU", "cuda")  # TEST_GPU=cpu: the dry run
needs_cuda = pytest.mark.skipif(
    GPU != "cuda", reason="needs streams, graphs, launches or the synchronisation mode of a GPU"
)
