"""The metrics of the published runs, pooled over all valid pixels of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, Metric
from torchmetrics.classification import BinaryPrecisionRecallCurve, MulticlassJaccardIndex

from taskgroup.lab.data.samples import Samples
from taskgroup.lab.vision.boundary import OdsF
from taskgroup.lab.vision.tasks import TASKONOMY, Task

__all__ = ["MaxF", "evaluate"]


class MaxF(BinaryPrecisionRecallCurve):
    r"""The largest F of saliency, pooled over all pixels (Achanta et al., CVPR 2009).

    .. math::
        F = \max_t \frac{(1 + \beta^2) P_t R_t}{\beta^2 P_t + R_t}, \qquad \beta^2 = 0.3,

    at the thresholds t = .05, .10, ..., .95 of a probability, a pixel being salient from t on.

    Example:
        >>> metric = MaxF()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.2]), torch.tensor([1, 0, 0]))
        >>> metric.compute().item()  # from .65 on nothing is wrong
        1.0
    """

    _BETA_SQUARED = 0.3

    def __init__(self) -> None:
        twentieths = torch.arange(1, 20, dtype=torch.float32, device="cpu") / 20
        super().__init__(thresholds=twentieths.tolist(), validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]
        """The F, a scalar; NaN where there is nothing to find."""
        precision, recall, _ = super().compute()
        # The curve ends in a point without a threshold: precision 1, recall 0.
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
    """Metric of every task that the model predicts.

    Pixels are pooled over all samples, so the batch size does not change the result. By the
    ``metric`` of a task:

    =========  ====================================================================================
    ``l1``     mean absolute error over pixels and channels; normals are brought to unit length
    ``rmse``   root mean squared error
    ``angle``  mean angle, degrees, of predicted p and true g: ``2 atan2(|p - g|, |p + g|)``
    ``miou``   intersection over union, the mean of the classes that occur
    ``max_f``  :class:`~taskgroup.lab.vision.metrics.MaxF`
    ``ods_f``  :class:`~taskgroup.lab.vision.boundary.OdsF`
    =========  ====================================================================================

    The model runs in evaluation mode; afterwards every module is back in the mode it was in.

    Args:
        model: ``model(images)`` gives ``{task: [B, C, H, W]}``; images go to the device of its
            first parameter.
        samples: all of them, or batch by batch.
        batch_size: Images per forward pass, of samples that come all at once.
        tasks: what is known of the tasks.
        only: those to evaluate; None is all that the model predicts.
        workers: processes that match edges, which takes seconds an image; 0 is this one.

    Returns:
        ``{task: metric}``; NaN for a task of which an output is not finite, and, with a warning,
        for one without a valid pixel.
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
                    with host:  # whatever torch's default: metrics are made there, and moved
                        metrics[name] = _metric(task, workers).to(device)
                    seen[name] = 0
                if not output.isfinite().all():  # of which an argmax, say, would make a class
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
    if task.metric == "miou":
        return MulticlassJaccardIndex(task.channels, validate_args=False)
    if task.metric == "ods_f":
        return OdsF(task.max_dist, workers=workers)
    simple: dict[str, Callable[[], Metric]] = {
        "l1": MeanAbsoluteError,
        "rmse": lambda: MeanSquaredError(squared=False),
        "angle": MeanMetric,
        "max_f": MaxF,
    }
    return simple[task.metric]()


def _update(metric: Metric, task: Task, output: Tensor, label: Tensor, mask: Tensor) -> None:
    if task.metric == "ods_f":  # of whole images
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
    """The values of the valid pixels, one row a pixel: [n, C]."""
    return x.movedim(1, -1)[mask.squeeze(1)]
