"""Training runs on the GPU: what the CPU trains, timed by events, in the memory there is."""

from itertools import count, islice

import pytest
import torch
from torch import nn

import taskgroup as tg

pytest.importorskip("yaml", reason="recipes need PyYAML, which is not installed")
pytest.importorskip("pydantic", reason="recipes need pydantic, which is not installed")

from taskgroup.lab.problem import Problem
from taskgroup.lab.recipe import read_recipe
from taskgroup.lab.studies.cost import step_seconds
from taskgroup.lab.train import trainer as of_trainer
from taskgroup.lab.train.trainer import Trainer
from taskgroup.lab.vision.dense_losses import criterion
from taskgroup.lab.vision.samples import Samples
from taskgroup.lab.vision.tasks import TASKONOMY
from tests.gpu.device import GPU, needs_cuda
from tests.gpu.test_loop import no_waiting

SETTINGS = {"size": 32, "dim": 32, "depth": 4, "batch_size": 4, "batches": 6}
WAYS = {
    "selective": {},
    "gradient": {"affinity": "gradient"},
    "one group": {"groups_per_batch": 1, "observe_every": 2},
    "joint": {"method": "gd"},
}


class RandomImages(Problem):
    """Tasks and losses of the photograph, whose other parts need libraries, on random numbers."""

    tasks = {name: task.title for name, task in TASKONOMY.items()}  # noqa: RUF012
    better = "lower"

    def __init__(self, settings):
        self._settings = settings

    def model(self, tasks):
        width = self._settings.dim
        encoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GELU())
        heads = {name: nn.Conv2d(width, TASKONOMY[name].channels, 1) for name in tasks}
        return tg.MultiTaskModel(encoder, heads)

    def batches(self, batch_size, seed, start=0):
        generator = torch.Generator().manual_seed(seed)

        def drawn(channels):
            return torch.rand(batch_size, channels, *self._settings.size, generator=generator)

        def batch(_):
            labels = {name: drawn(task.channels) for name, task in TASKONOMY.items()}
            return Samples(drawn(3), labels, {name: drawn(1) < 0.9 for name in TASKONOMY})

        return islice(map(batch, count()), start, None)

    def inputs(self, batch):
        return batch.images

    def losses(self, outputs, batch):
        return criterion(outputs, batch.labels, batch.masks)


def recipe(**changes):
    return read_recipe("motorcycle-small", {**SETTINGS, "device": GPU, **changes})


@pytest.fixture
def random_images(monkeypatch):
    monkeypatch.setattr(of_trainer, "make_problem", RandomImages)


@pytest.fixture
def photograph():
    for name in ("skimage", "torchmetrics", "transformers"):
        pytest.importorskip(name, reason=f"the photograph needs {name}, which is not installed")


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Convolutions of an encoder in float32, as on the CPU, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("data", ["random_images", "photograph"])
def test_trains_as_on_the_cpu(data, way, request):
    """To rounding, which the steps of Adam enlarge where a gradient is next to nothing.

    Noise of 1e-6 in all weights before each of these batches changes a loss of the photograph by
    5e-6 of it at most.
    """
    request.getfixturevalue(data)
    here, host = (Trainer(recipe(**{**way, "device": device})) for device in (GPU, "cpu"))
    for batch in range(4):
        ours, expected = here.step(), host.step()
        assert ours.groups == expected.groups
        assert ours.losses == pytest.approx(expected.losses, rel=1e-3 if batch else 1e-4)


@pytest.mark.parametrize("way", [*WAYS.values(), {"precision": "bfloat16"}], ids=[*WAYS, "bf16"])
def test_a_batch_waits_for_nothing_that_it_does_not_plan(way, random_images, tmp_path):
    trainer = Trainer(recipe(**way, batches=12, warmup=4))
    recorder = tg.Recorder(trainer.method or trainer.groups, tmp_path / "run")
    for _ in range(3):
        trainer.step()
    with no_waiting():
        for _ in range(8):
            trainer.step()
    recorder.flush()
    assert recorder.seconds["backward"] > 0
    assert recorder.seconds["optimizer"] > 0
    recorder.close()


def test_the_memory_is_that_of_the_allocator(random_images):
    trainer = Trainer(recipe())
    trainer.step()
    parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
    if GPU == "cuda":  # with gradients and Adam's averages
        assert 4 * parameters < trainer.peak_bytes < 2**30
    else:
        assert trainer.peak_bytes is None


def test_costs_of_methods_are_measured(random_images):
    found = step_seconds({"joint": recipe(method="gd"), "selective": recipe()})
    assert all(0 < seconds < 60 for seconds in found.values())


@needs_cuda
def test_too_little_memory_is_said_in_a_sentence(random_images):
    trainer = Trainer(recipe(batch_size=64, size=64))
    torch.cuda.empty_cache()
    held, whole = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((held + 2**24) / whole)
    try:
        with pytest.raises(RuntimeError, match=r"not enough .* --set batch_size=32"):
            trainer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_says_what_memory_it_took(photograph, tmp_path):
    pytest.importorskip("tensorboard", reason="runs need tensorboard, which is not installed")
    from taskgroup.lab.train.run import Run

    summary = Run(recipe(batches=3), tmp_path / "run").train()
    assert summary["batches"] == 3
    assert (summary["peak_bytes"] is None) == (GPU == "cpu")
