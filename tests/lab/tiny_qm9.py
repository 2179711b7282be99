"""CSV files in the format of qm9pack, with a few made-up molecules."""

from typing import NamedTuple

import numpy as np

from taskgroup.lab.data.qm9_files import COLUMNS, PARTS

HEADER = (
    "XYZ_file,Index,SMILES,InChi,N_atoms,Stoichiometry,Elements,XYZ_Ang,Mulliken_pop,"
    "Harmonic_Freq_cmi,RotA_GHz,RotB_GHz,RotC_GHz,Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,"
    "HOMO_LUMO_gap_au,R2_bohr2,ZPVE_au,InternalEnergy_0K_au,InternalEnergy_298K_au,"
    "Enthalphy_298K_au,GibbsFreeEnergy_298K_au,Heatcapacity_Cv_cal_mol_K"
)
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}
#: Hartree, of a free atom of each element, about as in QM9.
OF_ATOMS = {1: -0.6, 6: -38.1, 7: -54.7, 8: -75.2, 9: -99.9}
ENERGIES = ("u0", "u", "h", "g")


class Made(NamedTuple):
    """Molecules as they stand in the files: charges, positions in ångström, {task: target}."""

    charges: list[list[int]]
    positions: list[np.ndarray]
    targets: list[dict[str, float]]

    def column(self, task):
        return np.array([targets[task] for targets in self.targets])


def make_molecules(number=200, seed=0, noise=0.01):
    """Molecules of 2 to 12 atoms on a jittered lattice.

    The energies are those of the free atoms, with noise in hartree; other targets follow from the
    number of electrons, with noise.
    """
    draw = np.random.default_rng(seed)
    made = Made([], [], [])
    lattice = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), -1).reshape(-1, 3)
    for _ in range(number):
        n_atoms = int(draw.integers(2, 13))
        heavy = draw.choice([6, 7, 8, 9], n_atoms - n_atoms // 2)
        charges = [int(z) for z in heavy] + [1] * (n_atoms // 2)
        places = draw.permutation(lattice)[:n_atoms] * 1.4 + draw.normal(0, 0.05, (n_atoms, 3))
        free = sum(OF_ATOMS[z] for z in charges)
        size = sum(charges) / 50
        targets = {task: size + 0.1 * draw.normal() for task in COLUMNS}
        targets |= {task: free + noise * draw.normal() for task in ENERGIES}
        made.charges.append(charges)
        made.positions.append(places.round(10))
        made.targets.append({task: round(value, 6) for task, value in targets.items()})
    return made


def line(charges, positions, targets, index=1):
    """A molecule as a line of the files."""

    def entries(values):
        # As in the files, whole numbers end with the decimal point.
        return ",".join(np.format_float_positional(value, trim="k") for value in values)

    elements = ",".join(f"'{SYMBOLS.get(z, z)}'" for z in charges)
    places = ",".join(f"[{entries(place)}]" for place in positions)
    given = {column: targets[task] for task, column in COLUMNS.items()}
    numbers = [given.get(column, 0.25) for column in HEADER.split(",")[10:]]
    return (
        f'"dsgdb9nsd_{index:06}.xyz",{index},"C","InChI=1S/CH4/h1H4",{len(charges)},"[4,1,0,0,0]",'
        f'"[{elements}]","[{places}]","[-0.5,0.1]","[1341.3,1562.6]",{entries(numbers)}'
    )


def write_qm9(folder, made=None):
    """Write molecules to the three files; returns them."""
    made = made or make_molecules()
    lines = [line(*molecule, index) for index, molecule in enumerate(zip(*made, strict=True))]
    folder.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, len(lines), len(PARTS) + 1).astype(int)
    for name, start, end in zip(PARTS, bounds[:-1], bounds[1:], strict=True):
        (folder / name).write_text("\n".join([HEADER, *lines[start:end]]) + "\n")
    return made
