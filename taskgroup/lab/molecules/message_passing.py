"""A message-passing network on the coordinates of molecules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taskgroup.lab.words import kind_of

__all__ = ["ELEMENTS", "MessagePassing"]

#: The elements of QM9 by nuclear charge.
ELEMENTS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}

_SHORTEST = 0.7  # ångström; the bond of H2, the shortest of all, has 0.74
_ATOMS = 18  # of a molecule of QM9, on average


class MessagePassing(nn.Module):
    r"""Encoder of molecules: continuous-filter convolutions over the distances between atoms.

    In every layer, atom i receives from all others, as in SchNet (Schütt et al., NIPS 2017),

    .. math:: m_i = \sum_{j \ne i} W(d_{ij})\, S h_j, \qquad W(d) = \sum_r \varphi_r(d)\, W_r,

    with the state :math:`h_j` of atom j, brought to half the width by S, and matrices
    :math:`W_r` that are learned. A residual branch of atomwise layers reads :math:`m_i` and
    :math:`h_i`. The filters of SchNet are a network of the distance, evaluated for each pair and
    channel. Here they are linear in the radial basis, for two reasons. The basis has no
    parameters, so it is computed once for all layers and is no part of the backward pass. And
    :math:`\sum_j \varphi_r(d_{ij}) S h_j` is one product of matrices for a molecule, so
    :math:`W_r` is applied once per atom and not once per pair, and may mix channels.

    The basis functions are bumps :math:`(1 - u^2)^3`, zero for :math:`|u| \ge 1`, which resemble
    Gaussians. Their centres are evenly spaced in :math:`e^{-d/2}` (as in PhysNet, Unke & Meuwly
    2019), so they are dense where bonds are. They fade to zero at the cutoff, with two continuous
    derivatives.

    The states of the atoms are read out as their sum, for quantities that grow with the molecule
    (energies, polarizability), and as an average whose weights are learned, for those that do not
    (orbital energies). A linear layer mixes the two, and a residual branch follows it.

    The features depend on elements and distances alone. They do not change with rotation,
    translation, the order of the atoms or the amount of padding; nor with reflection, so two mirror
    images have the same features, as they have the same energy.

    Args:
        width: number of features, W. The atoms have states of this width.
        layers: number of message-passing layers.
        cutoff: distance in ångström beyond which two atoms do not see each other. Ten ångström span
            nearly every molecule of QM9.
        radial: number of basis functions, R.

    Raises:
        ValueError: if an argument is out of its range.

    Shape:
        - charges: :math:`(B, A)`, nuclear charges of any integer dtype: 1, 6, 7, 8 or 9, or 0
          for padding. Time and memory grow with A², so cut a batch to its largest molecule.
        - positions: :math:`(B, A, 3)` in ångström, floating point. Those of padding do not matter.
        - output: :math:`(B, W)`.

    Example:
        >>> network = MessagePassing(width=64, layers=3)
        >>> charges = torch.tensor([[8, 1, 1], [1, 1, 0]])  # water, hydrogen
        >>> positions = torch.tensor(
        ...     [
        ...         [[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]],
        ...         [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74], [0.0, 0.0, 0.0]],
        ...     ]
        ... )
        >>> network(charges, positions).shape
        torch.Size([2, 64])
    """

    def __init__(self, width: int, layers: int, cutoff: float = 10.0, radial: int = 24) -> None:
        super().__init__()
        smallest = {"width": (width, 2), "layers": (layers, 1), "radial": (radial, 2)}
        for name, (value, least) in smallest.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if not isinstance(cutoff, int | float) or not _SHORTEST < cutoff < math.inf:
            raise ValueError(
                f"cutoff is a distance in ångström above {_SHORTEST}, which no bond is shorter "
                f"than; got {cutoff!r}."
            )
        self.cutoff: float = float(cutoff)
        self.elements: Tensor
        self.centres: Tensor
        self.register_buffer("elements", torch.tensor(list(ELEMENTS)), persistent=False)
        ends = (math.exp(-self.cutoff / 2), math.exp(-_SHORTEST / 2))
        self.register_buffer("centres", torch.linspace(*ends, radial), persistent=False)
        self._half_width = 2 * (ends[1] - ends[0]) / (radial - 1)  # of a bump: two spacings
        self.embedding = nn.Linear(len(ELEMENTS), width, bias=False)
        nn.init.normal_(self.embedding.weight)
        self.layers = nn.ModuleList(_Layer(width, radial) for _ in range(layers))
        self.readout = _Readout(width)

    def forward(self, charges: Tensor, positions: Tensor) -> Tensor:
        """Compute the features [B, W] of molecules; see the class for shapes.

        Raises:
            ValueError: if a shape or dtype is wrong, or a charge is not that of a known element.
                The charges are checked on the CPU. On other devices, where that would wait for the
                device, and in compiled code, the features of such a molecule are NaN.
        """
        _check(charges, positions)
        one_hot = charges[..., None] == self.elements
        real = charges != 0
        unknown = real & ~one_hot.any(-1)
        if charges.device.type == "cpu" and not torch.compiler.is_compiling() and unknown.any():
            raise ValueError(
                f"charges holds {int(charges[unknown][0])}, and the network knows "
                f"{', '.join(f'{name} ({z})' for z, name in ELEMENTS.items())}; 0 is padding."
            )
        states = self.embedding(one_hot.to(self.embedding.weight.dtype))
        basis = self._basis(real, positions).to(states.dtype)
        for layer in self.layers:
            states = layer(states, basis)
        features: Tensor = self.readout(states, real)
        return features.masked_fill(unknown.any(-1, keepdim=True), math.nan)

    def _basis(self, real: Tensor, positions: Tensor) -> Tensor:
        """The basis functions of all pairs, [B, A (to), R, A (from)], in the dtype of positions."""
        squares = (positions[:, :, None] - positions[:, None]).square().sum(-1)
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        no_pair = ~(real[:, :, None] & real[:, None]) | itself
        # Twice the cutoff away, the basis and its gradient are exactly zero, and finite before.
        squares = squares.masked_fill(no_pair, 4 * self.cutoff**2)
        near = torch.exp(-squares.clamp_min(1e-12).sqrt() / 2)  # the root of 0 has no gradient
        offsets = (near[:, :, None] - self.centres.to(near.dtype)[:, None]) / self._half_width
        fade = _bump(squares / self.cutoff**2)
        # Far from their centres, Gaussians would be denormal numbers, which are slow on a CPU.
        return _bump(offsets.square()) * fade[:, :, None]


class _Layer(nn.Module):
    """One exchange of messages, [B, A, W] -> [B, A, W]."""

    def __init__(self, width: int, radial: int) -> None:
        super().__init__()
        self.send = nn.Linear(width, width // 2)
        self.filters = nn.Linear(radial * (width // 2), width, bias=False)  # all W_r side by side
        self.own = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, basis: Tensor) -> Tensor:
        sent = self.send(states)
        # [B, A R, A] @ [B, A, W / 2]: for each atom and basis function, a sum over the others.
        received = basis.flatten(1, 2) @ sent.to(basis.dtype)
        messages = self.filters(received.unflatten(1, basis.shape[1:3]).flatten(2))
        branch: Tensor = self.out(F.silu(self.own(states) + messages))
        return states + branch


class _Readout(nn.Module):
    """States of atoms [B, A, W] to features of molecules [B, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.atoms = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.parts = nn.Linear(width, 3 * width)  # what is summed, what is averaged, the weights
        self.mix = nn.Linear(2 * width, width)
        self.branch = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        padding = ~real[..., None]
        summed, averaged, scores = self.parts(self.atoms(states)).chunk(3, dim=-1)
        # A molecule without atoms gets finite weights too, and its average is zero.
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        average = (scores.softmax(1) * averaged.masked_fill(padding, 0)).sum(1)
        total = summed.masked_fill(padding, 0).sum(1) / _ATOMS
        # No activation in between: what is a sum over atoms reaches a linear head as such.
        mixed: Tensor = self.mix(torch.cat([total.to(average.dtype), average], dim=-1))
        branch: Tensor = self.branch(mixed)
        return mixed + branch


def _bump(squares: Tensor) -> Tensor:
    """(1 - u²)³ of u², and 0 beyond u = 1."""
    return (1 - squares).relu().pow(3)


def _check(charges: Tensor, positions: Tensor) -> None:
    """Raise if shapes or dtypes are wrong."""
    if not isinstance(charges, Tensor) or charges.ndim != 2 or not _is_integer(charges.dtype):
        raise ValueError(
            "charges must be a tensor [B, A] of integers: the nuclear charges of the atoms, 0 for "
            f"padding; got {_described(charges)}."
        )
    if not isinstance(positions, Tensor) or not positions.is_floating_point():
        raise ValueError(
            "positions must be a floating-point tensor [B, A, 3], in ångström; got "
            f"{_described(positions)}."
        )
    if positions.shape != (*charges.shape, 3):
        raise ValueError(
            f"positions must be of shape {[*charges.shape, 3]}, as charges is of shape "
            f"{[*charges.shape]}; got {_described(positions)}."
        )


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _described(thing: object) -> str:
    dtype = f" of dtype {thing.dtype}" if isinstance(thing, Tensor) else ""
    return f"{kind_of(thing)}{dtype}"
