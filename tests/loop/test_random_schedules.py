"""Schedules drawn at random against a plain loop that follows DESIGN's rules word by word.

``make test`` runs a part of them; all thousand: ``make full``.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import taskgroup as tg

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}
DECAY = 0.3


@dataclasses.dataclass(frozen=True)
class Step:
    """What the loop does with one group it is handed."""

    skip: str  # "", "before" or "after" its loss
    takes_step: bool  # else as a GradScaler does that found an infinity
    leave: bool  # the batch, after it


@dataclasses.dataclass(frozen=True)
class Schedule:
    n_tasks: int
    grouping: str  # or the labels of a fixed partition
    warmup: int
    regroup_every: int
    groups_per_batch: int | None
    observe_every: int
    reduction: str
    weights: tuple | None
    noise: str  # of dropout: none, "replayed" in every step of a batch, or "fresh"
    optimizer: str
    call: str  # "model" with the group, "plain" or "stacked"
    outside: str | None  # of attach()
    shares: tuple  # of the micro-batches of a step
    seed: int
    present: tuple  # for each batch a set of tasks, or None for iter()
    steps: tuple  # what is done with the groups, over and over
    resume: int  # after how many batches it is saved and loaded into another


@st.composite
def schedules(draw):
    n_tasks = draw(st.integers(1, 5))
    tasks = list(range(n_tasks))
    labels = draw(st.lists(st.integers(0, 2), min_size=n_tasks, max_size=n_tasks))
    step = st.builds(
        Step,
        skip=st.sampled_from(["", "", "", "", "before", "after"]),
        takes_step=st.sampled_from([True, True, True, False]),
        leave=st.sampled_from([False] * 7 + [True]),
    )
    present = st.one_of(st.none(), st.none(), st.frozensets(st.sampled_from(tasks)))
    return Schedule(
        n_tasks=n_tasks,
        grouping=draw(st.sampled_from(["learned", "learned", "together", "singletons", labels])),
        warmup=draw(st.integers(0, 3)),
        regroup_every=draw(st.integers(1, 4)),
        groups_per_batch=draw(st.one_of(st.none(), st.integers(1, 3))),
        observe_every=draw(st.integers(1, 3)),
        reduction=draw(st.sampled_from(["sum", "mean"])),
        weights=draw(st.one_of(st.none(), st.tuples(*[st.floats(0.25, 4) for _ in tasks]))),
        noise=draw(st.sampled_from(["fresh", "replayed", ""])),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        call=draw(st.sampled_from(["model", "plain", "stacked"])),
        outside=draw(st.sampled_from([None, "hold", "coast"])),
        shares=draw(st.sampled_from([(1.0,), (0.25, 0.75)])),
        seed=draw(st.integers(0, 99)),
        present=tuple(draw(st.lists(present, min_size=3, max_size=8))),
        steps=tuple(draw(st.lists(step, min_size=1, max_size=7))),
        resume=draw(st.integers(1, 8)),
    )


# What both loops train.


def names(schedule):
    return [f"t{k}" for k in range(schedule.n_tasks)]


def make_model(schedule):
    torch.manual_seed(schedule.seed)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4 if schedule.noise else 0.0))
    heads = {task: nn.Linear(4, 1) for task in names(schedule)}
    return tg.MultiTaskModel(encoder, heads).double()


def micro_batches(schedule, n):
    generator = torch.Generator().manual_seed(1000 * schedule.seed + n)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(4, schedule.n_tasks, generator=generator, dtype=torch.float64)
    parts = len(schedule.shares)
    return list(zip(x.chunk(parts), y.chunk(parts), schedule.shares, strict=True))


def loss_of(output, target):
    return (output[:, 0] - target).square().mean() + 0.2


def by_threshold(matrix):
    """Labels: tasks are together where they serve each other."""
    n_tasks = len(matrix)
    labels = list(range(n_tasks))
    for i in range(n_tasks):
        for k in range(i):
            if matrix[i, k] + matrix[k, i] > 0:
                old, new = labels[i], labels[k]
                labels = [new if label == old else label for label in labels]
    return labels


# The loop as a user writes it.


def run(schedule):
    tasks = names(schedule)
    model = make_model(schedule)
    optimizer = OPTIMIZERS[schedule.optimizer](model.parameters())
    seen = []  # what the grouping was given

    def learned(matrix):
        seen.append(matrix.clone())
        return torch.tensor(by_threshold(matrix))

    def make_groups():
        if schedule.grouping == "learned":
            grouping = learned
        elif schedule.grouping == "together":
            grouping = tg.Together()
        elif schedule.grouping == "singletons":
            grouping = tg.Singletons()
        else:
            members = {}
            for task, label in zip(tasks, schedule.grouping, strict=True):
                members.setdefault(label, []).append(task)
            grouping = tg.Fixed(list(members.values()))
        groups = tg.TaskGroups(
            tasks,
            weights=schedule.weights,
            affinity=tg.ProximalAffinity(decay=DECAY),
            grouping=grouping,
            warmup=schedule.warmup,
            regroup_every=schedule.regroup_every,
            groups_per_batch=schedule.groups_per_batch,
            observe_every=schedule.observe_every,
            reduction=schedule.reduction,
            replay_rng=schedule.noise != "fresh",
            seed=schedule.seed,
        )
        handle = None
        if schedule.outside is not None:
            handle = groups.attach(optimizer, model.heads, schedule.outside)
        return groups, handle

    groups, handle = make_groups()
    trace = []
    done = 0
    for n, present in enumerate(schedule.present):
        torch.manual_seed(n)
        if n == schedule.resume:
            state = groups.state_dict()
            if handle is not None:
                handle.remove()
            groups, handle = make_groups()
            groups.load_state_dict(state)
        for group in groups if present is None else groups.batch([tasks[k] for k in present]):
            step = schedule.steps[done % len(schedule.steps)]
            done += 1
            trace.append((group.tasks, set(group.observed), group.first, group.last))
            if step.skip == "before":
                group.skip()
                continue
            optimizer.zero_grad()
            for x, y, share in micro_batches(schedule, n):
                outputs = model(x, group=group) if schedule.call == "model" else model(x)
                losses = {t: loss_of(outputs[t], y[:, tasks.index(t)]) for t in outputs}
                if schedule.call == "stacked":
                    losses = torch.stack([losses[task] for task in tasks])
                group.loss(losses, share=share).backward()
            if step.skip == "after":
                group.skip()
                continue
            if step.takes_step:
                optimizer.step()
            if step.leave:
                break
        trace.append(([*groups.partition], groups.affinity.matrix.clone()))
    return trace, [p.detach() for p in model.parameters()], seen


# The same, from the rules alone.


class Reference:
    def __init__(self, schedule, seen):
        self.schedule = schedule
        self.tasks = names(schedule)
        self.seen = iter(seen)
        self.everyone = list(range(schedule.n_tasks))
        self.affinity = torch.zeros(schedule.n_tasks, schedule.n_tasks, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.queue = []
        self.rounds = self.done = 0
        self.since = dict.fromkeys(self.everyone, schedule.observe_every - 1)
        if schedule.grouping == "together":
            self.partition = [self.everyone]
        elif schedule.grouping in ("learned", "singletons"):
            self.partition = [[k] for k in self.everyone]
        else:
            self.partition = self.grouped(schedule.grouping)
        self.learns = schedule.grouping == "learned" and schedule.n_tasks > 1
        self.model = make_model(schedule)
        self.optimizer = OPTIMIZERS[schedule.optimizer](self.model.parameters())
        self.trace = []

    def grouped(self, labels):
        members = {}
        for k, label in enumerate(labels):
            members.setdefault(label, []).append(k)
        return list(members.values())

    def run(self):
        for n, present in enumerate(self.schedule.present):
            torch.manual_seed(n)
            here = self.everyone if present is None else sorted(present)
            if here:
                self.batch(n, here)
            partition = [tuple(self.tasks[k] for k in group) for group in self.partition]
            self.trace.append((partition, self.affinity.clone()))
        return self.trace, [p.detach() for p in self.model.parameters()]

    def deal(self, here, observes):
        """Rule 1: the groups of one batch."""
        dealt = []
        while not dealt:
            if not self.queue:
                late = self.rounds - self.schedule.warmup
                if self.learns and late >= 0 and late % self.schedule.regroup_every == 0:
                    given = next(self.seen)
                    torch.testing.assert_close(given.double(), self.affinity, rtol=1e-4, atol=1e-6)
                    self.partition = self.grouped(by_threshold(given))
                self.rounds += 1
                order = torch.randperm(len(self.partition), generator=self.generator)
                self.queue = [self.partition[i] for i in order]
            while self.queue and len(dealt) != self.schedule.groups_per_batch:
                group = [k for k in self.queue.pop(0) if k in here]
                if group:
                    dealt.append(group)
        if observes and self.learns and len(dealt) == 1:
            dealt.append(self.second(dealt[0], here))
        return dealt

    def second(self, first, here):
        while self.queue:
            group = [k for k in self.queue.pop(0) if k in here]
            if group:
                return group
        others = [[k for k in group if k in here] for group in self.partition]
        others = [group for group in others if group and group != first]
        if not others:
            return first
        return others[torch.randint(len(others), (), generator=self.generator)]

    def batch(self, n, here):
        schedule = self.schedule
        observes = False
        if len(here) > 1:  # every task is due in every so many of its own batches
            self.since = {k: self.since[k] + (k in here) for k in self.everyone}
            observes = any(self.since[k] >= schedule.observe_every for k in here)
        dealt = self.deal(here, observes)
        observes = observes and len(dealt) > 1
        if observes:
            self.since |= dict.fromkeys(here, 0)
        state = torch.get_rng_state()
        before = None  # the group stepped on last, and the losses before
        for place, group in enumerate(dealt):
            if schedule.noise == "replayed":
                torch.set_rng_state(state)
            step = schedule.steps[self.done % len(schedule.steps)]
            self.done += 1
            needed = here if observes else group
            self.trace.append(
                (
                    tuple(self.tasks[k] for k in group),
                    {self.tasks[k] for k in needed},
                    place == 0,
                    place == len(dealt) - 1,
                )
            )
            if step.skip == "before":
                continue
            losses = self.backward(n, group, needed)
            if observes:
                if before is not None:
                    self.observe(*before, losses)
                before = (group, losses)
            if step.skip == "after":
                before = None
                continue
            if step.takes_step:
                self.optimizer.step()
            if step.leave:
                break

    def backward(self, n, group, needed):
        """The gradients of the weighted sum or mean; returns the losses."""
        schedule = self.schedule
        model = self.model
        weights = schedule.weights or [1.0] * schedule.n_tasks
        total = 0.0
        losses = [0.0] * schedule.n_tasks
        for x, y, share in micro_batches(schedule, n):
            features = model.encoder(x)
            for k, task in enumerate(self.tasks):
                loss = share * loss_of(model.heads[task](features), y[:, k])
                losses[k] += loss.item()
                if k in group:
                    total = total + weights[k] * loss
        if schedule.reduction == "mean":
            total = total / len(group)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        held = schedule.outside == "hold" or (
            schedule.outside is None and schedule.call != "stacked"
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None and not held:
                gradient = torch.zeros_like(parameter)
            parameter.grad = gradient
        return [loss if k in needed else math.nan for k, loss in enumerate(losses)]

    def observe(self, group, before, after):
        """Rule 3."""
        ratio = {}
        moved = False
        for k in self.everyone:
            if math.isfinite(before[k]) and before[k] > 0 and math.isfinite(after[k]):
                ratio[k] = max(-1.0, min(1.0, 1 - after[k] / before[k])) / len(group)
                moved = moved or after[k] != before[k]
        if not moved:
            return
        for i in group:
            for k in self.everyone:
                if k not in ratio or i not in ratio:
                    continue
                if k not in group:
                    observed = ratio[k]
                elif k == i:
                    if ratio[i] < 0:
                        continue
                    observed = ratio[i]
                elif ratio[i] * ratio[k] >= 0:
                    observed = ratio[k]
                else:
                    observed = -max(ratio[i], ratio[k])
                self.affinity[i, k] = (1 - DECAY) * self.affinity[i, k] + DECAY * observed


def check(schedule):
    trace, parameters, seen = run(schedule)
    expected, expected_parameters = Reference(schedule, seen).run()
    assert len(trace) == len(expected)
    for got, wanted in zip(trace, expected, strict=True):
        if len(got) == 4:
            assert got == wanted
        else:
            assert got[0] == wanted[0]
            torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-4, atol=1e-6)
    for got, wanted in zip(parameters, expected_parameters, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


options = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@settings(options, max_examples=150, derandomize=True)
@given(schedules())
def test_some_schedules(schedule):
    check(schedule)


@pytest.mark.full
@settings(options, max_examples=1000)
@given(schedules())
def test_a_thousand_schedules(schedule):
    check(schedule)
