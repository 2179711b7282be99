"""A trainer may save in the handler of a signal, at whatever line the loop is."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import taskgroup as tg
from tests.states import assert_same

TASKS = ["a", "b", "c"]
SETTINGS = {
    "default": dict,
    "random": lambda: {"grouping": tg.RandomGroups(2)},
    "gradients": lambda: {"gradients": True},
    "now and then": lambda: {"observe_every": 2, "groups_per_batch": 2},
    **{name: functools.partial(dict, method=name) for name in ("rlw", "dwa", "famo")},
}


class Toy:
    def __init__(self, **settings):
        self.x = torch.zeros(2, requires_grad=True)
        if method := settings.pop("method", None):
            options = {"epoch": 3} if method == "dwa" else {}
            settings["weights"] = tg.methods.find(method)([self.x], TASKS, **options)
        if settings.pop("gradients", False):
            settings["affinity"] = tg.GradientAffinity([self.x], decay=0.3, sample=2)
        settings.setdefault("affinity", tg.ProximalAffinity(decay=0.3))
        self.groups = tg.TaskGroups(TASKS, warmup=2, seed=1, **settings)

    def train(self, batches, at=None, do=None):
        """At group ``at`` of the last batch, ``do`` something before and after its loss."""
        for n in range(batches):
            for place, group in enumerate(self.groups):
                here = n == batches - 1 and place == at
                if here:
                    do()
                losses = {t: (self.x - k).square().sum() for k, t in enumerate(TASKS, 1)}
                (gradient,) = torch.autograd.grad(group.loss(losses), self.x)
                if here:
                    do()
                self.x.data -= 0.01 * gradient


class Handlers:
    """The kinds of handlers that there are."""

    def __init__(self, toy, seen):
        self.toy, self.seen = toy, seen

    def method(self, number, frame):
        self.save()

    def save(self):  # at some depth, as trainers do
        self.seen.append(self.toy.groups.state_dict())

    def __call__(self, number, frame):
        self.save()


@contextlib.contextmanager
def handled(handler):
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("kind", ["function", "method", "object", "partial"])
@pytest.mark.parametrize(
    ("setting", "at"),
    [*((setting, 0) for setting in SETTINGS), *((n, 1) for n in ("default", "random", "famo"))],
)
def test_the_state_in_a_handler_is_that_of_the_last_whole_batch(setting, at, kind):
    toy, seen = Toy(**SETTINGS[setting]()), []
    toy.train(4)
    expected = toy.groups.state_dict()
    handlers = Handlers(toy, seen)
    handler = {
        "function": lambda number, frame: handlers.save(),
        "method": handlers.method,
        "object": handlers,
        "partial": functools.partial(Handlers.method, handlers),
    }[kind]
    with handled(handler) as send:
        toy.train(1, at=at, do=send)
        toy.train(2)
        assert len(seen) == 2
        for state in seen:
            assert_same(state, expected)
            other = Toy(**SETTINGS[setting]())
            other.groups.load_state_dict(state)
            other.train(3)
        with pytest.raises(RuntimeError, match="inside a batch"):  # not of the loop itself
            toy.train(1, at=0, do=toy.groups.state_dict)


def test_handlers_that_are_not_pythons_are_none():
    toy = Toy()
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        with handled(handler), pytest.raises(RuntimeError, match="inside a batch"):
            toy.train(1, at=1, do=toy.groups.state_dict)


def test_a_run_that_is_told_to_stop_saves_and_goes_on(tmp_path):
    """SIGTERM at a random line: the handler saves, another process goes on from the checkpoint."""
    program = tmp_path / "train.py"
    program.write_text(
        textwrap.dedent(
            """
            import faulthandler, os, signal, sys, threading
            import torch
            import taskgroup as tg

            faulthandler.dump_traceback_later(100, exit=True)
            path, after = sys.argv[1], float(sys.argv[2])
            x = torch.zeros(2, requires_grad=True)
            groups = tg.TaskGroups(["a", "b", "c"], warmup=2)
            if os.path.exists(path):
                groups.load_state_dict(tg.checkpoint.load(path)["groups"])
                print("batches", groups.state_dict()["batches"])

            def save(number, frame):
                tg.checkpoint.save(path, {"groups": groups.state_dict()})
                os._exit(7)

            signal.signal(signal.SIGTERM, save)
            if after:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM)).start()
            for _ in range(10**9 if after else 3):
                for group in groups:
                    losses = {t: (x - k).square().sum() for k, t in enumerate(groups.tasks, 1)}
                    group.loss(losses).backward()
                    x.data -= 0.001 * x.grad
                    x.grad = None
            """
        )
    )
    path = tmp_path / "checkpoint.pt"

    def start(after):
        return subprocess.run(
            [sys.executable, str(program), str(path), str(after)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    ended = start(0.5)
    assert ended.returncode == 7, ended.stderr
    ended = start(0)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[1]) > 10
