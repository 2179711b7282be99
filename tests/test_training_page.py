"""docs/training.md runs as it stands, on two ranks."""

import re
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import on_ranks

PAGE = Path(__file__).parents[1] / "docs" / "training.md"


def blocks():
    """``(line, code)`` of every Python block."""
    text = PAGE.read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run_page(rank, folder):
    generator = torch.Generator().manual_seed(rank)
    tasks = ["depth", "normal", "edges"]

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    loader = [(draw(8, 8), {task: draw(8, 1) for task in tasks}) for _ in range(3)]
    masks = [{task: (draw(8, 1) > 0.5).float() for task in tasks} for _ in loader]
    masks[1]["edges"] *= rank  # no label of it on rank 0
    partly = [(*batch, mask) for batch, mask in zip(loader, masks, strict=True)]
    names = {"loader": loader, "partly_labelled": partly, "folder": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"torch\.")  # of torch's own making
        for line, code in blocks():
            exec(compile("\n" * line + code, str(PAGE), "exec"), names)
    dist.barrier()
    model, groups = names["model"], names["groups"]
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return len(blocks()), flat, groups.partition


def test_every_block_runs():
    with tempfile.TemporaryDirectory() as folder:
        first, second = on_ranks(run_page, folder)
    assert first[0] > 10
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]
