"""The backends that a benchmark measures, and checks that their results are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.clocks import Call
from benchmarks.gradient_peers import Gradients
from taskgroup import ops
from tests.random_gradients import combination_error, gram_error

TOLERANCE = 1e-6  # of |g_i| |g_j|


class WrongNumberError(AssertionError):
    """A kernel gives a wrong number; this ends the benchmark."""


def backends(device: torch.device) -> list[str]:
    """The backends to measure: on a GPU CUDA and Triton, on the CPU the best one."""
    there = [name for name, problem in ops.backends().items() if problem is None]
    if device.type == "cuda":
        return [name for name in ("cuda", "triton") if name in there] or ["reference"]
    return ["cpp" if "cpp" in there else "reference"]


def on(backend: str, call: Call) -> Call:
    """The call on this backend."""

    def run() -> object:
        with ops.use_backend(backend):
            return call()

    return run


def check_gram(name: str, gram: Tensor, gradients: Gradients) -> None:
    """Compare inner products with float64.

    Raises:
        WrongNumberError: if one is off by more than the tolerance; it names the entry.
    """
    error = gram_error(gram, gradients)
    if not error <= TOLERANCE:
        i, j = error.entry
        raise WrongNumberError(
            f"{name}, {_sizes(gradients)}: entry ({i}, {j}) of the Gram matrix is off by "
            f"{error:.1e} of |g_{i}| |g_{j}|, more than {TOLERANCE:.0e}"
        )


def check_combination(
    name: str, total: Sequence[Tensor], gradients: Gradients, weights: Tensor
) -> None:
    """Compare weighted sums with float64.

    Raises:
        WrongNumberError: if one is off by more than rounding; it names the tensor and the element.
    """
    error = combination_error(total, gradients, weights)
    if not error <= 1:
        t, x = error.entry
        raise WrongNumberError(
            f"{name}, {_sizes(gradients)}: element {x} of tensor {t} is off by {error:.1f} "
            "times what rounding explains"
        )


def check_affinity(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare an affinity with the expected one.

    Raises:
        WrongNumberError: if an entry is off by more than the tolerance; it names the entry.
    """
    try:
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=0, atol=tolerance)
    except AssertionError as error:
        said = " ".join(str(error).split())  # names the entry
        raise WrongNumberError(f"{name}, K = {len(got)}, {got.dtype}: {said}") from None


def launches(call: Call) -> int:
    """The number of kernels that a call starts on the GPU."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name
        for event in trace.events()
    )


def _sizes(gradients: Gradients) -> str:
    n_elements = sum(gradient.numel() for gradient in gradients[0])
    return f"K = {len(gradients)}, {n_elements} parameters, {gradients[0][0].dtype}"
