"""Copies on their way to the host, with an event that needs no GPU."""

import copy
import pickle

import pytest
import torch
from torch.overrides import TorchFunctionMode

from taskgroup.loop.host_copy import HostCopy


class Event:
    """In the place of ``torch.cuda.Event``; of one process, as that."""

    arrived = False

    def record(self, stream):
        pass

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True

    def __reduce__(self):
        raise TypeError("cannot pickle")


class WithoutPinning(TorchFunctionMode):
    """Host memory is pinned only where there is a GPU; whatever the default device is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            assert kwargs["device"] == "cpu"
            assert "dtype" in kwargs
        return function(*args, **kwargs)


@pytest.fixture
def copied(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    values = [torch.tensor([[1.0, 2.0]]), torch.tensor(3.0, dtype=torch.float64)]
    with WithoutPinning():
        return HostCopy(values)


def test_the_values_arrive_in_their_shapes(copied):
    assert not copied.ready()
    first, second = copied.wait()
    assert first.tolist() == [[1.0, 2.0]]
    assert second.tolist() == 3.0
    assert copied.ready()


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
)
def test_a_copy_has_arrived(copied, again):
    other = again(copied)
    assert copied.ready()  # copying has waited
    assert other.ready()
    assert [value.tolist() for value in other.wait()] == [[[1.0, 2.0]], 3.0]
