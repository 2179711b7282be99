"""The recorder, listening to loops of many kinds."""

import copy
import gc
import json
import math
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import optimizer as of_optimizers

import taskgroup as tg
from taskgroup.lab.report.run_data import load_run_data
from taskgroup.recording import logs, read_header, read_lines, records, run_files
from taskgroup.recording.clock import StepClock
from tests.ranks import on_ranks

TASKS = ["a", "b", "c"]


class Loop:
    """A small training; ``step(n)`` trains on n batches as a user would."""

    def __init__(self, tasks=TASKS, seed=0, lr=0.05, **settings):
        torch.manual_seed(seed)
        self.tasks = tasks
        encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.model = tg.MultiTaskModel(encoder, {task: nn.Linear(8, 1) for task in tasks})
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        settings = {"warmup": 2, "affinity": tg.ProximalAffinity(decay=0.3), **settings}
        self.groups = tg.TaskGroups(tasks, **settings)
        self.batches = 0
        self.seen = []  # what the recorder should have seen: losses by task

    def losses(self, group=None, batch=None):
        generator = torch.Generator().manual_seed(self.batches if batch is None else batch)
        x = torch.randn(16, 4, generator=generator)
        outputs = self.model(x, group=group)
        return {
            task: (outputs[task][:, 0] - x[:, k % 4] * (-1) ** k).square().mean()
            for k, task in enumerate(self.tasks)
            if task in outputs
        }

    def batch(self):
        first = {}
        for group in self.groups:
            losses = self.losses(group)
            self.optimizer.zero_grad()
            loss = group.loss(losses)
            loss.backward()
            for task in group.observed:
                first.setdefault(task, losses[task].item())
            self.optimizer.step()
        self.seen.append(first)
        self.batches += 1

    def step(self, n):
        for _ in range(n):
            self.batch()

    def state(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy({**state, "groups": self.groups.state_dict(), "n": self.batches})

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.groups.load_state_dict(state["groups"])
        self.batches = state["n"]


def lines_of(folder, name="metrics"):
    return list(read_lines(folder / f"{name}.jsonl"))


def partitions(folder):
    found = []
    for line in lines_of(folder):
        found.append(line.get("partition", found[-1] if found else None))
    return found


WAYS = {
    "plain": {},
    "observed now and then": {"observe_every": 3},
    "one group a batch": {"groups_per_batch": 1},
    "gradients": {},
    "fixed": {"grouping": tg.Fixed([["a", "c"], ["b"]])},
    "together": {"grouping": tg.Together()},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_batch_is_recorded_and_the_training_is_unchanged(way, tmp_path):
    settings = copy.deepcopy(WAYS[way])
    loop, other = Loop(**copy.deepcopy(settings)), Loop(**settings)
    if way == "gradients":
        for one in (loop, other):
            affinity = tg.GradientAffinity(one.model.encoder, decay=0.3)
            one.groups = tg.TaskGroups(TASKS, warmup=2, affinity=affinity)
    recorder = tg.Recorder(loop.groups, tmp_path / "run", every=2, settings={"lr": 0.05})
    expected, warming, matrices = [], [], {}
    for n in range(1, 8):
        loop.batch()
        other.batch()
        expected.append([list(group) for group in loop.groups.partition])
        warming.append(loop.groups.warming_up)
        affinity = loop.groups.affinity
        matrices[n] = affinity.matrix.masked_fill(affinity.observed == 0, math.nan)
    recorder.close()
    for one, two in zip(loop.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)

    lines = lines_of(tmp_path / "run")
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    for line, seen in zip(lines, loop.seen, strict=True):
        assert line["losses"] == pytest.approx(seen, rel=1e-6)
    assert partitions(tmp_path / "run") == expected
    assert [line.get("warmup", False) for line in lines] == warming
    assert lines[0]["lr"] == [0.05]
    assert "lr" not in lines[1]  # it has not changed
    learned = not loop.groups.affinity.observed.any()
    recorded = lines_of(tmp_path / "run", "affinity")
    assert [line["batch"] for line in recorded] == ([] if learned else [2, 4, 6])
    for line in recorded:
        found = torch.tensor([[math.nan if v is None else v for v in r] for r in line["matrix"]])
        torch.testing.assert_close(
            found, matrices[line["batch"]], rtol=1e-4, atol=0, equal_nan=True
        )
    header = read_header(tmp_path / "run")
    assert header["tasks"] == TASKS
    assert header["ended"]
    assert header["settings"] == {**loop.groups.settings, "lr": 0.05}


def test_the_report_reads_it(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(6)
    recorder.metrics({"a": 0.5, "b": 0.25}, better={"a": "lower"})
    recorder.conflicts(loop.losses(), loop.model.encoder.parameters())
    page = recorder.report()
    assert page == tmp_path / "run" / "report.html"
    assert "Affinity over time" in page.read_text("utf-8")
    recorder.close()
    run = load_run_data(tmp_path / "run")
    assert run.method == "selective"
    assert run.tasks == tuple(TASKS)
    assert run.warmup == 2
    assert len(run.batches) == len(run.affinity.batches) == 6
    assert run.evaluations.values[0].tolist()[:2] == [0.5, 0.25]
    assert run.conflicts.values.shape == (1, 3, 3)
    assert set(run.seconds) >= {"forward", "backward", "optimizer", "everything"}
    assert run.finished.metrics == {"a": 0.5, "b": 0.25}
    assert run.finished.metric_names == {"a": "↓", "b": ""}


@pytest.mark.parametrize("library", ["plotly", "yaml"])
def test_the_report_says_which_library_it_needs(library, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("taskgroup.lab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(tg, "lab", None, raising=False)  # the old one is put back afterwards
    monkeypatch.setitem(sys.modules, library, None)
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(1)
    recorder.close()
    with pytest.raises(ImportError, match=rf"needs {library}\b.*pip install 'taskgroup\[report"):
        recorder.report()


def test_conflicts_are_the_cosines_and_leave_the_gradients(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(2)
    before = [p.grad for p in loop.model.encoder.parameters()]
    found = recorder.conflicts(loop.losses(), loop.model.encoder.parameters())
    assert all(p.grad is g for p, g in zip(loop.model.encoder.parameters(), before, strict=True))
    shared = list(loop.model.encoder.parameters())
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
            for loss in loop.losses().values()
        ]
    )
    rows = nn.functional.normalize(rows, dim=1)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-4, atol=1e-5)
    (line,) = lines_of(tmp_path / "run", "conflicts")
    assert line["batch"] == 3  # of the network before it
    torch.testing.assert_close(torch.tensor(line["matrix"]), found, rtol=1e-4, atol=1e-6)


def test_partial_labels_accumulation_and_batches_left_early(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    for present in (["a", "b"], [], ["c"], TASKS):
        for group in loop.groups.batch(present):
            losses = loop.losses()
            loop.optimizer.zero_grad()
            for _ in range(2):  # the same micro-batch twice
                group.loss({t: losses[t] for t in group.observed}, share=0.5).backward(
                    retain_graph=True
                )
            loop.optimizer.step()
    for group in loop.groups:
        group.skip()
    for group in loop.groups:
        expected = loop.losses()
        group.loss(expected)
        break
    with pytest.raises(ZeroDivisionError):
        for group in loop.groups:
            1 / 0  # noqa: B018
    recorder.close()
    lines = lines_of(tmp_path / "run")
    assert [set(line["losses"]) for line in lines] == [
        {"a", "b"}, {"c"}, set(TASKS), set(), set(TASKS), set(),
    ]  # fmt: skip
    assert [line["batch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["steps"] for line in lines] == [2, 1, 3, 0, 1, 0]
    assert lines[4]["losses"] == pytest.approx({t: v.item() for t, v in expected.items()})


def test_a_trainer_that_drops_the_iterator_before_the_step(tmp_path):
    affinity = tg.GradientAffinity(Loop().model.encoder, decay=0.3)
    loop = Loop(groups_per_batch=1, affinity=affinity)
    affinity_model = loop.model.encoder
    loop.groups = tg.TaskGroups(
        TASKS, groups_per_batch=1, affinity=tg.GradientAffinity(affinity_model), warmup=2
    )
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    seen = []
    for _ in range(4):
        group = next(loop.groups.batch(TASKS), None)
        losses = loop.losses(group)
        loop.optimizer.zero_grad()
        group.loss(losses).backward()
        loop.optimizer.step()
        seen.append({task: losses[task].item() for task in group.observed})
        loop.batches += 1
    recorder.close()
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 4
    for line, losses in zip(lines, seen, strict=True):
        assert line["losses"] == pytest.approx(losses)
    assert {"forward", "backward", "optimizer", "between batches"} <= set(recorder.seconds)


@pytest.mark.parametrize("announced", [False, True])
def test_a_joint_method(announced, tmp_path):
    loop = Loop()
    method = tg.methods.PCGrad(loop.model.encoder, TASKS)
    recorder = tg.Recorder(method, tmp_path / "run", every=1)
    expected = []
    for _ in range(3):
        if announced:
            recorder.begin_batch()
        losses = loop.losses()
        expected.append({task: loss.item() for task, loss in losses.items()})
        loop.optimizer.zero_grad()
        method.backward(losses)
        loop.optimizer.step()
        loop.batches += 1
    recorder.metrics(dict.fromkeys(TASKS, 1.0))
    recorder.close()
    lines = lines_of(tmp_path / "run")
    assert [line["losses"] for line in lines] == [pytest.approx(losses) for losses in expected]
    assert partitions(tmp_path / "run") == [[TASKS]] * 3
    assert ("forward" in recorder.seconds) == announced
    run = load_run_data(tmp_path / "run")
    assert run.method == "pcgrad"  # its name on the command line
    assert not len(run.affinity.batches)
    assert copy.deepcopy(method).backward(loop.losses()) is not None
    assert len(lines_of(tmp_path / "run")) == 3  # a copy is not listened to


def test_famo_tells_a_batch_once(tmp_path):
    loop = Loop()
    method = tg.methods.FAMO(loop.model.encoder, TASKS)
    with tg.Recorder(method, tmp_path / "run"):
        for _ in range(2):
            method.backward(loop.losses())
            loop.optimizer.step()
            method.observe(loop.losses())
    assert len(lines_of(tmp_path / "run")) == 2


def test_a_resumed_run_has_the_files_of_one_that_was_not_stopped(tmp_path):
    straight = Loop()
    recorder = tg.Recorder(straight.groups, tmp_path / "straight")
    straight.step(4)
    recorder.metrics({"a": 1.0})
    straight.step(6)
    recorder.close()

    stopped = Loop()
    recorder = tg.Recorder(stopped.groups, tmp_path / "stopped")
    stopped.step(4)
    recorder.metrics({"a": 1.0})
    tg.checkpoint.save(
        tmp_path / "state.pt", {**stopped.state(), "recorder": recorder.state_dict()}
    )
    stopped.step(2)  # lost
    recorder.metrics({"a": 2.0})
    recorder.flush()
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 7, "los')  # the process was killed while it wrote

    state = tg.checkpoint.load(tmp_path / "state.pt")
    resumed = Loop(seed=1)
    resumed.load(state)
    recorder = tg.Recorder(resumed.groups, tmp_path / "stopped")
    recorder.load_state_dict(state["recorder"])
    resumed.step(6)
    recorder.close()
    for name in ("metrics", "affinity", "evaluations"):
        files = [tmp_path / run / f"{name}.jsonl" for run in ("straight", "stopped")]
        assert files[0].read_text() == files[1].read_text()
    first, *_, last = lines_of(tmp_path / "stopped", "seconds")
    assert last["batch"] == 10
    assert last["seconds"]["everything"] > first["seconds"]["everything"] > 0


def test_what_was_measured_before_the_checkpoint_is_kept(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    recorder.metrics({"a": 3.0})  # before training
    loop.step(2)
    recorder.metrics({"a": 2.0})
    recorder.conflicts(loop.losses(), loop.model.encoder.parameters())
    state = {**loop.state(), "recorder": recorder.state_dict()}
    loop.step(1)
    recorder.conflicts(loop.losses(), loop.model.encoder.parameters())
    recorder.flush()
    resumed = Loop()
    resumed.load(state)
    recorder = tg.Recorder(resumed.groups, tmp_path / "run")
    recorder.load_state_dict(state["recorder"])
    resumed.step(2)
    again = recorder.state_dict()
    recorder.close()
    found = [(line["batch"], line["metrics"]) for line in lines_of(tmp_path / "run", "evaluations")]
    assert found == [(0, {"a": 3.0}), (2, {"a": 2.0})]
    assert [line["batch"] for line in lines_of(tmp_path / "run", "conflicts")] == [3]
    assert again["conflicts"] == 3


def test_conflicts_after_the_checkpoint_are_measured_again(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(2)
    state = {**loop.state(), "recorder": recorder.state_dict()}
    for n in range(2):
        recorder.conflicts(loop.losses(), loop.model.encoder.parameters())
        recorder.flush()
        if not n:
            loop = Loop()
            loop.load(state)
            recorder = tg.Recorder(loop.groups, tmp_path / "run")
            recorder.load_state_dict(state["recorder"])
    assert [line["batch"] for line in lines_of(tmp_path / "run", "conflicts")] == [3]


def test_evaluating_a_loaded_state_drops_nothing(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(2)
    state = recorder.state_dict()
    loop.step(3)
    recorder.close()
    again = tg.Recorder(Loop().groups, tmp_path / "run")
    again.load_state_dict(state)
    again.metrics({"a": 1.0})
    again.close()
    assert len(lines_of(tmp_path / "run")) == 5
    assert lines_of(tmp_path / "run", "evaluations")[0]["batch"] == 2


def test_a_folder_that_holds_another_run_is_kept(tmp_path):
    runs = [tmp_path / name for name in ("run", "run-2", "run-3")]
    loops = [Loop(seed=seed) for seed in range(3)]
    recorders = [tg.Recorder(loop.groups, runs[0]) for loop in loops]
    loops[0].step(2)
    recorders[0].flush()
    for n in (1, 2):
        with pytest.warns(
            UserWarning, match="run holds another run, which is kept, so this run is"
        ):
            loops[n].step(2)
    for n in (0, 1, 2):
        loops[n].step(1)
        recorders[n].close()
        assert recorders[n].folder == runs[n]
        assert [line["batch"] for line in lines_of(runs[n])] == [1, 2, 3]
    assert lines_of(runs[0])[0]["losses"] == pytest.approx(loops[0].seen[0], rel=1e-6)
    lost = tg.Recorder(Loop().groups, runs[0])
    lost.load_state_dict(recorders[1].state_dict())
    with pytest.warns(UserWarning, match="does not hold the run whose state was loaded"):
        lost.conflicts(loops[0].losses(), loops[0].model.encoder.parameters())
    assert lost.folder == tmp_path / "run-4"
    assert len(lines_of(runs[0])) == 3


def test_two_processes_never_take_the_same_next_folder(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    mkdir = Path.mkdir

    def slower(path, *args, **kwargs):
        if path.name == "run-2":
            mkdir(path)  # by another process, just before
            monkeypatch.setattr(Path, "mkdir", mkdir)
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", slower)
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    with pytest.warns(UserWarning, match="holds another run"):
        loop.step(2)
    recorder.close()
    assert recorder.folder == tmp_path / "run-3"
    assert not any((tmp_path / "run-2").iterdir())


def test_the_folder_stays_when_the_program_goes_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    loop = Loop()
    recorders = [tg.Recorder(loop.groups, folder) for folder in ("run", "~/run")]
    loop.step(1)
    monkeypatch.chdir("elsewhere")
    loop.step(1)
    for recorder, parent in zip(recorders, (tmp_path, tmp_path / "home"), strict=True):
        recorder.metrics({"a": 1.0})
        recorder.close()
        assert recorder.folder == parent / "run"
        assert len(lines_of(parent / "run")) == 2
        assert len(lines_of(parent / "run", "evaluations")) == 1
    assert not any((tmp_path / "elsewhere").iterdir())


HELD = """
    import sys, time
    from pathlib import Path
    import taskgroup as tg
    Path(sys.argv[1]).mkdir()
    held = tg.recording.hold(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_folder_that_another_process_writes_to(tmp_path):
    code = textwrap.dedent(HELD)
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        loop = Loop()
        recorder = tg.Recorder(loop.groups, tmp_path / "run")
        with pytest.warns(UserWarning, match="run is being written to by another process, so this"):
            loop.step(2)
        recorder.close()
        assert recorder.folder == tmp_path / "run-2"
        assert len(lines_of(tmp_path / "run-2")) == 2
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("file", ["metrics.jsonl", "affinity.jsonl", "seconds.jsonl"])
def test_a_full_disk_is_said_once_and_training_goes_on(file, tmp_path):
    loop, other = Loop(), Loop()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).symlink_to("/dev/full")
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    other.step(6)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loop.step(5)
        recorder.metrics({"a": 1.0})
        loop.step(1)
        state = recorder.state_dict()
        recorder.close()
    (warned,) = told
    assert "run cannot be written to (No space left on device), so the run is not" in str(
        warned.message
    )
    assert state["batch"] == 6
    for one, two in zip(loop.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "file" / "run")
    with pytest.warns(UserWarning, match="file/run cannot be written to .*the training goes on"):
        loop.step(3)
    recorder.close()


KILLED = """
    import sys, time
    sys.path.insert(0, {root!r})
    from tests.recording.test_recorder import Loop
    import taskgroup as tg
    loop = Loop()
    recorder = tg.Recorder(loop.groups, sys.argv[1])
    loop.step(5)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "batches", "ended"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 4, False),
        ("pass", 5, True),  # nobody has closed it
        ("1 / 0", 5, False),
        # A forked process that ends as a program does, while the first goes on.
        ("import os; os.fork() or sys.exit(); os.wait(); os._exit(0)", 4, False),
    ],
)
def test_a_process_that_ends_in_any_way_leaves_readable_files(end, batches, ended, tmp_path):
    root = str(Path(__file__).parents[2])
    code = textwrap.dedent(KILLED.format(root=root, end=end))
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], timeout=100, check=False)
    assert len(load_run_data(tmp_path / "run").batches) == batches
    assert read_header(tmp_path / "run")["ended"] == ended


def test_long_runs_are_thinned(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "_RECORDS", 20)
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(50)
    state = recorder.state_dict()
    loop.step(50)
    recorder.close()
    assert len(lines_of(tmp_path / "run")) == 100
    expected = list(range(8, 101, 8))
    for name in ("affinity", "seconds"):
        assert [line["batch"] for line in lines_of(tmp_path / "run", name)] == expected
    assert state["every"] == 4
    assert recorder.state_dict()["every"] == 8


def test_losses_that_are_not_finite_are_null(tmp_path):
    tasks = ["a", "b"]
    groups = tg.TaskGroups(tasks, warmup=0, grouping=tg.Together())
    recorder = tg.Recorder(groups, tmp_path / "run")
    x = torch.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="The loss of task 'b' is nan"):
        next(iter(groups)).loss({"a": x.sum(), "b": x.sum() * math.nan})
    recorder.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["losses"] == {"a": 2.0, "b": None}


def test_what_is_handed_to_a_tracker(monkeypatch, tmp_path):
    monkeypatch.setattr(logs, "_FIRST_IMAGE", 10)
    loop = Loop()
    shown, images = {}, {}

    class Tracker:
        def scalars(self, values, step):
            shown.setdefault(step, {}).update(values)

        def image(self, name, pixels, step):
            images[step] = name, pixels

    recorder = tg.Recorder(
        loop.groups, tmp_path / "run", log=Tracker(), log_every=5, pairs=[("a", "b")], every=1000
    )
    loop.step(10)
    recorder.metrics({"a": 0.5})
    loop.step(12)
    recorder.close()
    assert list(shown) == [5, 10, 15, 20]
    lines = lines_of(tmp_path / "run")
    for step in (5, 15, 20):
        values = {name.removeprefix("taskgroup/"): value for name, value in shown[step].items()}
        assert {f"loss/{t}": v for t, v in lines[step - 1]["losses"].items()}.items() <= (
            values.items()
        )
        assert values["lr/0"] == 0.05
        assert values["groups"] == len(partitions(tmp_path / "run")[step - 1])
    assert shown[10]["taskgroup/metric/a"] == 0.5
    matrix = loop.groups.affinity.matrix
    assert "taskgroup/affinity/a->b" in shown[20]
    assert list(images) == [10, 20, 22]  # each when the run is twice as long, and at the end
    assert matrix.shape == (3, 3)


def test_numbers_of_torch_and_numpy(tmp_path):
    loop = Loop()
    settings = {"lr": torch.tensor(0.5), "n": np.int64(3), "path": Path("x"), "betas": (0.5, 1)}
    recorder = tg.Recorder(loop.groups, tmp_path / "run", settings=settings)
    loop.step(1)
    values = {"a": torch.tensor([0.5], requires_grad=True), "b": np.float32(0.25), "c": np.nan}
    recorder.metrics(values)
    recorder.close()
    (line,) = lines_of(tmp_path / "run", "evaluations")
    assert line["metrics"] == {"a": 0.5, "b": 0.25, "c": None}
    found = read_header(tmp_path / "run")["settings"]
    assert found.items() >= {"lr": 0.5, "n": 3, "path": "x", "betas": [0.5, 1]}.items()


def test_a_matrix_that_is_not_finite_is_null(tmp_path):
    folder = run_files.RunFolder(tmp_path, {})
    folder.append_matrix(
        "conflicts.jsonl", 1, torch.tensor([[1.5, math.inf], [-math.inf, math.nan]])
    )
    folder.close()
    line = json.loads((tmp_path / "conflicts.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"batch": 1, "matrix": [[1.5, None], [None, None]]}


def test_what_comes_after_the_end_is_told(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(1)
    recorder.close()
    loop.step(1)
    with pytest.warns(UserWarning, match="run is closed, so these metrics are not recorded"):
        recorder.metrics({"a": 1.0})
    with pytest.warns(UserWarning, match="run is closed, so these conflicts are not recorded"):
        recorder.conflicts(loop.losses(), loop.model.encoder.parameters())
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()


def test_copies_share_the_open_files_and_pickles_are_refused(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(1)
    assert copy.deepcopy({"recorder": recorder})["recorder"] is recorder
    with pytest.raises(TypeError, match=r"A Recorder cannot be pickled.*save its state_dict\(\)"):
        pickle.dumps(recorder)
    recorder.close()


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"titles": {"z": "Z"}}, ValueError, r"titles names the unknown tasks \['z'\]"),
        ({"settings": {"x": {(1, 2): 3}}}, TypeError, "settings must be a dict that JSON can hold"),
        ({"settings": 3}, TypeError, "a dict that JSON can hold, got int"),
        ({"pairs": [("a", "z")]}, ValueError, r"such as \[\('a', 'c'\)\], got \('a', 'z'\)"),
        ({"pairs": ["ab"]}, ValueError, "pairs must hold pairs of tasks"),
        ({"every": 0}, ValueError, "every must be an integer of at least 1, got 0"),
        ({"log_every": 0.5}, ValueError, "log_every must be an integer of at least 1"),
        ({"log": 3}, TypeError, "log must be a SummaryWriter"),
    ],
)
def test_wrong_arguments(wrong, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence):
        tg.Recorder(Loop().groups, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_other_wrong_calls(tmp_path):
    with pytest.raises(TypeError, match=r"takes the TaskGroups of the loop.*got a Linear"):
        tg.Recorder(nn.Linear(1, 1), tmp_path)
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    with pytest.raises(
        ValueError, match="'lower' or 'higher' for every metric, got 'less' for 'a'"
    ):
        recorder.metrics({"a": 1.0}, better={"a": "less"})
    with pytest.raises(ValueError, match=r"better names \['b'\], and the metrics are \['a'\]"):
        recorder.metrics({"a": 1.0}, better={"b": "lower"})
    for value in (None, "x", torch.ones(2)):
        with pytest.raises(TypeError, match="The metric of 'a' must be a number, got a "):
            recorder.metrics({"a": value})
    with pytest.raises(ValueError, match="run has no batch to report; train on one"):
        recorder.report()
    with pytest.raises(ValueError, match="has version 9, and this taskgroup"):
        recorder.load_state_dict({"version": 9})
    state = recorder.state_dict()
    loop.step(1)
    with pytest.raises(RuntimeError, match="after the first batch; load the state before the loop"):
        recorder.load_state_dict(state)


def test_a_copy_of_the_groups_is_not_listened_to(tmp_path):
    loop = Loop()
    recorder = tg.Recorder(loop.groups, tmp_path / "run")
    loop.step(1)
    twin = copy.deepcopy(loop.groups)
    for group in twin:
        group.skip()
    recorder.close()
    assert len(lines_of(tmp_path / "run")) == 1


def test_a_recorder_that_nobody_keeps_records_and_is_collected_with_the_groups(tmp_path):
    gc.collect()
    before = len(of_optimizers._global_optimizer_pre_hooks)
    loop = Loop()
    tg.Recorder(loop.groups, tmp_path / "run")
    gc.collect()
    loop.step(3)
    assert len(of_optimizers._global_optimizer_pre_hooks) == before + 1
    del loop
    gc.collect()
    assert len(of_optimizers._global_optimizer_pre_hooks) == before
    assert len(lines_of(tmp_path / "run")) == 2


def test_the_sections_of_a_step():
    clock = StepClock(now=map(float, [0, 1, 3, 6, 10, 15, 21, 28, 36]).__next__)
    clock.begin_batch()  # 0
    clock.begin_step()  # 1, of choosing the groups
    clock.begin_loss()  # 3
    clock.end_loss()  # 6
    assert clock.begin_optimizer()  # 10
    clock.end_optimizer()  # 15
    clock.begin_step()  # 21
    clock.begin_loss()  # 28
    clock.end_loss()  # 36
    other = 1 + 3 + 6 + 8
    expected = {"other": other, "forward": 2 + 7, "backward": 4, "optimizer": 5}
    assert clock.read(wait=False) == {**expected, "everything": 36}


def test_steps_of_other_optimizers_and_pauses_are_not_counted():
    clock = StepClock(now=map(float, [0, 1, 3, 6, 10, 100, 101]).__next__)
    assert not clock.begin_optimizer()
    clock.begin_batch()  # 0
    clock.begin_step()  # 1
    assert not clock.begin_optimizer()  # that of a discriminator, in the forward pass
    clock.end_optimizer()
    clock.begin_loss()  # 3
    clock.end_loss()  # 6
    clock.begin_optimizer()  # 10
    clock.pause()  # an evaluation
    clock.begin_batch()  # 100
    clock.begin_step()  # 101
    assert clock.read(wait=False) == {"other": 5, "forward": 2, "backward": 4, "everything": 11}


def record_on_a_rank(rank, folder):
    loop = Loop()
    for p in loop.model.parameters():
        dist.broadcast(p.data, 0)
    recorder = tg.Recorder(loop.groups, folder / "run", log=lambda values, step: seen.append(step))
    seen, mine = [], []
    for batch in range(4):
        first = None
        for group in loop.groups:
            losses = loop.losses(group, batch=10 * batch + rank)
            first = first or {task: loss.item() for task, loss in losses.items()}
            loop.optimizer.zero_grad()
            group.loss(losses).backward()
            for p in loop.model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= 2
            loop.optimizer.step()
        mine.append([first[task] for task in TASKS])
    recorder.metrics({"a": float(rank)})
    recorder.flush()
    everyone = [None, None]
    dist.all_gather_object(everyone, mine)
    recorder.close()
    assert recorder.folder == folder / "run"
    return torch.tensor(everyone).mean(0).tolist(), seen


def test_on_two_ranks_the_first_records_the_means(tmp_path):
    (expected, seen), (_, other) = on_ranks(record_on_a_rank, tmp_path)
    lines = lines_of(tmp_path / "run")
    assert [[line["losses"][task] for task in TASKS] for line in lines] == [
        pytest.approx(losses, rel=1e-5) for losses in expected
    ]
    assert lines_of(tmp_path / "run", "evaluations")[0]["metrics"] == {"a": 0.0}
    assert not (tmp_path / "run-2").exists()
    assert (len(seen), other) == (1, [])  # the metrics
