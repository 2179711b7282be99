"""Bad losses: refused with a sentence before anything changes, or warned of and left out."""

import math
import warnings

import pytest
import torch

import taskgroup as tg

TASKS = ["depth", "normal", "edges"]


def good(scale=1.0):
    return {t: torch.tensor(scale * (k + 1), requires_grad=True) for k, t in enumerate(TASKS)}


def opened():
    """Groups inside a batch, with one step taken, so that a wrong observation would show."""
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=0.5))
    batch = iter(groups)
    next(batch).loss(good())
    return groups, batch, next(batch)


@pytest.mark.parametrize(
    ("losses", "error", "said"),
    [
        ({**good(), "total": torch.ones(())}, ValueError, "'total'.*for t in group.observed"),
        ({t: good()[t] for t in TASKS[:2]}, ValueError, "'edges' is missing"),
        ({}, ValueError, "'depth' is missing"),
        ({**good(), "normal": torch.ones(2, requires_grad=True)}, ValueError, r"'normal'.*\[2\]"),
        ({**good(), "normal": torch.ones(1, requires_grad=True)}, ValueError, r"'normal'.*\[1\]"),
        ({**good(), "edges": 1.0}, ValueError, "'edges'.*float"),
        ({t: torch.tensor(1) for t in TASKS}, ValueError, "'depth'.*int64"),
        (
            {**good(), "normal": torch.ones((), device="meta", requires_grad=True)},
            ValueError,
            "'normal' is on meta, that of 'depth' on cpu",
        ),
        ({t: loss.detach() for t, loss in good().items()}, ValueError, "has no graph"),
        (torch.ones(2, requires_grad=True), ValueError, r"\[3\], one per task.*\[2\]"),
        (torch.ones(3, 1, requires_grad=True), ValueError, r"got torch.float32 of shape \[3, 1\]"),
        (torch.ones(()), ValueError, r"got torch.float32 of shape \[\]"),
        (torch.ones(3), ValueError, "has no graph, so the group"),
        (torch.ones(3, dtype=torch.int64), ValueError, "int64"),
        (torch.ones(3, device="meta", requires_grad=True), ValueError, "on meta, those before"),
        ([1.0, 2.0, 3.0], TypeError, "got list"),
    ],
)
def test_refused_before_anything_changes(losses, error, said):
    groups, batch, group = opened()
    matrix = groups.affinity.matrix.clone()
    with pytest.raises(error, match=said):
        group.loss(losses)
    assert torch.equal(groups.affinity.matrix, matrix)
    # The same step goes on with good losses and observes the one before.
    group.loss(good(0.5))
    assert not torch.equal(groups.affinity.matrix, matrix)
    next(batch).loss(good())


def test_own_task_without_a_graph_is_named():
    groups = tg.TaskGroups(TASKS)
    group = next(iter(groups))
    losses = good()
    losses[group.tasks[0]] = losses[group.tasks[0]].detach()
    with pytest.raises(ValueError, match=f"'{group.tasks[0]}' has no graph"):
        group.loss(losses)


def test_others_need_no_graph_and_extra_known_tasks_are_welcome():
    groups = tg.TaskGroups(TASKS, observe_every=2, groups_per_batch=1, warmup=99)
    for _ in range(4):
        for group in groups:
            losses = {t: v if t in group.graph else v.detach() for t, v in good().items()}
            assert group.loss(losses).item() == losses[group.tasks[0]].item()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -2.0])
@pytest.mark.parametrize("stacked", [False, True])
def test_unusable_loss_warns_once_and_stays_out_of_the_affinity(bad, stacked):
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=0.5))
    told = []
    for n in range(3):
        for group in groups:
            losses = {t: v * (1 - 0.01 * n) for t, v in good().items()}
            losses["normal"] = losses["depth"] * 0 + bad
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                group.loss(torch.stack(list(losses.values())) if stacked else losses)
            told += caught
    (warning,) = told
    assert "'normal'" in str(warning.message)
    assert warning.filename == __file__  # it points at the loop
    matrix = groups.affinity.matrix
    assert torch.isfinite(matrix).all()
    assert not matrix[:, 1].any()
    assert not matrix[1, 1:2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype):
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=1.0), grouping=tg.Singletons())
    value = 1.0
    for group in groups:
        losses = {t: torch.tensor(value, dtype=dtype, requires_grad=True) for t in TASKS}
        loss = group.loss(losses)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        value /= 2
    assert (groups.affinity.matrix == 0.5).sum() == 6  # two observed steps, three tasks each


def test_losses_may_be_written_over_after_the_call():
    """A compiled model may put its next output where this one lies."""
    groups = tg.TaskGroups(TASKS, affinity=tg.ProximalAffinity(decay=1.0))
    buffer = torch.ones(3)
    for value, group in zip((4.0, 2.0, 1.0), groups, strict=True):
        buffer.fill_(value)
        group.loss(buffer.detach().requires_grad_())
    assert (groups.affinity.matrix == 0.5).sum() == 6


def test_stacked_losses_may_be_those_of_the_observed_tasks():
    groups = tg.TaskGroups(TASKS, grouping=tg.Singletons(), groups_per_batch=1)
    group = next(iter(groups))
    (task,) = group.observed
    said = r"\[3\], one per task in the order .*, or \[1\], those of group.observed; got .* \[2\]"
    with pytest.raises(ValueError, match=said):
        group.loss(torch.ones(2, requires_grad=True))
    assert group.loss(good()[task].view(1)).item() == good()[task].item()
