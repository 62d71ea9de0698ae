"""How processes find each other and agree; real ones run in tests/experiments/test_processes.py."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from kunlun_jax import processes
from kunlun_jax.processes import ProcessConfig, Vote, _meet, first_on_one, gather
from kunlun_jax.sharding import ParallelConfig, make_mesh


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def meet(*settings, patience=5):
    """What becomes of processes with these (index, count), each in a thread: None or its error."""
    address = f"localhost:{free_port()}"

    def one(setting):
        index, count = setting
        try:
            _meet(ProcessConfig(count, index, address, patience))
        except ConnectionError as error:
            return str(error)

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(one, settings))


def test_processes_that_are_complete_meet():
    assert meet((1, 3), (0, 3), (2, 3)) == [None] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([(0, 3), (1, 3), (1, 3)], "there are two processes with index 1. Start 3 processes, each index once"),
        ([(0, 2), (1, 3)], "process 1 expects 3 processes, process 0 expects 2"),
    ],
)
def test_processes_that_do_not_fit_together_all_say_why(settings, message):
    answers = meet(*settings)
    for (index, count), answer in zip(settings, answers, strict=True):
        assert answer.startswith(f"process {index}: {message.split('. Start')[0]}. Start {count} processes")


def test_processes_that_do_not_come_are_named():
    (alone,) = meet((0, 3), patience=1)
    assert "process 0: processes [1, 2] of 3 did not come within 1 s" in alone
    (lost,) = meet((1, 2), patience=1)
    assert "process 1: process 0 did not answer at localhost:" in lost
    port = free_port()
    with socket.create_server(("", port)), pytest.raises(ConnectionError, match=rf"port {port} can't be used here"):
        _meet(ProcessConfig(2, 0, f"localhost:{port}", 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 2, "index": 2}, r"processes.index is 2, but the launcher promised 2 process\(es\)"),
        ({"count": 2}, r"processes.coordinator: 2 processes need the host:port of process 0, got None"),
        ({"count": 2, "coordinator": "host"}, r"got 'host'"),
        ({"count": 0}, r"count 0 and patience 50 must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ProcessConfig(**settings)


def test_one_process_agrees_with_itself():
    assert gather({"a": 1}) == [{"a": 1}]
    assert first_on_one(lambda: 3) == 3
    for vote in (Vote(None), Vote(make_mesh(ParallelConfig(data=2)))):
        assert [vote(np.bool_(hand)) for hand in (False, True)] == [False, True]


def last_words(index, coordinator, said=b""):
    """What is said beside a process that is gone after it wrote `said` to the pipe."""
    program = Path(processes.__file__).with_name("last_words.py")
    command = [sys.executable, "-S", "-E", str(program), str(index), coordinator, "Start again"]
    done = subprocess.run(command, input=said, stderr=subprocess.PIPE, timeout=20)
    assert done.returncode == 0
    return done.stderr.decode().strip()


def test_a_process_that_is_gone_without_a_word_is_spoken_for():
    with socket.create_server(("localhost", 0)) as server:
        coordinator = f"localhost:{server.getsockname()[1]}"
        gone = "error: process {}: it was killed, or aborted for what stands above{}. Start again"
        assert last_words(1, coordinator) == gone.format(1, "")
        assert last_words(1, coordinator, b".") == ""
    lost = f"; process 0, the coordinator, has ended or can't be reached at {coordinator}"
    assert last_words(1, coordinator) == gone.format(1, lost)
    assert last_words(0, coordinator) == gone.format(0, "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: connection closed by peer"), True),
        (ValueError("batch_size 5 doesn't divide over 2 devices"), False),
        (ValueError("INTERNAL: Error writing \"w\" at local file:\nInput/output error [os_error_code='5']"), False),
        (None, False),
    ],
)
def test_a_failed_exchange_is_told_from_other_errors(error, expected, monkeypatch):
    assert not processes.failed_exchange(error)  # alone there is nobody to exchange with
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    assert processes.failed_exchange(error) == expected
