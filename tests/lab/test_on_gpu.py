"""What the trainer does on a GPU, tried on one that is none."""

import json

import pytest
import torch
from torch.utils._pytree import tree_map

import taskgroup as tg
from taskgroup.lab.report.page import write_report
from taskgroup.lab.report.run_data import load_run_data
from taskgroup.lab.studies import cost
from taskgroup.lab.studies.cell import Cell, train_cell
from taskgroup.lab.studies.cost import step_seconds
from taskgroup.lab.train import trainer as of_trainer
from taskgroup.lab.train.run import Run
from taskgroup.lab.train.trainer import Trainer, find_device
from taskgroup.recording import Clock
from tests.fake_gpu import FakeGPU
from tests.lab.small import yeast
from tests.lab.written_runs import load_metrics, write_run

WAYS = {
    "selective": {},
    "gradient": {"affinity": "gradient"},
    "one group": {"groups_per_batch": 1, "observe_every": 2, "outside": "coast"},
    "bfloat16": {"precision": "bfloat16"},
    "joint": {"method": "joint"},
    "gd": {"method": "gd"},
    "uw": {"method": "uw"},
}


def recipe(**changes):
    return yeast(**{"batches": 6, "decay": 0.3, "lr": 0.02, "device": "cuda", **changes})


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_batch_waits_for_its_forward_pass_and_for_nothing_else(way):
    with FakeGPU() as gpu:
        trainer = Trainer(recipe(**way))
        gpu.waits.clear()
        gpu.planned = 0
        for _ in range(6):
            trainer.step()
        assert gpu.waits == []
        assert gpu.planned <= 2 * 6  # for the losses, and where groups are learned


# Autocast does nothing there.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "bfloat16"])
def test_trains_as_on_the_host(way):
    on_host = Trainer(recipe(**WAYS[way], device="cpu"))
    expected = [on_host.step() for _ in range(6)]
    with FakeGPU():
        on_gpu = Trainer(recipe(**WAYS[way]))
        assert [on_gpu.step() for _ in range(6)] == expected
        assert on_gpu.evaluate("held_out") == on_host.evaluate("held_out")


# What their solvers and checks read on the host: the Gram matrix once, where none is named.
READS = {"gd": 0, "uw": 0, "rlw": 0, "imtl-l": 0, "dwa": 0, "graddrop": 0, "dtp": 1, "famo": 2}


@pytest.mark.parametrize("method", tg.methods.METHODS)
def test_joint_methods_train_as_on_the_host_and_wait_for_what_they_read(method):
    on_host = Trainer(recipe(method=method, device="cpu"))
    expected = [on_host.step() for _ in range(3)]
    with FakeGPU() as gpu:
        on_gpu = Trainer(recipe(method=method))
        gpu.waits.clear()
        assert [on_gpu.step() for _ in range(3)] == expected
        assert len(gpu.waits) == 3 * READS.get(method, 1)


def measured(device):
    trainer = Trainer(recipe(device=device))
    trainer.step()
    with trainer.losses_ahead() as losses:
        gradients = tg.task_gradients(losses, trainer.model.encoder.parameters())
    found = [tg.conflicts(tg.task_gram(gradients)), trainer.lookahead(), trainer.affinity()]
    return torch.stack([matrix.cpu() for matrix in found])


def test_what_is_measured_on_the_way_is_that_of_the_host():
    expected = measured("cpu")
    with FakeGPU():
        found = measured("cuda")
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bfloat16"])
def test_recording_waits_for_nothing(way, tmp_path):
    on_host = Trainer(recipe(**WAYS[way], device="cpu"))
    expected = [on_host.step() for _ in range(6)]
    with FakeGPU() as gpu:
        trainer = Trainer(recipe(**WAYS[way]))
        shown = []
        recorder = tg.Recorder(
            trainer.method or trainer.groups,
            tmp_path / "run",
            log=lambda values, step: shown.append((step, values)),
            log_every=1,
            pairs=[("class1", "class2")],
        )
        gpu.waits.clear()
        assert [trainer.step() for _ in range(6)] == expected
        assert gpu.waits == []
        recorder.close()
    lines = load_metrics(tmp_path / "run")
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, progress in zip(lines, expected, strict=True):
        assert {task: line["losses"][task] for task in progress.losses} == progress.losses
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    # What comes before the losses of a joint method is not known.
    sections = {"backward", "optimizer"} | ({"forward"} if trainer.method is None else set())
    assert all(recorder.seconds[section] > 0 for section in sections)


def test_a_clock_adds_up_what_lies_between_its_events():
    seconds = {"a": 0.0, "b": 0.0}
    with FakeGPU() as gpu:
        clock = Clock(seconds, torch.device("cuda"))
        clock.start()  # every event is a millisecond after the one before
        clock.lap("a")
        clock.lap("b")
        torch.cuda.Event().record()
        clock.start()
        clock.lap("b")
        clock.read()
        assert seconds == {"a": 0.0, "b": 0.0}
        clock.read(wait=True)
        assert seconds == {"a": 1e-3, "b": 2e-3}
        clock.read(wait=True)
        assert seconds == {"a": 1e-3, "b": 2e-3}
        assert gpu.planned == 1


def test_costs_are_taken_from_events(monkeypatch):
    with FakeGPU() as gpu:

        def made(recipe):
            trainer = Trainer(recipe)
            gpu.waits.clear()  # of the network on its way to the GPU
            return trainer

        monkeypatch.setattr(cost, "Trainer", made)
        found = step_seconds({"joint": recipe(method="gd"), "selective": recipe(warmup=6)})
        assert gpu.waits == []
    # Events are a millisecond apart: a batch records one, with its losses, and the clock another at
    # its end. A selective batch records one more, and takes several steps.
    assert found["joint"] == pytest.approx(2e-3)
    assert 0 < found["selective"] < found["joint"]


@pytest.fixture
def saved_from_the_host(monkeypatch):
    """Checkpoints are of tensors that torch knows; the fake ones are brought to the host."""
    save = tg.checkpoint.save

    def on_host(value):
        return value.cpu() if isinstance(value, torch.Tensor) and value.is_cuda else value

    monkeypatch.setattr(
        tg.checkpoint, "save", lambda path, state: save(path, tree_map(on_host, state))
    )


def test_a_run_on_the_gpu_writes_what_one_on_the_host_does(tmp_path, saved_from_the_host):
    settings = {"batches": 6, "checkpoint_every": 4}
    Run(recipe(**settings, device="cpu"), tmp_path / "host").train()
    with FakeGPU():
        summary = Run(recipe(**settings), tmp_path / "gpu").train()
    assert load_metrics(tmp_path / "gpu") == load_metrics(tmp_path / "host")
    written = [(tmp_path / where / "affinity.jsonl").read_text() for where in ("gpu", "host")]
    assert written[0] == written[1]
    assert len(written[0].splitlines()) == 6
    assert summary["peak_bytes"] == 5000  # of the fake allocator
    assert sum(summary["seconds"].values()) > 0


def test_recording_the_affinity_waits_for_nothing(tmp_path, saved_from_the_host):
    seen = []
    with FakeGPU() as gpu:
        run = Run(recipe(checkpoint_every=100), tmp_path / "run")
        gpu.waits.clear()
        run.train(lambda progress: seen.append(len(gpu.waits)))
    assert seen == [0] * 6


def test_a_cell_on_the_gpu():
    with FakeGPU():
        result = train_cell(Cell("selective", recipe()))
    assert result["diverged"] is None
    assert result["peak_bytes"] > 4000  # the peak above what was allocated, and what stands


def test_too_little_memory_is_said_with_what_to_lower(monkeypatch):
    trainer = Trainer(recipe(device="cpu"))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(trainer.problem, "losses", full)
    with pytest.raises(RuntimeError, match=r"batch_size: 8.*--set batch_size=4.*2\.00 GiB\.$"):
        trainer.step()
    monkeypatch.setattr(of_trainer, "make_model", full)
    with pytest.raises(RuntimeError, match="memory of the GPU is not enough for yeast"):
        Trainer(recipe(device="cpu"))


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"finds none .*--set device=cpu"):
        find_device("cuda")
    assert find_device("auto").type == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="nvidia-smi"):
        find_device("cuda")


def test_a_loss_that_is_not_finite_is_said_first():
    settings = recipe(method="uw")
    for device in ("cpu", "cuda"):
        with FakeGPU():
            trainer = Trainer(settings.replace(device=device))
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(torch.nan)
            with pytest.raises(FloatingPointError, match="is not finite after batch 0"):
                trainer.step()


def test_the_memory_is_in_the_report_of_runs_on_a_gpu(tmp_path):
    runs = [
        write_run(tmp_path / name, [[["a", "b"]]] * 2, metrics={"a": 1.0})
        for name in ("gpu", "cpu")
    ]
    assert "GPU memory" not in page(runs)
    summary = json.loads((runs[0] / "summary.json").read_text())
    (runs[0] / "summary.json").write_text(json.dumps({**summary, "peak_bytes": 3 * 2**29}))
    assert "<th>GPU memory</th>" in page(runs)
    assert ">1.50 GiB</td>" in page(runs)


def page(runs):
    file = runs[0].parent / "report.html"
    write_report([load_run_data(run) for run in runs], file)
    return file.read_text()
