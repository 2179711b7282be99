"""Folders of runs as training leaves them, untrained."""

import json

import numpy as np

from taskgroup.lab.recipe import Recipe
from taskgroup.recording import read_lines


def write_run(
    folder,
    partitions=(),
    matrices=None,
    seconds=None,
    dealt=None,
    conflicts=None,
    losses=None,
    metrics=None,
    lower_is_better=True,
    delta_m=None,
    titles=None,
    **settings,
):
    """Write a run; with ``seconds`` or ``metrics`` it is finished. Returns its folder.

    ``dealt`` is the number of steps of every batch; by default one for each group.
    """
    folder.mkdir(parents=True)
    settings = {"data": "nyud-v2", "method": "selective", "warmup": 1, **settings}
    recipe = Recipe(**settings)
    tasks = sorted({task for group in partitions[0] for task in group}) if partitions else []
    header = {"format": 1, "taskgroup": "0", "id": "0", "tasks": tasks, "ended": False}
    header["titles"] = titles or {}
    header["settings"] = recipe.model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps(header), "utf-8")
    lines = []
    learns = recipe.method == "selective" and recipe.make_grouping().reads_affinity
    rounds, undealt = 0, len(tasks)
    for batch, partition in enumerate(partitions, start=1):
        of_batch = dict.fromkeys(sorted(task for group in partition for task in group), 0.5)
        if losses is not None:
            of_batch = losses[batch - 1]
        steps = len(partition) if dealt is None else dealt[batch - 1]
        line = {"batch": batch, "losses": of_batch, "steps": steps, "partition": partition}
        if learns and rounds < recipe.warmup:
            line["warmup"] = True
            undealt -= steps
            if recipe.groups_per_batch is None or undealt <= 0:
                rounds, undealt = rounds + 1, len(tasks)
        lines.append(line)
    put(folder / "metrics.jsonl", lines)
    for name, recorded in (("affinity.jsonl", matrices), ("conflicts.jsonl", conflicts)):
        if recorded is not None:
            lines = [{"batch": b, "matrix": np.asarray(m).tolist()} for b, m in recorded]
            put(folder / name, lines)
    if seconds is not None or metrics is not None:
        seconds = seconds or {"everything": 1.0}
        summary = {
            "batches": 10,
            "seconds_per_batch": seconds["everything"] / 10,
            "seconds": seconds,
            "metrics": metrics or {},
            "metric": dict.fromkeys(metrics or {}, "RMSE"),
            "lower_is_better": dict.fromkeys(metrics or {}, lower_is_better),
            "delta_m": delta_m,
        }
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return folder


def put(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def load_metrics(run):
    """The lines of a run's ``metrics.jsonl``."""
    return list(read_lines(run / "metrics.jsonl"))
