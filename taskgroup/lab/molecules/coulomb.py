"""Coulomb matrices: molecules as vectors of a fixed length."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["coulomb_features"]

_BOHR = 0.529177210903  # ångström, CODATA 2018


def coulomb_features(
    charges: NDArray[np.integer], positions: NDArray[np.floating]
) -> NDArray[np.float32]:
    r"""Sorted Coulomb matrices of molecules, their upper triangles row by row.

    The matrix of a molecule (Rupp et al., Physical Review Letters 2012) is

    .. math:: C_{ii} = \tfrac12 Z_i^{2.4}, \qquad C_{ij} = Z_i Z_j / |R_i - R_j|,

    with distances in bohr. It does not change if the molecule is moved or rotated. Rows and columns
    are sorted by the Euclidean norm of the rows, the largest first, so that it does not depend on
    the order of the atoms either; atoms of equal norm keep their order. Atoms of charge 0 are
    padding: their rows are zero, and they come last.

    Args:
        charges: [N, A], integers; 0 is padding.
        positions: [N, A, 3], ångström.

    Returns:
        [N, A (A + 1) / 2], float32.

    Example:
        >>> hydrogen = coulomb_features(np.array([[1, 1]]), np.array([[[0, 0, 0], [0, 0, 0.74]]]))
        >>> hydrogen.round(3)
        array([[0.5  , 0.715, 0.5  ]], dtype=float32)
    """
    z, places = charges.astype(np.float64), positions.astype(np.float64) / _BOHR
    distances = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    atoms = charges.shape[1]
    diagonal = np.arange(atoms)
    distances[:, diagonal, diagonal] = 1
    pairs = z[:, :, None] * z[:, None]
    # Padded atoms lie on top of each other; their product of charges is zero.
    matrix = np.divide(pairs, distances, out=np.zeros_like(pairs), where=pairs != 0)
    matrix[:, diagonal, diagonal] = 0.5 * z**2.4
    # Rounded, so that atoms of equal norm keep their order on processors that sum otherwise.
    norms = np.linalg.norm(matrix, axis=-1).round(9)
    order = np.argsort(-norms, axis=-1, kind="stable")
    matrix = np.take_along_axis(matrix, order[:, :, None], axis=1)
    matrix = np.take_along_axis(matrix, order[:, None, :], axis=2)
    rows, columns = np.triu_indices(atoms)
    return matrix[:, rows, columns].astype(np.float32)
