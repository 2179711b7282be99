"""The metrics of the published Taskonomy runs, pooled over all valid pixels."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from taskgroup.vision.motorcycle import Samples
from taskgroup.vision.tasks import TASKONOMY

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, batch_size: int = 32) -> dict[str, float]:
    """Metric of every task that the model predicts.

    L1, the mean absolute error over valid pixels and channels; for curvature the root mean squared
    error. Predicted normals are brought to unit length first. All are lower-is-better. Pixels are
    pooled over all samples, so the batch size does not change the result.

    The model runs in evaluation mode; afterwards every module is back in the mode it was in.

    Args:
        model: ``model(images)`` gives {task: [B, C, H, W]}; images go to the device of its first
            parameter.
        samples: The images [N, 3, H, W] with their labels and masks.
        batch_size: Images per forward pass.

    Returns:
        {task: metric}; NaN, with a warning, for a task without a valid pixel.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    metrics: dict[str, MeanAbsoluteError | MeanSquaredError] = {}
    seen: dict[str, int] = {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for start in range(0, len(samples.images), batch_size):
            rows = slice(start, start + batch_size)
            for name, output in model(samples.images[rows].to(device)).items():
                if name not in metrics:
                    metrics[name] = _metric(name).to(device)
                    seen[name] = 0
                mask = samples.masks[name][rows].to(device)
                label = samples.labels[name][rows].to(device)
                if TASKONOMY[name].loss == "cosine":
                    output = F.normalize(output, dim=1)
                predicted, known = _pixels(output, mask), _pixels(label, mask)
                seen[name] += len(known)
                if len(known):
                    metrics[name].update(predicted, known)
    finally:
        for module, training in modes:
            module.training = training
    if empty := [name for name, count in seen.items() if count == 0]:
        warnings.warn(f"no valid pixel to evaluate: {', '.join(empty)}", stacklevel=2)
    return {
        name: metric.compute().item() if seen[name] else float("nan")
        for name, metric in metrics.items()
    }


def _metric(name: str) -> MeanAbsoluteError | MeanSquaredError:
    if TASKONOMY[name].metric == "rmse":
        return MeanSquaredError(squared=False)
    return MeanAbsoluteError()


def _pixels(x: Tensor, mask: Tensor) -> Tensor:
    """The values of the valid pixels, one row a pixel: [n, C]."""
    return x.movedim(1, -1)[mask.squeeze(1)]
