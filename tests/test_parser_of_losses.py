"""All that take losses read them with one parser, and so refuse them in the same sentence."""

import re

import pytest
import torch

import taskgroup as tg

TASKS = ["a", "b"]
X = torch.ones(2, requires_grad=True)
CALLERS = {
    "group.loss": lambda losses: next(iter(tg.TaskGroups(TASKS))).loss(losses()),
    "task_gradients": lambda losses: tg.task_gradients(losses(), [X]),
    "streaming_task_gram": lambda losses: tg.streaming_task_gram(losses(), [X]),
    "lookahead_affinity": lambda losses: tg.lookahead_affinity(
        losses, torch.optim.SGD([X], lr=0.1), [X]
    ),
    "method.backward": lambda losses: tg.methods.GD([X], TASKS).backward(losses()),
}


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (0.5, "got float; pass the tensor itself, without .item() or float()."),
        (X * 2, "got torch.float32 of shape [2]; reduce it, with .mean() for instance."),
        (torch.tensor([2]), "got torch.int64 of shape [1]; reduce it, with .mean() for instance."),
    ],
)
def test_one_sentence_for_all(caller, bad, said):
    whole = f"The loss of task 'b' must be a floating-point scalar tensor, {said}"
    with pytest.raises(ValueError, match=f"^{re.escape(whole)}$"):
        CALLERS[caller](lambda: {"a": X.sum(), "b": bad})


@pytest.mark.parametrize("caller", CALLERS)
def test_a_dict_or_a_tensor_will_do(caller):
    CALLERS[caller](lambda: {"a": X.sum(), "b": X.square().sum()})
    CALLERS[caller](lambda: torch.stack([X.sum(), X.square().sum()]))
