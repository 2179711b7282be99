"""Training runs on the GPU: what the CPU trains, timed by events, in the memory there is."""

import pytest
import torch

from taskgroup.experiment.cost import step_seconds
from taskgroup.experiment.recipe import read_recipe
from taskgroup.experiment.run import Run
from taskgroup.experiment.trainer import Trainer
from tests.gpu.device import GPU, needs_cuda
from tests.gpu.test_loop import no_waiting

SETTINGS = {"size": 32, "dim": 32, "depth": 4, "batch_size": 4, "batches": 6}
WAYS = {
    "selective": {},
    "gradient": {"affinity": "gradient"},
    "one group": {"groups_per_batch": 1, "observe_every": 2},
    "joint": {"method": "gd"},
}


def photograph(**changes):
    return read_recipe("motorcycle-small", {**SETTINGS, "device": GPU, **changes})


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Convolutions of an encoder in float32, as on the CPU, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_photograph_is_learned_as_on_the_cpu(way):
    """To rounding, which the steps of Adam enlarge where a gradient is next to nothing.

    Noise of 1e-6 in all weights before each of these batches changes a loss by 5e-6 at most.
    """
    here, host = (Trainer(photograph(**way, device=device)) for device in (GPU, "cpu"))
    for batch in range(4):
        ours, expected = here.step(), host.step()
        assert ours.groups == expected.groups
        assert ours.losses == pytest.approx(expected.losses, rel=1e-3 if batch else 1e-4)


@pytest.mark.parametrize("way", [*WAYS.values(), {"precision": "bfloat16"}], ids=[*WAYS, "bf16"])
def test_a_batch_waits_for_nothing_that_it_does_not_plan(way):
    trainer = Trainer(photograph(**way, batches=12))
    for _ in range(3):
        trainer.step()
    with no_waiting():
        for _ in range(8):
            trainer.step()
    trainer.wait()
    assert all(seconds > 0 for seconds in trainer.seconds.values())


def test_a_run_says_what_memory_it_took(tmp_path):
    summary = Run(photograph(batches=3), tmp_path / "run").train()
    assert summary["batches"] == 3
    if GPU == "cuda":
        parameters = sum(p.nbytes for p in Trainer(photograph()).model.parameters())
        assert summary["peak_bytes"] > 4 * parameters  # with gradients and Adam's averages
    else:
        assert summary["peak_bytes"] is None


def test_costs_of_methods_are_measured():
    found = step_seconds({"joint": photograph(method="gd"), "selective": photograph()})
    assert all(0 < seconds < 60 for seconds in found.values())


@needs_cuda
def test_too_little_memory_is_said_in_a_sentence():
    trainer = Trainer(photograph(batch_size=64, size=64))
    torch.cuda.empty_cache()
    held, whole = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((held + 2**24) / whole)
    try:
        with pytest.raises(RuntimeError, match=r"not enough .* --set batch_size=32"):
            trainer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
