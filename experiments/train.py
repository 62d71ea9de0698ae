"""Train a model and leave a run behind: config, log, summary, plots, checkpoints.

    python experiments/train.py movielens                       # Kunlun; two CPU cores: about 4 minutes
    python experiments/train.py movielens --model interformer   # or wukong, din, dcnv2
    python experiments/train.py synthetic --epochs 5 --model.width 64
    python experiments/train.py movielens --epochs 4 --embedding-dropout 0.6 --optimizer.learning-rate 1e-3
    python experiments/train.py movielens --resume              # goes on after an interruption, bit for bit
    python experiments/train.py gflops6 --device gpu            # 6 GFLOPs per sample on the GPU; compiles for minutes
    python experiments/train.py synthetic --parallel.data 2     # two devices; launch/ has several processes and hosts

--model NAME picks the model whose settings the other options then name. The result is written to runs/<preset>/, with
-NAME added for a model other than Kunlun (--out names another directory). SIGTERM or Ctrl-C saves and stops.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import absl.logging
import jax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kunlun_jax.checkpoint import CheckpointError
from kunlun_jax.config import TrainConfig
from kunlun_jax.data.pipeline import Placed, loader
from kunlun_jax.flops import model_flops, total
from kunlun_jax.memory import allocate_in_pieces
from kunlun_jax.mesh_learner import make_learner
from kunlun_jax.models import build, name_of, named
from kunlun_jax.plots import plot_run
from kunlun_jax.processes import HOW_TO_GO_ON, ProcessConfig, Vote, end, failed_exchange, finish, first_on_one, start
from kunlun_jax.run import Run, keep_programs, load_samples, stop_on_sigterm
from kunlun_jax.training import NonFiniteLoss, fit

PRESETS = {
    "movielens": TrainConfig.movielens,
    "synthetic": TrainConfig.synthetic_stream,
    "gflops6": TrainConfig.gflops_6,
}
STOPPED = 128 + 15  # exit code of a process that SIGTERM ended


@dataclass(frozen=True)
class Options:
    """Where the run goes, whether to go on with one that is there, and whether it must run on a GPU."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    resume: bool = False
    device: Literal["any", "gpu"] = "any"
    processes: ProcessConfig = field(default_factory=ProcessConfig)


def train(config: TrainConfig, out: Path, *, resume: bool = False) -> int:
    """Train as configured; return the process's exit code."""
    first = jax.process_index() == 0
    console = Console(highlight=False, soft_wrap=True, quiet=not first)
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"  # the source line tells a user nothing
    run = first_on_one(lambda: Run(out, config, resume=resume, writes=first))
    if run.summary is not None:
        console.print(f"{out} has finished; its results are in {out / 'summary.json'}")
        return 0
    samples, facts = first_on_one(lambda: load_samples(config))
    schema, base_rates = samples["train"].schema, samples["train"].base_rates()

    def batches(part: str, *, epochs: int, shuffle: bool = False):
        return loader(
            samples[part], batch_size=config.batch_size, epochs=epochs, shuffle=shuffle, seed=config.seed,
            capacity_fractions=config.capacity_fractions, shards=learner.shards, own=learner.own,
            threads=config.loader_threads, prefetch=max(4, config.loader_threads),
        )  # fmt: skip

    per_epoch = -(-len(samples["train"]) // config.batch_size)
    steps = config.epochs * per_epoch
    model = build(config.model, schema, rngs=nnx.Rngs(config.seed))
    learner = make_learner(model, schema, config, steps=steps, say=console.print)
    loaded = batches("train", epochs=config.epochs, shuffle=config.shuffle)
    stream = Placed(loaded, learner.place)
    vote, stop, due = Vote(learner.mesh), False, False

    with run.open_checkpoints(schema) as checkpoints, stop_on_sigterm() as signals:
        if checkpoints.latest_step() is not None:
            step, restored, position, _ = checkpoints.restore(learner.abstract())
            state = learner.adopt(restored)
            loaded.set_state(position)
            console.print(f"going on after step {step} of {steps}")
            if run.changed_versions:
                console.print(
                    f"versions changed since the start, results may differ in their last bits: {run.changed_versions}"
                )
        else:
            state = learner.init(config.seed)
        run.forget_after(int(state.step))
        _describe(console, config, schema, samples, learner.parameters, steps)

        with Progress(
            TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        ) as progress:  # fmt: skip
            bar = progress.add_task("", total=steps, completed=int(state.step))

            def on_log(step, values):
                run.log("train", step, values)
                line = _line(values, schema.tasks)
                progress.update(bar, completed=step, description=line)
                if not console.is_terminal:
                    console.print(f"step {step}/{steps}: {line}")

            def after_step(step, state):
                nonlocal stop, due
                stop = vote(bool(signals)) or stop
                due = due or stop or step % config.save_every == 0 or step == steps
                save = due and learner.in_sync(step)
                if save:
                    checkpoints.save(step, learner.portable(state), stream)
                    due = False
                if step % per_epoch == 0:
                    evaluation = learner.evaluate(state, batches("validation", epochs=1), base_rates)
                    run.log("validation", step, evaluation.results())
                    console.print(f"step {step}/{steps}: validation {_line(evaluation.results(), schema.tasks)}")
                return not (stop and save)

            state = fit(
                learner, state, stream, base_rates=base_rates, log_every=config.log_every,
                on_log=on_log, after_step=after_step,
            )  # fmt: skip
        checkpoints.wait()
        if stop:
            console.print(f"stopped by a signal; saved step {int(state.step)} of {steps}. Go on with --resume")
            return STOPPED

    test = learner.evaluate(state, batches("test", epochs=1), base_rates)
    if not run.writes:
        return 0
    validation = run.lines("validation")[-1]
    run.finish({"validation": validation, "test": test.results(), "data": facts})
    best_ne = facts.get("best_ne", {}).get("validation")
    plot_run(run, test, schema.tasks, best_ne)
    console.print(f"test: {_line(test.results(), schema.tasks)}")
    console.print(f"config, log, summary, plots and checkpoints are in {out}")
    return 0


def _describe(console, config, schema, samples, parameters, steps) -> None:
    rows = sum(t.rows for t in schema.tables)
    lengths = {name: e.stop - e.start for name, e in samples["train"].events.items()}
    title = named(name_of(config.model)).title
    gflops = total(model_flops(config.model, schema, lengths)) / 1e9
    console.print(
        f"{title} on {config.data}: {len(samples['train']):,} training samples, {steps} steps of {config.batch_size}; "
        f"{parameters:,} dense parameters, {rows:,} table rows, {gflops:.4f} GFLOP per sample forward; "
        f"{config.parallel.devices} × {jax.devices()[0].device_kind} ({jax.default_backend()})"
    )
    for part, of_part in samples.items():
        for name, rate in of_part.out_of_range_rates().items():
            if rate:
                console.print(f"{part}: {rate:.2%} of the ids of {name!r} have no table row of their own")


def _line(values: dict, tasks) -> str:
    parts = [
        f"{task + ' ' if len(tasks) > 1 else ''}loss {values[f'{task}/log_loss']:.4f} NE {values[f'{task}/ne']:.4f} "
        f"AUC {values[f'{task}/auc']:.4f}"
        for task in tasks
    ]
    if "samples_per_second" in values:
        parts.append(f"{values['samples_per_second']:,.0f} samples/s, data wait {values['data_wait']:.1%}")
    return ", ".join(parts)


def main() -> int:
    absl.logging.set_verbosity(absl.logging.FATAL)  # orbax logs whole tracebacks before our one line
    try:
        model, arguments = model_argument(sys.argv[1:])
        suffix = "" if model == "kunlun" else f"-{model}"
        presets = {
            name: (
                f"Settings of the preset {name!r}.",
                Options(config=preset(model), out=Path("runs") / f"{name}{suffix}"),
            )
            for name, preset in presets_of(model)
        }
        options = tyro.extras.overridable_config_cli(
            presets, prog="train.py", description=__doc__, args=arguments, config=(tyro.conf.AvoidSubcommands,)
        )
        allocate_in_pieces()
        start(options.processes)
        if options.device == "gpu" and (backend := jax.default_backend()) != "gpu":
            raise ValueError(
                f"--device gpu: there is none, JAX's default backend is {backend}; on a machine with an NVIDIA GPU let "
                f"make set up .venv again, which installs the CUDA build of JAX, or leave --device out"
            )
        keep_programs()
        code = train(options.config, options.out, resume=options.resume)
        finish()
        return code
    except (CheckpointError, NonFiniteLoss, OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        if failed_exchange(error):
            reason = f"an exchange failed ({str(error).splitlines()[0]})"
            print(f"error: process {jax.process_index()}: {reason}. {HOW_TO_GO_ON}", file=sys.stderr)
        elif isinstance(error, jax.errors.JaxRuntimeError):
            raise
        else:
            print(f"error: {error}", file=sys.stderr)
        return end(1)


def presets_of(model: str) -> list[tuple[str, Callable[[str], TrainConfig]]]:
    """The presets that this model has."""
    return [(n, p) for n, p in PRESETS.items() if n != "gflops6" or hasattr(named(model).config, "gflops_6")]


def model_argument(arguments: list[str]) -> tuple[str, list[str]]:
    """The name after --model, "kunlun" without one, and the other arguments: which options exist depends on it.

    Raises:
      ValueError: no model has that name.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="kunlun")
    known, others = parser.parse_known_args(arguments)
    named(known.model)
    return known.model, others


if __name__ == "__main__":
    sys.exit(main())
