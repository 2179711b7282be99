"""Figure 2 of the paper: time per batch and peak memory of every method, against joint training.

The tasks are the five of PASCAL-Context at 512 x 512 pixels and the eleven of Taskonomy at 256 x
256, with batches of 8 and ViT-T to ViT-L. Weights, pixels and labels are random, since neither time
nor memory depends on them. Float32 is torch's default (no TF32). Bfloat16 is autocast around the
network, with losses in float32, as in the recipes.

A batch is everything that a training loop does with it: forward, losses, ``zero_grad``, backward,
the work of the method, and the optimizer step (fused Adam). Peak memory is the peak of torch's
allocator, including parameters and moments. On a GPU the allocator counts it during the timed
batches; on the CPU it comes from the profiler's record of further batches.

The methods run in the order of their importance: joint training, selective updates, then the
others, so that a run that ends early has the important results. The smallest backbone runs first.
Then each pair of tasks and dtype gets the largest backbone that fits into the remaining time.
``FIGURE2_SECONDS`` sets the time; the default is 110 on a GPU, 30 on the CPU, and unlimited with
``--full``. On the CPU, a tiny backbone on small images only shows that everything runs.

``python -m benchmarks.figure2`` draws the results that ``--save`` wrote.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import taskgroup as tg
from benchmarks import record
from benchmarks.clocks import cuda_seconds, wall
from taskgroup.lab.train.memory import peak_bytes
from taskgroup.lab.vision.backbones import ViTFeatures, backbone
from taskgroup.lab.vision.dense_losses import criterion
from taskgroup.lab.vision.models import dense_model
from taskgroup.lab.vision.tasks import NYUD, PASCAL, TASKONOMY, Task
from taskgroup.methods.gradient_space import GramMethod

SECONDS = {"cuda": 110.0, "cpu": 30.0}
GROUPS = (2, 3, 4)  # M
JOINT = "joint training"
EVERY = 10  # with one group per batch, one of ten batches is observed and takes two steps

Batch = Callable[[], None]


# The tasks of each data set, and the height and width of its images in the paper's runs.
DATA_SETS = {
    "NYUD-v2": (NYUD, (448, 576)),
    "PASCAL-Context": (PASCAL, (512, 512)),
    "Taskonomy": (TASKONOMY, (256, 256)),
}
DATA = ("PASCAL-Context", "Taskonomy")  # those of Figure 2
# The work of a joint step relative to ViT-T, rounded up: docs/reproduce.md, "Time and memory".
WORK = {"tiny": 1, "vit-t": 1, "vit-s": 4, "vit-b": 14, "vit-l": 50}


@dataclass(frozen=True)
class Scale:
    """The backbones, from small to large, and the batches to measure on a type of device."""

    models: tuple[str, ...]
    n_images: int
    warmup: int  # batches
    batches: int  # timed
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    size: tuple[int, int] | None = None  # None is the size in the paper


SCALES = {
    "cuda": Scale(("vit-t", "vit-s", "vit-b", "vit-l"), n_images=8, warmup=3, batches=5),
    "cpu": Scale(
        ("tiny",), n_images=2, warmup=1, batches=2, dtypes=("float32", "bfloat16"), size=(32, 32)
    ),
}


class Case(NamedTuple):
    """The data set, backbone and dtype on which all methods are measured."""

    data: str
    model: str
    dtype: str


def random_labels(task: Task, n_images: int, size: tuple[int, int]) -> Tensor:
    """Random values, or random class numbers; a binary task has two classes."""
    if task.kind == "values":
        return torch.rand(n_images, task.channels, *size)
    return torch.randint(max(task.channels, 2), (n_images, 1, *size), dtype=torch.uint8)


class Training:
    """A network and a batch of random images and labels."""

    def __init__(self, case: Case, scale: Scale, device: torch.device) -> None:
        self.tasks, size = DATA_SETS[case.data]
        self.device = device
        self.size = scale.size or size
        self.dtype = case.dtype
        torch.manual_seed(0)
        with device:  # draw the weights there: drawing a ViT-L on the CPU takes seconds
            encoder = (
                ViTFeatures(self.size, patch=8, dim=32)
                if case.model == "tiny"
                else backbone(case.model, size=self.size, weights="random", drop_path=0.15)
            )
            channels = {name: task.channels for name, task in self.tasks.items()}
            self.model = dense_model(encoder, channels)
            self.images = torch.rand(scale.n_images, 3, *self.size)
            self.labels = {
                name: random_labels(task, scale.n_images, self.size)
                for name, task in self.tasks.items()
            }
            mask = torch.ones(scale.n_images, 1, *self.size, dtype=torch.bool)
        self.masks = {name: mask.clone() for name in self.tasks}
        state = self.model.state_dict()  # keep a copy on the host, where it does not count
        self._start = {key: value.to("cpu", copy=True) for key, value in state.items()}

    def restart(self) -> None:
        """Restore the initial weights, because the results of the solvers depend on them."""
        torch.manual_seed(0)
        self.model.zero_grad()
        self.model.load_state_dict(self._start)

    def losses(self, group: tg.Group | None = None) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            outputs = self.model(self.images, group=group)
        return self.criterion(outputs)

    def criterion(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = {task: output.float() for task, output in outputs.items()}
        return criterion(outputs, self.labels, self.masks, self.tasks)

    def optimizer(self, learned: list[nn.Parameter] = []) -> torch.optim.Optimizer:  # noqa: B006
        self.stands = [*self.model.parameters(), *learned]
        return torch.optim.Adam(self.stands, lr=2e-5, weight_decay=1e-6, fused=True)


class Setting(NamedTuple):
    """A method; ``make`` turns a training into a function that trains on one batch."""

    name: str
    n_groups: int | None
    make: Callable[[Training], tuple[Batch, torch.optim.Optimizer]]
    cycle: int = 1  # number of batches after which their costs repeat


class NotInstalledError(Exception):
    """A method needs a package that is not installed."""


def joint(training: Training) -> tuple[Batch, torch.optim.Optimizer]:
    """Ordinary joint training."""
    optimizer = training.optimizer()

    def batch() -> None:
        losses = training.losses()
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()

    return batch, optimizer


class Dealt:
    """Runs the default clustering, but always returns M groups.

    The affinity is observed and the clustering takes its time, as in a training, while M is fixed.
    """

    def __init__(self, n_groups: int) -> None:
        self.n_groups = n_groups
        self.learned = tg.AffinityPropagation()

    def __call__(self, matrix: Tensor) -> Tensor:
        self.learned(matrix)
        return torch.arange(len(matrix)) % self.n_groups


def selective(n_groups: int, **options: Any) -> Callable[..., tuple[Batch, torch.optim.Optimizer]]:
    """The loop of the README with a ``MultiTaskModel``, after its warm-up."""

    def make(training: Training) -> tuple[Batch, torch.optim.Optimizer]:
        groups = tg.TaskGroups(training.tasks, warmup=0, grouping=Dealt(n_groups), **options)
        # Skip the first round, in which every task is alone.
        groups.load_state_dict({**groups.state_dict(), "rounds": 1})
        optimizer = training.optimizer()
        groups.attach(optimizer)

        def batch() -> None:
            for group in groups:
                losses = training.losses(group)
                optimizer.zero_grad()
                group.loss(losses).backward()
                optimizer.step()

        return batch, optimizer

    return make


class Unweighted(GramMethod):
    """A method in Gram space without a solver."""

    _requires = ()

    def _weigh(self, gram: Tensor) -> Tensor:
        return torch.ones(len(gram))


def likelihood(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {task: loss.neg().exp().clamp(1e-3, 1 - 1e-3) for task, loss in losses.items()}


# Arguments of the methods besides the shared parameters and the tasks.
OPTIONS: dict[str, dict[str, Any]] = {"dtp": {"score": likelihood}, "dwa": {"epoch": 1000}}


def method(kind: type[tg.methods.JointMethod], **options: Any) -> Callable[..., Any]:
    """The loop of a joint method, as the README shows it."""

    def make(training: Training) -> tuple[Batch, torch.optim.Optimizer]:
        try:
            made = kind(training.model.encoder, [*training.tasks], **options)
        except ImportError as error:
            raise NotInstalledError(str(error)) from error
        optimizer = training.optimizer(made.parameters())

        def batch() -> None:
            losses = training.losses()
            optimizer.zero_grad()
            made.backward(losses)
            optimizer.step()
            if made.observes_step:
                with torch.no_grad():
                    made.observe(training.losses())

        return batch, optimizer

    return make


def settings() -> list[Setting]:
    """Every method, the most important first; those of ``tg.methods`` in their order."""
    return [
        Setting(JOINT, None, joint),
        *(Setting("selective", m, selective(m)) for m in GROUPS),
        # The setting that docs/cost.md recommends if a step per group costs too much.
        *(
            Setting(
                "one group per batch",
                m,
                selective(m, groups_per_batch=1, observe_every=EVERY),
                EVERY,
            )
            for m in GROUPS
        ),
        Setting("K gradients, no solver", None, method(Unweighted)),
        *(
            Setting(name, None, method(kind, **OPTIONS.get(name, {})))
            for name, kind in tg.methods.METHODS.items()
        ),
    ]


@dataclass(frozen=True)
class Row:
    """The result of a method on a case; None if there is no number, and ``reason`` says why."""

    version: str
    commit: str
    torch: str
    device: str
    machine: str
    threads: int
    data: str
    K: int
    model: str
    dtype: str
    images: str  # batch x height x width
    method: str
    M: int | None
    batches: int  # timed
    ms: float | None  # milliseconds per batch, the mean
    min_ms: float | None
    median_ms: float | None
    max_ms: float | None
    relative: float | None  # to joint training, same case, same run
    peak_gb: float | None  # all memory of torch's allocator at its peak
    relative_peak: float | None
    reason: str
    command: str


class Figures(NamedTuple):
    """The seconds of each timed batch, and the peak memory in bytes."""

    seconds: list[float]
    peak: int


def measure(
    setting: Setting, training: Training, scale: Scale, left: Callable[[], float]
) -> Figures | None:
    """Time and memory of a method; None if the time is over before one batch is timed.

    It waits for the GPU after each batch, so that the run can stop between any two batches.
    """
    batch, optimizer = setting.make(training)
    cuda = training.device.type == "cuda"
    for _ in range(scale.warmup):
        batch()
        if left() < 0:
            return None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < max(scale.batches, setting.cycle) and not (seconds and left() < 0):
        seconds.append(cuda_seconds(batch, 1) if cuda else wall(batch, 1).seconds)
    if cuda:
        return Figures(seconds, torch.cuda.max_memory_allocated())
    # The CPU's allocator has no peak counter. The profiler's record of its allocations gives the
    # peak above the memory that is held when the batch begins.
    moments = [t for state in optimizer.state.values() for t in state.values()]
    gradients = [p.grad for p in training.stands if p.grad is not None]
    held = [*training.stands, *moments, *gradients, training.images]
    held += [*training.labels.values(), *training.masks.values()]
    above = peak_bytes(lambda: [batch() for _ in range(setting.cycle)], training.device)
    return Figures(seconds, sum(t.nbytes for t in held) + above)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that torch's allocator, a library or the host is out of memory."""
    words = ("out of memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


@dataclass
class Run:
    """Measures all cases on a device until the time is over.

    Args:
        device: where to measure.
        seconds: the time for all cases.
        keep: called with each row as soon as it is measured.
        say: called with each line to print.
        command: the command line.
    """

    device: torch.device
    seconds: float
    keep: Callable[[Row], None]
    say: Callable[[str], None]
    command: str = ""
    clock: Callable[[], float] = time.monotonic
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scale = SCALES[self.device.type]
        self._start = self.clock()
        self.measured = 0  # number of rows with times

    def left(self) -> float:
        """The remaining seconds."""
        return self.seconds - (self.clock() - self._start)

    def everything(self) -> None:
        """Run the smallest backbone, then the largest that fit into half of the time, then all."""
        smallest, *larger = self.scale.models
        cases = [Case(d, smallest, dtype) for dtype in self.scale.dtypes for d in DATA]
        to_come = {case: list(larger) for case in cases}
        rates = {}  # seconds of the batches of a case, by its work

        def run(case: Case, model: str) -> None:
            seconds = self.case(case._replace(model=model))
            if seconds is not None:
                rates[case] = seconds / WORK[model]

        for case in cases:
            run(case, smallest)
        for share in itertools.chain([0.5], itertools.repeat(1.0)):
            some = False
            for case, rate in list(rates.items()):
                room = share * self.left()
                if fits := [model for model in to_come[case] if rate * WORK[model] <= room]:
                    to_come[case].remove(fits[-1])
                    run(case, fits[-1])
                    some = True
            if share == 1 and not some:
                break
        for case, models in to_come.items():
            self.left_out += [_title(case._replace(model=model)) for model in models]

    def case(self, case: Case) -> float | None:
        """Measure all methods on a case.

        Returns:
            The seconds of their batches, without costs that occur once, such as imports; None if
            the time was over before all methods ran.
        """
        spent = 0.0
        joint: Figures | None = None
        training: Training | None = None
        late: list[str] = []
        every = settings()
        for setting in every:
            figures, reason = None, ""
            try:
                if self.left() > 0:
                    training = training or Training(case, self.scale, self.device)
                    training.restart()
                    figures = measure(setting, training, self.scale, self.left)
            except NotInstalledError:
                reason = "not installed"
            except tg.methods.NoWeightsError:
                reason = "no weights found"
            except Exception as error:  # one method fails; the others continue
                reason = "out of memory" if out_of_memory(error) else _first_line(error)
                if not out_of_memory(error):
                    self.failed.append(f"{_title(case)}, {_name(setting)}: {reason}")
            # Outside of the handler, since its traceback would keep the batch alive.
            self._free()
            if figures is None and not reason:
                late.append(_name(setting))
                continue
            if setting.name == JOINT:
                joint = figures
            if figures is not None:
                n_batches = self.scale.warmup + len(figures.seconds)
                spent += n_batches * statistics.mean(figures.seconds)
            self._note(case, setting, figures, joint, reason)
            if training is None:
                break  # the network itself does not fit into memory
        if late:
            names = "" if len(late) == len(every) else f" ({', '.join(late)})"
            self.left_out.append(_title(case) + names)
        return None if late else spent

    def _free(self) -> None:
        """Free the memory, so that methods start alike, and notice a broken device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _note(
        self,
        case: Case,
        setting: Setting,
        figures: Figures | None,
        joint: Figures | None,
        reason: str,
    ) -> None:
        tasks, size = DATA_SETS[case.data]
        height, width = self.scale.size or size
        ms = [1e3 * seconds for seconds in figures.seconds] if figures else []
        mean = statistics.mean(ms) if ms else None
        peak = figures.peak if figures else None
        row = Row(
            **record.origin(self.device),
            machine=record.device_name(self.device),
            data=case.data,
            K=len(tasks),
            model=case.model,
            dtype=case.dtype,
            images=f"{self.scale.n_images}x{height}x{width}",
            method=setting.name,
            M=setting.n_groups,
            batches=len(ms),
            ms=mean,
            min_ms=min(ms, default=None),
            median_ms=statistics.median(ms) if ms else None,
            max_ms=max(ms, default=None),
            relative=mean / (1e3 * statistics.mean(joint.seconds)) if mean and joint else None,
            peak_gb=None if peak is None else peak / 1e9,
            relative_peak=None if peak is None or joint is None else peak / joint.peak,
            reason=reason,
            command=self.command,
        )
        self.measured += figures is not None
        self.keep(row)
        self.say(line(row))


def line(row: Row) -> str:
    """The printed line of a row."""
    head = f"{row.data:<14}  {row.model:<5}  {row.dtype:<8}  {_name(row):<24}"
    if row.ms is None or row.peak_gb is None:
        return f"{head}  {row.reason}"
    relative = "" if row.relative is None else f"{row.relative:6.2f}x"
    memory = "" if row.relative_peak is None else f"{row.relative_peak:6.2f}x"
    return f"{head}  {row.ms:9.2f} ms {relative}  {row.peak_gb:8.3f} GB {memory}"


def _title(case: Case) -> str:
    return f"{case.data} {case.model} {case.dtype}"


def _name(of: Setting | Row) -> str:
    name, n_groups = (of.method, of.M) if isinstance(of, Row) else (of.name, of.n_groups)
    return name if n_groups is None else f"{name}, M = {n_groups}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")


@pytest.mark.timeout(0)  # it limits its own time
def test_every_method(
    request: pytest.FixtureRequest, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(text: str) -> None:
        with capsys.disabled():
            print(f"  {text}", flush=True)

    option = request.config.getoption
    ViTFeatures(8, patch=8, dim=16)  # import transformers before the time starts
    default = math.inf if option("full") else SECONDS[device.type]
    path = record.results(device) / "figure2.csv"
    run = Run(
        device,
        float(os.environ.get("FIGURE2_SECONDS", default)),
        (lambda row: record.append(path, row)) if option("save") else lambda row: None,
        say,
        " ".join(["pytest", *map(str, request.config.invocation_params.args)]),
    )
    say(f"\nfigure2: {record.machine(device)}, torch {torch.__version__}")
    gc.freeze()  # or each collection would visit all imported modules, for a third of a second
    try:
        run.everything()
    finally:
        gc.unfreeze()
    if run.left_out:
        say(f"Not measured within {run.seconds:g} s: {'; '.join(run.left_out)}.")
    assert not run.failed, "\n".join(run.failed)
    assert run.measured, f"{run.seconds:g} s are too short for one method: raise FIGURE2_SECONDS"
