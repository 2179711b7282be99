"""The loop: equal where it must be, exact on resume, and what it does to learning rates."""

import io
import math

import numpy as np
import pytest
import torch

import taskgroup as tg
from taskgroup.lab.recipe import GROUP_WEIGHTS, read_recipe
from taskgroup.lab.train.trainer import Trainer
from tests.lab.small import yeast

METHODS = list(tg.methods.METHODS)
WAYS = {
    **{name: {"method": name} for name in [*METHODS, "selective", "joint"]},
    "published": {"credit": "published"},
    "gradient": {"affinity": "gradient"},
    "state of groups": {"shared_state": "group"},
    "cheap": {"groups_per_batch": 1, "observe_every": 2},
    "random": {"grouping": "random:2", "outside": "coast", "head_lr_times": "sqrt(M)"},
}
INSIDE = {f"{name} inside": {"group_weights": name, "warmup": 1} for name in GROUP_WEIGHTS}


def trainer(**changes):
    settings = {"batches": 8, "decay": 0.3, "dropout": 0.2, "lr": 0.02}
    return Trainer(yeast(**{**settings, **changes}))


def steps(trained, n):
    return [trained.step() for _ in range(n)]


def parameters(trained):
    return [parameter.detach().clone() for parameter in trained.model.parameters()]


def assert_same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gd_is_joint_training_bitwise():
    one = trainer(method="gd")
    start = parameters(one)
    expected = [progress.losses for progress in steps(one, 8)]
    other = trainer(method="joint")  # made now: dropout draws from the generator that it seeds
    assert [progress.losses for progress in steps(other, 8)] == expected
    assert_same(parameters(one), parameters(other))
    assert not any(torch.equal(a, b) for a, b in zip(start, parameters(one), strict=True))


def test_methods_of_one_seed_start_alike_and_see_the_same_batches():
    seen = [trainer(method=name, seed=3).step().losses for name in ["selective", *METHODS]]
    assert all(losses == seen[0] for losses in seen)
    assert trainer(method="selective", seed=4).step().losses != seen[0]


@pytest.mark.parametrize("way", [*WAYS, *INSIDE])
def test_saved_and_loaded_it_goes_on_bitwise(way):
    settings = {**WAYS, **INSIDE}[way]
    one = trainer(**settings)
    steps(one, 4)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    expected = steps(one, 4)

    other = trainer(**settings)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.batch == 4
    assert steps(other, 4) == expected
    assert_same(parameters(one), parameters(other))
    assert str(one.state_dict()["method"]) == str(other.state_dict()["method"])
    assert str(one.state_dict()["groups"]) == str(other.state_dict()["groups"])
    assert str(one.state_dict()["optimizer"]) == str(other.state_dict()["optimizer"])


def published_rule(batches, tasks, decay):
    """The published bookkeeping, entry by entry; a batch is [(group, losses before its step)]."""
    row = {task: k for k, task in enumerate(tasks)}
    matrix = [[0.0] * len(tasks) for _ in tasks]
    for batch in batches:
        before = None
        for group, losses in batch:
            for s in group if before is not None else ():
                for t in tasks:
                    share = (1 - losses[t] / before[t]) / len(group)
                    own = (1 - losses[s] / before[s]) / len(group)
                    if t == s and share < 0:
                        continue
                    if t in group and share * own < 0:
                        share = -max(share, own)
                    i, k = row[s], row[t]
                    matrix[i][k] = (1 - decay) * matrix[i][k] + decay * share
            before = losses
    return torch.tensor(matrix)


@pytest.mark.learned
@pytest.mark.parametrize("per_batch", [None, 1])
def test_published_credit_is_the_published_rule(per_batch, monkeypatch):
    # Whatever would be learned, groups of two.
    monkeypatch.setattr(
        tg.AffinityPropagation, "__call__", lambda self, matrix: torch.tensor([0, 0, 1, 1, 2])
    )
    tasks = "class1,class3,class4,class5,class6"
    one = trainer(credit="published", tasks=tasks, groups_per_batch=per_batch, batches=24)
    seen = []
    evaluate = one.problem.losses

    def note(outputs, batch):
        losses = evaluate(outputs, batch)
        seen.append({task: loss.item() for task, loss in losses.items()})
        return losses

    monkeypatch.setattr(one.problem, "losses", note)
    batches = []
    for _ in range(24):
        seen.clear()
        batches.append(list(zip(one.step().groups, seen, strict=True)))
    assert any(len(group) > 1 for batch in batches for group, _ in batch)
    found = one.groups.affinity.matrix
    # Float32 of numbers about 0.01 against Python's doubles.
    torch.testing.assert_close(found, published_rule(batches, one.tasks, 0.3), rtol=0, atol=1e-6)
    other = trainer(tasks=tasks, groups_per_batch=per_batch, batches=24)  # credit: step
    steps(other, 24)
    assert_same(parameters(one), parameters(other))
    assert not torch.allclose(found, other.groups.affinity.matrix, atol=1e-3)


@pytest.mark.parametrize("grouping", ["affinity-propagation", "kmeans:2"])
def test_a_run_from_when_published_credit_was_a_grouping_is_refused(grouping):
    one = trainer(credit="published", grouping=grouping)
    steps(one, 2)
    state = one.state_dict()
    state["groups"]["grouping"] = {"matrix": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match="load the checkpoint with the grouping that wrote it"):
        trainer(credit="published", grouping=grouping).load_state_dict(state)


@pytest.mark.parametrize(
    ("method", "rule", "times"),
    [
        ("selective", "1", 1),
        ("selective", "sqrt(M)", math.sqrt(2)),
        ("selective", "M", 2),
        ("selective", "K", 3),
        ("gd", "M", 1),
        ("gd", "K", 3),
    ],
)
def test_learning_rate_of_the_heads(method, rule, times):
    one = trainer(method=method, head_lr_times=rule, head_lr=0.05, grouping="random:2")
    used, scheduled = [], []
    one.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups])
    )
    for batch in range(8):
        before = len(used)
        one.step()
        fall = (1 - batch / 8) ** 0.9
        for encoder, heads in used[before:]:
            assert encoder == pytest.approx(0.02 * fall)
            assert heads == pytest.approx(0.05 * fall * times)
        scheduled.append(one.scheduler.get_last_lr())
    plain = [((1 - n / 8) ** 0.9) for n in range(1, 9)]
    assert scheduled == [pytest.approx([0.02 * fall, 0.05 * fall]) for fall in plain]
    assert len(used) == (16 if method == "selective" else 8)


def test_what_a_method_learns_is_in_the_optimizer():
    one = trainer(method="uw")
    learned = one.optimizer.param_groups[2]
    assert learned["lr"] == 0.02
    assert learned["weight_decay"] == 0
    before = [parameter.detach().clone() for parameter in learned["params"]]
    assert sum(parameter.numel() for parameter in before) == 3
    steps(one, 2)
    assert not any(
        torch.equal(a, b.detach()) for a, b in zip(before, learned["params"], strict=True)
    )


@pytest.mark.parametrize("name", ["uw", "imtl-l"])
def test_what_is_learned_inside_groups_is_in_the_optimizer(name):
    one = trainer(group_weights=name)
    learned = one.optimizer.param_groups[2]
    assert learned["lr"] == 0.02
    assert learned["weight_decay"] == 0
    steps(one, 2)
    (parameter,) = learned["params"]
    assert parameter.shape == (3,)
    assert parameter.abs().min() > 0


def test_dtp_needs_a_score_and_says_so_before_training():
    recipe = read_recipe("motorcycle-small", {"method": "dtp"})
    with pytest.raises(ValueError, match="score"):
        Trainer(recipe)


@pytest.mark.learned
@pytest.mark.filterwarnings("ignore:The loss of task:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_diverges_is_a_floating_point_error(way):
    one = trainer(**WAYS[way], lr=1e20)
    with pytest.raises(FloatingPointError, match="not finite"):
        steps(one, 8)


def test_some_tasks_in_the_order_of_the_data():
    one = trainer(tasks="class9, class2,class9")
    assert one.tasks == ["class2", "class9"]
    assert list(one.step().losses) == one.tasks
    with pytest.raises(ValueError, match="yeast has no task 'class15', 'depth'; its tasks are cla"):
        trainer(tasks="class15,class1,depth")


def test_lookahead_leaves_the_training_as_it_is():
    one = trainer(method="gd", dropout=0.0)
    steps(one, 2)
    before, moments = parameters(one), str(one.optimizer.state_dict())
    matrix = one.lookahead()
    assert matrix.shape == (3, 3)
    assert matrix.isfinite().all()
    assert_same(before, parameters(one))
    assert str(one.optimizer.state_dict()) == moments


def conflicts(trainer):
    with trainer.losses_ahead() as losses:
        gradients = tg.task_gradients(losses, trainer.model.encoder.parameters())
    return tg.conflicts(tg.task_gram(gradients))


@pytest.mark.parametrize("way", ["selective", "gd", "gradient"])
def test_conflicts_are_those_of_the_batch_to_come_and_change_nothing(way):
    looked, other = trainer(**WAYS[way]), trainer(**WAYS[way])
    steps(looked, 2)
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(looked.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))

    drawn = torch.get_rng_state()
    found = conflicts(looked)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(conflicts(looked), found)  # the same batch, the same dropout
    # By hand: the batch that the other trainer takes next.
    batch = next(other.batches)
    losses = other.problem.losses(other.model(other.problem.inputs(batch)), batch)
    shared = list(other.model.encoder.parameters())
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
            for loss in losses.values()
        ]
    )
    cosines = torch.nn.functional.normalize(rows, dim=1)
    torch.testing.assert_close(found, cosines @ cosines.T, rtol=1e-4, atol=1e-5)

    file.seek(0)
    again = trainer(**WAYS[way])
    again.load_state_dict(torch.load(file, weights_only=True))
    expected = steps(again, 2)
    torch.set_rng_state(drawn)
    assert steps(looked, 2) == expected
    assert_same(parameters(looked), parameters(again))


SMALL = {"size": 32, "dim": 16, "depth": 4, "attention_heads": 2, "batch_size": 2, "batches": 3}


@pytest.fixture
def other_defaults():
    """Another dtype and another device than torch's own."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("data", ["motorcycle", "nyud-v2"])
def test_defaults_of_torch_change_nothing(data, minis, tmp_path, request):
    settings = {**SMALL, "warmup": 1, "evaluate_every": None, "backbone": "tiny"}
    if data != "motorcycle":
        settings |= {"root": str(minis / data), "tasks": "semseg,depth,normals", "workers": 0}
    recipe = read_recipe(data, settings)

    def trained(pictures):
        trainer = Trainer(recipe)
        losses = [trainer.step().losses for _ in range(recipe.batches)]
        trainer.problem.draw(trainer.model, tmp_path)
        photo = minis / "nyud-v2" / "images" / "left_1.png"
        trainer.problem.predict(trainer.model, photo, tmp_path / pictures)
        return losses, trainer.evaluate("held_out", quick=True), trainer.affinity()

    usual = trained("usual.png")
    request.getfixturevalue("other_defaults")
    other = trained("other.png")
    assert other[0] == usual[0]
    # The sums of torchmetrics are of the default dtype.
    assert other[1] == pytest.approx(usual[1], rel=1e-5)
    assert other[2].dtype == torch.float32
    assert other[2].device.type == "cpu"
    np.testing.assert_array_equal(other[2].numpy(), usual[2].numpy())
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "usual.png").read_bytes()
