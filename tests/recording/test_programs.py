"""The example programs that record their own loop: each gets a report and feeds its tracker."""

import json
import runpy
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(program):
    """Run a program in the current folder; return its tasks and the metrics that it recorded."""
    threads = torch.get_num_threads()
    names = runpy.run_path(str(EXAMPLES / program))
    torch.set_num_threads(threads)
    groups, recorder = names["groups"], names["recorder"]
    assert groups.affinity.matrix.any()
    page = (recorder.folder / "report.html").read_text("utf-8")
    for task in groups.tasks:
        assert f'data-column="task">{task}</td>' in page  # its last metric
    lines = (recorder.folder / "evaluations.jsonl").read_text("utf-8").splitlines()
    return groups.tasks, [json.loads(line)["metrics"] for line in lines]


def test_dense_heads_and_wandb(wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks, metrics = run("dense_wandb.py")
    assert metrics[-1].keys() == set(tasks)
    assert sum(metrics[-1].values()) < 0.8 * sum(metrics[0].values())
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/taskgroup/affinity_*.png"))


def test_a_recommender_and_tensorboard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks, metrics = run("recommender.py")
    assert len(tasks) == 40
    assert sum(metrics[-1].values()) < sum(metrics[0].values())
    events = EventAccumulator("runs/recommender-tensorboard").Reload()
    logged = {"groups", "lr/0", "lr/1", *(f"loss/{task}" for task in tasks)}
    logged |= {f"metric/{task}" for task in tasks}
    assert {f"taskgroup/{name}" for name in logged} == set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["taskgroup/affinity"]
