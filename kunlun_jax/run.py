"""A training run on disk: its configuration, its log, its summary, and the signal that asks it to stop."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from kunlun_jax.checkpoint import Checkpoints
from kunlun_jax.config import TrainConfig, from_dict, to_dict
from kunlun_jax.data import movielens
from kunlun_jax.data.samples import Samples
from kunlun_jax.data.synthetic import generate
from kunlun_jax.schema import FeatureSchema

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
CHECKPOINTS = "checkpoints"
# What may change between the parts of a run that was resumed: it does not touch the result. Where the run computes may
# change as well; sums over other devices differ in their last bits, and table replicas in more.
FREE_TO_CHANGE = ("log_every", "save_every", "data_directory", "parallel.")


class Run:
    """The directory of one run: config.json, versions.json, metrics.jsonl, summary.json, plots/, checkpoints/.

    Args:
      directory: made if it doesn't exist.
      config: of the training.
      resume: whether to go on with what the directory holds. A new directory is a new run either way.
      writes: false on all but one of several processes, which then leave the files to that one.

    Raises:
      FileExistsError: the directory holds a run and `resume` is false.
      ValueError: the run to resume was started with other settings.
    """

    def __init__(self, directory: Path, config: TrainConfig, *, resume: bool, writes: bool = True):
        self.directory, self.config, self.writes = directory, config, writes
        self.plots = directory / "plots"
        self._log = directory / "metrics.jsonl"
        self.changed_versions: dict[str, str] = {}
        if not writes:
            return
        saved = directory / "config.json"
        if saved.exists():
            if not resume:
                raise FileExistsError(
                    f"{directory} already holds a run; --resume goes on with it, --out names another directory"
                )
            _check_same_settings(json.loads(saved.read_text()), to_dict(config), directory)
        self.plots.mkdir(parents=True, exist_ok=True)
        write_json(saved, to_dict(config))
        self.changed_versions = self._note_versions(directory / "versions.json")

    def open_checkpoints(self, schema: FeatureSchema) -> Checkpoints:
        return Checkpoints(self.directory / CHECKPOINTS, schema=schema, config=to_dict(self.config))

    def _note_versions(self, path: Path) -> dict[str, str]:
        """Write down what runs here; return what differs from the run's start, since bits may differ with it."""
        now = versions()
        if not path.exists():
            write_json(path, now)
        started = json.loads(path.read_text())
        return {name: f"{started.get(name)} → {now[name]}" for name in now if started.get(name) != now[name]}

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the finished run reached; None before it has finished."""
        path = self.directory / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        if self.writes:
            write_json(self.directory / "summary.json", summary)

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self._log.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The log's lines of one kind, oldest first."""
        return [line for line in self._lines() if line["kind"] == kind]

    def forget_after(self, step: int) -> None:
        """Drop log lines beyond `step`: a resumed run writes them again."""
        if not self.writes:
            return
        kept = [json.dumps(line) + "\n" for line in self._lines() if line["step"] <= step]
        _replace(self._log, "".join(kept))

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._log.exists():
            return
        for line in self._log.read_text().splitlines():
            # A killed process may leave half a line, always the last.
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def load_config(directory: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
      FileNotFoundError: the directory holds no run.
      ValueError: config.json is damaged or has fields that this version doesn't know.
    """
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no run: {path} is missing; train one with experiments/train.py")
    try:
        return from_dict(TrainConfig, json.loads(path.read_text()), where=str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it, or train again into another directory") from error


def load_samples(config: TrainConfig) -> tuple[dict[str, Samples], dict[str, Any]]:
    """The parts "train", "validation" and "test", and facts about the data for the summary."""
    if config.data == "movielens":
        samples, facts = movielens.load(movielens.fetch(config.data_directory)), {}
    else:
        generated = generate(config.synthetic)
        samples, facts = generated.samples, {"best_ne": generated.best_ne}
    rates = {part: {k: r for k, r in s.out_of_range_rates().items() if r} for part, s in samples.items()}
    return samples, {**facts, "out_of_range": rates}


def versions() -> dict[str, str]:
    """Packages, Python and the device: what a number depends on besides the code."""
    device, cores = jax.devices()[0], len(usable_cores())
    kind = f"CPU {_cpu_model()}" if device.platform == "cpu" else device.device_kind
    return {
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": f"{kind} ({device.platform}), {jax.device_count()} of them; {cores} CPU cores",
    }


def keep_programs() -> None:
    """Keep what is compiled for a GPU in ~/.cache/kunlun_jax, where the next start finds it: large presets compile for
    minutes. To be called before the first compilation; settings of the user stand.
    """
    if jax.default_backend() == "gpu" and jax.config.jax_compilation_cache_dir is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(caches / "kunlun_jax"))


def usable_cores() -> list[int]:
    """The CPU cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _cpu_model() -> str:
    """The processor's name as Linux knows it, else as Python does."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[list[int]]:
    """A list that stays empty until the process is asked to end (SIGTERM, or Ctrl-C once)."""
    received: list[int] = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mean_and_spread(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of every metric ("task/metric") over at least two runs."""
    metrics = {name: [run[name] for run in runs] for name in runs[0] if "/" in name}
    return {
        name: {"mean": statistics.mean(values), "standard_deviation": statistics.stdev(values)}
        for name, values in metrics.items()
    }


def write_json(path: Path, values: Any) -> None:
    _replace(path, json.dumps(values, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _check_same_settings(saved: dict, wanted: dict, directory: Path) -> None:
    differences = [
        f"{name}: there {_at(saved, name)!r}, now {_at(wanted, name)!r}"
        for name in sorted(_names(saved) | _names(wanted))
        if _at(saved, name) != _at(wanted, name) and not name.startswith(FREE_TO_CHANGE)
    ]
    if differences:
        raise ValueError(
            f"{directory} was started with other settings; resume with the same, or name another directory with "
            f"--out:\n  " + "\n  ".join(differences)
        )


def _names(config: dict, prefix: str = "") -> set[str]:
    return {
        name
        for key, value in config.items()
        for name in (_names(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"})
    }


def _at(config: dict, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key, {}) if isinstance(config, dict) else {}
    return config
