"""One process at a time writes to a folder; a killed one does not keep it."""

import gc
import multiprocessing
import os
import signal

import pytest

from taskgroup.recording import LOCK, hold, is_empty
from tests.processes import PROCESSES


def keep(folder, connection):
    """Hold a folder until the other end says so."""
    try:
        held = hold(folder)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send("held")
    connection.recv()
    del held
    connection.send("left")


def elsewhere(folder, context=PROCESSES):
    """Another process that tries to hold a folder, what it says, and how to talk to it."""
    ours, theirs = context.Pipe()
    process = context.Process(target=keep, args=(folder, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    return process, ours.recv(), ours


def test_a_folder_is_held_by_one_process(tmp_path):
    process, said, talk = elsewhere(tmp_path)
    assert said == "held"
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .*; wait until"):
        hold(tmp_path)
    talk.send("go")
    assert talk.recv() == "left"
    with hold(tmp_path):
        assert (tmp_path / LOCK).exists()
        assert is_empty(tmp_path)
        assert f"{tmp_path} is in use by process {os.getpid()} on" in elsewhere(tmp_path)[1]
    assert not (tmp_path / LOCK).exists()
    process.join()


def test_a_killed_process_does_not_keep_it(tmp_path):
    process, _, _ = elsewhere(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists()
    with hold(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_within_a_process_it_is_shared(tmp_path):
    first = hold(tmp_path)
    second = hold(tmp_path / ".." / tmp_path.name)
    assert second is first
    del first
    gc.collect()
    assert (tmp_path / LOCK).exists()
    del second
    gc.collect()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # torch has threads
def test_a_forked_worker_does_not_keep_it(tmp_path):
    """As of a DataLoader, which outlives a killed parent for a while."""
    held = hold(tmp_path)
    process, said, talk = elsewhere(tmp_path, multiprocessing.get_context("fork"))
    assert "is in use by" in said  # what it inherited is not its own
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"started")
        signal.pause()
    os.read(reading, 7)
    try:
        assert (tmp_path / LOCK).exists()  # it has not removed what it inherited
        del held
        gc.collect()
        process, said, talk = elsewhere(tmp_path)
        assert said == "held"
        talk.send("go")
        process.join()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
