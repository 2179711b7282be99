"""A random generator on the host that can be copied, pickled and sent to another process."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["HostGenerator"]


class HostGenerator(torch.Generator):
    """A generator on the CPU whose copies continue with the same numbers.

    A plain ``torch.Generator`` is pickled as a tensor in shared memory, which a spawned process
    cannot open; this one is pickled as bytes.

    Example:
        >>> import copy
        >>> generator = HostGenerator(seed=7)
        >>> other = copy.deepcopy(generator)
        >>> torch.equal(generator.get_state(), other.get_state())
        True
    """

    def __new__(cls, seed: int = 0) -> HostGenerator:
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        try:
            # True is an integer to Python, and never the seed that was meant.
            number = None if isinstance(seed, bool) else operator.index(seed)
        except TypeError:
            number = None
        if number is None or not -(2**63) <= number < 2**64:
            raise ValueError(
                f"seed must be an integer of at most 64 bits, got {seed!r}. Without one, the seed "
                "is 0, and every run draws the same."
            )
        self.manual_seed(number)

    def permutation(self, n: int) -> list[int]:
        """The numbers 0 to n-1 in random order."""
        order: list[int] = torch.randperm(n, generator=self, device="cpu").tolist()
        return order

    def below(self, n: int) -> int:
        """A random number from 0 to n-1."""
        return int(torch.randint(n, (), generator=self, device="cpu"))

    def __reduce__(self) -> Any:
        return _from_state, (self.get_state().numpy().tobytes(),)


def _from_state(state: bytes) -> HostGenerator:
    generator = HostGenerator()
    # The bytes are copied because they are read-only.
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator
