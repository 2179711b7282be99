"""The peak of a call, whatever was measured and released before it in the same process."""

import gc

import torch

from taskgroup.lab.studies.cell import Cell, train_cell
from taskgroup.lab.train.memory import peak_bytes
from taskgroup.lab.train.trainer import Trainer
from tests.lab.small import yeast

CPU = torch.device("cpu")


def test_a_release_of_an_older_block_is_not_counted():
    """Torch remembers the blocks of earlier profiles, whose addresses other blocks have since."""
    made = [[] for _ in range(50)]
    peak_bytes(lambda: [kept.append(torch.zeros(1000)) for kept in made], CPU)
    for kept in made:
        kept.clear()
    older = [torch.zeros(1000) for _ in range(200)]

    def replace():
        older.clear()
        return [torch.zeros(10) for _ in range(5)]

    assert peak_bytes(replace, CPU) == 5 * 40


def test_garbage_is_not_collected_meanwhile():
    def litter():
        for _ in range(3):
            cycle = [torch.zeros(100)]
            cycle.append(cycle)
            del cycle
            [[] for _ in range(100_000)]  # enough new objects for a collection

    assert peak_bytes(litter, CPU) == 3 * 400
    assert gc.isenabled()


def test_a_run_says_the_same_as_the_first_of_its_process():
    cells = [Cell(method, yeast(method=method, batches=6)) for method in ("uw", "selective")]
    first = [train_cell(cell) for cell in cells]
    for _ in range(4):
        assert [train_cell(cell)["peak_bytes"] for cell in cells] == [
            result["peak_bytes"] for result in first
        ]


def test_the_states_of_all_groups_count():
    settings = {"grouping": "singletons", "batches": 6}
    one, each = (
        train_cell(Cell("selective", yeast(shared_state=which, **settings)))["peak_bytes"]
        for which in ("all", "group")
    )
    shared = sum(p.nbytes for p in Trainer(yeast()).parts.shared)
    assert each - one >= 2 * 2 * shared  # two moments, of two more groups than one
