"""The Hugging Face Trainer on two text data sets, with MLflow and a report.

python examples/text_mlflow.py

Reviews have labels of sentiment and stars, news of topic and urgency. Every batch mixes both data
sets, so that all pairs of tasks are observed.
"""

import argparse
import os
from pathlib import Path

import mlflow
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, TrainingArguments

import taskgroup as tg
from taskgroup.integrations.transformers import GroupTrainer

CLASSES = {"sentiment": 2, "stars": 3, "topic": 3, "urgency": 2}
TASKS = list(CLASSES)
NO_LABEL = -100  # also what cross_entropy ignores


class Encoder(nn.Module):
    """A small BERT that has learned nothing yet; its feature is the mean over the words."""

    def __init__(self):
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.bert = BertModel(BertConfig(vocab_size=40, intermediate_size=64, **size))

    def forward(self, input_ids):
        return self.bert(input_ids).last_hidden_state.mean(1)


def make_model():
    torch.manual_seed(0)
    return tg.MultiTaskModel(Encoder(), {task: nn.Linear(32, n) for task, n in CLASSES.items()})


def make_data(n, seed):
    """Made-up texts of 12 words: reviews and news in turn, each with the labels of its tasks."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(40, (n, 12), generator=generator)
    good, bad = ((texts // 10 == kind).sum(1) for kind in (0, 1))  # ten words of each kind
    topics = torch.stack([(texts // 10 == kind).sum(1) for kind in (1, 2, 3)], 1)
    labels = {
        "sentiment": (good > bad).long(),
        "stars": (good > 2).long() + (good > bad),
        "topic": topics.argmax(1),
        "urgency": (texts >= 35).any(1).long(),
    }
    for k, task in enumerate(TASKS):
        labels[task][1 - k // 2 :: 2] = NO_LABEL
    return [
        {"input_ids": text, **{task: labels[task][row] for task in TASKS}}
        for row, text in enumerate(texts)
    ]


def losses(outputs, inputs):
    return {task: cross_entropy(output, inputs[task]) for task, output in outputs.items()}


def accuracies(found):
    """The accuracy of each task on the texts that have its label."""
    metrics = {}
    for task, scores, labels in zip(TASKS, found.predictions, found.label_ids, strict=True):
        right = scores.argmax(-1) == labels
        metrics[f"{task}_accuracy"] = right[labels != NO_LABEL].mean()
    return metrics


def train(folder, epochs):
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # so that mlflow-skinny is enough
    mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
    groups = tg.TaskGroups(TASKS, warmup=20, affinity=tg.ProximalAffinity(decay=0.05))
    recorder = tg.Recorder(groups, folder / "run", log=mlflow)
    arguments = TrainingArguments(
        str(folder / "checkpoints"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        label_names=TASKS,
        report_to="mlflow",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = GroupTrainer(
        make_model(),
        arguments,
        groups=groups,
        losses=losses,
        train_dataset=make_data(960, seed=0),
        eval_dataset=make_data(320, seed=1),
        compute_metrics=accuracies,
        recorder=recorder,
        metrics={task: (f"eval_{task}_accuracy", "higher") for task in TASKS},
    )
    trainer.train()
    return groups, recorder


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--epochs", type=int, default=3)
    groups, recorder = train(**vars(parser.parse_args()))
    print(f"groups {groups.partition}, report {recorder.report()}")
