"""What workers are asked before they train, and what is refused."""

import pytest
import torch

import taskgroup as tg
from taskgroup.lab.studies.comparison import Comparison
from taskgroup.lab.studies.presets import Variant
from taskgroup.lab.studies.probe import check_workers, probe
from tests.lab.small import InThisProcess, yeast

HERE = {
    "taskgroup": tg.__version__,
    "torch": "2.10.0",
    "device": "cuda",
    "host": "node1",
    "gpus": ["0"],
    "source": {},
}


def test_a_process_says_what_it_has():
    found = probe(yeast())
    assert (found["taskgroup"], found["device"], found["gpus"]) == (tg.__version__, "cpu", [])
    assert torch.__version__.startswith(found["torch"])
    check_workers(yeast(), {"one": found, "other": dict(found, host="elsewhere")})


def test_workers_alike_are_taken():
    several = {"a": dict(HERE, gpus=["0"]), "b": dict(HERE, gpus=["1"])}
    check_workers(yeast(), several)
    # A single GPU may be shared, and other hosts count their GPUs from 0 as well.
    check_workers(yeast(), {"a": HERE, "b": HERE})
    two = dict(HERE, gpus=["0", "1"])
    check_workers(yeast(), {"a": two, "b": dict(two, host="node2")})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(HERE, taskgroup="0.0.1"), r"b has taskgroup 0\.0\.1, .* the same version everywhere"),
        (dict(HERE, torch="2.9.0"), r"a has torch 2\.10\.0, and b has 2\.9\.0"),
        (dict(HERE, device="cpu", gpus=[]), "a trains on cuda, and b on cpu; .* device=cpu"),
        (ModuleNotFoundError("No module named 'mine'"), "b cannot train yeast: No module .* code"),
        (KeyError(), r"b cannot train yeast: KeyError\(\)"),
    ],
)
def test_workers_that_differ_are_refused(other, said):
    with pytest.raises(RuntimeError, match=said):
        check_workers(yeast(), {"a": HERE, "b": other})


def test_workers_that_would_share_one_of_several_gpus_are_refused():
    two = dict(HERE, gpus=["0", "1"])
    with pytest.raises(RuntimeError, match=r"a and c on node1 see the same 2 GPUs .* cuda worker"):
        check_workers(yeast(), {"a": two, "b": dict(two, host="node2"), "c": two})


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"device": "cuda"}, "A worker cannot train yeast: device: cuda needs a GPU")],
)
def test_an_executor_is_asked_before_anything_is_trained(changes, said, tmp_path, trained):
    gd = Variant("gd", "GD", {"method": "gd"})
    compared = Comparison(yeast(**changes), [gd], 1, tmp_path, budgets=["batches"])
    with pytest.raises(RuntimeError, match=said):
        compared.run(executor=InThisProcess())
    assert trained == []
