"""The pages in docs/ run as they stand."""

import re
import tempfile
import textwrap
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import taskgroup as tg
from tests.ranks import on_ranks

ROOT = Path(__file__).parents[1]


def run_blocks(page, names):
    """Run every Python block of a page of docs/, with these names to begin with; how many."""
    path = ROOT / "docs" / page
    text = path.read_text("utf-8")
    found = list(re.finditer(r"^( *)```python\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL))
    for block in found:
        line = text.count("\n", 0, block.start(2))
        exec(compile("\n" * line + textwrap.dedent(block[2]), str(path), "exec"), names)
    return len(found)


def run_training(rank, folder):
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
        blocks = run_blocks("training.md", names)
    dist.barrier()
    model, groups = names["model"], names["groups"]
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return blocks, flat, groups.partition


def test_training_on_two_ranks():
    with tempfile.TemporaryDirectory() as folder:
        first, second = on_ranks(run_training, folder)
    assert first[0] > 10
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


def test_trainers(tmp_path, accelerate, monkeypatch):
    import transformers
    from lightning.pytorch import LightningModule, Trainer

    monkeypatch.syspath_prepend(ROOT / "examples")
    import weather

    names = {
        **vars(accelerate),
        **vars(weather),
        "LightningModule": LightningModule,
        "transformers": transformers,
        "loader": weather.make_loader(),
        "model": weather.make_model(),
    }
    names["optimizer"] = torch.optim.Adam(names["model"].parameters(), lr=1e-2)
    assert run_blocks("trainers.md", names) == 4

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path}
    forecast = names["Forecast"]()
    Trainer(**quiet).fit(forecast, weather.make_loader())
    assert forecast.groups.affinity.matrix.any()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=11,
        eval_strategy="steps",
        eval_steps=5,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
        label_names=["y"],
        prediction_loss_only=True,
    )
    x, y = weather.make_loader().dataset.tensors
    data = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    model, groups = names["model"], names["groups"]
    trainer = names["GroupTrainer"](
        model, arguments, groups=groups, train_dataset=data, eval_dataset=data[:16]
    )
    trainer.train()
    assert groups.affinity.matrix.any()


def test_reproduce(tmp_path):
    from taskgroup.vision.datasets.mini import write_mini

    write_mini("nyud-v2", tmp_path / "nyud")
    for split, n_samples in (("train", 4), ("val", 1)):  # a batch of each
        lists = tmp_path / "nyud" / "gt_sets" / f"{split}.txt"
        lists.write_text("\n".join(lists.read_text().split()[:n_samples]))
    torch.manual_seed(0)
    names = {"tg": tg, "torch": torch, "root": tmp_path / "nyud"}
    assert run_blocks("reproduce.md", names) == 1
    assert set(names["metrics"]) == {"semseg", "depth", "normals", "edge"}
    assert names["groups"].affinity.matrix.any()


def test_nothing_is_left_open():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert not re.search(r"@[A-Z_]+@|TODO", page.read_text("utf-8")), page


def test_cost():
    tasks = [f"task{k}" for k in range(30)]
    names = {
        "tg": tg,
        "nn": nn,
        "torch": torch,
        "tasks": tasks,
        "encoder": nn.Linear(3, 256),
        "loader": [(torch.randn(4, 3), torch.randn(30, 4, 1)) for _ in range(3)],
        "groups": tg.TaskGroups(tasks, groups_per_batch=2, observe_every=2),
    }
    assert run_blocks("cost.md", names) == 1
    assert names["groups"].affinity.matrix.any()
