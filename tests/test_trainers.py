"""In every trainer the loop gives the same result as the plain loop, bit by bit."""

import contextlib
import math
import os
import re
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import taskgroup as tg
from tests.ranks import on_ranks
from tests.states import assert_same

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINERS = ["lightning", "accelerate", "trainer"]


def train(trainer, folder, epochs, rank=0, world=1):
    """Run an example; return the model, the optimizer state and the groups that it saved."""
    environment = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test"}
    environment |= {"OMP_NUM_THREADS": 1}  # or Accelerate takes more, which round otherwise
    here = {name: str(value) for name, value in environment.items()} if world > 1 else {}
    with mock.patch.dict(os.environ, here), mock.patch.object(sys, "path", [*sys.path]):
        sys.path.insert(0, str(EXAMPLES))
        return globals()[f"train_{trainer}"](folder, epochs, world)


def train_plain(folder, epochs, world):
    import ddp
    import plain

    (plain if world == 1 else ddp).train(folder / "plain.pt", epochs)
    wait_for_all(world)
    state = tg.checkpoint.load(folder / "plain.pt")
    return dict(state["model"]), state["optimizer"]["state"], state["groups"]


def train_lightning(folder, epochs, world):
    import with_lightning

    with_lightning.train(folder, epochs, world)
    wait_for_all(world)
    state = torch.load(folder / "last.ckpt", weights_only=True)
    model = {name.removeprefix("model."): part for name, part in state["state_dict"].items()}
    return (
        model,
        state["optimizer_states"][0]["state"],
        state["callbacks"]["GroupsCallback"]["groups"],
    )


def train_accelerate(folder, epochs, world):
    import with_accelerate
    from safetensors.torch import load_file

    with_accelerate.train(folder, epochs)
    wait_for_all(world)
    last = folder / f"epoch-{epochs - 1:03}"
    optimizer = torch.load(last / "optimizer.bin", weights_only=True)
    groups = torch.load(last / "custom_checkpoint_0.pkl", weights_only=True)
    return load_file(last / "model.safetensors"), optimizer["state"], groups


def train_trainer(folder, epochs, world):
    import with_trainer
    from safetensors.torch import load_file

    with_trainer.train(folder, epochs)
    wait_for_all(world)
    last = folder / f"checkpoint-{epochs * 20 // world}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    groups = tg.checkpoint.load(last / "groups.pt")["groups"]
    return load_file(last / "model.safetensors"), optimizer["state"], groups


def wait_for_all(world):
    if world > 1:
        torch.distributed.barrier()


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.usefixtures("accelerate")
def test_a_trainer_trains_and_resumes_as_the_plain_loop(trainer, tmp_path):
    plain = train("plain", tmp_path / "plain", 4)
    assert plain[2]["rounds"] > 20  # groups have been learned
    train(trainer, tmp_path / trainer, 2)
    assert_same(train(trainer, tmp_path / trainer, 4), plain)


def train_all(rank, folder):
    for name in TRAINERS:  # which go on from there
        train(name, Path(folder) / name, epochs=1, rank=rank, world=2)
    names = ["plain", *TRAINERS]
    return [train(name, Path(folder) / name, epochs=3, rank=rank, world=2) for name in names]


@pytest.mark.slow
def test_a_trainer_on_two_ranks_trains_and_resumes_as_ddp(tmp_path):
    for saved in on_ranks(train_all, str(tmp_path)):
        for state in saved[1:]:
            assert_same(state, saved[0])
    (model, _, groups), *_ = saved
    assert groups["rounds"] > 20  # groups have been learned
    assert all(torch.isfinite(part).all() for part in model.values())


def small():
    """Three equal tasks: the heads, and so the gradients, are the same at the start."""
    torch.manual_seed(0)
    model = tg.MultiTaskModel(nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in "abc"})
    for head in model.heads.values():
        head.load_state_dict(model.heads["a"].state_dict())
    return model, torch.optim.Adam(model.parameters(), lr=0.1), torch.randn(8, 3)


def losses_of(model, x, group):
    return {task: output.square().mean() for task, output in model(x, group=group).items()}


@pytest.mark.parametrize("where", ["around the batch", "in the group", "not called"])
def test_accumulation_by_accelerate_is_refused(where, accelerate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer, x = small()
    model, optimizer = accelerator.prepare(model, optimizer)
    before = [parameter.tolist() for parameter in model.parameters()]
    groups = tg.TaskGroups(["a", "b", "c"])

    def step(group):
        accelerator.backward(group.loss(losses_of(model, x, group)))
        optimizer.step()
        optimizer.zero_grad()

    def batch():
        for group in groups:
            if where == "in the group":
                with accelerator.accumulate(model):
                    step(group)
            else:
                step(group)

    around = accelerator.accumulate if where == "around the batch" else contextlib.nullcontext
    refused = pytest.raises(RuntimeError, match=r"gradient_accumulation_steps above 1.*share=1/n")
    with refused, around(model):
        batch()
    assert [parameter.tolist() for parameter in model.parameters()] == before
    accelerator.gradient_accumulation_steps = 1  # as the sentence says
    with around(model):
        batch()


def test_accumulation_with_accelerate_as_the_sentence_says(accelerate):
    """Four micro-batches give the same step as all of them at once."""
    accelerator = accelerate.Accelerator(cpu=True)
    models = []
    for parts in (1, 4):
        model, optimizer, x = small()
        prepared, stepper = accelerator.prepare(model, optimizer)
        groups = tg.TaskGroups(["a", "b", "c"])
        for group in groups:
            stepper.zero_grad()
            for part in x.chunk(parts):
                losses = losses_of(prepared, part, group)
                accelerator.backward(group.loss(losses, share=1 / parts))
            stepper.step()
        models.append(model)
    for one, four in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


def test_accelerate_saves_a_recorder_with_the_groups(accelerate, tmp_path):
    def made():
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer, x = small()
        model, optimizer = accelerator.prepare(model, optimizer)
        groups = tg.TaskGroups(["a", "b", "c"])
        recorder = tg.Recorder(groups, tmp_path / "run")
        accelerator.register_for_checkpointing(groups, recorder)

        def run(batches):
            for _ in range(batches):
                for group in groups:
                    optimizer.zero_grad()
                    accelerator.backward(group.loss(losses_of(model, x, group)))
                    optimizer.step()

        return accelerator, run, recorder

    accelerator, run, recorder = made()
    run(2)
    accelerator.save_state(tmp_path / "state")
    run(1)  # of which the resumed run knows nothing
    recorder.close()
    accelerator, run, recorder = made()
    accelerator.load_state(tmp_path / "state")
    run(2)
    recorder.close()
    lines = tg.recording.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["batch"] for line in lines] == [1, 2, 3, 4]


def test_attach_to_an_optimizer_that_a_trainer_has_wrapped(accelerate):
    from lightning.pytorch.core.optimizer import LightningOptimizer

    for wrap in (accelerate.Accelerator(cpu=True).prepare, LightningOptimizer):
        model, optimizer, x = small()
        groups = tg.TaskGroups(["a", "b", "c"])
        groups.attach(wrap(optimizer))
        for batch in range(2):
            for group in groups:
                model.zero_grad(set_to_none=False)  # heads outside would coast
                before = {t: head.weight.clone() for t, head in model.heads.items()}
                group.loss(losses_of(model, x, group)).backward()
                optimizer.step()
                moved = {t for t, head in model.heads.items() if (head.weight != before[t]).any()}
                assert moved == set(group.tasks)


def test_a_trainer_that_steps_once_per_batch_is_told_of(tmp_path):
    """Lightning's automatic optimization leaves every batch after its first group."""
    from lightning.pytorch import LightningModule, Trainer

    class Wrong(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer, self.x = small()
            self.groups = tg.TaskGroups(["a", "b", "c"])

        def configure_optimizers(self):
            return self.optimizer

        def training_step(self, batch, number):
            group = next(iter(self.groups))
            return group.loss(losses_of(self.model, self.x, group))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    data = torch.utils.data.DataLoader(torch.zeros(30, 1))
    with pytest.warns(
        UserWarning, match=r"last 20 batches of several.*automatic_optimization = False"
    ):
        trainer.fit(Wrong(), data)


def block_of_the_page(start):
    """The code block in docs/trainers.md that begins with this text."""
    page = (EXAMPLES.parent / "docs" / "trainers.md").read_text("utf-8")
    (block,) = re.findall(rf"^```python\n({re.escape(start)}.*?)^```$", page, re.M | re.S)
    return block


def with_unlabelled_batches():
    """The data of the examples, in which two batches of four samples have no label at all."""
    import weather

    x, y = (part.clone() for part in weather.make_loader().dataset.tensors)
    y[4:8] = y[20:24] = torch.nan
    return [(x[n : n + 4], y[n : n + 4]) for n in range(0, 40, 4)]


def test_lightning_sees_batches_without_labels(monkeypatch, tmp_path):
    """Lightning-AI/pytorch-lightning#9052: a StopIteration would end the epoch."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import lightning
    import weather

    from taskgroup.integrations.lightning import GroupsCallback

    names = {"tg": tg, "torch": torch, "LightningModule": lightning.LightningModule}
    names |= {name: getattr(weather, name) for name in dir(weather)}
    exec(block_of_the_page("class AutomaticForecast"), names)
    seen, moved = [], []

    class Module(names["AutomaticForecast"]):
        def training_step(self, batch, number):
            self.before = [parameter.detach().clone() for parameter in self.parameters()]
            loss = super().training_step(batch, number)
            seen.append(loss is not None)
            return loss

        def on_train_batch_end(self, *_):
            moved.append(not all(map(torch.equal, self.before, self.parameters())))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        callbacks=[GroupsCallback(module.groups)],
        **quiet,
    )
    loader = torch.utils.data.DataLoader(with_unlabelled_batches(), batch_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned `None`")
        trainer.fit(module, loader)
    assert seen == moved == [n not in (1, 5) for n in range(10)]


@pytest.mark.parametrize("outside", ["hold", "coast"])
def test_attach_under_automatic_optimization(outside, tmp_path):
    """Lightning gives the optimizer a closure that makes the gradients; here of stacked losses."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, _, self.x = small()
            self.groups = tg.TaskGroups(
                ["a", "b", "c"], grouping=tg.Singletons(), groups_per_batch=1
            )
            self.moved = []

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            self.groups.attach(optimizer, self.model.heads, outside)
            return optimizer

        def training_step(self, batch, number):
            self.before = {t: [*map(torch.clone, h.parameters())] for t, h in self.heads()}
            self.group = next(self.groups.batch(self.groups.tasks))
            outputs = self.model(self.x)
            return self.group.loss(torch.stack([v.square().mean() for v in outputs.values()]))

        def on_train_batch_end(self, *_):
            moved = {
                task
                for task, head in self.heads()
                if not all(map(torch.equal, head.parameters(), self.before[task]))
            }
            self.moved.append((set(self.group.tasks), moved))

        def heads(self):
            return self.model.heads.items()

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
    loader = torch.utils.data.DataLoader(torch.zeros(9))
    lightning.Trainer(**quiet, default_root_dir=tmp_path).fit(module, loader)
    stepped = set()
    for group, moved in module.moved:
        stepped |= group  # a head without a step has no momentum to coast on
        assert moved == (group if outside == "hold" else stepped)
    assert len(module.moved) == 9


@pytest.mark.learned
def test_one_step_per_batch_with_gradient_affinity_is_a_batch():
    """The loop for a trainer that takes one step per batch; it raises no warning."""
    model, _, x = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # the heads stay nearly alike
    affinity = tg.GradientAffinity(model.encoder)
    groups = tg.TaskGroups(["a", "b", "c"], affinity=affinity, groups_per_batch=1, warmup=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(30):
            optimizer.zero_grad()
            group = next(iter(groups))
            group.loss(losses_of(model, x, group)).backward()
            optimizer.step()
    assert (affinity.matrix > 0).all()
    assert groups.partition == [("a", "b", "c")]


def test_one_group_a_batch_that_never_sees_its_second_step_is_told_of():
    """Batches of one step between those that observe must not suppress the warning."""
    model, _, x = small()
    groups = tg.TaskGroups(["a", "b", "c"], groups_per_batch=1, observe_every=4)

    def batch():
        group = next(iter(groups))
        group.loss(losses_of(model, x, group))

    for _ in range(77):  # of which every fourth has a second step
        batch()
    with pytest.warns(UserWarning, match="last 20 batches of several steps") as caught:
        batch()
    assert caught[0].filename == __file__


def test_batches_left_now_and_then_are_nobodys_business():
    model, _, x = small()
    groups = tg.TaskGroups(["a", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in range(60):
            for group in groups:
                if batch % 15:
                    break
                group.loss(losses_of(model, x, group))


@pytest.mark.learned
def test_a_trainer_that_takes_the_steps_itself(tmp_path, accelerate):
    """The Hugging Face Trainer, with one group per batch, learned from gradients."""
    import transformers

    model, _, _ = small()
    affinity = tg.GradientAffinity(model.encoder)
    groups = tg.TaskGroups(["a", "b", "c"], affinity=affinity, groups_per_batch=1, warmup=1)

    class GroupTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, **options):
            group = next(iter(groups))
            return group.loss(losses_of(model, inputs["x"], group))

    def train(**options):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=12,
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            **options,
        )
        data = [{"x": torch.randn(3)} for _ in range(64)]
        GroupTrainer(model, arguments, train_dataset=data).train()

    train()
    assert (affinity.matrix > 0).all()
    assert groups.partition == [("a", "b", "c")]
    groups = tg.TaskGroups(["a", "b", "c"], groups_per_batch=1)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps above 1"):
        train(gradient_accumulation_steps=2)


@pytest.mark.learned
def test_the_recommender_learns_what_goes_together(monkeypatch):
    """Skipping is the opposite of clicking; sharing mostly depends on other tastes.

    Here every task is stepped on alone in every batch. The example itself uses one group per batch
    and observes one batch in five, so what it learns in a few epochs depends on rounding.
    """
    monkeypatch.syspath_prepend(EXAMPLES)
    import tabular

    click, share, skip = (tabular.TASKS.index(task) for task in ("click", "share", "skip"))
    ahead = []
    for seed in range(2):
        affinity = tg.ProximalAffinity(decay=0.02)
        groups = tg.TaskGroups(tabular.TASKS, warmup=1000, affinity=affinity, seed=seed)
        with torch.random.fork_rng():
            losses = tabular.train(groups, epochs=2)
        assert losses["click"] < math.log(2)  # that of a model that knows nothing
        similarity = affinity.matrix / affinity.matrix.diagonal()
        similarity = (similarity + similarity.T) / 2
        ahead.append(similarity[click, skip] - similarity[click, share])
    assert sum(ahead) / len(ahead) > 0.1  # seeds give 0.19 to 0.32
