"""Several processes that train one model: how they find each other, agree, and notice that one of them has died.

Every process runs the same command, computes its own devices' part and feeds its own batch shards. Process 0 also
writes the log and the summary. All must see the same directory for checkpoints.

A process that dies leaves the others waiting inside an exchange, which some back ends never give up. So each process
leaves a sign of life with the coordinator every few seconds, and ends itself with a clear error when another's stops.
Where the coordinator itself, process 0, dies, JAX's runtime aborts the others at once; `last_words` then speaks for
them.
"""

import atexit
import contextlib
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from kunlun_jax.sharding import BATCH, REPLICATED, own_shards

SIGN_OF_LIFE = 2.0  # seconds between two
SILENCE = 25.0  # seconds without a new one after which a process counts as dead
_ALIVE = "kunlun_jax/alive"


@dataclass(frozen=True)
class ProcessConfig:
    """This process among those that train together. The default is one process alone.

    Attributes:
      count: of processes.
      index: of this one, from 0.
      coordinator: host:port of process 0, reachable by all; the port must be free there.
      patience: seconds to wait for all processes at the start.

    Raises:
      ValueError: numbers don't fit together: among them an index beyond what the launcher promised.
    """

    count: int = 1
    index: int = 0
    coordinator: str | None = None
    patience: int = 50

    def __post_init__(self):
        if self.count < 1 or self.patience < 1:
            raise ValueError(f"processes: count {self.count} and patience {self.patience} must be at least 1")
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"processes.index is {self.index}, but the launcher promised {self.count} process(es), numbered from "
                f"0; start fewer processes, or raise processes.count for all of them"
            )
        if self.count > 1 and (self.coordinator is None or not self.coordinator.rpartition(":")[2].isdecimal()):
            raise ValueError(
                f"processes.coordinator: {self.count} processes need the host:port of process 0, got "
                f"{self.coordinator!r}"
            )


def start(config: ProcessConfig) -> None:
    """Join the other processes; call it before anything asks JAX for a device. One process alone needs nothing.

    Raises:
      ConnectionError: not all processes came in time, two have the same index, or they expect different numbers.
    """
    if config.count == 1:
        return
    _meet(config)
    _leave_last_words(config)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, by which a run saves and stops
    jax.distributed.initialize(
        config.coordinator,
        config.count,
        config.index,
        # All devices that this process sees are its own, whatever a cluster's environment would suggest.
        cluster_detection_method="deactivate",
        initialization_timeout=config.patience,
        # Later than our own sign of life, whose error is clearer.
        heartbeat_timeout_seconds=int(2 * SILENCE),
    )
    threading.Thread(target=_watch, args=(config,), daemon=True).start()


def _meet(config: ProcessConfig) -> None:
    """Count heads at the coordinator's address before JAX takes it over, which aborts without a word to the user."""
    host, _, port = config.coordinator.rpartition(":")  # type: ignore[union-attr]
    deadline = time.monotonic() + config.patience
    if config.index == 0:
        problem = _count_heads(config, int(port), deadline)
    else:
        problem = _report_to((host.strip("[]"), int(port)), config, deadline)
    if problem:
        raise ConnectionError(f"process {config.index}: {problem}. Start {config.count} processes, each index once")


def _count_heads(config: ProcessConfig, port: int, deadline: float) -> str | None:
    """Process 0's part: wait for the others and tell them all what is wrong, if anything is."""
    present: dict[int, socket.socket] = {}
    others, problem = [], None
    try:
        with socket.create_server(("", port)) as server:
            while problem is None and len(present) < config.count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    other, _ = server.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, config.count)) - present.keys())
                    problem = f"processes {missing} of {config.count} did not come within {config.patience} s"
                    break
                others.append(other)
                other.settimeout(5)
                with contextlib.suppress(OSError, ValueError):  # whoever speaks otherwise is none of us
                    index, count = (int(x) for x in other.recv(64).split())
                    if count != config.count:
                        problem = f"process {index} expects {count} processes, process 0 expects {config.count}"
                    elif index in present:
                        problem = f"there are two processes with index {index}"
                    present[index] = other
    except OSError as error:
        problem = f"port {port} can't be used here ({error}); choose another in processes.coordinator"
    for other in others:
        with contextlib.suppress(OSError):
            other.sendall((problem or "welcome").encode())
        other.close()
    return problem


def _report_to(address: tuple[str, int], config: ProcessConfig, deadline: float) -> str | None:
    while True:
        try:
            with socket.create_connection(address, timeout=5) as coordinator:
                coordinator.sendall(f"{config.index} {config.count}\n".encode())
                coordinator.settimeout(max(deadline + 5 - time.monotonic(), 1))
                answer = coordinator.recv(1000).decode(errors="replace")
            return None if answer == "welcome" else answer or "process 0 has ended"
        except OSError as error:
            if time.monotonic() > deadline:
                return f"process 0 did not answer at {config.coordinator} within {config.patience} s ({error})"
            time.sleep(0.2)


_ended = threading.Event()
_beside: list[subprocess.Popen] = []  # what speaks for this process if it can't


def _leave_last_words(config: ProcessConfig) -> None:
    program = [sys.executable, "-S", "-E", str(Path(__file__).with_name("last_words.py"))]
    arguments = [str(config.index), str(config.coordinator), HOW_TO_GO_ON]
    _beside.append(subprocess.Popen([*program, *arguments], stdin=subprocess.PIPE))
    atexit.register(_no_last_words)


def _no_last_words() -> None:
    """This process ends in an orderly way, and has said what there is to say."""
    while _beside:
        with contextlib.suppress(OSError):
            _beside.pop().communicate(b".")


def finish() -> None:
    """Leave in peace: wait for the others, so that nobody takes this process for dead."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("finish")
        _ended.set()
        jax.distributed.shutdown()


def end(code: int) -> int:
    """The exit code after an error. One of several processes ends here and now: on its way out JAX would wait for the
    others, who notice the missing sign of life and end as well."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        _no_last_words()
        os._exit(code)
    return code


def _watch(config: ProcessConfig) -> None:
    client: Any = distributed.global_state.client  # the only key-value store that all processes share
    beats: dict[str, tuple[str, float]] = {}
    count = 0
    while not _ended.wait(SIGN_OF_LIFE):
        count += 1
        try:
            client.key_value_set(f"{_ALIVE}/{config.index}", str(count), allow_overwrite=True)
            seen = dict(client.key_value_dir_get(_ALIVE))
        except Exception as error:  # whatever it is: a watch that ends silently is worse than none
            _give_up(config, f"process 0, the coordinator, does not answer ({str(error).splitlines()[0]})")
            return
        now = time.monotonic()
        for index in range(config.count):
            key = f"{_ALIVE}/{index}"
            value = seen.get(key, "")
            if beats.get(key, (None, 0.0))[0] != value:
                beats[key] = (value, now)
            elif now - beats[key][1] > SILENCE:
                _give_up(config, f"process {index} has given no sign of life for {SILENCE:.0f} s")
                return


def _give_up(config: ProcessConfig, reason: str) -> None:
    if not _ended.is_set():
        print(f"\nerror: process {config.index}: {reason}. {HOW_TO_GO_ON}", file=sys.stderr)
        end(1)


def failed_exchange(error: BaseException | None) -> bool:
    """Is this what JAX raises where an exchange with another process breaks off?

    A ValueError, too, where the failure reaches Python with an array's values; such a message begins with a status.
    So does that of a file that can't be written, which also gives the operating system's code.
    """
    if jax.process_count() == 1:
        return False
    status = re.match(r"(ABORTED|INTERNAL|UNAVAILABLE|UNKNOWN): (?!.*os_error_code)", str(error), re.DOTALL)
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and status is not None)


HOW_TO_GO_ON = (
    "Another process has probably ended; its own output says why. The last checkpoint is untouched: start all "
    "processes again with --resume"
)


def gather(value: Any) -> list[Any]:
    """The value of every process, by index, on every process. All must call it at the same point."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)  # only ever exchanged among processes of one run
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first_on_one[T](function: Callable[[], T]) -> T:
    """Call `function` on process 0 and then on the others, so that they find its files; all fail if the first does."""
    if jax.process_count() == 1:
        return function()
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except (OSError, ValueError) as error:
            problem = error
    if (failed := gather(problem and str(problem))[0]) is not None:
        raise problem or ValueError(f"process 0: {failed}")
    return result if jax.process_index() == 0 else function()  # type: ignore[return-value]


class Vote:
    """Whether any process has raised its hand, told to all at the same step: one call late, so that nobody waits."""

    def __init__(self, mesh: Mesh | None):
        self._mesh, self._pending = mesh, None
        if mesh is not None and len(own_shards(mesh)) < mesh.size:
            self._sharding = NamedSharding(mesh, BATCH)
            self._any = jax.jit(lambda x: x.any(), out_shardings=NamedSharding(mesh, REPLICATED))
        else:
            self._mesh = None

    def __call__(self, hand: bool) -> bool:
        if self._mesh is None:
            return hand
        before = self._pending
        flags = jax.make_array_from_callback((self._mesh.size,), self._sharding, lambda _: np.array([hand]))
        self._pending = self._any(flags)
        return before is not None and bool(before)
