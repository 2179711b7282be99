"""A table with many tasks: river's yeast data set, with fourteen labels per gene.

Needs the extra ``compare``, and Python 3.11 or later, as river does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

import taskgroup as tg
from taskgroup.lab.mlp import mlp
from taskgroup.lab.problem import Problem
from taskgroup.lab.recipe import ProblemSettings

try:
    from river.datasets import Yeast as Records
except ImportError:
    raise ImportError(
        "The yeast data ships with river, which is not installed: pip install 'taskgroup[compare]' "
        "(river needs Python 3.11 or later)."
    ) from None

__all__ = ["Yeast"]

# Rows of the 2,417 genes, which _tables() shuffles with a fixed seed.
_SPLITS = {"train": slice(0, 1450), "validation": slice(1450, 1850), "held_out": slice(1850, None)}


class Table(NamedTuple):
    """Features [N, 103] of some genes, and their labels [N, 14], 0 or 1; both float32.

    The features have mean 0 and variance 1 over the training genes.
    """

    features: Tensor
    labels: Tensor


class Yeast(Problem):
    """Which of 14 functional classes a yeast gene belongs to (Elisseeff & Weston, NIPS 2001).

    There are 2,417 genes with 103 features (expression levels and phylogenetic profiles). Each
    class is a binary task, with 1.4 to 75 per cent of positives. 1,450 genes are for training, 400
    for validation, and 567 are held out. The network is an MLP of ``depth`` layers of width ``dim``
    with a linear head per task. The loss is binary cross-entropy, and the metric is the area under
    the ROC curve. The score of a loss L is exp(-L), the geometric mean probability of the right
    label.
    """

    tasks: Mapping[str, str] = {f"class{k}": f"Class {k}" for k in range(1, 15)}
    better = "higher"
    metrics = "AUC"
    splits = ("train", "validation", "held_out")

    def __init__(self, settings: ProblemSettings) -> None:
        self._settings = settings
        self._train = _tables()["train"]

    @staticmethod
    def score(losses: Mapping[str, Tensor]) -> dict[str, float]:
        """exp(-L) of every task, kept below 1, which a rare class may reach, and above 0."""
        values = torch.stack(list(losses.values())).tolist()  # waits for the device once
        return {
            task: max(min(math.exp(-value), 1 - 1e-6), 1e-300)
            for task, value in zip(losses, values, strict=True)
        }

    def model(self, tasks: Sequence[str]) -> tg.MultiTaskModel:
        """An MLP with a head for each of the tasks, linear unless ``head_depth`` says otherwise."""
        settings, width = self._settings, self._settings.dim
        inputs = self._train.features.shape[1]
        hidden = settings.head_width or width
        return tg.MultiTaskModel(
            mlp(inputs, width, settings.depth, dropout=settings.dropout),
            {task: mlp(width, hidden, settings.head_depth, outputs=1) for task in tasks},
        )

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Table]:
        """Draw random training genes, with replacement."""
        generator = torch.Generator().manual_seed(seed)
        n_genes = len(self._train.features)
        size = (batch_size,)
        drawn = (torch.randint(n_genes, size, generator=generator, device="cpu") for _ in count())
        for rows in islice(drawn, start, None):
            yield Table(self._train.features[rows], self._train.labels[rows])

    def losses(self, outputs: Mapping[str, Tensor], batch: Table) -> dict[str, Tensor]:
        """Binary cross-entropy of every task."""
        column = {task: k for k, task in enumerate(self.tasks)}
        return {
            task: F.binary_cross_entropy_with_logits(output[:, 0], batch.labels[:, column[task]])
            for task, output in outputs.items()
        }

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The area under the ROC curve of every task."""
        table = _tables()[split]
        device = next(model.parameters()).device
        outputs = model(table.features.to(device))
        labels = dict(zip(self.tasks, table.labels.long().unbind(1), strict=True))
        return {
            task: binary_auroc(output[:, 0].cpu(), labels[task]).item()
            for task, output in outputs.items()
        }


@cache
def _tables() -> dict[str, Table]:
    rows = [(list(x.values()), list(y.values())) for x, y in Records()]  # type: ignore[no-untyped-call]
    features = torch.tensor([x for x, _ in rows], dtype=torch.float32, device="cpu")
    labels = torch.tensor([y for _, y in rows], dtype=torch.float32, device="cpu")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0), device="cpu")
    features, labels = features[order], labels[order]
    train = features[_SPLITS["train"]]
    features = (features - train.mean(0)) / train.std(0)
    return {name: Table(features[rows], labels[rows]) for name, rows in _SPLITS.items()}
