"""Trainings to compare, each model in a process of its own: tuned on validation over several seeds, timed alone.

A process compiles, trains every setting of the grid with every seed side by side (population.py), keeps the setting
whose mean validation NE is best, and evaluates its seeds on the test part: the only time that anything looks at it.
Processes compile at the same time; `turns` of them at a time train, in the order of the jobs, as programs that share a
device by turns wait for one another. When all have trained, they measure their speed one after the other.
A run that ends early goes on where it was: every model's results are kept as soon as they are there.
"""

import dataclasses
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kunlun_jax.config import TrainConfig, to_dict
from kunlun_jax.metrics import entropy
from kunlun_jax.run import usable_cores, write_json

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device
PARTS = ("validation", "test")
LAST = 20  # batches of the training part whose NE after training tells overfitting from learning too little


@dataclass(frozen=True)
class Grid:
    """Settings that every model tries alike, with every seed.

    Attributes:
      learning_rates: peaks of the dense parameters' rate.
      dropouts: rates of dropped embedding fields.
      epochs: passes over the training part, each with a schedule of that length.
      seeds: of the initial parameters and the dropout.
      capacity_fractions: shares of the full size for which a program is compiled.
    """

    learning_rates: tuple[float, ...]
    dropouts: tuple[float, ...]
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    capacity_fractions: tuple[float, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name):
                raise ValueError(f"{field.name}: give at least one")
        if len(self.seeds) < 2 or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: a spread needs at least two different ones, got {self.seeds}")


def chosen(entry: dict[str, Any]) -> str:
    """A tried setting in words."""
    return f"rate {entry['learning_rate']:g}, dropout {entry['dropout']:g}, {entry['epochs']} epochs"


@dataclass(frozen=True)
class Job:
    """One model on one data set; without a grid nothing is trained, only the speed measured."""

    label: str
    config: TrainConfig
    grid: Grid | None
    measure: bool = True


def run_jobs(
    jobs: Sequence[Job], *, processes: int, turns: int, so_far: Path, setting: Any = None
) -> dict[str, dict[str, Any]]:
    """The results of all jobs by label; a failed one holds its "error".

    Goes on from `so_far` if it is there: what it holds is not done again, only what is missing or failed.

    Args:
      processes: at most so many at a time.
      turns: so many of them train at a time. If several, a CPU's cores are dealt out among them.
      so_far: a file that holds all results after each one, for a run that does not come to its end.
      setting: what the results depend on besides the jobs, JSON-able: versions and device.

    Raises:
      ValueError: `so_far` holds results of other jobs or of another setting.
    """
    so_far.parent.mkdir(parents=True, exist_ok=True)
    about = json.loads(json.dumps({"jobs": {job.label: to_dict(job) for job in jobs}, "setting": setting}))
    results = _kept(so_far, about)
    waiting = [(number, job) for number, job in enumerate(jobs) if _lacks(job, results.get(job.label, {}))]
    alive, ready, training, timers = {}, [], set(), []
    shares = _shares(turns)

    def start():
        number, job = waiting.pop(0)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        learn = "runs" not in results.get(job.label, {}) if job.grid else False
        process = context.Process(target=_work, args=(job, learn, shares, theirs), daemon=True)
        process.start()
        theirs.close()
        alive[ours] = (number, job, process)

    def note(label, values):
        results[label] = {k: v for k, v in results.get(label, {}).items() if k != "error"} | values
        write_json(so_far, about | {"results": results})

    while waiting or len(alive) > len(timers):
        while waiting and len(alive) - len(timers) < processes:
            start()
        pipe: Any
        for pipe in multiprocessing.connection.wait([p for p in alive if p not in timers]):
            number, job, process = alive[pipe]
            try:
                kind, values = pipe.recv()
            except EOFError:
                kind, values = "failed", {"error": f"{job.label}: the process ended without a result"}
            if kind == "ready":
                ready.append((number, pipe))
                continue
            if kind == "timer":
                timers.append(pipe)
                continue
            training.discard(pipe)
            note(job.label, values)
            if kind == "failed" or not job.measure:
                process.join()
                del alive[pipe]
        while ready and len(training) < turns:
            ready.sort(key=lambda entry: entry[0])
            _, pipe = ready.pop(0)
            training.add(pipe)
            pipe.send("train")
    for pipe in sorted(timers, key=lambda pipe: alive[pipe][0]):
        _, job, process = alive[pipe]
        pipe.send("measure")
        note(job.label, pipe.recv()[1])
        process.join()
    return {job.label: results[job.label] for job in jobs}


def _kept(so_far: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in the file, which must be of these jobs."""
    if not so_far.exists():
        return {}
    kept = json.loads(so_far.read_text())
    results = kept.pop("results")
    if kept != about:
        differ = _differences(kept, about)
        raise ValueError(f"{so_far} holds results of other settings ({', '.join(differ)}): finish those, or remove it")
    print(f"going on from {so_far}: {', '.join(results)}", flush=True)
    return results


def _differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two JSON values differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [d for key in keys for d in _differences(one.get(key), other.get(key), f"{where}.{key}".strip("."))]
    return [] if one == other else [f"{where} {str(one)[:60]} and now {str(other)[:60]}"]


def _lacks(job: Job, result: dict[str, Any]) -> bool:
    learned = "runs" in result or not job.grid
    return "error" in result or not learned or (job.measure and "samples_per_second" not in result)


def _shares(turns: int) -> Any:
    """The cores of each training when several run side by side: a queue from which each process takes one share."""
    cores = usable_cores()
    if turns == 1 or len(cores) < turns or not hasattr(os, "sched_setaffinity"):
        return None
    shares = multiprocessing.get_context("spawn").Queue()
    for i in range(turns):
        shares.put(cores[i * len(cores) // turns : (i + 1) * len(cores) // turns])
    return shares


def _work(job: Job, learn: bool, shares, pipe) -> None:
    """A worker's side: ("ready", {}), then on "train" ("trained", results), ("timer", {}), on "measure" the speed."""
    warnings.simplefilter("ignore")
    cores = shares.get() if shares is not None else None
    if cores is not None:
        os.sched_setaffinity(0, cores)  # before JAX starts its threads
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}".strip()
    try:
        trainer = Trainer(job, learn=learn)
        if learn:
            pipe.send(("ready", {}))
            pipe.recv()
            pipe.send(("trained", trainer.train()))
        elif not job.grid:
            pipe.send(("trained", trainer.sizes()))
        if job.measure:
            measure = trainer.population.stopwatch()
            pipe.send(("timer", {}))
            pipe.recv()
            pipe.send(("measured", {"samples_per_second": measure(), "speed_device": trainer.sizes()["device"]}))
    except Exception as error:  # the other jobs go on; the result says what happened
        traceback.print_exc()
        pipe.send(("failed", {"error": f"{type(error).__name__}: {error}"}))
    finally:
        if shares is not None:
            shares.put(cores)


class Trainer:
    """One job's population. What needs JAX is imported here: a parent with JAX would hold a share of the device.

    Args:
      learn: whether to compile its training, or only to measure.
    """

    def __init__(self, job: Job, *, learn: bool):
        from population import Population, cut

        from kunlun_jax.run import load_samples

        self.job, self.started = job, time.time()
        config, grid = job.config, job.grid
        self.samples, self.facts = load_samples(config)
        fractions = grid.capacity_fractions if grid else config.capacity_fractions
        parts = ("train", *PARTS) if learn else ("train",)
        batches = {part: cut(self.samples[part], config.batch_size, fractions) for part in parts}
        batches["trained"] = batches["train"][-LAST:]
        self.settings = list(itertools.product(grid.learning_rates, grid.dropouts)) if grid else []
        size = max(1, len(self.settings) * len(grid.seeds)) if grid else 1
        self.population = Population(config.model, self.samples, config.optimizer, batches, size=size)
        if learn:
            self.population.compile()
            self.say(f"compiled in {self.population.compile_seconds:.0f} s")

    def say(self, text: str) -> None:
        print(f"{time.time() - self.started:6.1f} s  {self.job.label}: {text}", flush=True)

    def train(self) -> dict[str, Any]:
        """Sizes, the tried settings and the best one's runs."""
        assert self.job.grid is not None
        compiled = {"compile_seconds": round(self.population.compile_seconds, 1)}
        return self.sizes() | compiled | self._tune(self.job.grid, self.samples["train"].schema.tasks[0])

    def sizes(self) -> dict[str, Any]:
        """Config, parameters, FLOPs, device."""
        from kunlun_jax.flops import model_flops, total
        from kunlun_jax.run import versions

        config, schema = self.job.config, self.samples["train"].schema
        lengths = {name: e.stop - e.start for name, e in self.samples["train"].events.items()}
        flops = model_flops(config.model, schema, lengths)
        return {
            "config": to_dict(config.model),
            "parameters": self.population.parameters,
            "flops_per_sample": total(flops),
            "flops": flops,
            "best_ne": self.facts.get("best_ne"),
            "device": versions()["device"],
        }

    def _tune(self, grid: Grid, task: str) -> dict[str, Any]:
        from population import Trial

        started, tried, best = time.time(), [], None
        for epochs in grid.epochs:
            trials = [Trial(*setting, seed) for setting in self.settings for seed in grid.seeds]
            state, losses = self.population.run(trials, epochs=epochs)
            validation = self.population.evaluate(state, "validation")
            for i, (rate, dropout) in enumerate(self.settings):
                own = slice(i * len(grid.seeds), (i + 1) * len(grid.seeds))
                by_seed = [metrics[f"{task}/ne"] for metrics in validation[own]]
                ne = statistics.mean(by_seed)
                entry = {"learning_rate": rate, "dropout": dropout, "epochs": epochs, "validation_ne": ne}
                entry["validation_ne_by_seed"] = by_seed
                tried.append(entry)
                if best is None or ne < best[0]["validation_ne"]:
                    best = entry, own, state, losses[own], validation[own]
            self.say(
                f"{epochs} epochs: " + ", ".join(f"{t['validation_ne']:.4f}" for t in tried[-len(self.settings) :])
            )
        entry, own, state, losses, validation = best
        test = self.population.evaluate(state, "test", own)
        trained = [metrics[f"{task}/ne"] for metrics in self.population.evaluate(state, "trained", own)]
        self.say(f"best: {chosen(entry)}; test NE " + ", ".join(f"{metrics[f'{task}/ne']:.4f}" for metrics in test))
        window = max(1, losses.shape[1] // 40)
        whole = losses[:, : losses.shape[1] // window * window].reshape(len(losses), -1, window).mean(axis=2)
        curves = whole / entropy(self.samples["train"].base_rates()[task])
        runs = zip(grid.seeds, validation, test, trained, curves.tolist(), strict=True)
        return {
            "task": task,
            "tried": tried,
            "best": entry,
            "runs": [
                {"seed": s, "validation": v, "test": t, "trained_ne": n, "progressive_ne": c} for s, v, t, n, c in runs
            ],
            "window": window * self.job.config.batch_size,
            "train_seconds": round(time.time() - started, 1),
        }
