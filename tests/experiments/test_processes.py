"""Two processes on one machine, through gloo: the result of one process, and what happens when something goes wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kunlun_jax.checkpoint import describe
from kunlun_jax.run import CHECKPOINTS

ROOT = Path(__file__).parents[2]
# The quickest model to compile; what is around it is every model's. 90 samples make 6 steps, in 2 epochs 12.
SETTINGS = [
    *("synthetic", "--model", "dcnv2", "--synthetic.train", "90", "--synthetic.validation", "40"),
    *("--synthetic.test", "40", "--synthetic.max-length", "4", "--batch-size", "16", "--epochs", "2", "--shuffle"),
    *("--log-every", "1", "--capacity-fractions", "1.0", "--parallel.data", "2", "--parallel.replicate-below", "0"),
]
STEPS = 12


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "NPROC": "16",
        "PYTHON": sys.executable,
    }


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "experiments/train.py", *map(str, arguments)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def process(environment, index, port, *arguments):
    address = ("--processes.coordinator", f"localhost:{port}")
    return start(environment, *arguments, "--processes.count", 2, "--processes.index", index, *address)


def end(running, seconds):
    output, _ = running.communicate(timeout=seconds)
    # A message in a frame is broken over lines between its sides.
    return running.returncode, " ".join(re.sub("[│╭╮╰╯─]", " ", output).split())


def arrays(out, step):
    """Everything in a checkpoint, by path, wherever it was written."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = describe(out / CHECKPOINTS, step).arrays
    target = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=here) for path, (shape, dtype) in found.items()}
    restored = ocp.StandardCheckpointer().restore((out / CHECKPOINTS / str(step) / "state").absolute(), target)
    return {path: np.asarray(x) for path, x in restored.items()}


def steps(out):
    directory = out / CHECKPOINTS
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal()) if directory.is_dir() else []


def wait_for(condition, running):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.02)


def test_a_killed_process_ends_the_other_whichever_it_was_and_both_can_go_on(environment, tmp_path):
    out = tmp_path / "killed"
    long = (*SETTINGS, "--epochs", "2000", "--save-every", "4", "--out", out)

    def both(*arguments):
        port = free_port()
        return [process(environment, index, port, *long, *arguments) for index in (0, 1)]

    last = 0
    for killed, reason in ((0, "process 0, the coordinator, "), (1, "process 1 has given no sign of life")):
        two = both("--resume")
        wait_for(lambda last=last: (steps(out) or [0])[-1] > last, two[0])
        two[killed].send_signal(signal.SIGKILL)
        code, output = end(two[1 - killed], 60)
        assert code != 0, output
        others = rf"error: process {1 - killed}: (an exchange failed|it was killed, or aborted.*; process 0, |{reason})"
        assert re.search(others, output), output
        assert "start all processes again with --resume" in output
        _, output = end(two[killed], 60)
        assert f"error: process {killed}: it was killed" in output, output
        last = steps(out)[-1]
        assert all(np.isfinite(x).all() for x in arrays(out, last).values())

    # A signal to one of them stops both at the same step.
    two = both("--resume")
    wait_for(lambda: steps(out)[-1] > last, two[0])
    two[1].send_signal(signal.SIGTERM)
    (code, output), (other, _) = (end(one, 60) for one in two)
    assert (code, other) == (143, 143), output
    assert f"going on after step {last} of" in output
    assert int(re.search(r"stopped by a signal; saved step (\d+)", output)[1]) == steps(out)[-1]


def test_two_processes_end_where_one_with_two_devices_ends(environment, tmp_path):
    launch = ["launch/local.sh", "2", *SETTINGS, "--out", str(tmp_path / "two")]
    launched = subprocess.run(launch, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "error" not in launched.stderr
    one_process = environment | {"JAX_NUM_CPU_DEVICES": "2"}
    code, output = end(start(one_process, *SETTINGS, "--out", tmp_path / "one"), 200)
    assert code == 0, output
    two, one = (arrays(tmp_path / name, STEPS) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-3, atol=1e-5, err_msg=name)
    two, one = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one"))
    for part in ("validation", "test"):
        for name in [name for name in one[part] if "/" in name]:
            np.testing.assert_allclose(two[part][name], one[part][name], rtol=1e-3, err_msg=f"{part} {name}")
    assert two["test"]["click/samples"] == 40
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))

    # What only process 0 sees stops both.
    again = subprocess.run(launch, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=100)
    assert again.returncode == 1
    assert again.stderr.count("two already holds a run") == 2, again.stderr


def test_settings_that_do_not_fit_end_with_one_clear_error(environment, tmp_path):
    code, output = end(start(environment, *SETTINGS, "--out", tmp_path / "run"), 60)
    assert code == 1
    assert "takes 2 devices; there are 1 in 1 process" in output
    assert "Traceback" not in output
