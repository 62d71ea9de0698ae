"""Whole training steps on one GPU: samples/s, MFU, memory, waiting for data, and time per module from a profile.

    python experiments/bench_model.py                     # an H100; every case is compiled first, minutes each
    python experiments/bench_model.py --only "kunlun 6"   # the cases whose printed name contains this
    python experiments/bench_model.py --memory            # bytes each case needs, by shapes alone; no GPU needed
    python experiments/bench_model.py --plot              # draw the results there are
    python experiments/bench_model.py --toy               # the same at a tiny size on the CPU, a minute

A step is that of a real training: look-up, forward, backward, AdamW, row-wise AdaGrad, and the next batch on its way
to the device meanwhile. Its program is compiled twice: as a training runs it, for the times, and without command
buffers, inside which a profile knows no operations, for the time per module. Waiting for data is how long the host
waits for the next batch while a step runs. MFU counts the products of the real events by formula
(kunlun_jax/flops.py), three times the forward ones, recomputation not, against 989 TFLOP/s. The ladder adds one
optimisation after the other to the model of 6 GFLOPs at fill 0.5; where it pads, every sequence is as long as its
maximum, which is what padded code computes, and only the real events count. Beside the times are the SM clock and the
power while they were taken: under its power limit a GPU lowers its clock, one card more than another. Results go to
experiments/results/bench_model.json after every case.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import lax

from kunlun_jax.batch import Batch, PackedBatch, layout_of
from kunlun_jax.config import TrainConfig
from kunlun_jax.data.pipeline import Placed
from kunlun_jax.data.synthetic import SyntheticConfig, generate, make_schema
from kunlun_jax.flops import PEAK_FLOPS, mfu, model_flops, total, training_flops
from kunlun_jax.layers import gdpa as gdpa_layer
from kunlun_jax.memory import abstract_batch, allocate_in_pieces, check_fits, device_memory, largest_batch, step_memory
from kunlun_jax.model_configs import InterFormerConfig, KunlunConfig, ModelConfig, WukongConfig
from kunlun_jax.models import build
from kunlun_jax.training import Learner, TrainState
from pallas_kernels import gdpa, hopper
from pallas_kernels.dispatch import SlowerPathWarning

RESULTS = pathlib.Path(__file__).parent / "results" / "bench_model.json"
LADDER_BATCH = 512
# Steps, steps, host batches that are dealt in turn. The first batches make the pinned memory grow that they are copied
# through, at the sizes of the 6 GFLOP preset half a second long at once.
WARM_UP, PROFILED, POOL = 10, 3, 2
H100 = 80 * 1000**3  # bytes, where no device can be asked
# Kernels inside command buffers have no operation's name in a profile.
OPTIONS = {"xla_gpu_enable_command_buffer": ""}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # on the CPU
RUNGS = ("naive PFFN, full attention, padding", "GDPA", "window", "jagged", "CompSkip", "fused norms")


@dataclass(frozen=True)
class Case:
    """One program to time.

    Attributes:
      preset: size of the stream and the model.
      fill: mean length of the sequences over their maximum.
      rung: name on the ladder, empty beside it.
      padded: run on sequences filled up to their maximum, and count the real events.
      fused: whether norms and residuals are fused around GDPA.
    """

    preset: str
    model: str
    config: ModelConfig
    stream: SyntheticConfig
    batch: int
    fill: float
    rung: str = ""
    padded: bool = False
    fused: bool = True

    @property
    def name(self) -> str:
        return f"{self.model} {self.preset} fill {self.fill}{' ' + self.rung if self.rung else ''} batch {self.batch}"

    @property
    def fraction(self) -> float:
        """The capacity that batches need: lengths are uniform at fill 0.5, few sums exceed 4 deviations."""
        if self.padded or self.fill == 1:
            return 1.0
        return min(1.0, math.ceil(128 * (self.fill + 4 * (12 * self.batch) ** -0.5)) / 128)


def cases() -> list[Case]:
    """Every preset, fill and model, then the ladder. Kunlun's operators are named, so that none is slower unnoticed."""
    # Nearly what 80 GB hold, by fill: (1.0, 0.5).
    batches = {("6", "kunlun"): (2816, 4096), ("60", "kunlun"): (496, 736), ("180", "kunlun"): (200, 272),
               ("6", "interformer"): (1024, 1024), ("60", "interformer"): (256, 256),
               ("180", "interformer"): (128, 128), ("6", "wukong"): (512, 512)}  # fmt: skip
    configs = {"kunlun": KunlunConfig, "interformer": InterFormerConfig, "wukong": WukongConfig}
    found = []
    for (preset, model), of_fills in batches.items():
        config = getattr(configs[model], f"gflops_{preset}")()
        if model == "kunlun":
            config = dataclasses.replace(config, implementation="mosaic_gpu")
        for fill, batch in zip((1.0, 0.5), of_fills, strict=True):
            stream = getattr(SyntheticConfig, f"gflops_{preset}")(fill=fill)
            found.append(Case(preset, model, config, stream, batch, fill))
    best = next(c for c in found if c.name.startswith("kunlun 6 fill 0.5"))
    return found + ladder(dataclasses.replace(best, batch=LADDER_BATCH))


def ladder(best: Case) -> list[Case]:
    """From the naive model to `best`, one optimisation more on each rung; the last rung is `best` itself.

    All at a batch that fits the first, whose padded sequences and matrices per sample take the most memory.
    """
    assert isinstance(best.config, KunlunConfig)
    windows = best.config.events
    unbounded = {name: dataclasses.replace(e, window=None) for name, e in windows.items()}
    settings: list[tuple[dict, dict]] = [
        (dict(pffn="naive", events=unbounded, comp_skip=False), dict(padded=True, fused=False)),
        (dict(events=unbounded, comp_skip=False), dict(padded=True, fused=False)),
        (dict(comp_skip=False), dict(padded=True, fused=False)),
        (dict(comp_skip=False), dict(fused=False)),
        (dict(), dict(fused=False)),
        (dict(), dict()),
    ]
    return [
        dataclasses.replace(best, config=dataclasses.replace(best.config, **changes), rung=rung, **how)
        for rung, (changes, how) in zip(RUNGS, settings, strict=True)
    ]


def toy_cases() -> list[Case]:
    """The same kinds of cases at a size for two CPU cores."""
    stream = SyntheticConfig(max_length=24, conversions=8, set_noise=5, event_noise=1, event_numbers=2)
    schema = make_schema(stream)
    kunlun = Case("toy", "kunlun", KunlunConfig.tiny(schema), stream, 16, 0.5)
    inter = dataclasses.replace(kunlun, model="interformer", config=InterFormerConfig.tiny(schema))
    return [kunlun, dataclasses.replace(kunlun, fill=1.0), inter, *ladder(kunlun)]


def learner_of(case: Case) -> Learner:
    """Its learner without any array: shapes are enough to count bytes and to compile."""
    schema = make_schema(case.stream)
    model = nnx.eval_shape(lambda: build(case.config, schema, rngs=nnx.Rngs(0)))
    return Learner(model, schema, TrainConfig.gflops_6().optimizer, steps=200)


def programs(case: Case, learner: Learner) -> tuple[Any, Any, Any]:
    """What makes the first state, the step, and the step to profile, compiled. The cheap random bits are those a GPU
    makes in hardware."""

    def first_state() -> TrainState:
        key = jax.random.key(0, impl="unsafe_rbg")
        model = build(case.config, learner.schema, rngs=nnx.Rngs(key))
        return learner.state_of(nnx.split(model)[1], key)

    gpu = jax.default_backend() == "gpu"
    batch = abstract_batch(learner.schema, case.batch, fraction=case.fraction)
    words: Any = jax.ShapeDtypeStruct((1, layout_of(batch).words), jnp.int32)
    with contextlib.nullcontext() if case.fused else separate_norms():
        lowered = learner.train_step.lower(learner.abstract_state(), PackedBatch(words, layout_of(batch)))
    step = lowered.compile(compiler_options=None if gpu else QUICK)
    return jax.jit(first_state).lower().compile(), step, lowered.compile(compiler_options=OPTIONS) if gpu else step


@contextlib.contextmanager
def separate_norms() -> Iterator[None]:
    """The PFFN block as a framework writes it down: the norms as operations beside the GDPA kernel."""

    def block(q, k, v, *, eps=1e-5, **arguments):
        wide = q.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=(1, 2), keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + eps)
        normed = normed.astype(q.dtype)
        mixed = gdpa(normed, k, v, **arguments).astype(jnp.float32) + normed
        return (mixed * lax.rsqrt(jnp.mean(mixed**2, axis=(1, 2), keepdims=True) + eps) + wide).astype(q.dtype)

    fused, gdpa_layer.gdpa_block = gdpa_layer.gdpa_block, block
    try:
        yield
    finally:
        gdpa_layer.gdpa_block = fused


def host_batches(case: Case) -> tuple[list[Batch], dict[str, np.ndarray]]:
    """A few batches of the stream, and the real lengths of their sequences by event type."""
    stream = dataclasses.replace(case.stream, train=POOL * case.batch, validation=1, test=1, fill=case.fill)
    samples = generate(stream).samples["train"]
    lengths = {name: e.stop - e.start for name, e in samples.events.items()}
    if case.padded:
        samples = generate(dataclasses.replace(stream, fill=1.0)).samples["train"]
    fractions = tuple(sorted({case.fraction, 1.0}))
    parts = np.arange(POOL * case.batch).reshape(POOL, -1)
    return [samples.batch(part, capacity_fractions=fractions) for part in parts], lengths


def measure(case: Case, *, steps: int) -> dict[str, Any]:
    """One row of the results.

    Raises:
      ValueError: the case does not fit the device, found before compiling.
    """
    learner = learner_of(case)
    memory = device_memory()
    needed = check_fits(learner, case.batch, memory or H100, fraction=case.fraction)
    batches, lengths = host_batches(case)
    first, step, step_to_profile = programs(case, learner)
    state = first()
    stream = Placed(itertools.cycle(batches), learner.place)
    with clock_and_power() as card:
        state, report, elapsed, waited = timed(step, state, stream, steps)
    if not report.healthy:
        raise FloatingPointError(f"{case.name}: the loss is {report.loss}")

    flops = model_flops(case.config, learner.schema, lengths)
    stats, analysis = jax.local_devices()[0].memory_stats() or {}, step.memory_analysis()
    rate = steps * case.batch / elapsed
    modules = time_per_module(step_to_profile, lambda: _steps(step_to_profile, state, stream))
    stream.close()
    return dict(
        name=case.name,
        preset=case.preset,
        model=case.model,
        fill=case.fill,
        rung=case.rung,
        batch=case.batch,
        parameters=learner.parameters,
        gflops_forward=round(total(flops) / 1e9, 3),
        step_ms=round(elapsed / steps * 1e3, 3),
        samples_per_second=round(rate, 1),
        mfu=round(mfu(rate, training_flops(flops), PEAK_FLOPS["H100"]), 4),
        data_wait=round(waited / elapsed, 4),
        **card,
        peak_bytes=stats.get("peak_bytes_in_use"),
        program_bytes=_program_bytes(analysis),
        estimated_bytes=needed.total,
        largest_batch=largest_batch(learner, memory or H100, fraction=case.fraction),
        loss=round(float(report.loss), 4),
        ms_by_module={name: round(s * 1e3, 3) for name, s in modules.items()},
    )


def timed(step, state, stream, steps: int) -> tuple[Any, Any, float, float]:
    """(state, last report, seconds that `steps` steps took, seconds of them that the host waited for batches), behind
    `WARM_UP` steps. As in a training, the host reads each report while the next step runs. The clock runs from the end
    of one step to that of another, each with its successor enqueued already.
    """
    waited = start = 0.0
    report: Any = None
    for k in range(WARM_UP + steps + 1):
        before, last = time.perf_counter(), report
        _, batch = next(stream)
        waited += (time.perf_counter() - before) * (k > WARM_UP)
        state, report = step(state, batch)
        jax.block_until_ready(last)
        if k == WARM_UP:
            start = time.perf_counter()
    elapsed = time.perf_counter() - start
    jax.block_until_ready(report)
    return state, report, elapsed, waited


@contextlib.contextmanager
def clock_and_power() -> Iterator[dict[str, float]]:
    """The first GPU's mean SM clock in MHz and power in W over the second half of what runs inside, there when it ends;
    nothing without nvidia-smi."""
    found: dict[str, float] = {}
    if shutil.which("nvidia-smi") is None:
        yield found
        return
    query = ["--id=0", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--loop-ms=100"]
    with subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        try:
            yield found
        finally:
            watcher.terminate()
        samples = re.findall(r"^([\d.]+), ([\d.]+)\n", watcher.stdout.read(), re.MULTILINE)
    if samples:
        clock, power = np.mean(np.asarray(samples[len(samples) // 2 :], float), axis=0)
        found |= dict(sm_clock_mhz=round(float(clock)), power_w=round(float(power)))


def _program_bytes(analysis: Any) -> int | None:
    return analysis and analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


def _steps(step, state, stream) -> None:
    for _ in range(PROFILED):
        state, report = step(state, next(stream)[1])
    jax.block_until_ready(report)


MODULES = re.compile(
    r"(\w+)\.(pffn|seed_pooling|attention|event_tokens)|(set_tokens|interaction|head|tables|optimizer)\b"
)


def time_per_module(program: Any, run: Callable[[], None]) -> dict[str, float]:
    """Seconds per step on the device by module, from a profile of `PROFILED` steps.

    An operation belongs to the last of the model's scopes in its name in the program; what has none is "other".
    """
    names = re.findall(r'%?([\w.\-]+) = [^\n]*metadata={[^}\n]*op_name="([^"]*)"', program.as_text())
    module_of = {operation: _module(scope) for operation, scope in names}
    seconds: dict[str, float] = {}
    for (operation, kernel), duration in profiled(run).items():
        module = module_of.get(operation, "copies" if "memcpy" in kernel.lower() else "other")
        seconds[module] = seconds.get(module, 0.0) + duration / PROFILED
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def profiled(run: Callable[[], None]) -> dict[tuple[str, str], float]:
    """Seconds on the GPU by operation of the program and kernel; empty where there is no GPU."""
    seconds: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        for file in pathlib.Path(directory).rglob("*.xplane.pb"):
            planes = jax.profiler.ProfileData.from_file(str(file)).planes
            lines = [line for p in planes if p.name.startswith("/device:GPU") for line in p.lines]
            for event in (e for line in lines if line.name.startswith("Stream") for e in line.events):
                key = str(dict(event.stats).get("hlo_op", "")), event.name
                seconds[key] = seconds.get(key, 0.0) + event.duration_ns / 1e9
    return seconds


def _module(scope: str) -> str:
    if "weight_generation" in scope:
        return _module(scope.replace("weight_generation", "")).replace(".pffn", ".weight_generation")
    found = MODULES.findall(scope)
    if not found:
        return "other"
    event, part, single = found[-1]
    return f"{event}.{part}" if part else single


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Stacked bars: milliseconds of a step by module, one bar per case, with its MFU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["ms_by_module"]]
    kinds = list(dict.fromkeys(name.split(".")[-1] for r in rows for name in r["ms_by_module"]))
    figure, axis = plt.subplots(figsize=(11, 1.5 + 0.45 * len(rows)), layout="constrained")
    left = np.zeros(len(rows))
    for i, kind in enumerate(kinds):
        share = [
            sum(ms for name, ms in r["ms_by_module"].items() if name.split(".")[-1] == kind) / r["step_ms"]
            for r in rows
        ]
        axis.barh(range(len(rows)), share, left=left, label=kind, color=f"C{i}" if i < 10 else f"{0.2 * (i - 9):.1f}")
        left += share
    for i, row in enumerate(rows):
        axis.text(left[i] + 0.01, i, f"{row['step_ms']:.0f} ms, MFU {row['mfu']:.1%}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [r["name"] for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="share of the step", xlim=(0, 1.55), title="A training step on one H100, by module")
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    only: str = "",
    steps: int = 20,
    memory: bool = False,
    plot_only: Annotated[bool, tyro.conf.arg(name="plot")] = False,
    toy: bool = False,
    out: pathlib.Path = RESULTS,
) -> int:
    """See the head of the file."""
    rows = {row["name"]: row for row in json.loads(out.read_text())["results"]} if out.exists() else {}
    if plot_only:
        plot(list(rows.values()), out.with_suffix(".png"))
        return 0
    everything = toy_cases() if toy else cases()
    chosen = [case for case in everything if only == case.name] or [case for case in everything if only in case.name]
    if memory:
        warnings.filterwarnings("ignore", category=SlowerPathWarning)  # nothing runs
        for case in chosen:
            learner = learner_of(case)
            with hopper.assumed():
                fits = largest_batch(learner, H100, fraction=case.fraction)
                needed = step_memory(learner, case.batch, fraction=case.fraction)
            print(f"{case.name}: {needed.total / 1e9:.1f} GB ({needed}); largest batch in 80 GB: {fits}", flush=True)
        return 0
    if not toy and len(chosen) > 1:
        # A process per case: what one leaves behind in pieces of the GPU's memory would be missing in the next.
        for case in chosen:
            arguments = ["--only", case.name, "--steps", str(steps), "--out", str(out)]
            code = subprocess.run([sys.executable, __file__, *arguments], check=False).returncode
            if code > 0:  # refused, as the others would be; what a signal ended costs no other case
                return code
        return 0
    allocate_in_pieces()
    if not toy and jax.default_backend() != "gpu":
        print(f"error: needs a GPU, the default backend is {jax.default_backend()}; --toy runs on it", file=sys.stderr)
        return 1
    about = dict(command="python experiments/bench_model.py", device=jax.devices()[0].device_kind, jax=jax.__version__)
    for case in chosen:
        try:
            rows[case.name] = row = measure(case, steps=steps)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, FloatingPointError) as error:
            print(f"{case.name}: {error!r}"[:600], flush=True)  # the other cases are worth having
            continue
        print(
            f"{case.name}: {row['step_ms']} ms, {row['samples_per_second']:,} samples/s, MFU {row['mfu']:.1%}, "
            f"data wait {row['data_wait']:.1%}, program {(row['program_bytes'] or 0) / 1e9:.1f} GB",
            flush=True,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(dict(about=about, results=list(rows.values())), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
