"""Trainings to compare, each model in a process of its own: tuned on validation over several seeds, timed alone.

A process compiles, trains every setting of the grid with every seed side by side (population.py), keeps the setting
whose mean validation NE is best, and evaluates its seeds on the test part: the only time that anything looks at it.
Processes compile at the same time; `turns` of them at a time train, in the order of the jobs, as programs that share a
device by turns wait for one another. When all have trained, they measure their speed one after the other.
"""

import dataclasses
import itertools
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
from kunlun_jax.run import write_json

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device
PARTS = ("validation", "test")


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


@dataclass(frozen=True)
class Job:
    """One model on one data set; without a grid nothing is trained, only the speed measured."""

    label: str
    config: TrainConfig
    grid: Grid | None
    measure: bool = True


def run_jobs(jobs: Sequence[Job], *, processes: int, turns: int, so_far: Path) -> dict[str, dict[str, Any]]:
    """The results of all jobs by label; a failed one holds its "error".

    Args:
      processes: at most so many at a time.
      turns: so many of them train at a time.
      so_far: a file that holds all results after each one, for a run that does not come to its end.
    """
    so_far.parent.mkdir(parents=True, exist_ok=True)
    waiting, results, alive = list(enumerate(jobs)), {}, {}
    ready, training, timers = [], set(), []

    def start():
        number, job = waiting.pop(0)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        alive[ours] = (number, job, process)

    def note(label, values):
        results[label] = results.get(label, {}) | values
        write_json(so_far, results)

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
    for pipe in timers:
        _, job, process = alive[pipe]
        pipe.send("measure")
        note(job.label, pipe.recv()[1])
        process.join()
    return {job.label: results[job.label] for job in jobs}


def _work(job: Job, pipe) -> None:
    """A worker's side: ("ready", {}), then on "train" ("trained", results), ("timer", {}), on "measure" the speed."""
    warnings.simplefilter("ignore")
    try:
        trainer = Trainer(job)
        if job.grid:
            pipe.send(("ready", {}))
            pipe.recv()
        pipe.send(("trained", trainer.train()))
        if job.measure:
            measure = trainer.population.stopwatch()
            pipe.send(("timer", {}))
            pipe.recv()
            pipe.send(("measured", {"samples_per_second": measure()}))
    except Exception as error:  # the other jobs go on; the result says what happened
        traceback.print_exc()
        pipe.send(("failed", {"error": f"{type(error).__name__}: {error}"}))


class Trainer:
    """One job's compiled population. What needs JAX is imported here: a parent with JAX would hold a share of the
    device."""

    def __init__(self, job: Job):
        from population import Population, cut

        from kunlun_jax.run import load_samples

        self.job, self.started = job, time.time()
        config, grid = job.config, job.grid
        self.samples, self.facts = load_samples(config)
        fractions = grid.capacity_fractions if grid else config.capacity_fractions
        parts = ("train", *PARTS) if grid else ("train",)
        batches = {part: cut(self.samples[part], config.batch_size, fractions) for part in parts}
        self.settings = list(itertools.product(grid.learning_rates, grid.dropouts)) if grid else []
        size = max(1, len(self.settings) * len(grid.seeds)) if grid else 1
        self.population = Population(config.model, self.samples, config.optimizer, batches, size=size)
        self.say(f"compiled in {self.population.compile_seconds:.0f} s")

    def say(self, text: str) -> None:
        print(f"{time.time() - self.started:6.1f} s  {self.job.label}: {text}", flush=True)

    def train(self) -> dict[str, Any]:
        import jax

        from kunlun_jax.flops import model_flops, total

        config, grid, schema = self.job.config, self.job.grid, self.samples["train"].schema
        lengths = {name: e.stop - e.start for name, e in self.samples["train"].events.items()}
        flops = model_flops(config.model, schema, lengths)
        result: dict[str, Any] = {
            "config": to_dict(config.model),
            "parameters": self.population.parameters,
            "flops_per_sample": total(flops),
            "flops": flops,
            "compile_seconds": round(self.population.compile_seconds, 1),
            "best_ne": self.facts.get("best_ne"),
            "device": jax.devices()[0].device_kind,
        }
        return result | self._tune(grid, schema.tasks[0]) if grid else result

    def _tune(self, grid: Grid, task: str) -> dict[str, Any]:
        from population import Trial

        started, tried, best = time.time(), [], None
        for epochs in grid.epochs:
            trials = [Trial(*setting, seed) for setting in self.settings for seed in grid.seeds]
            state, losses = self.population.run(trials, epochs=epochs)
            validation = self.population.evaluate(state, "validation")
            for i, (rate, dropout) in enumerate(self.settings):
                own = slice(i * len(grid.seeds), (i + 1) * len(grid.seeds))
                ne = statistics.mean(metrics[f"{task}/ne"] for metrics in validation[own])
                entry = {"learning_rate": rate, "dropout": dropout, "epochs": epochs, "validation_ne": ne}
                tried.append(entry)
                if best is None or ne < best[0]["validation_ne"]:
                    best = entry, own, state, losses[own], validation[own]
            self.say(
                f"{epochs} epochs: " + ", ".join(f"{t['validation_ne']:.4f}" for t in tried[-len(self.settings) :])
            )
        entry, own, state, losses, validation = best
        test = self.population.evaluate(state, "test")[own]
        self.say(f"best {entry}; test NE " + ", ".join(f"{metrics[f'{task}/ne']:.4f}" for metrics in test))
        window = max(1, losses.shape[1] // 40)
        whole = losses[:, : losses.shape[1] // window * window].reshape(len(losses), -1, window).mean(axis=2)
        curves = whole / entropy(self.samples["train"].base_rates()[task])
        runs = zip(grid.seeds, validation, test, curves.tolist(), strict=True)
        return {
            "task": task,
            "tried": tried,
            "best": entry,
            "runs": [{"seed": s, "validation": v, "test": t, "progressive_ne": c} for s, v, t, c in runs],
            "window": window * self.job.config.batch_size,
            "train_seconds": round(time.time() - started, 1),
        }
