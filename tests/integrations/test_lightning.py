"""GroupsCallback: the groups in Lightning's checkpoints, and what a recorder hears."""

import importlib
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import taskgroup as tg
from taskgroup.integrations.lightning import GroupsCallback
from tests.states import assert_same

TASKS = ["a", "b", "c"]
PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_module(package, at=None, do=None):
    """A module of this package; in the step after the number ``at``, ``do`` is called."""
    module_class = importlib.import_module(package).LightningModule

    class Module(module_class):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.model = tg.MultiTaskModel(
                nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in TASKS}
            )
            affinity = tg.ProximalAffinity(decay=0.1)
            self.groups = tg.TaskGroups(TASKS, warmup=2, affinity=affinity)
            self.whole = []  # the state before each batch
            self.steps = 0

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def losses(self, x, group=None):
            outputs = self.model(x, group=group)
            return {
                task: (output - x.sum() * TASKS.index(task)).square().mean()
                for task, output in outputs.items()
            }

        def training_step(self, x, number):
            self.whole.append(self.groups.state_dict())
            optimizer = self.optimizers()
            for group in self.groups:
                optimizer.zero_grad()
                self.manual_backward(group.loss(self.losses(x, group)))
                optimizer.step()
                self.steps += 1
                if self.steps == at:
                    do()

        def validation_step(self, x, number):
            for task, loss in self.losses(x).items():
                self.log(f"val_{task}", loss)

    return Module()


def make_trainer(package, folder, callback, **options):
    trainer = importlib.import_module(package).Trainer
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    return trainer(
        **QUIET, accelerator="cpu", default_root_dir=folder, callbacks=[callback], **options
    )


def loader():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randn(24, 3, generator=generator), batch_size=4)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_resumes_exactly_in_both_packages(package, tmp_path):
    def run(epochs, resumed=None):
        module = make_module(package)
        callback = GroupsCallback(module.groups)
        trainer = make_trainer(package, tmp_path, callback, max_epochs=epochs)
        trainer.fit(module, loader(), loader(), ckpt_path=resumed)
        return module, trainer

    whole, _ = run(3)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed, _ = run(3, tmp_path / "first.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert_same(resumed.groups.state_dict(), whole.groups.state_dict())
    assert whole.groups.affinity.matrix.any()
    assert len(resumed.whole) == 12


@pytest.mark.parametrize("within", [0, 1])
def test_slurm_requeues_a_job_in_the_middle_of_a_batch(within, tmp_path, monkeypatch):
    """Lightning saves in the handler of the signal; the next run goes on from there by itself."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment
    from lightning.pytorch.trainer.connectors import signal_connector

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    asked = []
    monkeypatch.setattr(signal_connector, "call", lambda command: asked.append(command) or 0)

    def trainer(module):
        cluster = SLURMEnvironment(auto_requeue=True)
        options = {"plugins": [cluster], "max_epochs": 1}
        recorder = tg.Recorder(module.groups, tmp_path / "run")
        callback = GroupsCallback(module.groups, recorder)
        return make_trainer(PACKAGES[0], tmp_path, callback, **options)

    def interrupted():
        os.kill(os.getpid(), signal.SIGUSR1)

    module = make_module(PACKAGES[0], at=4 + within, do=interrupted)  # in the second batch
    trainer(module).fit(module, loader(), loader())
    assert asked == [["scontrol", "requeue", "7"]]
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert_same(saved["callbacks"]["GroupsCallback"]["groups"], module.whole[1])

    again = make_module(PACKAGES[0])
    with pytest.warns(UserWarning, match="dataloader is not resumable"):  # Lightning's own
        trainer(again).fit(again, loader(), loader())
    assert_same(again.whole[0], module.whole[1])
    batches = [line["batch"] for line in tg.recording.read_lines(tmp_path / "run/metrics.jsonl")]
    assert batches == [*range(1, 1 + 1 + len(again.whole))]  # none of them twice


class Notes(tg.Recorder):
    """Stands for a Recorder: notes what it is told."""

    def __init__(self):
        self.heard, self.loaded = [], None

    def metrics(self, values, better):
        self.heard.append((values, better))

    def state_dict(self):
        return {"evaluations": len(self.heard)}

    def load_state_dict(self, state):
        self.loaded = state

    def close(self):
        self.heard.append("closed")


METRICS = {"a": ("val_a", "lower"), "c": ("val_c", "higher")}


def test_a_recorder_hears_of_validations_during_the_training(tmp_path):
    recorder, module = Notes(), make_module(PACKAGES[0])
    trainer = make_trainer(PACKAGES[0], tmp_path, GroupsCallback(module.groups, recorder, METRICS))
    trainer.fit(module, loader(), loader())
    *evaluations, end = recorder.heard
    assert len(evaluations) == 2  # and not one more of the sanity check
    assert end == "closed"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    values, better = evaluations[1]
    assert better == {"a": "lower", "c": "higher"}
    assert values == {task: float(trainer.callback_metrics[f"val_{task}"]) for task in "ac"}
    trainer.validate(module, loader(), verbose=False)
    assert len(recorder.heard) == 3

    other = make_module(PACKAGES[0])
    callback = GroupsCallback(other.groups, recorder, METRICS)
    trainer = make_trainer(PACKAGES[0], tmp_path, callback, max_epochs=3)
    trainer.fit(other, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert recorder.loaded == {"evaluations": 3}


def test_a_metric_that_was_not_logged(tmp_path):
    module = make_module(PACKAGES[0])
    callback = GroupsCallback(module.groups, Notes(), {"a": ("val_accuracy", "higher")})
    trainer = make_trainer(PACKAGES[0], tmp_path, callback)
    with pytest.raises(ValueError, match=r"no \['val_accuracy'\].*'val_a'"):
        trainer.fit(module, loader(), loader())


def test_a_checkpoint_without_the_groups_is_told_of(tmp_path):
    module = make_module(PACKAGES[0])
    trainer = importlib.import_module(PACKAGES[0]).Callback()
    trainer = make_trainer(PACKAGES[0], tmp_path, trainer, max_epochs=1)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    again = make_module(PACKAGES[0])
    trainer = make_trainer(PACKAGES[0], tmp_path, GroupsCallback(again.groups))
    with pytest.warns(UserWarning, match="no state of the groups.*learned anew"):
        trainer.fit(again, loader(), loader(), ckpt_path=tmp_path / "old.ckpt")


def test_wrong_arguments_are_explained():
    with pytest.raises(TypeError, match=r"GroupsCallback takes tg\.TaskGroups, got list"):
        GroupsCallback(TASKS)
    with pytest.raises(ValueError, match=r"pass recorder=tg.Recorder\(groups, folder\)"):
        GroupsCallback(tg.TaskGroups(TASKS), metrics=METRICS)
    with pytest.raises(TypeError, match="pass a tracker as its log="):
        GroupsCallback(tg.TaskGroups(TASKS), print)
    with pytest.raises(ValueError, match=r"unknown tasks \['d'\].*tasks \['a', 'b', 'c'\]"):
        GroupsCallback(tg.TaskGroups(TASKS), Notes(), {"d": ("val_d", "lower")})
