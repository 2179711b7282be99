"""Sorted Coulomb matrices: by hand, and what they do not depend on."""

import numpy as np
import pytest

from taskgroup.lab.molecules.coulomb import coulomb_features

BOHR = 0.529177  # ångström


def water():
    """Charges and positions of water, hydrogens first."""
    return [1, 1, 8], np.array([[0.757, 0.586, 0.0], [-0.757, 0.586, 0.0], [0.0, 0.0, 0.0]])


def random_molecules(number=20, atoms=9, padding=3, seed=0):
    draw = np.random.default_rng(seed)
    charges = np.zeros((number, atoms + padding), np.uint8)
    charges[:, :atoms] = draw.choice([1, 6, 7, 8, 9], (number, atoms))
    positions = np.zeros((number, atoms + padding, 3))
    positions[:, :atoms] = draw.normal(0, 3, (number, atoms, 3))
    return charges, positions


def test_water_by_hand():
    charges, positions = water()
    oxygen, hydrogen = 0.5 * 8**2.4, 0.5
    bond = np.hypot(0.757, 0.586) / BOHR
    across = 2 * 0.757 / BOHR
    # Oxygen has the largest row: O, then the two H; the upper triangle row by row.
    expected = [oxygen, 8 / bond, 8 / bond, hydrogen, 1 / across, hydrogen]
    found = coulomb_features(np.array([charges]), positions[None])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_padding_adds_zeros_after_the_atoms():
    charges, positions = water()
    padded = coulomb_features(np.array([[*charges, 0]]), np.pad(positions, ((0, 1), (0, 0)))[None])
    whole = coulomb_features(np.array([charges]), positions[None])
    rows, columns = np.triu_indices(4)
    atoms = (rows < 3) & (columns < 3)
    np.testing.assert_array_equal(padded[:, atoms], whole)
    assert not padded[:, ~atoms].any()


def test_rows_fall_in_norm():
    features = coulomb_features(*random_molecules())
    matrix = np.zeros((len(features), 12, 12))
    rows, columns = np.triu_indices(12)
    matrix[:, rows, columns] = matrix[:, columns, rows] = features
    norms = np.linalg.norm(matrix, axis=-1)
    assert (np.diff(norms, axis=1) <= 1e-4).all()


def rotated(charges, positions):
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    return charges, positions @ q.T


def moved(charges, positions):
    return charges, positions + np.array([3.0, -2.0, 10.0])


def reordered(charges, positions):
    order = np.random.default_rng(2).permutation(charges.shape[1])  # padding moves too
    return charges[:, order], positions[:, order]


@pytest.mark.parametrize("change", [rotated, moved, reordered])
def test_neither_place_nor_order_matters(change):
    charges, positions = random_molecules()
    expected = coulomb_features(charges, positions)
    np.testing.assert_allclose(
        coulomb_features(*change(charges, positions)), expected, rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(coulomb_features(charges, 1.01 * positions), expected, rtol=1e-4)


def test_atoms_of_equal_norm_keep_their_order_when_they_are_moved():
    # Four hydrogens at the corners of a rectangle, the same for each but for errors of rounding.
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [1, 2, 0]], float)
    expected = coulomb_features(np.ones((1, 4), int), corners[None])
    for shift in np.linspace(0.1, 5, 50):
        found = coulomb_features(np.ones((1, 4), int), corners[None] + shift)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
