"""The commands as a user runs them: killed, stopped, resumed, misused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kunlun_jax.config import TrainConfig, from_dict
from kunlun_jax.run import CHECKPOINTS

ROOT = Path(__file__).parents[2]
# 6 steps in each of 2 epochs of a model so small that it compiles in seconds.
SETTINGS = [
    *("--synthetic.train", "300", "--synthetic.validation", "100", "--synthetic.test", "100"),
    *("--synthetic.max-length", "8", "--batch-size", "50", "--epochs", "2", "--shuffle"),
    *("--log-every", "1", "--save-every", "4", "--capacity-fractions", "1.0"),
    *("--model.depth", "1", "--model.events.clicked.depth", "1", "--model.events.viewed.depth", "1"),
]
STEPS = 12


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("compiled")  # the runs differ in nothing that is compiled
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }


def start(environment, script, *arguments):
    command = [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(environment, script, *arguments):
    process = start(environment, script, *arguments)
    output, _ = process.communicate(timeout=240)
    return process.returncode, " ".join(output.split())


def train(environment, out, *arguments):
    return run(environment, "train.py", "synthetic", *SETTINGS, "--out", out, *arguments)


def arrays(out: Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint, by path."""
    config = from_dict(TrainConfig, json.loads((out / "config.json").read_text()))
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (out / CHECKPOINTS).iterdir() if p.name.isdigit())
    assert config.epochs == 2
    restored = ocp.StandardCheckpointer().restore((out / CHECKPOINTS / str(step) / "state").absolute())
    return {"step": np.asarray(step), **{str(k): np.asarray(v) for k, v in restored.items()}}


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = train(environment, out)
    assert code == 0, output
    return out


def assert_same_run(out: Path, other: Path) -> None:
    one, two = arrays(out), arrays(other)
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert json.loads((out / "summary.json").read_text()) == json.loads((other / "summary.json").read_text())


def steps_logged(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count('"kind": "train"') if log.exists() else 0


def wait_until(process, condition):
    deadline = time.time() + 200
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline
        time.sleep(0.005)


def test_a_run_leaves_everything_behind(undisturbed):
    left = {str(p.relative_to(undisturbed)) for p in undisturbed.rglob("*") if p.is_file()}
    assert {"config.json", "versions.json", "metrics.jsonl", "summary.json"} <= left
    assert {f"plots/{name}.png" for name in ("learning_curve", "calibration", "roc")} <= left
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [6, 12]
    assert {"click/ne", "click/auc", "samples_per_second", "data_wait"} <= lines[0].keys()
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["test"]["click/samples"] == 100
    assert 0 < summary["data"]["best_ne"]["test"] < 1


def test_a_killed_run_resumes_bit_for_bit(environment, undisturbed, tmp_path):
    out = tmp_path / "killed"
    process = start(environment, "train.py", "synthetic", *SETTINGS, "--out", out)
    wait_until(process, lambda: steps_logged(out) >= 9)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    code, output = train(environment, out, "--resume")
    assert code == 0, output
    assert re.search(r"going on after step (4|8) of 12", output)
    assert_same_run(out, undisturbed)


def test_sigterm_saves_where_it_stands_and_exits(environment, undisturbed, tmp_path):
    out = tmp_path / "stopped"
    process = start(environment, "train.py", "synthetic", *SETTINGS, "--out", out)
    wait_until(process, lambda: steps_logged(out) >= 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    step = int(re.search(r"saved step (\d+) of 12", output)[1])
    assert (out / CHECKPOINTS / str(step)).is_dir()
    code, output = train(environment, out, "--resume")
    assert code == 0, output
    assert f"going on after step {step} of 12" in output
    assert_same_run(out, undisturbed)


def test_a_finished_run_stays_as_it_is(environment, undisturbed):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    code, output = train(environment, undisturbed, "--resume")
    assert code == 0
    assert "has finished" in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    code, output = train(environment, undisturbed)
    assert code == 1
    assert "error:" in output
    assert "already holds a run" in output


def test_evaluate_repeats_the_test_result(environment, undisturbed):
    code, output = run(environment, "evaluate.py", undisturbed)
    assert code == 0, output
    result = json.loads(output[output.index("{") :])
    expected = json.loads((undisturbed / "summary.json").read_text())["test"]
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.wdth", "3"], "--model.wdth"),
        (["--model.width", "three"], "invalid"),
        (["--model.experts", "5"], "tokens don't divide over 5 experts"),
        (["--model.events.clicked.head-width", "7"], "must divide into heads"),
        (["--capacity-fractions", "0.5"], "must rise from above 0 and end with 1"),
        (["--synthetic.fill", "2"], "fill"),
        (["--device", "gpu"], "--device gpu: there is none"),
    ],
)
def test_bad_settings_end_with_one_clear_error(environment, tmp_path, arguments, message):
    code, output = train(environment, tmp_path / "run", *arguments)
    assert code != 0
    assert message in output
    assert "Traceback" not in output


def test_missing_data_is_one_clear_line(environment, tmp_path):
    file = tmp_path / "file"
    file.touch()
    code, output = run(environment, "train.py", "movielens", "--out", tmp_path / "run", "--data-directory", file)
    assert code == 1
    assert output.count("error:") == 1
    assert "Traceback" not in output


def test_evaluate_without_a_run(environment, tmp_path):
    code, output = run(environment, "evaluate.py", tmp_path)
    assert code == 1
    assert "holds no run" in output
