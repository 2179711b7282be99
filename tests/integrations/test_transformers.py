"""GroupTrainer: the Hugging Face Trainer with one step per group."""

import logging
import os
import warnings
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import taskgroup as tg
from taskgroup.integrations.transformers import GroupTrainer
from tests.ranks import on_ranks
from tests.states import assert_same

TASKS = ["mood", "topic", "length"]
CLASSES = {"mood": 2, "topic": 3, "length": 2}


class Encoder(nn.Module):
    """Takes the columns of a batch by name, as the models of transformers do."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids, attention_mask=None):
        return self.dropout(self.norm(self.embedding(input_ids).mean(1)))


class OwnModel(nn.Module):
    """Runs all heads in every call, and knows nothing of groups."""

    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.heads = nn.ModuleDict({task: nn.Linear(8, n) for task, n in CLASSES.items()})

    def forward(self, input_ids):
        features = self.encoder(input_ids)
        return {task: head(features) for task, head in self.heads.items()}


def make_model(**options):
    torch.manual_seed(0)
    heads = {task: nn.Linear(8, n) for task, n in CLASSES.items()}
    return tg.MultiTaskModel(Encoder(**options), heads)


def make_data(n=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(n):
        words = torch.randint(10, (6,), generator=generator)
        labels = {"mood": words[0] % 2, "topic": words[1] % 3, "length": words[2] % 2}
        data.append({"input_ids": words, **labels, "note": torch.tensor(0)})
    return data


def losses_of(outputs, inputs):
    return {task: cross_entropy(own, inputs[task]) for task, own in outputs.items()}


def make_trainer(
    model, groups, data=None, cls=GroupTrainer, options=(), losses=losses_of, **arguments
):
    import transformers

    arguments = {
        "label_names": TASKS,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    return cls(
        model,
        transformers.TrainingArguments(**arguments),
        train_dataset=make_data() if data is None else data,
        groups=groups,
        losses=losses,
        **dict(options),
    )


@pytest.fixture
def train(tmp_path, accelerate):
    """Make a trainer; its files are in ``tmp_path`` unless it is told otherwise."""
    yield lambda *args, **kwargs: make_trainer(*args, **{"output_dir": str(tmp_path), **kwargs})
    logging.getLogger("transformers").setLevel(logging.WARNING)


class InOrder(GroupTrainer):
    """Takes the samples in the order of the data."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def batches_of(data):
    for start in range(0, len(data), 8):
        samples = data[start : start + 8]
        yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_clipping_precision_and_schedule_are_those_of_a_loop_with_accelerate(
    precision, train, accelerate
):
    """Every step is clipped, and the schedule counts batches."""
    model, groups, data = make_model(dropout=0), tg.TaskGroups(TASKS, warmup=3), make_data()
    settings = {"max_grad_norm": 0.3, "learning_rate": 1e-2, "weight_decay": 0.1}
    settings["logging_steps"] = 1
    trainer = train(model, groups, data, InOrder, **settings, bf16=precision == "bf16")
    result = trainer.train()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    own, own_groups = make_model(dropout=0), tg.TaskGroups(TASKS, warmup=3)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    rates = [{"params": [p], "weight_decay": 0.0 if p.dim() < 2 else 0.1} for p in own.parameters()]
    optimizer = torch.optim.AdamW(rates, lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    prepared, stepper = accelerator.prepare(own, optimizer)
    seen, clipped = [], 0
    for _ in range(2):
        for batch in batches_of(data):
            for group in own_groups:
                losses = losses_of(prepared(input_ids=batch["input_ids"], group=group), batch)
                if group.first:
                    seen.append(sum(losses.values()).item())
                stepper.zero_grad()
                accelerator.backward(group.loss(losses))
                clipped += accelerator.clip_grad_norm_(own.parameters(), 0.3).item() > 0.3
                stepper.step()
            scheduler.step()
    assert clipped > 10
    assert_same(dict(own.state_dict()), dict(model.state_dict()))
    assert_same(own_groups.state_dict(), groups.state_dict())
    assert result.training_loss == pytest.approx(sum(seen) / len(seen), rel=1e-4)
    assert trainer.state.global_step == 12
    assert all(line["grad_norm"] > 0 for line in trainer.state.log_history[:12])  # it steps too


def snapshot(model):
    return {name: own.clone() for name, own in model.state_dict().items()}


class Watched(GroupTrainer):
    """Notes the group and the loss of every step, and what every batch changes."""

    def compute_loss(self, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(self._group)
        return super().compute_loss(*args, **kwargs)

    def training_step(self, model, inputs, *args):
        self.__dict__.setdefault("batches", []).append([])
        before, n = snapshot(self.model), len(self.__dict__.setdefault("seen", []))
        loss = super().training_step(model, inputs, *args)
        self.batches[-1] = [group.tasks for group in self.seen[n:]], loss.item(), before
        return loss


def partly_labelled():
    """Batches of eight with the labels of some tasks, by a missing column or by -100."""
    data = make_data(32)
    for sample in data[:8]:
        del sample["topic"]  # the whole batch lacks the column
    for sample in data[8:16]:
        sample["mood"] = sample["length"] = torch.tensor(-100)
    for sample in data[16:24]:
        sample |= dict.fromkeys(TASKS, torch.tensor(-100))
    return data, [("mood", "length"), ("topic",), (), tuple(TASKS)]


def masked(outputs, inputs):
    """The losses, of outputs of labelled tasks alone: a mean over no label would be NaN."""
    losses = {task: cross_entropy(own, inputs[task]) for task, own in outputs.items()}
    assert all(loss.isfinite() for loss in losses.values())
    return losses


@pytest.mark.parametrize("make", [make_model, OwnModel])
def test_partly_labelled_batches(make, train):
    data, present = partly_labelled()
    model, groups = make(), tg.TaskGroups(TASKS)
    trainer = train(
        model, groups, data, type("T", (Watched, InOrder), {}), losses=masked, num_train_epochs=1
    )
    trainer.train()
    states = [before for _, _, before in trainer.batches] + [snapshot(model)]
    for n, (stepped, loss, _) in enumerate(trainer.batches):
        assert {task for group in stepped for task in group} == set(present[n])
        moved = {
            name for name, own in states[n].items() if not torch.equal(own, states[n + 1][name])
        }
        heads = {name.split(".")[1] for name in moved if name.startswith("heads.")}
        assert heads == set(present[n])
        assert (loss > 0) == bool(moved) == bool(present[n])


def test_batches_without_labels_are_refused_with_a_gradient_scaler(train):
    data, _ = partly_labelled()
    trainer = train(make_model(), tg.TaskGroups(TASKS), data[16:24])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # fp16 itself needs a GPU
    with pytest.raises(RuntimeError, match="use bf16=True, or leave such batches out"):
        trainer.train()


def test_a_loss_that_is_missing_in_an_evaluation(train):
    trainer = train(
        make_model(),
        tg.TaskGroups(TASKS),
        losses=lambda outputs, inputs: {"mood": outputs["mood"].sum()},
    )
    with pytest.raises(ValueError, match="'topic'"):
        trainer.evaluate(make_data(8))


def test_batch_norm_of_your_own_model_counts_batches(train):
    model = OwnModel()
    trainer = train(model, tg.TaskGroups(TASKS), num_train_epochs=1)
    trainer.train()
    assert model.encoder.norm.num_batches_tracked == 6  # and not one per group


def test_the_evaluation_has_the_loss_of_each_task_and_the_metrics_of_the_user(train):
    data, _ = partly_labelled()
    model = make_model()
    seen = {}

    def accuracies(found):
        for task, scores, labels in zip(TASKS, found.predictions, found.label_ids, strict=True):
            seen[task] = scores.shape, labels.shape
        return {"agreed": 0.5}

    evaluated = [*data[8:16], *data[24:28]]  # all columns, some of them -100
    options = {"eval_dataset": evaluated, "compute_metrics": accuracies}
    trainer = train(model, tg.TaskGroups(TASKS), losses=masked, options=options)
    found = trainer.evaluate()
    assert seen == {task: ((12, n), (12,)) for task, n in CLASSES.items()}
    assert found["eval_agreed"] == 0.5
    model.eval()
    with torch.no_grad():
        first, last = (
            losses_of(model(input_ids=batch["input_ids"]), batch) for batch in batches_of(evaluated)
        )
    expected = {"mood": last["mood"], "topic": (8 * first["topic"] + 4 * last["topic"]) / 12}
    expected["length"] = last["length"]
    for task, loss in expected.items():
        assert found[f"eval_{task}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(sum(expected.values()).item(), rel=1e-5)
    more = trainer.evaluate([*data[8:24], *data[24:28]])  # with a batch without any label
    assert {t: more[f"eval_{t}_loss"] for t in TASKS} == {t: found[f"eval_{t}_loss"] for t in TASKS}


def evaluated_on_a_rank(rank, folder, data):
    own = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    own |= {"MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": 1}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in own.items()}):
        trainer = make_trainer(
            make_model(),
            tg.TaskGroups(TASKS),
            losses=masked,
            options={"eval_dataset": data},
            output_dir=folder,
        )
        return trainer.evaluate()


@pytest.mark.slow
def test_the_loss_of_each_task_is_that_over_all_ranks(train, tmp_path):
    """Where only one rank has labels of a task, too."""
    data = partly_labelled()[0][8:16] + make_data(16, seed=1) + make_data(8, seed=2)
    alone = train(
        make_model(), tg.TaskGroups(TASKS), losses=masked, options={"eval_dataset": data}
    ).evaluate()
    for found in on_ranks(evaluated_on_a_rank, str(tmp_path), data):
        for task in TASKS:
            assert found[f"eval_{task}_loss"] == pytest.approx(alone[f"eval_{task}_loss"])


def test_data_sets_of_their_own_labels_are_evaluated_one_by_one(train):
    def only(task):
        return [{"input_ids": one["input_ids"], task: one[task]} for one in make_data(16)]

    seen = []

    def accuracy(found):
        seen.append([labels.shape for labels in (found.label_ids,)])
        return {}

    options = {
        "eval_dataset": {f"{task}_set": only(task) for task in TASKS},
        "compute_metrics": accuracy,
    }
    trainer = train(make_model(), tg.TaskGroups(TASKS), options=options)
    found = trainer.evaluate()
    assert seen == [[(16,)]] * 3
    for task in TASKS:
        assert found[f"eval_{task}_set_{task}_loss"] == pytest.approx(
            found[f"eval_{task}_set_loss"]
        )
    assert trainer.label_names == TASKS
    assert f"eval_{TASKS[0]}_set_{TASKS[1]}_loss" not in found


def test_losses_as_one_tensor_and_outputs_as_one_tensor(train):
    """As of a model with one layer for all tasks; the rows of the other tasks are held."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids).mean(1))

    def losses(outputs, inputs):
        targets = torch.stack([inputs[task] for task in TASKS], 1).float()
        return (outputs - targets).square().mean(0)

    torch.manual_seed(0)
    model, groups = Stacked(), tg.TaskGroups(TASKS, grouping=tg.Singletons(), groups_per_batch=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rows = {task: [model.head.weight[k], model.head.bias[k]] for k, task in enumerate(TASKS)}
    groups.attach(optimizer, rows)
    shapes = []
    options = {
        "optimizers": (optimizer, None),
        "eval_dataset": make_data(8),
        "compute_metrics": lambda found: shapes.append(found.predictions.shape) or {},
    }
    trainer = train(model, groups, cls=Watched, losses=losses, options=options, max_grad_norm=0)
    trainer.train()
    states = [before["head.bias"] for _, _, before in trainer.batches] + [model.head.bias]
    for (stepped, _, _), before, after in zip(
        trainer.batches, states[:-1], states[1:], strict=True
    ):
        moved = [task for task, a, b in zip(TASKS, before, after, strict=True) if a != b]
        assert [tuple(moved)] == stepped
    found = trainer.evaluate()
    assert shapes == [(8, 3)]
    assert found["eval_loss"] == pytest.approx(sum(found[f"eval_{t}_loss"] for t in TASKS))


def state_of(trainer):
    parts = trainer.model, trainer.optimizer.optimizer, trainer.lr_scheduler, trainer.groups
    return [part.state_dict() for part in parts]


@pytest.mark.parametrize("how", ["True", "folder", "a later epoch"])
def test_a_run_resumes_exactly(how, train, tmp_path, accelerate):
    """Also within an epoch, with shuffled data and dropout."""

    def made(folder, callbacks=(), **options):
        callbacks = list(callbacks)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        groups = tg.TaskGroups(TASKS, warmup=2, affinity=tg.ProximalAffinity(decay=0.1))
        own = {"recorder": tg.Recorder(groups, folder / "run"), "callbacks": callbacks}
        return train(make_model(), groups, output_dir=str(folder), options=own, **options)

    whole = made(tmp_path / "whole")
    whole.train()
    step = 4 if how != "a later epoch" else 6

    class Stop(transformers_callback()):
        def on_step_end(self, args, state, control, **_):
            control.should_save = control.should_training_stop = state.global_step == step

    begun = made(tmp_path / "own", [Stop()], save_strategy="steps")
    begun.train()
    other = made(tmp_path / "own")
    folder = tmp_path / "own" / f"checkpoint-{step}"
    other.train(resume_from_checkpoint=True if how == "True" else str(folder))
    assert_same(state_of(other), state_of(whole))
    assert whole.groups.affinity.matrix.any()
    recorded, expected = (
        [*tg.recording.read_lines(trainer.recorder.folder / "metrics.jsonl")]
        for trainer in (other, whole)
    )
    assert recorded == expected


def transformers_callback():
    from transformers import TrainerCallback

    return TrainerCallback


def test_a_checkpoint_without_the_groups_is_refused(train, tmp_path):
    trainer = train(make_model(), tg.TaskGroups(TASKS), max_steps=2, save_strategy="epoch")
    trainer.train()
    (tmp_path / "checkpoint-2" / "groups.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no state of the groups \(groups.pt\)"):
        trainer.train(resume_from_checkpoint=True)


def test_only_checkpoints_to_resume_from_hold_the_groups(train, tmp_path):
    options = {"max_steps": 2, "save_strategy": "epoch", "save_only_model": True}
    trainer = train(make_model(), tg.TaskGroups(TASKS), **options)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert not [*tmp_path.rglob("groups.pt")]


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


def test_a_recorder_hears_of_evaluations_and_is_closed_before_the_trackers(train, accelerate):
    recorder = Notes()

    class Tracker(transformers_callback()):
        def on_train_end(self, *_, **__):
            recorder.heard.append("tracker closed")

    def made(**options):
        options |= {"eval_dataset": make_data(8), "recorder": recorder}
        options |= {"compute_metrics": lambda _: {"right": 0.25}, "callbacks": [Tracker()]}
        settings = {"num_train_epochs": 1, "eval_strategy": "epoch", "save_strategy": "epoch"}
        return train(make_model(), tg.TaskGroups(TASKS), options=options, **settings)

    trainer = made()
    trainer.train()
    (values, better), *ends = recorder.heard
    assert better == dict.fromkeys(TASKS, "lower")
    assert all(trainer.state.log_history[-2][f"eval_{t}_loss"] == v for t, v in values.items())
    assert ends == ["closed", "tracker closed"]
    trainer.evaluate()  # after the training, it is closed
    assert len(recorder.heard) == 3

    recorder.heard.clear()
    trainer = made(metrics={"mood": ("eval_right", "higher")})
    trainer.train()
    assert recorder.heard[0] == ({"mood": 0.25}, {"mood": "higher"})
    trainer = made(metrics={"mood": ("eval_wrong", "higher")})
    with pytest.raises(ValueError, match=r"no \['eval_wrong'\].*'eval_right'"):
        trainer.train()
    made().train(resume_from_checkpoint=True)
    assert recorder.loaded == {"evaluations": 1}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"gradient_accumulation_steps": 2}, "would mix the groups: use larger batches"),
        ({"label_names": []}, r"TrainingArguments\(label_names"),
        ({"torch_compile": True}, r"call model.compile\(\) instead"),
        ({"options": {"compute_loss_func": print}}, "pass losses= instead"),
        ({"options": {"recorder": print}}, r"recorder must be a tg\.Recorder"),
        ({"options": {"metrics": {"mood": ("a", "lower")}}}, r"pass recorder=tg\.Recorder"),
        ({"options": {"groups": TASKS}}, r"GroupTrainer takes tg\.TaskGroups, got list"),
    ],
)
def test_what_does_not_work_with_groups_is_refused(wrong, sentence, train):
    groups = dict(wrong.get("options", {})).pop("groups", tg.TaskGroups(TASKS))
    rest = {k: v for k, v in dict(wrong.pop("options", {})).items() if k != "groups"}
    with pytest.raises((TypeError, ValueError), match=sentence):
        train(make_model(), groups, options=rest, **wrong)


def test_a_model_that_is_made_anew_is_refused(train):
    with pytest.raises(ValueError, match="model_init makes a new model"):
        train(None, tg.TaskGroups(TASKS), options={"model_init": lambda: make_model()})


def test_data_parallel_is_refused(train, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="one process per GPU with torchrun"):
        train(make_model(), tg.TaskGroups(TASKS))


def test_one_group_per_batch_with_gradient_affinity(train):
    model = make_model()
    affinity = tg.GradientAffinity(model.encoder)
    groups = tg.TaskGroups(TASKS, affinity=affinity, groups_per_batch=1, warmup=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = train(model, groups, cls=Watched)
        trainer.train()
    assert all(len(stepped) == 1 for stepped, _, _ in trainer.batches)
    assert affinity.observed.all()


def test_sequence_to_sequence_trainers_can_take_groups(train):
    """A trainer derived from the Trainer is combined with GroupTrainer by inheritance."""
    import transformers

    class Both(GroupTrainer, transformers.Seq2SeqTrainer):
        pass

    assert issubclass(Both.mro()[2], transformers.Seq2SeqTrainer)
