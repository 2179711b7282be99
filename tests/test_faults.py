"""Killed runs resume exactly, files are complete or unchanged, a dead rank ends the others."""

import contextlib
import os
import re
import resource
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import taskgroup as tg
from tests.processes import PROCESSES
from tests.states import assert_same

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(rank, world, port, folder, epochs):
    """Start examples/ddp.py as torchrun does."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    checkpoint = folder / "checkpoint.pt"
    sys.argv = ["ddp.py", f"--checkpoint={checkpoint}", f"--epochs={epochs}"]
    with (folder / f"rank{rank}.txt").open("a") as log, contextlib.redirect_stdout(log):
        runpy.run_path(str(EXAMPLES / "ddp.py"), run_name="__main__")


def start(world, folder, epochs=5):
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(target=example, args=(rank, world, port, folder, epochs), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def wait_for(processes):
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.002)


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def epochs_done(folder):
    return state_of(folder)["epochs"] if (folder / "checkpoint.pt").exists() else 0


@pytest.mark.parametrize("world", [1, 2])
def test_killed_runs_go_on_as_if_nothing_had_been(world, tmp_path):
    """Send SIGKILL at random moments until a run completes."""
    wait_for(start(world, tmp_path / "whole"))
    draw = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
    killed = tmp_path / "killed"
    for _ in range(2):
        # Once it has got on a little, somewhere in the middle of a batch or of a checkpoint.
        beyond = epochs_done(killed) + int(torch.randint(2, (), generator=draw))
        processes = start(world, killed)
        wait_until(lambda beyond=beyond: epochs_done(killed) > beyond)
        time.sleep(0.1 * torch.rand((), generator=draw).item())
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    wait_for(start(world, killed))
    assert_same(state_of(killed), state_of(tmp_path / "whole"))


def test_a_dead_rank_ends_the_others(tmp_path):
    """The other ranks end soon, with an error."""
    alive, dying = start(2, tmp_path, epochs=100_000)
    wait_until((tmp_path / "checkpoint.pt").exists)
    dying.kill()
    alive.join(30)
    assert alive.exitcode not in (None, 0)


# Written when Python is about to end: what of gloo runs on may abort the process from then on.
LEFT = """
import atexit, os, sys
sys.path.append({root!r})

def note():
    if "torch" in sys.modules:
        from tests.ranks import gloo_threads
        with open({file!r}, "a") as file:
            print("left:", *gloo_threads(), file=file)

atexit.register(note)
"""


def test_the_example_as_its_first_lines_say(tmp_path):
    (tmp_path / "site").mkdir()
    left = tmp_path / "left.txt"
    hook = LEFT.format(root=str(EXAMPLES.parent), file=str(left))
    (tmp_path / "site" / "sitecustomize.py").write_text(hook)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        str(EXAMPLES / "ddp.py"),
    ]
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, "--epochs=3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 3: groups \[\('wind'", done.stdout)
    assert tg.checkpoint.load(tmp_path / "runs" / "ddp.pt")["epochs"] == 3
    assert left.read_text().splitlines() == ["left:"] * 3  # two ranks, and what started them


def write_for_ever(path):
    torch.set_num_threads(1)
    for n in range(1_000_000):
        tg.checkpoint.save(path, {"n": n, "tensor": torch.full((200_000,), float(n))})


def test_a_kill_during_the_write_leaves_the_last_good_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    draw = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
    abandoned = 0
    for _ in range(12):
        process = PROCESSES.Process(target=write_for_ever, args=(path,), daemon=True)
        process.start()
        before = path.stat().st_mtime_ns if path.exists() else 0
        wait_until(lambda before=before: path.exists() and path.stat().st_mtime_ns > before)
        time.sleep(0.02 * torch.rand((), generator=draw).item())
        process.kill()
        process.join()
        state = tg.checkpoint.load(path)
        assert torch.equal(state["tensor"], torch.full((200_000,), float(state["n"])))
        abandoned += len(list(tmp_path.glob("*.partial")))
    assert abandoned > 0  # some were hit while they wrote
    tg.checkpoint.save(path, {"n": -1})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk(tmp_path):
    """A limit on the size of files raises the same error at the same place as a full disk."""
    path = tmp_path / "checkpoint.pt"
    tg.checkpoint.save(path, {"n": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint\.pt could not be written \(.+\); .* kept\."):
            tg.checkpoint.save(path, {"n": 2, "tensor": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert tg.checkpoint.load(path) == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be written .*Not a directory"):
        tg.checkpoint.save(tmp_path / "file" / "run" / "checkpoint.pt", {})


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "code", "list", "folder"])
def test_unreadable_checkpoints(damage, tmp_path):
    path = tmp_path / "checkpoint.pt"
    tg.checkpoint.save(path, {"tensor": torch.zeros(1000)})
    whole = path.read_bytes()
    said = r"checkpoint\.pt cannot be read as a checkpoint.+ (R|r)esume from another one"
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "code":
        torch.save({"run": os.getcwd}, path)
    elif damage == "list":
        torch.save([1, 2], path)
        said = "holds a list, not the dict"
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match=said) as caught:
        tg.checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.pt; start without one"):
        tg.checkpoint.load(tmp_path / "nowhere.pt")


def test_nothing_is_left_of_a_write_that_fails_or_is_stopped(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def stop(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tg.checkpoint.write_atomically(path, stop)
    with pytest.raises(TypeError, match=r'state\["a"\] is of type .*function'):
        tg.checkpoint.save(path, {"a": lambda: 0})
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    path = tmp_path / "latest.pt"
    path.symlink_to(tmp_path / "disk" / "run.pt")
    tg.checkpoint.save(path, {"n": 1})
    assert path.is_symlink()
    assert tg.checkpoint.load(tmp_path / "disk" / "run.pt") == {"n": 1}


def test_what_others_write_is_left_alone(tmp_path):
    """Keep partial files of a live process, of another machine, and of another file name."""
    path = tmp_path / "a[1].pt"
    host = socket.gethostname()
    ours = [f"a[1].pt.{host}-{os.getppid()}.partial", "a[1].pt.elsewhere-1.partial"]
    for name in (*ours, f"b.pt.{host}-999999999.partial", f"a[1].pt.{host}-999999999.partial"):
        (tmp_path / name).write_text("")
    tg.checkpoint.save(path, {})
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"a[1].pt", *ours, f"b.pt.{host}-999999999.partial"}
