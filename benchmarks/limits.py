"""The speed of the machine at its best, measured beside the ops: a copy and a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

COPY = "copy of a large tensor"
PRODUCT = "product of square matrices"
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # much more than the caches hold
PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}


class Rates(NamedTuple):
    """The speeds of the machine in a run."""

    bytes_per_second: float  # read and written
    flops_per_second: float

    def __str__(self) -> str:
        return (
            f"copy {self.bytes_per_second * 1e-9:.0f} GB/s, "
            f"product {self.flops_per_second * 1e-12:.2f} TFLOP/s"
        )


class Limit(NamedTuple):
    """The least seconds that an op can take, by its bytes and by its operations."""

    by_bytes: float
    by_flops: float

    @property
    def seconds(self) -> float:
        """The larger of the two, since the op needs both."""
        return max(self)

    def __str__(self) -> str:
        return f"bytes {self.by_bytes * 1e6:.0f} µs, flops {self.by_flops * 1e6:.0f} µs"


class Limits:
    """Measures the machine in the same rounds as the ops, and computes their limits.

    Args:
        device: the device of the ops.
        dtype: the dtype of the matrix product.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)
        size = PRODUCT_SIZE[device.type]
        self._factor = torch.rand(size, size, device=device).to(dtype)
        self._product = torch.empty_like(self._factor)

    def sides(self) -> dict[str, Callable[[], object]]:
        """The calls to measure, by name."""
        return {
            COPY: lambda: self._target.copy_(self._source),
            PRODUCT: lambda: torch.mm(self._factor, self._factor, out=self._product),
        }

    def rates(self, least: Mapping[str, float]) -> Rates:
        """The speeds, from the measured seconds of :meth:`sides`."""
        return Rates(
            2 * self._source.nbytes / least[COPY], 2 * len(self._factor) ** 3 / least[PRODUCT]
        )

    def of(self, least: Mapping[str, float], n_bytes: float, flops: float = 0) -> Limit:
        """The limit of an op that moves ``n_bytes`` and does ``flops`` operations.

        Args:
            least: the measured seconds of :meth:`sides`.
            n_bytes: the bytes that the op reads and writes.
            flops: its additions and multiplications.
        """
        rates = self.rates(least)
        return Limit(n_bytes / rates.bytes_per_second, flops / rates.flops_per_second)
