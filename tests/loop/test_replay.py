"""Every forward from the same random state, on any kind of device."""

import copy
import pickle
import types

import pytest
import torch

from taskgroup._random_state import RandomState


class Accelerator(types.SimpleNamespace):
    """In the place of ``torch.xpu``: a generator for each of two devices."""

    def __init__(self, **more):
        states = {0: torch.tensor([0]), 1: torch.tensor([10])}
        super().__init__(
            states=states,
            get_rng_state=lambda device: states[device.index].clone(),
            set_rng_state=lambda state, device: states.update({device.index: state.clone()}),
            **more,
        )


@pytest.fixture
def use(monkeypatch):
    def start(module):
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu")
        )
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
        return module

    return start


def drawn(state):
    state.replay()
    return torch.rand(3, device="cpu")


@pytest.mark.parametrize("device", [None, torch.device("cpu"), torch.device("meta")])
def test_the_generator_of_the_cpu(device):
    state = RandomState(device)
    first = torch.rand(3)
    assert torch.equal(drawn(state), first)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(drawn(other), first)


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_under_another_default(default):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(default):
            state = RandomState(None)
            first = torch.rand(3, device="cpu")
            assert torch.equal(drawn(state), first)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("device", "moved"),
    [(torch.device("xpu", 0), 0), (torch.device("xpu", 1), 1), (None, 1)],
)
def test_the_generator_of_the_device_that_is_named_or_current(use, device, moved):
    module = use(Accelerator(is_initialized=lambda: True))
    state = RandomState(device)
    module.states.update({0: torch.tensor([7]), 1: torch.tensor([7])})
    state.replay()
    assert module.states[moved] == [0, 10][moved]
    assert module.states[1 - moved] == 7


def test_a_device_that_is_not_used_is_not_started(use):
    module = use(Accelerator(is_initialized=lambda: False))
    module.get_rng_state = None
    RandomState(None).replay()


def test_a_device_without_a_question_whether_it_is_started(use):
    """As torch.mps."""
    module = use(Accelerator())
    state = RandomState(None)
    module.states[1] = torch.tensor([7])
    state.replay()
    assert module.states[1] == 10


def test_a_device_without_a_generator(use):
    use(types.SimpleNamespace())
    RandomState(torch.device("xpu", 0)).replay()
