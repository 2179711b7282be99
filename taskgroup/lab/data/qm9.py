"""QM9: eleven properties of 130,831 small organic molecules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import taskgroup as tg
from taskgroup.lab.data.qm9_files import ATOMS, COLUMNS, Molecules, molecules
from taskgroup.lab.mlp import mlp
from taskgroup.lab.molecules.message_passing import MessagePassing
from taskgroup.lab.molecules.regimes import PLANTED, loss_factors, plant
from taskgroup.lab.problem import Problem
from taskgroup.lab.recipe import ProblemSettings
from taskgroup.lab.words import listed

__all__ = ["QM9", "TASKS", "Batch", "split_rows", "targets_in_units"]

_MEV = 27_211.386245988  # per hartree, CODATA 2018
_SPLITS = {"train": 110_000, "validation": 10_000, "held_out": 10_831}
_SPLIT_SEED = 0
_FIXED_TRAINING = 5_000  # molecules that the training metrics are computed on
_AT_ONCE = 1_000  # molecules of a forward pass of the evaluation

#: ``{task: (name as shown, unit of its error, factor from the unit of the CSV files)}``.
TASKS = {
    "dipole": ("Dipole", "D", 1.0),
    "polarizability": ("Polarizability", "bohr³", 1.0),
    "homo": ("HOMO", "meV", _MEV),
    "lumo": ("LUMO", "meV", _MEV),
    "r2": ("R²", "bohr²", 1.0),
    "zpve": ("ZPVE", "meV", _MEV),
    "u0": ("U₀", "meV", _MEV),
    "u": ("U", "meV", _MEV),
    "h": ("H", "meV", _MEV),
    "g": ("G", "meV", _MEV),
    "cv": ("Cv", "cal/(mol K)", 1.0),
}
_ENERGIES = ("u0", "u", "h", "g")
_ELEMENTS = (1, 6, 7, 8, 9)


class Batch(NamedTuple):
    """Molecules of a batch.

    ``inputs`` is what the encoder takes: Coulomb features [B, 435], or nuclear charges [B, A] and
    positions [B, A, 3]. ``targets`` [B, 11] have mean 0 and variance 1 over the training split.
    """

    inputs: Tensor | tuple[Tensor, Tensor]
    targets: Tensor


class QM9(Problem):
    """Eleven properties of 130,831 small organic molecules (Ramakrishnan et al., 2014).

    The molecules are those of the package qm9pack. 110,000 are for training, 10,000 for validation,
    and 10,831 are held out. The targets are those of the published comparisons of multi-task
    optimizers: dipole moment, isotropic polarizability, HOMO, LUMO, R², zero-point vibrational
    energy, the energies U₀, U, H and G, and the heat capacity. The four energies are of
    atomisation: the least-squares fit of the counts of the elements over the training split is
    subtracted. The loss is the mean squared error of targets with mean 0 and variance 1 over the
    training split. The metric is the mean absolute error in the unit of chemists.

    ``backbone`` is ``"mlp"``, an MLP on sorted Coulomb matrices, or ``"message-passing"``, a
    network on the coordinates; ``dim`` and ``depth`` are its width and its layers. The head of each
    task is linear, with ``head_depth`` hidden layers of width ``head_width`` before.

    ``regime`` plants tasks or scales of losses; see :func:`taskgroup.lab.molecules.regimes.plant`.
    """

    tasks: Mapping[str, str] = {task: title for task, (title, _, _) in TASKS.items()}
    metrics: Mapping[str, str] = {task: f"MAE in {unit}" for task, (_, unit, _) in TASKS.items()}
    better = "lower"
    splits = tuple(_SPLITS)
    #: As the publications of FAMO (NeurIPS 2023) and FairGrad (ICML 2024) list them: the percentage
    #: by which errors are larger than those of single-task training.
    published: Mapping[str, float] = {
        "gd": 177.6,
        "si": 77.8,
        "rlw": 203.8,
        "dwa": 175.3,
        "uw": 108.0,
        "mgda": 120.5,
        "pcgrad": 125.7,
        "cagrad": 112.8,
        "imtl-g": 77.2,
        "nash-mtl": 62.0,
        "famo": 58.5,
        "fairgrad": 57.9,
    }
    published_note = (
        "The published runs train another network, the message passing of Gilmer et al. (ICML "
        "2017), for 300 epochs and take the best one on validation data; so do their single-task "
        "baselines. Compare the order of the methods, not the numbers."
    )

    def __init__(self, settings: ProblemSettings) -> None:
        self._settings = settings
        self._data = _data(settings.root, settings.regime)
        self._factors = loss_factors(list(TASKS), settings.regime, _SPLIT_SEED)
        if settings.regime != "clean":
            self.published = {}  # nothing was planted there
        if settings.regime == "negatives":
            self.auxiliary = PLANTED
            self.tasks = {**type(self).tasks, **{task: task.capitalize() for task in PLANTED}}
            self.metrics = {**type(self).metrics, **dict.fromkeys(PLANTED, "MAE in deviations")}

    def model(self, tasks: Sequence[str]) -> tg.MultiTaskModel:
        """The encoder with a head for each of the tasks."""
        settings, width = self._settings, self._settings.dim
        encoder: nn.Module
        if settings.backbone == "mlp":
            inputs = ATOMS * (ATOMS + 1) // 2
            encoder = mlp(inputs, width, settings.depth, dropout=settings.dropout)
        else:
            encoder = MessagePassing(width, settings.depth)
        hidden = settings.head_width or width
        return tg.MultiTaskModel(
            encoder, {task: mlp(width, hidden, settings.head_depth, outputs=1) for task in tasks}
        )

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Draw random training molecules, with replacement."""
        generator = torch.Generator().manual_seed(seed)
        rows = self._data.rows["train"]
        size = (batch_size,)
        drawn = (torch.randint(len(rows), size, generator=generator, device="cpu") for _ in count())
        for some in islice(drawn, start, None):
            yield self._batch(rows[some.numpy()])

    def _batch(self, rows: NDArray[np.intp]) -> Batch:
        data = self._data
        targets = torch.from_numpy(data.targets[rows])
        if self._settings.backbone == "mlp":
            features = torch.from_numpy(np.ascontiguousarray(data.molecules.coulomb[rows]))
            return Batch(features.sub_(data.mean).div_(data.deviation), targets)
        charges = data.molecules.charges[rows]
        atoms = int(np.count_nonzero(charges.any(axis=0)))  # of the largest molecule of the batch
        positions = torch.from_numpy(np.ascontiguousarray(data.molecules.positions[rows, :atoms]))
        return Batch((torch.from_numpy(charges[:, :atoms].astype(np.int64)), positions), targets)

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The mean squared error of every task, in units of the variance of its target."""
        errors = self._errors(outputs, batch.targets).square().mean(0)
        losses = dict(zip(outputs, errors.unbind(), strict=True))
        if self._settings.regime == "scales":
            return {task: self._factors[task] * loss for task, loss in losses.items()}
        return losses

    def _errors(self, outputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Outputs minus targets [B, T] of the T tasks of the outputs."""
        columns = [list(self.tasks).index(task) for task in outputs]
        return torch.cat(list(outputs.values()), dim=1) - targets[:, columns]

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The mean absolute error of every task in its own unit."""
        device = next(model.parameters()).device
        rows = self._data.rows[split]
        if split == "train":
            rows = rows[:_FIXED_TRAINING]
        tasks: list[str] = []
        sums = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(rows), _AT_ONCE):
            batch = self._batch(rows[start : start + _AT_ONCE])
            inputs = batch.inputs if isinstance(batch.inputs, tuple) else (batch.inputs,)
            outputs = model(*(tensor.to(device) for tensor in inputs))
            tasks = list(outputs)
            errors = self._errors(outputs, batch.targets.to(device))
            sums = sums + errors.abs().sum(0, dtype=torch.float64)
        means = dict(zip(tasks, (sums / len(rows)).tolist(), strict=True))
        return {task: means[task] * self._data.scale[task] for task in tasks}


class _Data(NamedTuple):
    """What all runs of a process share.

    Attributes:
        molecules: all of them.
        rows: of each split.
        targets: [N, 11] float32, with mean 0 and variance 1 over the training split; [N, 13] with
            the planted ones.
        scale: ``{task: standard deviation of the target in its unit}`` over the training split.
        mean, deviation: of the Coulomb features, over the training split.
    """

    molecules: Molecules
    rows: Mapping[str, NDArray[np.intp]]
    targets: NDArray[np.float32]
    scale: Mapping[str, float]
    mean: Tensor
    deviation: Tensor


def split_rows(number: int, seed: int) -> dict[str, NDArray[np.intp]]:
    """Rows of the three splits: 110,000 molecules, 10,000, and the rest, in a random order.

    Fewer molecules than the 130,831 are split in the same proportions.

    Raises:
        ValueError: if a split would be empty.
    """
    part = min(1.0, number / sum(_SPLITS.values()))
    training, validation = (int(part * _SPLITS[name]) for name in ("train", "validation"))
    if not (training and validation and number > training + validation):
        raise ValueError(
            f"{number} molecules are too few to train on some and to evaluate on others; the CSV "
            "files of QM9 must hold 14 or more."
        )
    order = np.random.default_rng(seed).permutation(number)
    return dict(zip(_SPLITS, np.split(order, [training, training + validation]), strict=True))


def targets_in_units(found: Molecules, training: NDArray[np.intp]) -> NDArray[np.float64]:
    """Targets [N, 11] in the units of :data:`TASKS`, the energies as energies of atomisation.

    The energies of the free atoms are fitted by least squares to the training rows: one number per
    element, which explains as much of the energy as the counts of the elements can.
    """
    targets: NDArray[np.float64] = found.targets * np.array([f for _, _, f in TASKS.values()])
    counts = np.stack([(found.charges == z).sum(axis=1) for z in _ELEMENTS], axis=1).astype(float)
    energies = [list(COLUMNS).index(task) for task in _ENERGIES]
    of_atoms, *_ = np.linalg.lstsq(counts[training], targets[training][:, energies], rcond=None)
    targets[:, energies] -= counts @ of_atoms
    return targets


def _with_planted(
    targets: NDArray[np.float32], splits: Iterable[NDArray[np.intp]]
) -> NDArray[np.float32]:
    """The targets [N, 11] with those that compete with them, which stay within their split."""
    more = np.empty((len(targets), len(TASKS) + len(PLANTED)), np.float32)
    for rows in splits:
        within = torch.from_numpy(targets[rows])
        more[rows] = plant(within, list(TASKS), "negatives", _SPLIT_SEED)[0].numpy()
    return more


@cache
def _data(root: str | None, regime: str) -> _Data:
    found = molecules(root)
    rows = split_rows(len(found.targets), _SPLIT_SEED)
    training = rows["train"]
    targets = targets_in_units(found, training)
    trained = targets[training]
    if same := [task for task, y in zip(TASKS, trained.T, strict=True) if np.ptp(y) == 0]:
        raise ValueError(f"All molecules of the training split have the same {listed(same)}.")
    scale = dict(zip(TASKS, trained.std(axis=0).tolist(), strict=True))
    standard = ((targets - trained.mean(axis=0)) / list(scale.values())).astype(np.float32)
    if regime == "negatives":
        standard = _with_planted(standard, rows.values())
        scale |= dict.fromkeys(PLANTED, 1.0)
    # Some of the training split is enough; all its features would be copied to memory.
    features = torch.from_numpy(found.coulomb[np.sort(training[:20_000])])
    deviation = features.std(0)
    # A place that few molecules fill has a tiny deviation, which would blow up its few values.
    deviation = deviation.clamp(min=float(0.1 * deviation.median()) or 1.0)
    return _Data(found, rows, standard, scale, features.mean(0), deviation)
