"""Measure training over several devices, and model on paper how it grows to thousands.

    python experiments/bench_parallel.py measure                    # one and two GPUs
    python experiments/bench_parallel.py quality                    # c = 1 against c = R, on CPUs
    python experiments/bench_parallel.py paper                      # from the measured numbers, seconds

Each writes its part of experiments/results/bench_parallel.json (`paper` the plot as well).

measure: (a) weak scaling of a bfloat16 Kunlun with equal batch per device, samples/s from whole training steps on
batches that lie on the devices: one device, two with a table replica each (2D), two with the rows over both (1D), and
two that share rows and experts; (b) one table's look-up and row-wise AdaGrad alone against its rows, as far as memory
goes, and whole training steps on one device against the rows of their tables; (c) one table over two devices, 1D and
2D, from which the exchange's share of a step follows.
Times are medians over rounds of many steps without a wait in between, rotating batches.

quality: NE on the generated stream at equal samples for one replica, R replicas with c = 1 and with c = R.

paper: step time = compute + exchange inside the group + averaging of replicas + all-reduce of dense gradients + what
two devices measured beyond that, with the assumptions that it prints.
"""

import concurrent.futures
import dataclasses
import gc
import json
import math
import pathlib
import sys
import time
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from kunlun_jax.batch import Batch, check_batch
from kunlun_jax.embedding import TableState, look_up, update
from kunlun_jax.embedding.placement import plan_tables
from kunlun_jax.embedding.sharded import ShardedTables
from kunlun_jax.flops import kunlun_flops, training_flops
from kunlun_jax.jagged import pack
from kunlun_jax.mesh_learner import MeshLearner
from kunlun_jax.model_configs import EventConfig, KunlunConfig
from kunlun_jax.models.kunlun import Kunlun
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.schema import PADDING_ID, DenseField, EventType, FeatureSchema, SparseField, Table
from kunlun_jax.sharding import BATCH, ParallelConfig, make_mesh, on_mesh, place_batch
from kunlun_jax.training import Learner

RESULTS = pathlib.Path(__file__).parent / "results"
NAME = "bench_parallel"
BATCHES = 4  # rotated through


@dataclasses.dataclass(frozen=True)
class Measure:
    """Weak scaling, step time against rows, and 1D against 2D, on the devices at hand."""

    batch: int = 1024  # samples per device
    table_rows: int = 10_000_000
    width: int = 128
    max_length: int = 128
    depth: int = 3
    ids: int = 65_536  # per device in the table benchmarks
    rows: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8, 10**9)
    rows_over_all: tuple[int, int] = (10**9, 32)  # rows × width of the largest table over all devices
    steps: int = 20
    rounds: int = 5
    implementation: str | None = None  # of the sequence operators
    settings: str = ""  # part of the names of the settings to time beside one device
    rows_in_a_step: tuple[int, ...] = (10**5, 10**6, 10**7, 10**8)
    parts: tuple[Literal["tables", "steps", "scaling"], ...] = ("tables", "steps", "scaling")
    out: pathlib.Path = RESULTS


@dataclasses.dataclass(frozen=True)
class Quality:
    """Trains a preset on simulated or real devices once per setting and seed."""

    replicas: int = 8
    batch_size: int = 256
    seeds: tuple[int, ...] = (0, 1)
    runs: pathlib.Path = pathlib.Path("runs/quality")
    out: pathlib.Path = RESULTS


@dataclasses.dataclass(frozen=True)
class Paper:
    """Step time on up to `devices` devices."""

    devices: int = 4096
    group: int = 8  # devices of a host, which share rows in 2D
    rows: int = 10**9  # of all tables together
    width: int = 64
    inside: float = 300e9  # bytes/s per device within a host (NVLink, achieved)
    across: float = 40e9  # bytes/s per device between hosts (400 Gb/s network, achieved)
    latency: float = 10e-6  # seconds per collective and doubling of the devices
    sync_every: tuple[int, ...] = (1, 100)
    out: pathlib.Path = RESULTS


# --- (a) weak scaling -------------------------------------------------------------------------------------------------


def make_schema(rows: int, max_length: int) -> FeatureSchema:
    half = max_length // 2
    return FeatureSchema(
        tables=(Table("item", rows, 64), Table("user", rows // 2, 64), Table("tag", 500, 64)),
        dense=(DenseField("age"), DenseField("price", "candidate")),
        sparse=(
            SparseField("user", "user"),
            *(SparseField(f"user_{i}", "tag") for i in range(5)),
            SparseField("item", "item", "candidate"),
            *(SparseField(f"item_{i}", "tag", "candidate", max_ids=4) for i in range(5)),
        ),
        events=(
            EventType("click", max_length, (SparseField("item", "item"), SparseField("tag", "tag"))),
            EventType("view", half, (SparseField("item", "item"), SparseField("tag", "tag"))),
        ),
    )


def make_config(schema: FeatureSchema, options: Measure) -> KunlunConfig:
    event = EventConfig(
        width=options.width, head_width=options.width // 2, depth=options.depth, n_seeds=32, n_tokens=8, window=32
    )
    return KunlunConfig(
        events={e.name: event for e in schema.events}, width=options.width, depth=options.depth, generated=64,
        dense_tokens=2, experts=2, dtype="bfloat16", implementation=options.implementation,
    )  # fmt: skip


def make_batch(schema: FeatureSchema, samples: int, shards: int, seed: int) -> Batch:
    """Lengths uniform over [0, max_length], ids log-uniform over the rows: few are popular, most are rare."""
    rng = np.random.default_rng(seed)

    def ids(field, count):
        rows = schema.table(field.table).rows
        return np.minimum(rows ** rng.random((count, field.max_ids)), rows - 1).astype(np.int32)

    events = {}
    for event in schema.events:
        # Every shard holds as many events as the others, as the loader's dealing nearly achieves.
        lengths = np.tile(rng.integers(0, event.max_length + 1, samples // shards), shards)
        tokens = int(lengths.sum())
        values = {f.name: ids(f, tokens) for f in event.sparse}
        values |= {name: rng.exponential(3600, tokens).astype(np.float32) for name in ("gap", "age")}
        capacity = -(-int(0.5625 * event.max_length * samples / shards) // 64) * 64
        fill = {name: PADDING_ID if x.dtype == np.int32 else 0 for name, x in values.items()}
        events[event.name] = pack(
            values, lengths, capacity=capacity, shards=shards, max_length=event.max_length, fill=fill
        )
    ones = np.ones((samples, 1), np.float32)
    batch = Batch(
        dense={f.name: rng.normal(size=samples).astype(np.float32) for f in schema.dense},
        sparse={f.name: ids(f, samples) for f in schema.sparse},
        events=events,
        request_index=np.tile(np.arange(samples // shards, dtype=np.int32), (shards, 1)),
        labels=(rng.random((samples, 1)) < 0.3).astype(np.float32),
        label_mask=ones,
        weight=ones[:, 0],
    )
    return check_batch(batch, schema)


def learners(options: Measure) -> dict[str, tuple[Learner, int]]:
    """Per setting the learner and its number of devices."""
    schema, devices = make_schema(options.table_rows, options.max_length), jax.device_count()
    model = Kunlun(make_config(schema, options), schema, rngs=nnx.Rngs(0))
    found: dict[str, tuple[Learner, int]] = {"one device": (Learner(model, schema, OptimizerConfig(), steps=1000), 1)}
    for name, parallel in (
        ("2D: a table replica per device", ParallelConfig(data=devices)),
        ("1D: rows over all", ParallelConfig(data=devices, table_rows="all")),
        ("rows and experts over the group", ParallelConfig(expert=devices)),
    ):
        if devices > 1 and options.settings in name:
            plan = plan_tables(schema, parallel).check()
            print(plan, flush=True)
            learner = MeshLearner(
                model, schema, OptimizerConfig(), steps=1000, mesh=make_mesh(parallel), tables=plan,
                batch_size=options.batch * devices,
            )  # fmt: skip
            found[name] = learner, devices
    return found


def measure_scaling(options: Measure, save) -> None:
    notes: set[str] = set()  # which implementation ran where a faster one was passed over
    warnings.showwarning = lambda message, *_, **__: notes.add(str(message))
    found, prepared = learners(options), {}
    for name, (learner, devices) in found.items():
        batches = [make_batch(learner.schema, options.batch * devices, devices, seed) for seed in range(BATCHES)]
        prepared[name] = learner.train_step.lower(learner.abstract(), learner.place(batches[0])), batches
    started = time.time()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = dict(zip(prepared, pool.map(lambda entry: entry[0].compile(), prepared.values()), strict=True))
    print(f"{len(programs)} programs compiled in {time.time() - started:.0f} s", flush=True)
    rows = []
    for name, (learner, devices) in found.items():
        timed = time_learner(learner, programs[name], prepared[name][1], options)
        rows.append({"setting": name, "devices": devices, "samples": options.batch * devices, **timed})
        print(rows[-1], flush=True)
        for row in rows[1:]:
            row["speedup"] = row["samples_per_second"] / rows[0]["samples_per_second"]
        save("weak_scaling", rows)
    config, schema = make_config(found["one device"][0].schema, options), found["one device"][0].schema
    flops = training_flops(kunlun_flops(config, schema, {e.name: e.max_length / 2 for e in schema.events}))
    save(
        "model",
        {
            "training_gflop_per_sample": flops / 1e9,
            "dense_parameters": found["one device"][0].parameters,
            "ids_per_device": ids_of(prepared["one device"][1][0], schema),
            "notes": sorted(notes),
        },
    )


def time_learner(learner: Learner, program, batches: list[Batch], options: Measure) -> dict[str, Any]:
    """Whole training steps on batches that lie on the devices.

    Raises:
      FloatingPointError: a step met a number that is not finite.
    """
    state = learner.init(0)
    placed = [learner.place(batch) for batch in batches]
    placed = jax.device_put(placed, jax.devices()[0]) if learner.mesh is None else placed
    table_bytes = bytes_on_first(state.tables)
    seconds, state = time_steps(lambda state, i: program(state, placed[i % len(placed)])[0], state, options)
    if not state.healthy:
        raise FloatingPointError("a step met a number that is not finite; its time means nothing")
    del state, placed
    gc.collect()
    return {
        "ms": 1e3 * seconds,
        "samples_per_second": batches[0].weight.shape[0] / seconds,
        "table_bytes_per_device": table_bytes,
        "implementation": options.implementation or "the fastest that runs",
    }


def measure_steps(options: Measure, save) -> None:
    rows = []
    for count in options.rows_in_a_step:
        schema = make_schema(count, options.max_length)
        model = Kunlun(make_config(schema, options), schema, rngs=nnx.Rngs(0))
        learner = Learner(model, schema, OptimizerConfig(), steps=1000)
        batches = [make_batch(schema, options.batch, 1, seed) for seed in range(BATCHES)]
        program = learner.train_step.lower(learner.abstract(), batches[0]).compile()
        rows.append({"rows": count, "samples": options.batch, **time_learner(learner, program, batches, options)})
        print(rows[-1], flush=True)
        save("rows_in_a_step", rows)


def ids_of(batch: Batch, schema: FeatureSchema) -> dict[str, int]:
    """Per table, the ids of a batch, padding included: what the exchanges carry."""
    counts = dict.fromkeys((t.name for t in schema.tables), 0)
    for field in schema.sparse:
        counts[field.table] += batch.sparse[field.name].size
    for event in schema.events:
        for field in event.sparse:
            counts[field.table] += batch.events[event.name].values[field.name].size
    return counts


def bytes_on_first(tree: Any) -> int:
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


def time_steps(step, state, options: Measure):
    """Median seconds per step over rounds; the first round warms up."""
    times = []
    for _ in range(options.rounds + 1):
        started = time.perf_counter()
        for i in range(options.steps):
            state = step(state, i)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - started) / options.steps)
    return float(np.median(times[1:])), state


# --- (b), (c) one table -----------------------------------------------------------------------------------------------


def table_step(options: Measure, rows: int, width: int, parallel: ParallelConfig):
    """A compiled step on a table alone (gradient = the rows read), its state, batches and bytes on the first device."""
    fields = 64
    samples = options.ids // fields
    schema = FeatureSchema(tables=(Table("t", rows, width),), sparse=(SparseField("f", "t", max_ids=fields),))
    plan = plan_tables(schema, dataclasses.replace(parallel, replicate_below=0)).check()
    placement, mesh = plan.placements["t"], make_mesh(parallel)
    sharded = ShardedTables(schema, plan, steps=10**9)

    def fresh():
        rows = placement.padded_rows
        return {"t": TableState(jnp.full((rows, width), 0.01), jnp.full(rows, 0.1))}

    def batch_of(ids):
        nothing = jnp.zeros((1, 0))
        return Batch({}, {"f": ids}, {}, nothing, nothing, nothing, nothing)

    def alone(tables, ids):
        found, plans = look_up(schema, tables, batch_of(ids))
        return update(tables, plans, found, learning_rate=0.01)

    def over(tables, ids):
        found, requests = sharded.look_up(tables, batch_of(ids))
        ok, rate = jnp.array(True), jnp.float32(0.01)
        settings = {"step": jnp.int32(0), "learning_rate": rate, "epsilon": 1e-8, "ok": ok}
        return sharded.update(tables, requests, found, {}, **settings)[0]

    rng = np.random.default_rng(0)
    ids = [rng.integers(0, rows, (samples * parallel.devices, fields), np.int32) for _ in range(8)]
    if parallel.devices == 1:
        step, tables = alone, jax.jit(fresh)()
        ids = jax.device_put(ids, jax.devices()[0])
    else:
        step = jax.shard_map(over, mesh=mesh, in_specs=(plan.specs, BATCH), out_specs=plan.specs, check_vma=False)
        tables, ids = jax.jit(fresh, out_shardings=on_mesh(mesh, plan.specs))(), place_batch(mesh, ids)
    program = jax.jit(step, donate_argnums=0).lower(tables, ids[0]).compile()
    memory = program.memory_analysis()
    return program, tables, ids, {
        "rows": rows, "width": width, "table_bytes_per_device": bytes_on_first(tables),
        "planned_bytes_per_device": plan.table_bytes, "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
    }  # fmt: skip


def time_table(options: Measure, rows: int, width: int, parallel: ParallelConfig) -> dict[str, Any]:
    program, tables, ids, facts = table_step(options, rows, width, parallel)
    longer = dataclasses.replace(options, steps=5 * options.steps)
    seconds, tables = time_steps(lambda tables, i: program(tables, ids[i % len(ids)]), tables, longer)
    return {**facts, "ids_per_device": options.ids, "ms": 1e3 * seconds}


def measure_tables(options: Measure, save) -> None:
    rows = []
    for count in options.rows:
        gc.collect()
        try:
            rows.append(time_table(options, count, 16, ParallelConfig()))
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            rows.append({"rows": count, "width": 16, "not_run": str(error).splitlines()[0]})
        print(rows[-1], flush=True)
        save("rows_on_one_device", rows)
    devices = jax.device_count()
    if devices == 1:
        return
    modes = []
    for name, count, width, parallel in (
        ("one device", 10**7, 64, ParallelConfig()),
        ("2D", 10**7, 64, ParallelConfig(data=devices)),
        ("1D", 10**7, 64, ParallelConfig(data=devices, table_rows="all")),
        ("1D", *options.rows_over_all, ParallelConfig(data=devices, table_rows="all")),
    ):
        gc.collect()
        if jax.default_backend() == "cpu":
            count = min(count, max(options.rows))
        try:
            modes.append({"mode": name, **time_table(options, count, width, parallel)})
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            modes.append({"mode": name, "rows": count, "width": width, "not_run": str(error).splitlines()[0]})
        print(modes[-1], flush=True)
        save("one_table_over_devices", modes)


def measure(options: Measure) -> None:
    save = Saver(options.out, "measure", options)
    for part in options.parts:
        {"tables": measure_tables, "steps": measure_steps, "scaling": measure_scaling}[part](options, save)


# --- quality ----------------------------------------------------------------------------------------------------------


def quality(options: Quality) -> None:
    # Only here: the loader's library is needed by no other part.
    from train import PRESETS, train

    base, rows = PRESETS["synthetic"](), []
    save = Saver(options.out, "quality", options)
    r = options.replicas
    settings = {
        "one replica": ParallelConfig(data=r, table_rows="all", replicate_below=0),
        f"R = {r}, c = 1": ParallelConfig(data=r, moment_scale="one", replicate_below=0),
        f"R = {r}, c = R": ParallelConfig(data=r, replicate_below=0),
    }
    for seed in options.seeds:
        for name, parallel in settings.items():
            config = dataclasses.replace(base, parallel=parallel, seed=seed, batch_size=options.batch_size)
            out = options.runs / f"{name.replace(' ', '')}-{seed}"
            if code := train(config, out, resume=True):
                sys.exit(code)
            summary = json.loads((out / "summary.json").read_text())
            metrics = {part: summary[part]["click/ne"] for part in ("validation", "test")}
            rows.append({"setting": name, "seed": seed, "ne": metrics, "best_ne": summary["data"]["best_ne"]})
            print(rows[-1], flush=True)
            save("runs", rows)


# --- on paper ---------------------------------------------------------------------------------------------------------


def step_time(
    paper: Paper, devices: int, group: int, sync_every: int, *, compute: float, ids: int, dense: int, beyond: float = 0
) -> dict[str, float]:
    """Seconds of each part of a step on `devices` devices, of which `group` share the rows of the tables."""
    group = min(devices, group)
    replicas = devices // group
    row = 4 * paper.width

    def wire(count: int) -> float:
        return paper.inside if count <= paper.group else paper.across

    def wait(count: int) -> float:
        return paper.latency * max(math.log2(count), 0)

    # Ids out, rows back, gradients home: all-gather, reduce-scatter, all-gather, of which (G - 1) / G is others'.
    exchange = (group - 1) * ids * (4 + 2 * row) / wire(group) + 3 * wait(group)
    averaging = 0.0
    if replicas > 1:
        # All-reduce of a row per id of all replicas since the last time, or of the whole block if that is smaller.
        rows = min(sync_every * devices * ids, paper.rows / group)
        averaging = (2 * (replicas - 1) / replicas * rows * (row + 4) / wire(devices) + 2 * wait(replicas)) / sync_every
    reduce = 2 * (devices - 1) / devices * 4 * dense / wire(devices) + 2 * wait(devices)
    return {
        "compute": compute,
        "exchange": exchange,
        "averaging": averaging,
        "dense": reduce,
        "beyond": beyond if devices > 1 else 0.0,
    }


def on_paper(options: Paper) -> None:
    measured = json.loads((options.out / f"{NAME}.json").read_text())["measure"]
    one, facts = measured["weak_scaling"][0], measured["model"]
    known = {
        "compute": one["ms"] / 1e3,
        "ids": facts["ids_per_device"]["item"] + facts["ids_per_device"]["user"],
        "dense": facts["dense_parameters"],
    }
    for row in measured["weak_scaling"]:
        if row["setting"].startswith("1D"):
            same = sum(step_time(options, row["devices"], row["devices"], 1, **known).values())
            known["beyond"] = max(row["ms"] / 1e3 - same, 0)
    assumptions = [
        f"one device computes {one['samples']} samples in {one['ms']:.1f} ms (measured: {measured['about']['device']})",
        f"each device sends {known['ids']:,} ids per step, padding included; rows are {options.width} float32 wide",
        "the exchange is the implemented one: all-gather of ids, reduce-scatter of rows, all-gather of gradients",
        f"1D shards rows over all devices, 2D over the {options.group} of a host (neighbours = group)",
        f"{options.rows:,} rows; replicas average a row per id of all since the last time, at most the whole block",
        f"bytes per second and device: {options.inside / 1e9:.0f} GB/s inside a host, {options.across / 1e9:.0f} GB/s "
        f"between hosts; {options.latency * 1e6:.0f} µs per collective and doubling of the devices",
        f"two devices measured {1e3 * known.get('beyond', 0):.1f} ms per step beyond this model; it stays as it is",
        "nothing overlaps, devices are equally loaded, reading data costs nothing",
    ]
    print("assumptions:", *assumptions, sep="\n  ")
    modes = {"1D": (options.devices, 1)}
    for every in options.sync_every:
        modes[f"2D, averaged every {every} step{'s' if every > 1 else ''}"] = (options.group, every)
    rows = []
    for mode, (group, every) in modes.items():
        for devices in [2**i for i in range(options.devices.bit_length())]:
            parts = step_time(options, devices, group, every, **known)
            seconds = sum(parts.values())
            rows.append(
                {
                    "mode": mode, "devices": devices, "ms": 1e3 * seconds, "efficiency": known["compute"] / seconds,
                    "parts_ms": {name: 1e3 * value for name, value in parts.items()},
                }
            )  # fmt: skip
            shown = ", ".join(f"{name} {value:.2f}" for name, value in rows[-1]["parts_ms"].items())
            print(f"{mode}: {devices:5d} devices {1e3 * seconds:9.2f} ms ({shown}), {rows[-1]['efficiency']:.0%}")
    Saver(options.out, "paper", options)("step_time", {"assumptions": assumptions, "rows": rows})
    plot(options.out, measured, rows)


def plot(out: pathlib.Path, measured: dict, paper: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    scaling = measured["weak_scaling"]
    axes[0].barh([row["setting"] for row in scaling], [row["samples_per_second"] / 1e3 for row in scaling])
    for place, row in enumerate(scaling):
        axes[0].text(0, place, f"  {row['samples_per_second']:,.0f}", va="center", color="white")
    axes[0].set(title="Weak scaling", xlabel="thousand samples/s")
    axes[0].invert_yaxis()
    timed = [row for row in measured["rows_on_one_device"] if "ms" in row]
    axes[1].semilogx([row["rows"] for row in timed], [row["ms"] for row in timed], "o-")
    axes[1].set(title="One table's step against its rows", xlabel="rows", ylabel="ms", ylim=(0, None))
    for mode in dict.fromkeys(row["mode"] for row in paper):
        points = [row for row in paper if row["mode"] == mode]
        axes[2].loglog([row["devices"] for row in points], [row["ms"] for row in points], "o-", label=mode)
    axes[2].set(title="Step time on paper", xlabel="devices", ylabel="ms")
    axes[2].legend()
    figure.savefig(out / f"{NAME}.png", dpi=110)


class Saver:
    """Writes each part as soon as it is known, so that a time limit costs only what follows."""

    def __init__(self, out: pathlib.Path, part: str, options: Any):
        self.file, self.part = out / f"{NAME}.json", part
        out.mkdir(parents=True, exist_ok=True)
        self.about = {
            "command": "python experiments/bench_parallel.py " + type(options).__name__.lower(),
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "jax": jax.__version__,
            "options": {k: v for k, v in vars(options).items() if not isinstance(v, pathlib.Path)},
        }

    def __call__(self, name: str, values: Any) -> None:
        everything = json.loads(self.file.read_text()) if self.file.exists() else {}
        everything[self.part] = {**everything.get(self.part, {}), "about": self.about, name: values}
        self.file.write_text(json.dumps(everything, indent=1) + "\n")


def main() -> None:
    options = tyro.cli(Measure | Quality | Paper, description=__doc__)  # type: ignore[arg-type]
    {Measure: measure, Quality: quality, Paper: on_paper}[type(options)](options)


if __name__ == "__main__":
    main()
