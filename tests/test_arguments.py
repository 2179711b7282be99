"""Wrong arguments of public names get a sentence at the call, and numbers of NumPy work.

Such a sentence names the argument and says what to pass. An error that Python, NumPy or torch
raises further down (``'str' object has no attribute ...``) does not.
"""

import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import taskgroup as tg

TASKS = ["depth", "normal", "edges"]
PACKAGE = Path(tg.__file__).parent
JUNK = ("text", None, 5, 1.5, True, [1], np.eye(3), nn.Linear, {"a": 1})
NOT_COUNTS = ("5", 1.5, True, -1, np.bool_(True), torch.tensor(5.0), [5])


def parameter():
    return nn.Parameter(torch.ones(2))


def losses():
    x = parameter()
    return {task: (k + x.square()).sum() for k, task in enumerate(TASKS)}


def optimizer():
    return torch.optim.SGD([parameter()], lr=0.1)


def groups(**settings):
    return tg.TaskGroups(TASKS, **settings)


def group():
    return next(iter(groups()))


def stack():
    return torch.stack(list(losses().values()))


# What is called, with one argument; the arguments that are wrong; and what the sentence names.
WRONG = {
    "tasks": (tg.TaskGroups, [*JUNK[:-1], {"depth", "edges"}, nn.Linear(1, 1)], r"[Tt]asks?\b"),
    "weights": (
        lambda v: groups(weights=v),
        [
            *("1,2,3", ["1", "2", "3"], {**dict.fromkeys(TASKS, 1), "edges": "1"}, 5, [1, None, 2]),
            *([True, 1, 1], np.ones((3, 1)), torch.ones(3, 1), nn.Linear(1, 1), {1: 1.0}),
        ],
        "weight",
    ),
    "affinity": (
        lambda v: groups(affinity=v),
        [tg.ProximalAffinity, tg.AffinityPropagation(), torch.eye(3), "text", 5],
        "affinity",
    ),
    "grouping": (
        lambda v: groups(grouping=v),
        [tg.AffinityPropagation, tg.ProximalAffinity(), [["depth"]], torch.eye(3), "text", 5],
        "grouping",
    ),
    "warmup": (lambda v: groups(warmup=v), [*NOT_COUNTS, None], "warmup"),
    "regroup_every": (lambda v: groups(regroup_every=v), [*NOT_COUNTS, None], "regroup_every"),
    "observe_every": (lambda v: groups(observe_every=v), [*NOT_COUNTS, None], "observe_every"),
    "groups_per_batch": (lambda v: groups(groups_per_batch=v), NOT_COUNTS, "groups_per_batch"),
    "reduction": (lambda v: groups(reduction=v), ["max", None, sum, True], "reduction"),
    "replay_rng": (
        lambda v: groups(replay_rng=v),
        ["false", None, 1, [], torch.tensor(True)],
        "replay_rng",
    ),
    "process_group": (
        lambda v: groups(process_group=v),
        ["world", 0, [0, 1], True, torch.distributed],
        r"process_group .*new_group",
    ),
    "seed": (
        lambda v: groups(seed=v),
        [None, "0", 1.5, True, 2**70, torch.Generator(), [1], np.bool_(True)],
        "seed",
    ),
    "present": (
        lambda v: list(groups().batch(v)),
        [*JUNK, [["depth"]], {"depth": 1}],
        r"batch\(\)",
    ),
    "optimizer": (
        lambda v: groups().attach(v),
        [torch.optim.SGD, None, [], "sgd", [optimizer(), None], nn.Linear(1, 1)],
        r"attach\(\) takes a torch.optim.Optimizer",
    ),
    "heads": (
        lambda v: groups().attach(optimizer(), v),
        [
            *("text", 5, [nn.Linear(1, 1)], {"depth": []}, dict.fromkeys(TASKS, "weight")),
            *(dict.fromkeys(TASKS, 5), dict.fromkeys(TASKS, nn.Linear), {t: ["w"] for t in TASKS}),
        ],
        "head",
    ),
    "outside": (
        lambda v: groups().attach(optimizer(), outside=v),
        [True, False, None, "freeze"],
        "outside",
    ),
    "shared_state": (
        lambda v: groups().attach(optimizer(), shared_state=v),
        [True, False, None, "own", "groups"],
        "shared_state",
    ),
    "loss": (lambda v: group().loss(v), [*JUNK, np.ones(3), [1.0] * 3], "[Ll]oss|[Uu]nknown task"),
    "rows": (
        lambda v: group().loss(stack(), rows=v),
        [*(junk for junk in JUNK if junk is not None), torch.zeros(3), torch.zeros(4).long()],
        "tasks of the rows",
    ),
    "share": (
        lambda v: group().loss(stack(), share=v),
        [None, "1", 0, 2, True, 1j, float("nan")],
        "share",
    ),
    "state": (lambda v: groups().load_state_dict(v), [*JUNK, torch.ones(2)], "state"),
    "decay": (
        tg.ProximalAffinity,
        ["0.1", None, 0, 2, True, [0.1], 1j, float("nan"), np.bool_(True)],
        "decay",
    ),
    "shared": (tg.GradientAffinity, [*JUNK, optimizer(), ["weight"], [None], []], "shared"),
    "every": (lambda v: tg.GradientAffinity([parameter()], every=v), NOT_COUNTS, "every"),
    "sample": (lambda v: tg.GradientAffinity([parameter()], sample=v), NOT_COUNTS, "sample"),
    "m of KMeans": (tg.KMeans, [*NOT_COUNTS, None], "m of KMeans"),
    "m of RandomGroups": (tg.RandomGroups, [*NOT_COUNTS, None], "m of RandomGroups"),
    "m of Exhaustive": (tg.Exhaustive, [*NOT_COUNTS, None], "max_groups of Exhaustive"),
    "seed of KMeans": (lambda v: tg.KMeans(2, seed=v), [*NOT_COUNTS, None], "seed"),
    "seed of RandomGroups": (lambda v: tg.RandomGroups(2, seed=v), [None, "0", 1.5, True], "seed"),
    "partition": (tg.Fixed, [None, 5, [1], "ab", ["ab"], nn.Linear(1, 1)], "Fixed"),
    "threshold": (tg.GraphColoring, ["0", None, [1], float("inf"), True, np.eye(2)], "threshold"),
    "preference": (
        lambda v: tg.AffinityPropagation(preference=v),
        ["0", [1], float("nan"), True, np.eye(2)],
        "preference",
    ),
    "damping": (lambda v: tg.AffinityPropagation(damping=v), ["0.5", None, 0.1, 1.0], "damping"),
    "matrix": (
        tg.AffinityPropagation(),
        [*JUNK, torch.ones(3), torch.ones(2, 3)],
        "AffinityPropagation takes an affinity",
    ),
    "similarity": (tg.affinity_propagation, ["text", None, 5, [1], {"a": 1}], "similarity"),
    "losses of gradients": (lambda v: tg.task_gradients(v, [parameter()]), JUNK, "[Ll]oss"),
    "params": (lambda v: tg.task_gradients(losses(), v), [*JUNK, []], "params"),
    "params of streaming": (lambda v: tg.streaming_task_gram(losses(), v), JUNK, "params"),
    "gradients": (tg.task_gram, [*JUNK, []], "gradient|number of tasks|tasks"),
    "gradients to combine": (lambda v: tg.combine(v, [1.0]), [*JUNK, []], "gradient|tasks"),
    "weights to combine": (
        lambda v: tg.combine([[torch.ones(2)]], v),
        ["text", None, 5, [1, 2], {"a": 1}],
        "weights",
    ),
    "gram": (tg.pareto_stationarity, [*JUNK, torch.ones(2)], "gram"),
    "gram of conflicts": (tg.conflicts, [*JUNK, torch.ones(2)], "gram"),
    "closure": (
        lambda v: tg.lookahead_affinity(v, optimizer(), [parameter()]),
        [*JUNK, losses()],
        "closure",
    ),
    "encoder": (lambda v: tg.MultiTaskModel(v, {"a": nn.Linear(1, 1)}), JUNK, "encoder"),
    "heads of a model": (lambda v: tg.MultiTaskModel(nn.Linear(1, 1), v), JUNK, "head"),
    "heads in a batch": (tg.BatchedHeads, JUNK, "head"),
    "group of a model": (
        lambda v: tg.MultiTaskModel(nn.Linear(1, 1), {"a": nn.Linear(1, 1)})(
            torch.ones(1), group=v
        ),
        [value for value in JUNK if value is not None],
        "group",
    ),
    "group of statistics": (lambda v: tg.statistics_once(nn.BatchNorm1d(1), v), JUNK, "group"),
    "module of statistics": (lambda v: tg.statistics_once(v, group()), JUNK, "statistics_once"),
    "results": (lambda v: tg.delta_m(v, {"a": 1.0}, {"a"}), ["text", None, 5, [1]], "results"),
    "lower_is_better": (
        lambda v: tg.delta_m({"a": 1.0}, {"a": 1.0}, v),
        ["a", None, 5, True],
        "lower_is_better",
    ),
    "shared of a method": (
        lambda v: tg.methods.GD(v, TASKS),
        [*JUNK, parameter() * 2, []],
        "shared",
    ),
    "tasks of a method": (
        lambda v: tg.methods.GD([parameter()], v),
        ["text", None, 5, [], ["a", "a"], nn.Linear(1, 1), np.eye(2)],
        "tasks",
    ),
    "losses of a method": (
        lambda v: tg.methods.GD([parameter()], TASKS).backward(v),
        JUNK,
        "[Ll]oss|task",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_wrong_arguments_are_explained_at_the_call(name):
    call, values, said = WRONG[name]
    for value in values:
        with pytest.raises((ValueError, TypeError)) as raised:
            call(value)
        message = str(raised.value)
        assert re.search(said, message), (value, message)
        where = traceback.extract_tb(raised.value.__traceback__)[-1]
        assert PACKAGE in Path(where.filename).parents, (value, message)
        assert "raise" in where.line, (value, message)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"affinity": "proximal"}, "Write affinity=tg.ProximalAffinity()."),
        ({"affinity": "Gradient"}, "Write affinity=tg.GradientAffinity(model.encoder)."),
        ({"grouping": "affinity-propagation"}, "Write grouping=tg.AffinityPropagation()."),
        ({"grouping": "graph_coloring"}, "Write grouping=tg.GraphColoring()."),
        ({"grouping": "kmeans:3"}, "Write grouping=tg.KMeans(m)."),
        ({"grouping": "random:2"}, "Write grouping=tg.RandomGroups(m)."),
        ({"grouping": "together"}, "Write grouping=tg.Together()."),
        ({"affinity": tg.ProximalAffinity}, "got the class ProximalAffinity; call it, as in"),
        ({"tasks": "depth,normal"}, "write ['depth', 'normal']."),
    ],
)
def test_what_was_meant_is_named(settings, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        tg.TaskGroups(**{"tasks": TASKS, **settings})


def test_a_string_of_another_kind_names_no_part_of_this_one():
    with pytest.raises(TypeError) as raised:
        groups(affinity="together")
    assert "Write" not in str(raised.value)


@pytest.mark.parametrize("count", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_integers_of_numpy_and_torch_are_integers(count):
    made = groups(
        warmup=count,
        regroup_every=count,
        observe_every=count,
        groups_per_batch=count,
        seed=count,
        grouping=tg.RandomGroups(count, seed=count),
        affinity=tg.GradientAffinity([parameter()], every=count, sample=count),
        replay_rng=np.bool_(False),
        weights=np.ones(3, np.float32),
    )
    same = groups(
        warmup=2,
        regroup_every=2,
        observe_every=2,
        groups_per_batch=2,
        seed=2,
        grouping=tg.RandomGroups(2, seed=2),
        affinity=tg.GradientAffinity([parameter()], every=2, sample=2),
    )
    for made_group, same_group in zip(made, same, strict=True):
        assert made_group.tasks == same_group.tasks
        made_group.skip()
        same_group.skip()
    assert groups(weights=[torch.tensor(1.0), np.float32(1), 1]).tasks == tuple(TASKS)
    assert tg.ProximalAffinity(np.float32(0.5)).decay == 0.5
    assert (
        tg.AffinityPropagation(preference=np.float32(0.5), damping=np.float64(0.5)).damping == 0.5
    )
    assert group().loss(stack(), share=np.float32(0.5)).requires_grad
