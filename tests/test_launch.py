"""The launch templates: the sizes in them fit together, and what they run starts, stops and fails as it should."""

import itertools
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
# Stands for the training: notes its arguments, and ends by itself with a code, or at SIGTERM with 143.
STAND_IN = """#!/usr/bin/env bash
echo "$@" > arguments
trap 'touch stopped; exit 143' TERM
[ "$CODE" = forever ] || exit "$CODE"
for _ in {1..200}; do sleep 0.05; done
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def kubernetes(directory: Path) -> tuple[list[str], dict[str, str]]:
    script(directory / "bin" / "python", STAND_IN)
    (container,) = job()["template"]["spec"]["containers"]
    return container["command"] + container["args"], {"JOB_COMPLETION_INDEX": "3"}


def slurm(directory: Path) -> tuple[list[str], dict[str, str]]:
    script(directory / ".venv" / "bin" / "python", STAND_IN)
    script(directory / "bin" / "scontrol", "#!/usr/bin/env bash\necho node1\necho node2\n")
    script(directory / "bin" / "srun", '#!/usr/bin/env bash\nshift\nexec "$@"\n')
    task = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
    return ["bash", str(LAUNCH / "slurm.sbatch"), "synthetic", "--parallel.data", "32"], task


def job() -> dict:
    (found,) = (d["spec"] for d in yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()) if d["kind"] == "Job")
    return found


def start(template, directory: Path, code: str) -> subprocess.Popen:
    command, environment = template(directory)
    script(directory / "bin" / "sleep", '#!/usr/bin/env bash\n[ "$1" = 5 ] || exec /bin/sleep "$1"\n')
    path = f"{directory / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | environment | {"PATH": path, "CODE": code}
    return subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True)


@pytest.mark.parametrize("template", [kubernetes, slurm])
def test_a_template_hands_on_arguments_exit_codes_and_sigterm(template, tmp_path):
    for code in ("0", "7"):
        assert start(template, tmp_path, code).wait(20) == int(code)
    arguments = (tmp_path / "arguments").read_text()
    assert "experiments/train.py synthetic" in arguments
    assert "--processes.count 4 --processes.index 3 --processes.coordinator " in arguments
    assert "--resume" in arguments
    (tmp_path / "arguments").unlink()

    running = start(template, tmp_path, "forever")
    while not (tmp_path / "arguments").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    if template is kubernetes:  # the container's first process gets the signal, there all of the step's
        running.send_signal(signal.SIGTERM)
    else:
        os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(20) in (143, -signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not (tmp_path / "stopped").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_sizes_of_the_kubernetes_template_fit_together():
    spec = job()
    (container,) = spec["template"]["spec"]["containers"]
    words = container["args"][0].split()
    number = {word: int(after) for word, after in itertools.pairwise(words) if after.isdecimal()}
    assert spec["parallelism"] == spec["completions"] == number["--processes.count"]
    devices = number["--parallel.data"] * number["--parallel.expert"]
    assert devices == spec["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert number["--batch-size"] % devices == 0
