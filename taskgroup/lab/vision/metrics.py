"""The metrics of the published runs, pooled over all valid pixels of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import BinaryPrecisionRecallCurve, MulticlassJaccardIndex

from taskgroup.lab.vision.boundary import OdsF
from taskgroup.lab.vision.samples import Samples
from taskgroup.lab.vision.tasks import TASKONOMY, Task

__all__ = ["MaxF", "evaluate"]


class MaxF(BinaryPrecisionRecallCurve):
    r"""The largest F of saliency, pooled over all pixels (Achanta et al., CVPR 2009).

    .. math::
        F = \max_t \frac{(1 + \beta^2) P_t R_t}{\beta^2 P_t + R_t}, \qquad \beta^2 = 0.3,

    over the thresholds t = .05, .10, ..., .95; a pixel is salient if its probability is at least t.

    Example:
        >>> metric = MaxF()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.2]), torch.tensor([1, 0, 0]))
        >>> metric.compute().item()  # from .65 on, all pixels are right
        1.0
    """

    _BETA_SQUARED = 0.3

    def __init__(self) -> None:
        twentieths = torch.arange(1, 20, dtype=torch.float32, device="cpu") / 20
        super().__init__(thresholds=twentieths.tolist(), validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The F, a scalar; NaN if no pixel is salient."""
        precision, recall, _ = super().compute()
        # The last point of the curve, precision 1 and recall 0, has no threshold.
        precision, recall = precision[:-1], recall[:-1]
        f = (1 + self._BETA_SQUARED) * precision * recall
        f = (f / (self._BETA_SQUARED * precision + recall)).nan_to_num(0.0).max()
        positives = self.confmat[0, 1].sum()
        return torch.where(positives > 0, f, torch.nan)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples | Iterable[Samples],
    batch_size: int = 32,
    *,
    tasks: Mapping[str, Task] = TASKONOMY,
    only: Collection[str] | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Compute the metric of every task that the model predicts.

    Pixels are pooled over all samples, so that the batch size does not change the result. The
    ``metric`` of a task is one of:

    =========  ====================================================================================
    ``l1``     mean absolute error over pixels and channels; normals are brought to unit length
    ``rmse``   root mean squared error
    ``angle``  mean angle, degrees, of predicted p and true g: ``2 atan2(|p - g|, |p + g|)``
    ``miou``   mean intersection over union of the classes that occur
    ``max_f``  :class:`~taskgroup.lab.vision.metrics.MaxF`
    ``ods_f``  :class:`~taskgroup.lab.vision.boundary.OdsF`
    =========  ====================================================================================

    The model runs in evaluation mode; afterwards every module returns to its previous mode.

    Args:
        model: maps images to ``{task: [B, C, H, W]}``; images are moved to the device of its first
            parameter.
        samples: all samples in one, or an iterable of batches.
        batch_size: images per forward pass, if ``samples`` is not an iterable of batches.
        tasks: ``{task: Task}``.
        only: the tasks to evaluate; None evaluates all that the model predicts.
        workers: number of processes that match edges, the slowest of the metrics; 0 works in
            this process.

    Returns:
        ``{task: metric}``; NaN for a task if one of its outputs is not finite, or, with a warning,
        if it has no valid pixel.
    """
    host = torch.device("cpu")
    device = next((parameter.device for parameter in model.parameters()), host)
    metrics: dict[str, Metric] = {}
    seen: dict[str, int] = {}
    broken: set[str] = set()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in _slices(samples, batch_size) if isinstance(samples, Samples) else samples:
            images, labels, masks = tree_map(lambda tensor: tensor.to(device), batch)
            for name, output in model(images).items():
                if only is not None and name not in only:
                    continue
                task = tasks[name]
                if name not in metrics:
                    with host:  # whatever the default device; the metric is moved afterwards
                        metrics[name] = _metric(task, workers).to(device)
                    seen[name] = 0
                if not output.isfinite().all():  # an argmax, for one, would hide it
                    broken.add(name)
                    continue
                n_valid = int(masks[name].sum())
                seen[name] += n_valid
                if n_valid:
                    with host:
                        _update(metrics[name], task, output.float(), labels[name], masks[name])
    finally:
        for module, training in modes:
            module.training = training
    if empty := [name for name, count in seen.items() if not count and name not in broken]:
        warnings.warn(f"no valid pixel to evaluate: {', '.join(empty)}", stacklevel=2)
    with host:
        return {
            name: metric.compute().item() if seen[name] and name not in broken else float("nan")
            for name, metric in metrics.items()
        }


def _slices(samples: Samples, batch_size: int) -> Iterator[Samples]:
    for start in range(0, len(samples.images), batch_size):
        rows = slice(start, start + batch_size)
        yield tree_map(lambda tensor, rows=rows: tensor[rows], samples)


def _metric(task: Task, workers: int) -> Metric:
    kinds: dict[str, Callable[[], Metric]] = {
        "l1": MeanAbsoluteError,
        "rmse": partial(MeanSquaredError, squared=False),
        "angle": MeanMetric,
        "miou": partial(MulticlassJaccardIndex, task.channels, validate_args=False),
        "max_f": MaxF,
        "ods_f": partial(OdsF, task.max_dist, workers=workers),
    }
    return kinds[task.metric]()


def _update(metric: Metric, task: Task, output: Tensor, label: Tensor, mask: Tensor) -> None:
    if task.metric == "ods_f":  # takes whole images
        metric.update(output.sigmoid(), label > 0, mask)
        return
    if task.metric == "miou":
        output = output.argmax(1, keepdim=True)
    elif task.metric == "max_f":
        output, label = output.sigmoid(), label.long()
    elif task.loss in ("cosine", "unit_l1"):
        output = F.normalize(output, dim=1)
    predicted, known = _pixels(output, mask), _pixels(label, mask)
    if task.metric == "angle":
        apart = (predicted - known).norm(dim=1)
        metric.update(torch.rad2deg(2 * torch.atan2(apart, (predicted + known).norm(dim=1))))
    elif task.metric in ("miou", "max_f"):
        metric.update(predicted[:, 0], known[:, 0].long())
    else:
        metric.update(predicted, known)


def _pixels(x: Tensor, mask: Tensor) -> Tensor:
    """The values of the valid pixels, one row per pixel: [n, C]."""
    return x.movedim(1, -1)[mask.squeeze(1)]
