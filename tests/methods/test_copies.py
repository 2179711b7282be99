"""Joint methods that are copied, pickled and sent to another process, and under other defaults."""

import copy
import pickle
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.methods.problems import NAMES, Model, made, tasks_of


def step(model, method, optimizer, k, observe=True):
    """One step on batch k; the weights."""
    torch.manual_seed(k)
    x = model.x + 0.1 * k
    optimizer.zero_grad()
    weights = method.backward(model.losses(x))
    optimizer.step()
    if method.observes_step and observe:
        with torch.no_grad():
            method.observe(model.losses(x))
    return weights


def training(name):
    model = Model(3)
    method = made(name, model)
    optimizer = torch.optim.Adam([*model.parameters(), *method.parameters()], lr=0.05)
    return model, method, optimizer


def proceed(model, method, optimizer):
    """Three steps more, the first of which was perhaps not observed."""
    if method.state_dict().get("open"):
        method.observe(model.losses(model.x))
    weights = [step(model, method, optimizer, 10 + k) for k in range(3)]
    return [w.tolist() for w in [*weights, *model.parameters(), *method.parameters()]]


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda it: pickle.loads(pickle.dumps(it))}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_on_as_the_original(name, after, way):
    """To the bit, and neither moves the other."""
    original = training(name)
    for k in range(after):
        step(*original, k, observe=k < after - 1)  # in the middle of a step
    copied = COPIES[way](original)
    other = copy.deepcopy(original)
    found = proceed(*copied)
    assert proceed(*original) == found
    assert proceed(*other) == found
    names = {id(p) for p in original[0].parameters()}
    assert not any(id(p) in names for p in copied[1]._shared)
    assert all(p in set(copied[0].parameters()) for p in copied[1]._shared)


def _in_another_process(trainings, queue):
    try:
        queue.put({name: proceed(*own) for name, own in trainings.items()})
    except Exception as error:  # the test is to show it, not to wait
        queue.put(error)
        raise


def test_a_spawned_process_goes_on():
    """All methods in one process: it takes seconds to start."""
    trainings = {name: training(name) for name in NAMES}
    for own in trainings.values():
        for k in range(2):
            step(*own, k, observe=k == 0)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_in_another_process, args=(copy.deepcopy(trainings), queue))
    process.start()
    found = queue.get()
    process.join()
    assert not isinstance(found, Exception), found
    for name, own in trainings.items():
        np.testing.assert_allclose(
            np.concatenate([np.ravel(v) for v in found[name]]),
            np.concatenate([np.ravel(v) for v in proceed(*own)]),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", NAMES)
def test_states_are_copies(name):
    own = training(name)
    for k in range(3):
        step(*own, k)
    _, method, _ = own
    learned = method.parameters()
    state = method.state_dict()
    kept = copy.deepcopy(state)
    step(*own, 3)
    assert repr(state) == repr(kept)  # later steps do not change it
    later = copy.deepcopy(method.state_dict())
    spoil(method.state_dict())
    assert repr(method.state_dict()) == repr(later)
    method.load_state_dict(state)
    spoil(state)
    assert repr(method.state_dict()) == repr(kept)
    for before, now in zip(learned, method.parameters(), strict=True):
        assert before is now  # an optimizer holds it


def spoil(state):
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.fill_(7)
        elif isinstance(value, list):
            value.clear()


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tasks_are_plain_strings(name):
    """torch.load(weights_only=True) refuses NumPy's."""
    model = Model(2)
    method = made(name, model, tasks=np.array(tasks_of(2)))
    assert [type(task) for task in method.state_dict()["tasks"]] == [str, str]
    assert method.backward(model.losses(model.x)).isfinite().all()


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "set_default_device": lambda: default_device("meta"),
    "with torch.device": lambda: torch.device("meta"),
}


def weights_and_state(name, model):
    method = made(name, model)
    optimizer = torch.optim.SGD([*model.parameters(), *method.parameters()], lr=0.05)
    weights = [step(model, method, optimizer, k) for k in range(5)]
    state = method.state_dict()
    again = made(name, model)
    again.load_state_dict(state)
    return [*weights, *model.parameters(), *method.parameters()], state


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_torch_change_nothing(name):
    usual, usual_state = weights_and_state(name, Model(3))
    for kind, defaults in DEFAULTS.items():
        model = Model(3)
        with defaults():
            found, state = weights_and_state(name, model)
        for value, expected in zip(found, usual, strict=True):
            assert (value.dtype, value.device) == (expected.dtype, expected.device), kind
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        for key, value in usual_state.items():
            if isinstance(value, torch.Tensor):
                assert (state[key].dtype, state[key].device) == (value.dtype, value.device), kind
