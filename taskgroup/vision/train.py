"""A training run: the loop, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.tensorboard import SummaryWriter

import taskgroup as tg
from taskgroup.report import plots
from taskgroup.vision.losses import criterion
from taskgroup.vision.metrics import evaluate
from taskgroup.vision.models import vit
from taskgroup.vision.motorcycle import Motorcycle
from taskgroup.vision.recipe import Recipe, read_recipe
from taskgroup.vision.tasks import TASKONOMY

__all__ = ["Interrupted", "Progress", "Run", "load_summary"]

_CHECKPOINT_VERSION = 1
_EVENTS_EVERY = 10  # batches; TensorBoard thins finer curves out anyway
_PICTURED = 4  # held-out crops in predictions.png
_MODEL_SECTIONS = ("forward", "loss", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known after a batch.

    Attributes:
        batch: batches done.
        batches: batches of the whole run.
        losses: of every task, before the first step of the batch.
        groups: as they were stepped on.
        partition: as it stands.
    """

    batch: int
    batches: int
    losses: dict[str, float]
    groups: list[tuple[str, ...]]
    partition: list[tuple[str, ...]]


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The user asked to stop, and a checkpoint has been written."""


class Run:
    """One training run in a folder of its own.

    The folder holds ``config.yaml``; ``metrics.jsonl``, a line per batch; ``checkpoint.pt``;
    TensorBoard events; and, at the end, ``summary.json`` and pictures. A run that was stopped, even
    by SIGKILL, goes on exactly from its last checkpoint.

    Args:
        recipe: the settings.
        out: the folder; new or empty.

    Raises:
        ValueError: if the folder is in use, or the recipe's baseline has no summary.
    """

    def __init__(self, recipe: Recipe, out: str | Path) -> None:
        out = Path(out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(
                f"{out} exists and is not empty; name another folder with --out, or go on with it "
                f"by --resume {out}."
            )
        self._set_up(recipe, out)
        out.mkdir(parents=True, exist_ok=True)
        settings = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
        (out / "config.yaml").write_text(settings)

    @classmethod
    def resume(cls, out: str | Path) -> Run:
        """Take up a run where its last checkpoint was written.

        Raises:
            ValueError: if there is no run, or its checkpoint cannot be read.
        """
        out = Path(out)
        config = out / "config.yaml"
        if not config.is_file():
            raise ValueError(f"{out} is no run: it has no config.yaml.")
        run = cls.__new__(cls)
        run._set_up(read_recipe(config), out)
        if (out / "checkpoint.pt").is_file():
            run._load(out / "checkpoint.pt")
        run._cut_metrics()
        return run

    def _set_up(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self._baseline = load_summary(recipe.baseline)["metrics"] if recipe.baseline else None
        self.batch = 0
        self.seconds = dict.fromkeys((*_MODEL_SECTIONS, "everything"), 0.0)

        torch.manual_seed(recipe.seed)
        self.scene = Motorcycle(recipe.size)
        self.model = vit(
            size=recipe.size,
            patch=recipe.patch,
            dim=recipe.dim,
            depth=recipe.depth,
            attention_heads=recipe.attention_heads,
            dropout=recipe.dropout,
        )
        self.groups = tg.TaskGroups(
            list(TASKONOMY),
            affinity=tg.ProximalAffinity(decay=recipe.decay),
            grouping=recipe.make_grouping(),
            warmup=recipe.warmup,
            regroup_every=recipe.regroup_every,
            groups_per_batch=recipe.groups_per_batch,
            observe_every=recipe.observe_every,
            seed=recipe.seed,
        )
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.model.encoder.parameters(), "lr": recipe.lr},
                {"params": self.model.heads.parameters(), "lr": recipe.head_lr},
            ],
            weight_decay=recipe.weight_decay,
            fused=True,  # a third of the time of the default on a CPU
        )
        self.groups.attach(self.optimizer, self.model.heads, outside=recipe.outside)
        self.scheduler = PolynomialLR(self.optimizer, recipe.batches, recipe.poly_power)
        self.crops = torch.Generator().manual_seed(recipe.seed)

    def train(self, listen: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
        """Train to the end, then evaluate, draw and write the summary.

        Args:
            listen: called after every batch.

        Returns:
            What ``summary.json`` holds.

        Raises:
            Interrupted: at the first SIGINT or SIGTERM, once the batch at hand is done and a
                checkpoint is written.
        """
        self.model.train()
        with (
            _stop_signals() as stop,
            (self.out / "metrics.jsonl").open("a", buffering=1) as metrics,
            SummaryWriter(str(self.out), purge_step=self.batch or None) as board,
        ):
            while self.batch < self.recipe.batches:
                started = time.perf_counter()
                progress = self._train_batch()
                _write_line(metrics, progress)
                if self.batch % _EVENTS_EVERY == 0:
                    _write_events(board, progress)
                listen(progress)
                self.seconds["everything"] += time.perf_counter() - started
                if stop.asked or self.batch % self.recipe.checkpoint_every == 0:
                    self.save()
                if stop.asked:
                    raise Interrupted(
                        f"Stopped after batch {self.batch} of {self.recipe.batches}; go on with "
                        f"taskgroup train --resume {self.out}"
                    )
            if (
                not (self.out / "checkpoint.pt").is_file()
                or self.batch % self.recipe.checkpoint_every
            ):
                self.save()
        return self._finish()

    def _train_batch(self) -> Progress:
        """One batch of the loop that the README shows, with a clock beside it."""
        images, labels, masks = self.scene.sample(self.recipe.batch_size, self.crops)
        clock = _Clock(self.seconds)
        first: Tensor | None = None
        stepped = []
        for group in self.groups:
            clock.start()
            outputs = self.model(images, group=group)
            clock.lap("forward")
            losses = criterion(outputs, labels, masks)
            clock.lap("loss")
            self.optimizer.zero_grad()
            loss = group.loss(losses)
            clock.start()
            loss.backward()
            clock.lap("backward")
            self.optimizer.step()
            clock.lap("optimizer")
            if first is None:
                first = torch.stack([losses[task].detach() for task in group.observed])
                observed = group.observed
            stepped.append(group.tasks)
        self.scheduler.step()
        self.batch += 1
        assert first is not None
        return Progress(
            batch=self.batch,
            batches=self.recipe.batches,
            losses=dict(zip(observed, first.tolist(), strict=True)),
            groups=stepped,
            partition=self.groups.partition,
        )

    def _finish(self) -> dict[str, Any]:
        held_out = self.scene.held_out()
        metrics = evaluate(self.model, held_out)
        delta = None
        if self._baseline is not None:
            delta = tg.delta_m(metrics, self._baseline, set(metrics))
        history = load_metrics(self.out)
        everything = self.seconds["everything"]
        inside = sum(self.seconds[section] for section in _MODEL_SECTIONS)
        summary = {
            "method": self.recipe.method,
            "batches": self.batch,
            "steps": sum(len(line["groups"]) for line in history),
            "metrics": metrics,
            "delta_m": delta,
            "baseline": self.recipe.baseline,
            "partition": [list(group) for group in self.groups.partition],
            "unconverged": self.groups.unconverged,
            "seconds_per_batch": everything / self.batch,
            "share_outside_model": 1 - inside / everything,
            "seconds": self.seconds,
        }
        titles = {name: task.title for name, task in TASKONOMY.items()}
        learned = [line for line in history if line["batch"] > self.recipe.warmup]
        plots.affinity(
            self.groups.affinity.matrix, titles, self.groups.partition, self.out / "affinity.png"
        )
        plots.number_of_groups(
            [len(line["partition"]) for line in history],
            self.recipe.warmup,
            self.out / "groups.png",
        )
        plots.cogrouping(
            [line["partition"] for line in learned or history], titles, self.out / "cogrouping.png"
        )
        some = torch.linspace(0, len(held_out.images) - 1, _PICTURED).round().long()
        image, targets, masks = held_out
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(image[some])
        outputs["normal"] = F.normalize(outputs["normal"], dim=1)
        plots.predictions(
            image[some],
            {task: target[some] for task, target in targets.items()},
            {task: mask[some] for task, mask in masks.items()},
            outputs,
            titles,
            self.out / "predictions.png",
        )
        _write_atomically(
            self.out / "summary.json",
            lambda file: file.write(json.dumps(summary, indent=2).encode()),
        )
        return summary

    def save(self) -> None:
        """Write ``checkpoint.pt``; a crash on the way leaves the one before.

        Raises:
            OSError: if it cannot be written; the sentence says so.
        """
        state = {
            "version": _CHECKPOINT_VERSION,
            "batch": self.batch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "groups": self.groups.state_dict(),
            "crops": self.crops.get_state(),
            "torch": torch.get_rng_state(),
        }
        _write_atomically(self.out / "checkpoint.pt", lambda file: torch.save(state, file))

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
            version = state["version"]
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({' '.join(str(error).split())[:200]}); start again with "
                "another --out."
            ) from None
        if version != _CHECKPOINT_VERSION:
            raise ValueError(
                f"{path} has version {version}, this taskgroup reads {_CHECKPOINT_VERSION}; "
                "resume with the taskgroup that wrote it."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.groups.load_state_dict(state["groups"])
        self.crops.set_state(state["crops"])
        torch.set_rng_state(state["torch"])
        self.batch = state["batch"]
        self.seconds = state["seconds"]

    def _cut_metrics(self) -> None:
        """Drop the lines of batches that ran after the checkpoint, and a line cut short."""
        path = self.out / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        _write_atomically(path, lambda file: file.writelines(lines[: self.batch]))


def load_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of a run."""
    with (Path(run) / "metrics.jsonl").open() as file:
        return [json.loads(line) for line in file]


def load_summary(run: str | Path) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        ValueError: if there is none.
    """
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{run} has no summary.json: it is no run, or not finished.")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


class _Clock:
    """Adds the time between laps to named sections."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._since = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def lap(self, section: str) -> None:
        now = time.perf_counter()
        self._seconds[section] += now - self._since
        self._since = now


class _Stop:
    asked = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM sets a flag; the second acts as if this were not here."""
    stop = _Stop()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread, which alone gets signals
            break
    try:
        yield stop
    finally:
        for restored, handler in previous.items():
            signal.signal(restored, handler)


def _write_line(file: Any, progress: Progress) -> None:
    line = {
        "batch": progress.batch,
        "losses": progress.losses,
        "groups": progress.groups,
        "partition": progress.partition,
    }
    file.write(json.dumps(line) + "\n")


def _write_events(board: SummaryWriter, progress: Progress) -> None:
    for task, loss in progress.losses.items():
        board.add_scalar(f"loss/{task}", loss, progress.batch)
    board.add_scalar("groups", len(progress.partition), progress.batch)


def _write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Write beside ``path``, then put it in its place."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({' '.join(str(error).split())}); what was there before "
            "is kept. Make room, or name another folder with --out."
        ) from error
