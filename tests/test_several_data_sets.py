"""Data sets that each have the labels of their own tasks: the page and the program."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import taskgroup as tg
from tests.ranks import on_ranks
from tests.test_pages import run_blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import several_data_sets as program

sys.path.pop(0)

WITHIN = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()


def trained(rank, turns):
    def wrap(model):
        return DistributedDataParallel(model, find_unused_parameters=True)

    groups = program.train(turns=turns, steps=24, rank=rank, wrap=wrap)
    return groups.partition, groups.affinity.matrix, groups.affinity.observed


def check(observed, turns):
    """In turns, only pairs of one data set are observed; together, all pairs are."""
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    expected = WITHIN if turns else torch.ones_like(WITHIN)
    if turns:
        assert not observed[~expected].any()
        # Fixed groups take one step in a batch of one group, which nothing is seen of.
        assert not observed[off_diagonal].any()
    else:
        assert (observed[off_diagonal] > 0).all()


@pytest.mark.parametrize("turns", [False, True])
def test_the_program_on_one_process(turns):
    groups = program.train(turns=turns, steps=24)
    check(groups.affinity.observed, turns)
    if turns:
        assert groups.partition == [("wind", "rain"), ("heat",), ("smoke",)]


@pytest.mark.parametrize("turns", [False, True])
def test_the_program_on_two_processes(turns):
    (first, matrix, observed), other = on_ranks(trained, turns)
    check(observed, turns)
    assert other[0] == first
    assert torch.equal(other[1], matrix)
    assert torch.equal(other[2], observed)


def test_the_page():
    tasks = list(program.TASKS)
    torch.manual_seed(0)
    encoder = nn.Linear(8, 16)
    heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in tasks})
    streams = {name: program.stream(name, 0) for name in program.TASKS_OF}
    drawn = [{name: next(own) for name, own in streams.items()} for _ in range(6)]
    names = {
        "tg": tg,
        "torch": torch,
        "tasks": tasks,
        "encoder": encoder,
        "heads": heads,
        "criterion": nn.functional.mse_loss,
        "optimizer": torch.optim.Adam([*encoder.parameters(), *heads.parameters()]),
        "groups": tg.TaskGroups(tasks),
        "drawn": drawn,
        "in_turns": [batch for batches in drawn for batch in batches.values()],
    }
    learned = names["groups"]
    assert run_blocks("several-data-sets.md", names) == 4
    check(learned.affinity.observed, turns=False)
    check(names["groups"].affinity.observed, turns=True)
    assert names["gram"].shape == (4, 4)
