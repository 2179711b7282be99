import math

import numpy as np
import pytest
import torch

from taskgroup.lab.vision import NYUD, PASCAL, TASKONOMY, Task, criterion


def batch(seed=0, valid=0.6):
    g = torch.Generator().manual_seed(seed)
    outputs, labels, masks = {}, {}, {}
    for name, task in TASKONOMY.items():
        outputs[name] = torch.randn(2, task.channels, 5, 7, generator=g).requires_grad_()
        labels[name] = torch.randn(2, task.channels, 5, 7, generator=g)
        masks[name] = torch.rand(2, 1, 5, 7, generator=g) < valid
    return outputs, labels, masks


def reference(name, output, label, mask):
    """One pixel at a time, in float64."""
    output, label = output.detach().double().numpy(), label.double().numpy()
    total, count = 0.0, 0
    for b, _, y, x in np.argwhere(mask.numpy()):
        o, t = output[b, :, y, x], label[b, :, y, x]
        if name == "normal":
            total += 1 - o @ t / np.sqrt((o @ o) * (t @ t))
        elif name == "principal_curvature":
            total += np.mean((o - t) ** 2)
        else:
            total += np.mean(np.abs(o - t))
        count += 1
    return total / max(count, 1)


def test_agrees_with_a_loop_over_pixels():
    outputs, labels, masks = batch()
    losses = criterion(outputs, labels, masks)
    assert list(losses) == list(TASKONOMY)
    for name, loss in losses.items():
        assert loss.shape == ()
        assert loss.item() == pytest.approx(
            reference(name, outputs[name], labels[name], masks[name]), rel=1e-5
        )


def test_only_the_tasks_of_the_outputs():
    outputs, labels, masks = batch()
    assert list(criterion({"normal": outputs["normal"]}, labels, masks)) == ["normal"]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
def test_a_masked_label_reaches_neither_value_nor_gradient(junk):
    outputs, labels, masks = batch()
    clean = criterion(outputs, labels, masks)
    spoiled = {t: torch.where(masks[t], labels[t], junk) for t in labels}
    again = criterion(outputs, spoiled, masks)
    for name in TASKONOMY:
        assert torch.equal(clean[name], again[name])
        (gradient,) = torch.autograd.grad(again[name], outputs[name])
        assert gradient.isfinite().all()
        assert (gradient * ~masks[name] == 0).all()
        assert (gradient * masks[name] != 0).any()


def test_a_batch_without_valid_pixels_has_loss_zero_with_a_graph():
    outputs, labels, masks = batch(valid=0.0)
    labels = {t: torch.full_like(label, torch.nan) for t, label in labels.items()}
    for name, loss in criterion(outputs, labels, masks).items():
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, outputs[name])
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_normals_are_compared_over_the_channel():
    label = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for output, expected in ((label * 5, 0.0), (-label, 2.0), (label.roll(1, 1), 1.0)):
        loss = criterion({"normal": output}, {"normal": label}, {"normal": mask})["normal"]
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_zero_prediction_of_a_normal_is_no_nan():
    output = torch.zeros(1, 3, 2, 2, requires_grad=True)
    label, mask = torch.ones(1, 3, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool)
    loss = criterion({"normal": output}, {"normal": label}, {"normal": mask})["normal"]
    assert loss.item() == 1
    assert torch.autograd.grad(loss, output)[0].isfinite().all()


def pixels(*values):
    """Pixels in a row, [1, C, 1, W], from C values each."""
    return torch.tensor(values, dtype=torch.float32).T[None, :, None]


def loss(kind, output, label, mask):
    task = Task("t", output.shape[1], kind, "l1", "T")
    found = criterion({"t": output}, {"t": label}, {"t": mask}, {"t": task})
    return found["t"].item()


def test_cross_entropy_by_hand():
    output = pixels((0.0, math.log(3)), (2.0, 0.0), (9.0, 9.0))
    label = torch.tensor([[[[1, 0, 255]]]], dtype=torch.uint8)
    mask = label < 255
    expected = (math.log(4 / 3) + math.log(1 + math.exp(-2))) / 2
    assert loss("cross_entropy", output, label, mask) == pytest.approx(expected)
    assert loss("cross_entropy", output, label, mask & False) == 0


def test_weighted_and_balanced_cross_entropy_by_hand():
    output = pixels((0.0,), (1.0,), (-2.0,), (5.0,))
    label = torch.tensor([[[[True, False, False, True]]]])
    mask = torch.tensor([[[[True, True, True, False]]]])

    def softplus(x):
        return math.log1p(math.exp(x))

    positive, negatives = softplus(0), softplus(1) + softplus(-2)
    expected = (0.95 * positive + 0.05 * negatives) / 3
    assert loss("weighted_bce", output, label, mask) == pytest.approx(expected)
    # Of three known pixels two are negative.
    expected = (2 / 3 * positive + 1 / 3 * negatives) / 3
    assert loss("balanced_bce", output, label, mask) == pytest.approx(expected)
    none = torch.zeros_like(label)
    assert loss("balanced_bce", output, none, mask) == 0  # nothing to balance


def test_unit_l1_by_hand():
    output, label = pixels((0, 3, 4), (2, 0, 0)), pixels((0, 0, 1), (1, 0, 0))
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert loss("unit_l1", output, label, mask) == pytest.approx((0.6 + 0.2) / 2)


@pytest.mark.parametrize("tasks", [NYUD, PASCAL])
def test_masks_of_all_losses(tasks):
    g = torch.Generator().manual_seed(0)
    outputs, labels, junk, masks = {}, {}, {}, {}
    for name, task in tasks.items():
        outputs[name] = torch.randn(2, task.channels, 5, 7, generator=g).requires_grad_()
        masks[name] = torch.rand(2, 1, 5, 7, generator=g) < 0.6
        if task.kind == "values":
            labels[name] = torch.randn(2, task.channels, 5, 7, generator=g)
            junk[name] = torch.where(masks[name], labels[name], torch.nan)
        else:
            labels[name] = torch.randint(0, max(2, task.channels), (2, 1, 5, 7), generator=g)
            labels[name] = labels[name].to(torch.uint8 if task.kind == "classes" else torch.bool)
            other = torch.tensor(255 if task.kind == "classes" else True, dtype=labels[name].dtype)
            junk[name] = torch.where(masks[name], labels[name], other)
    clean, spoiled = (criterion(outputs, given, masks, tasks) for given in (labels, junk))
    for name, value in clean.items():
        assert value.shape == ()
        assert torch.equal(value, spoiled[name])
        (gradient,) = torch.autograd.grad(spoiled[name], outputs[name])
        assert gradient.isfinite().all()
        assert (gradient * ~masks[name] == 0).all()
        assert (gradient * masks[name] != 0).any()
        nothing = criterion({name: outputs[name]}, junk, {name: masks[name] & False}, tasks)[name]
        (gradient,) = torch.autograd.grad(nothing, outputs[name])
        assert nothing.item() == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))
