"""Run the Python blocks of the pages in docs/ and of the README."""

import re
import tempfile
import textwrap
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import taskgroup as tg
from tests.ranks import on_ranks

ROOT = Path(__file__).parents[1]
PAGES = list((ROOT / "docs").rglob("*.md"))


PYTHON = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def run_blocks(page, names):
    """Run every Python block of a page in docs/ in the namespace ``names``; return their number."""
    path = ROOT / "docs" / page
    text = path.read_text("utf-8")
    found = list(PYTHON.finditer(text))
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
    monkeypatch.chdir(tmp_path)
    import weather

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False}
    own = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    x, y = weather.make_loader().dataset.tensors
    names = {
        **vars(accelerate),
        **vars(weather),
        "Accelerator": partial(accelerate.Accelerator, cpu=True),
        "LightningModule": LightningModule,
        "Trainer": partial(Trainer, **quiet),
        "TrainingArguments": partial(transformers.TrainingArguments, **own),
        "data": [{"input": a, "y": b} for a, b in zip(x, y, strict=True)],
        "loader": weather.make_loader(),
        "model": weather.make_model(),
    }
    names["optimizer"] = torch.optim.Adam(names["model"].parameters(), lr=1e-2)
    assert run_blocks("trainers.md", names) == 5
    assert names["module"].groups.affinity.matrix.any()
    assert names["trainer"].groups.affinity.matrix.any()
    found = names["trainer"].evaluate()
    assert found["eval_loss"] > found["eval_wind_loss"] > 0
    assert names["groups"].affinity.matrix.any()


def test_reproduce(tmp_path):
    from taskgroup.lab.data.mini import write_mini

    write_mini("nyud-v2", tmp_path / "nyud")
    for split, n_samples in (("train", 4), ("val", 1)):  # a batch of each
        lists = tmp_path / "nyud" / "gt_sets" / f"{split}.txt"
        lists.write_text("\n".join(lists.read_text().split()[:n_samples]))
    torch.manual_seed(0)
    names = {"tg": tg, "torch": torch, "root": tmp_path / "nyud"}
    assert run_blocks("reproduce.md", names) == 1
    assert set(names["metrics"]) == {"semseg", "depth", "normals", "edge"}
    assert names["groups"].affinity.matrix.any()


def test_clusters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert run_blocks("clusters.md", names) == 1
    assert len(list((tmp_path / "runs/mine/cells").iterdir())) == 4
    assert [row.variant.name for row in names["table"].rows] == ["gd", "selective"]


def test_nothing_is_left_open():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert not re.search(r"@[A-Z_]+@|TODO", page.read_text("utf-8")), page


def test_cost():
    tasks = [f"task{k}" for k in range(30)]
    encoder = nn.Linear(3, 256)
    model = tg.MultiTaskModel(encoder, {task: nn.Linear(256, 1) for task in tasks})

    def criterion(outputs, labels):
        place = {task: k for k, task in enumerate(tasks)}
        return {t: (output - labels[place[t]]).square().mean() for t, output in outputs.items()}

    names = {
        "tg": tg,
        "nn": nn,
        "torch": torch,
        "tasks": tasks,
        "encoder": encoder,
        "model": model,
        "criterion": criterion,
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
        "loader": [(torch.randn(4, 3), torch.randn(30, 4, 1)) for _ in range(3)],
        "groups": tg.TaskGroups(tasks, groups_per_batch=2, observe_every=2),
    }
    assert run_blocks("cost.md", names) == 2
    assert names["costs"].skips_heads
    assert names["groups"].affinity.matrix.any()


def small_training():
    """The names that pages use without defining them: a model, a loader, losses, ..."""
    tasks = ["depth", "normal", "edges"]

    def criterion(outputs, labels):
        return {task: (outputs[task] - labels[task]).square().mean() for task in outputs}

    torch.manual_seed(0)
    data = [(torch.randn(8), {task: torch.randn(1) for task in tasks}) for _ in range(24)]
    loader = DataLoader(data, batch_size=8)
    model = tg.MultiTaskModel(nn.Linear(8, 4), {task: nn.Linear(4, 1) for task in tasks})
    images, labels = next(iter(loader))
    losses = criterion(model(images), labels)
    gradients = tg.task_gradients(losses, model.encoder.parameters(), retain_graph=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return {
        "tg": tg,
        "torch": torch,
        "nn": nn,
        "tasks": tasks,
        "criterion": criterion,
        "loader": loader,
        "model": model,
        "encoder": model.encoder,
        "heads": dict(model.heads),
        "optimizer": torch.optim.Adam(model.parameters(), lr=1e-3),
        "groups": tg.TaskGroups(tasks),
        "losses": losses,
        "gradients": gradients,
        "weights": [0.2, 0.3, 0.5],
    }


# Pages that need more than small_training(); test_page runs all other pages.
RUN_ABOVE = (
    "architecture.md",  # in test_architecture.py
    "clusters.md",
    "cost.md",
    "own-data.md",  # in lab/test_own_problem.py
    "reproduce.md",
    "several-data-sets.md",  # in test_several_data_sets.py
    "trackers.md",
    "trainers.md",
    "training.md",
    "your-model.md",
)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.learned] if page == "quickstart.md" else [])
        for page in sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES)
        if page not in RUN_ABOVE and PYTHON.search((ROOT / "docs" / page).read_text("utf-8"))
    ],
)
def test_page(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # some pages write a run
    names = small_training()
    run_blocks(page, names)
    if page == "quickstart.md":  # does what it says
        assert names["groups"].partition == [("wind", "rain"), ("heat", "smoke")]
        assert str(names["groups"].partition) in (ROOT / "docs" / page).read_text("utf-8")
        assert (
            names["groups"].affinity.matrix.sign() == torch.eye(2).kron(torch.ones(2, 2)) * 2 - 1
        ).all()


def test_trackers(tmp_path, monkeypatch, wandb, mlflow, capsys):
    """The recorders of the page pass values to all trackers."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorders, make = [], tg.Recorder
    monkeypatch.setattr(
        tg, "Recorder", lambda *args, **kwargs: recorders.append(make(*args, **kwargs))
    )
    monkeypatch.chdir(tmp_path)
    names = small_training()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Lightning's own making
        assert run_blocks("trackers.md", names) == len(recorders) == 5
    assert isinstance(names["run"], wandb.Run)
    run_id = mlflow.active_run().info.run_id

    batches = [batch for _ in range(4) for batch in names["loader"]]
    for images, labels in batches[:10]:
        for group in names["groups"]:
            losses = names["criterion"](names["model"](images, group=group), labels)
            names["optimizer"].zero_grad()
            group.loss(losses).backward()
            names["optimizer"].step()
    for recorder in recorders:
        recorder.close()
    names["writer"].close()
    names["logger"].save()
    names["run"].finish()

    events = EventAccumulator("runs/tensorboard").Reload()
    page = (ROOT / "docs" / "trackers.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `(\S+)`", page, re.MULTILINE))
    logged = {name for kind in ("scalars", "images") for name in events.Tags()[kind]}
    # No metric was recorded, and no optimizer is attached.
    assert listed - logged <= {"taskgroup/metric/depth", "taskgroup/lr/0"}
    assert list(Path("wandb").glob("offline-run-*/files/media/images/taskgroup/affinity_*.png"))
    assert mlflow.get_run(run_id).data.metrics["taskgroup/groups"] >= 1
    (table,) = Path("runs/lightning").rglob("metrics.csv")
    assert "taskgroup/loss/depth" in table.read_text("utf-8")
    assert re.search(r"^10 \d", capsys.readouterr().out, re.MULTILINE)


def test_readme():
    """Run the blocks of the README one by one, except outlines with an ellipsis."""
    blocks = [block[2] for block in PYTHON.finditer((ROOT / "README.md").read_text("utf-8"))]
    whole = [block for block in blocks if "..." not in block]
    assert len(blocks) - 1 <= len(whole) > 4
    for block in whole:
        exec(compile(block, "README.md", "exec"), small_training())


def diffs_of(page):
    """Yield ``(before, after, number of changed lines)`` for every ``diff -w`` on a page.

    The body of an added block was indented by one level less before.
    """
    for block in re.findall(r"^```diff\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        before, after, opened = [], [], None
        changes = 0
        for sign, line in ((line[:1], line[1:]) for line in block.splitlines()):
            indent = len(line) - len(line.lstrip())
            if line and opened is not None and indent <= opened:
                opened = None
            if sign != "+":
                before.append(line if opened is None else line[4:])
            if sign != "-":
                after.append(line)
            if sign == "+":
                changes += bool(line)
                if line.endswith(":"):
                    opened = indent
        yield "\n".join(before), "\n".join(after), changes


def test_your_model(accelerate, monkeypatch, tmp_path):
    """Every change takes at most five lines, and every loop runs before and after it."""
    from lightning.pytorch import LightningModule, Trainer

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    page = (ROOT / "docs" / "your-model.md").read_text("utf-8")
    training = small_training()
    known = {
        "Accelerator": accelerate.Accelerator,
        "LightningModule": LightningModule,
        "TASKS": training["tasks"],
        "loader": training["loader"],
    }

    def fit(module):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        quiet |= {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
        before = [parameter.detach().clone() for parameter in module.parameters()]
        Trainer(**quiet, default_root_dir=tmp_path).fit(module, training["loader"])
        assert not all(map(torch.equal, before, module.parameters()))

    names = dict(known)
    run_blocks("your-model.md", names)
    fit(names["Module"]())
    fit(names["Automatic"]())

    blocks = [block[2].strip() for block in PYTHON.finditer(page)]
    diffs = list(diffs_of(page))
    assert len(diffs) == 4
    for before, after, changes in diffs:
        assert 0 < changes <= 5
        assert "tg" not in before
        assert after.strip() in blocks
        old = dict(known)
        exec(PYTHON.search(page)[2] + before, old)
        for name in {"Module", "Automatic"} & old.keys():
            fit(old[name]())


def test_the_reference_is_whole():
    """docs/api shows the docstring of every public name."""
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    shown = {name.split(".")[-1] for name in re.findall(r"^\.\. auto\w+:: (\S+)", pages, re.M)}
    public = {*tg.__all__, *tg.ops.__all__, *tg.methods.__all__, *tg.checkpoint.__all__}
    assert public - shown == {"checkpoint", "methods", "ops", "recording"}  # modules
    import taskgroup.lab.data

    assert not {*taskgroup.lab.vision.__all__, *taskgroup.lab.data.__all__} - shown
