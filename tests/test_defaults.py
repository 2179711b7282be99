"""Torch's default dtype and device change nothing: the package always names both."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import taskgroup as tg

TASKS = ["a", "b", "c", "d", "e"]
PACKAGE = Path(tg.__file__).parent

# Calls that make a tensor, and which of the two they take from torch's defaults.
BOTH = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}
DEVICE = {"arange", "randint", "randperm"}  # whose dtype follows from their arguments
LAB = {"lab", "__main__.py"}


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in LAB],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_every_tensor_that_is_made_says_its_dtype_and_device(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = node.func
        if not isinstance(called.value, ast.Name) or called.value.id != "torch":
            continue
        named = {keyword.arg for keyword in node.keywords}
        wanted = {"dtype", "device"} if called.attr in BOTH else {"device"}
        if called.attr in BOTH | DEVICE and not wanted <= named:
            wrong.append(f"line {node.lineno}: torch.{called.attr} without {wanted - named}")
    assert not wrong


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "default device meta": lambda: default_device("meta"),
    "within torch.device('meta')": lambda: torch.device("meta"),
}
AFFINITIES = {
    "proximal": lambda x: tg.ProximalAffinity(decay=0.2),
    "gradient": lambda x: tg.GradientAffinity([x], decay=0.2),
    "gradient of a sample": lambda x: tg.GradientAffinity([x], decay=0.2, sample=3),
}
GROUPINGS = {
    "affinity propagation": tg.AffinityPropagation,
    "graph coloring": tg.GraphColoring,
    "exhaustive": lambda: tg.Exhaustive(3),
    "k-means": lambda: tg.KMeans(2),
    "spectral": lambda: tg.Spectral(2),
    "heterogeneous": tg.Heterogeneous,
    "random": lambda: tg.RandomGroups(2),
    "fixed": lambda: tg.Fixed([["a", "b"], ["c", "d", "e"]]),
    "together": tg.Together,
    "singletons": tg.Singletons,
}


def trained(affinity, grouping, within, weights=None):
    """Make and train everything under a default, with tensors of the user made before."""
    x = torch.zeros(3, requires_grad=True, device="cpu", dtype=torch.float32)
    targets = torch.linspace(-1, 1, 15, device="cpu", dtype=torch.float32).view(5, 3)
    found = []
    with within():
        groups = tg.TaskGroups(
            TASKS,
            warmup=2,
            affinity=AFFINITIES[affinity](x),
            grouping=GROUPINGS[grouping](),
            weights=weights,
        )
        for n in range(8):
            present = TASKS if n % 3 else TASKS[:4]
            for group in groups.batch(present):
                losses = {
                    t: (x - targets[k]).square().sum()
                    for k, t in enumerate(TASKS)
                    if t in group.observed
                }
                stacked = torch.stack([*losses.values()])
                loss = group.loss(stacked if n % 2 else losses)
                (gradient,) = torch.autograd.grad(loss, x)
                x.data -= 0.01 * gradient
                found.append((group.tasks, loss.item()))
                assert group.mask.device.type == "cpu"
        state = groups.state_dict()
        groups.load_state_dict(state)
        assert groups.affinity.matrix.dtype == torch.float32
        assert groups.affinity.matrix.device.type == "cpu"
        found.append((groups.affinity.matrix.tolist(), groups.affinity.observed.tolist()))
    return found


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groups_are_those_without_a_default(default, grouping):
    expected = trained("proximal", grouping, torch.enable_grad)
    assert trained("proximal", grouping, DEFAULTS[default]) == expected


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_affinities_are_those_without_a_default(default, affinity):
    weights = [1.0, 2.0, 0.5, 1.0, 3.0]
    expected = trained(affinity, "affinity propagation", torch.enable_grad, weights)
    assert trained(affinity, "affinity propagation", DEFAULTS[default], weights) == expected
