"""Measure training over several devices.

    python experiments/bench_parallel.py measure                    # one and two GPUs
    python experiments/bench_parallel.py quality                    # c = 1 against c = R, on CPUs

Each writes its parts of experiments/results/bench_parallel.json; parallel_paper.py goes on from there, to thousands of
devices, and draws the plot.

measure: (a) `scaling`, weak scaling of a bfloat16 Kunlun with equal batch per device, samples/s from whole training
steps on batches that lie on the devices: one device, two with a table replica each (2D), two with the rows over both
(1D), and two that share rows and experts; of several devices also the time inside exchanges, waiting for each other
included, from a profile; (b) `tables`, one table's look-up and row-wise AdaGrad alone against its rows, as far as
memory goes, and one table over all devices, 1D and 2D; `steps`, whole training steps on one device against the rows of
their tables.
Times are medians over rounds of many steps without a wait in between, rotating batches.

quality: NE on the generated stream at equal samples for one replica, R replicas with c = 1 and with c = R.
"""

import concurrent.futures
import dataclasses
import gc
import importlib.metadata
import json
import pathlib
import sys
import time
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_model import profiled
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
PROFILED = 4  # steps


@dataclasses.dataclass(frozen=True)
class Measure:
    """Weak scaling, step time against rows, and 1D against 2D, on the devices at hand."""

    batches: tuple[int, ...] = (1024, 4096, 8192)  # samples per device, for the scaling
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
    batch_in_a_step: int = 4096
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


def learners(options: Measure, batch: int) -> dict[str, tuple[Learner, int]]:
    """Per setting the learner and its number of devices, each of which takes `batch` samples."""
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
            learner = MeshLearner(
                model, schema, OptimizerConfig(), steps=1000, mesh=make_mesh(parallel), tables=plan,
                batch_size=batch * devices,
            )  # fmt: skip
            found[name] = learner, devices
    return found


def measure_scaling(options: Measure, save) -> None:
    notes: set[str] = set()  # which implementation ran where a faster one was passed over
    warnings.showwarning = lambda message, *_, **__: notes.add(str(message))
    rows = []
    for batch in options.batches:
        found = learners(options, batch)
        batches = {
            name: [make_batch(learner.schema, batch * devices, devices, seed) for seed in range(BATCHES)]
            for name, (learner, devices) in found.items()
        }
        with concurrent.futures.ThreadPoolExecutor() as pool:
            of_setting = {
                name: pool.submit(compiled, learner, batches[name][0]) for name, (learner, _) in found.items()
            }
            programs = {name: future.result() for name, future in of_setting.items()}
        one = None
        for name, (learner, devices) in found.items():
            row = {"setting": name, "devices": devices, "samples": batch * devices}
            row |= time_learner(learner, programs[name], batches[name], options)
            one = one or row["samples_per_second"]
            rows.append({**row, "speedup": row["samples_per_second"] / one})
            print(rows[-1], flush=True)
            save("weak_scaling", rows, notes=sorted(notes))
        learner, _ = found["one device"]
        describe_model(options, batch, learner, batches["one device"][0], save)


def compiled(learner: Learner, batch: Batch):
    """A learner's step for batches like this one."""
    return learner.train_step.lower(learner.abstract_state(), learner.place(batch)).compile()


def describe_model(options: Measure, samples: int, learner: Learner, batch: Batch, save) -> None:
    config, schema = make_config(learner.schema, options), learner.schema
    flops = training_flops(kunlun_flops(config, schema, {e.name: e.max_length / 2 for e in schema.events}))
    facts = {
        "training_gflop_per_sample": flops / 1e9,
        "dense_parameters": learner.parameters,
        "samples_per_device": samples,
        "ids_per_device": ids_of(batch, schema),
    }
    save("model", facts)


def time_learner(learner: Learner, program, batches: list[Batch], options: Measure) -> dict[str, Any]:
    """Whole training steps on batches that lie on the devices.

    Raises:
      FloatingPointError: a step met a number that is not finite.
    """
    state = learner.init(0)
    placed = [learner.place(batch) for batch in batches]
    placed = jax.device_put(placed, jax.devices()[0]) if learner.mesh is None else placed
    table_bytes = bytes_on_first(state.tables)

    def step(state, i):
        return program(state, placed[i % len(placed)])[0]

    seconds, state = time_steps(step, state, options)
    exchanges, state = time_exchanges(step, state) if learner.mesh is not None else ({}, state)
    if not state.healthy:
        raise FloatingPointError("a step met a number that is not finite; its time means nothing")
    del state, placed
    gc.collect()
    return {
        "ms": 1e3 * seconds,
        "samples_per_second": batches[0].weight.shape[0] / seconds,
        "table_bytes_per_device": table_bytes,
        "implementation": options.implementation or "the fastest that runs",
        **({"exchange_ms": exchanges} if exchanges else {}),
    }


def measure_steps(options: Measure, save) -> None:
    rows = []
    for count in options.rows_in_a_step:
        schema = make_schema(count, options.max_length)
        model = Kunlun(make_config(schema, options), schema, rngs=nnx.Rngs(0))
        learner = Learner(model, schema, OptimizerConfig(), steps=1000)
        batch = options.batch_in_a_step
        batches = [make_batch(schema, batch, 1, seed) for seed in range(BATCHES)]
        program = compiled(learner, batches[0])
        rows.append({"rows": count, "samples": batch, **time_learner(learner, program, batches, options)})
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


def time_exchanges(step, state) -> tuple[dict[str, float], Any]:
    """Milliseconds per step and device by NCCL kernel, in which devices also wait for each other; and the state."""
    held = [state]

    def run():
        for i in range(PROFILED):
            held.append(step(held.pop(), i))
        jax.block_until_ready(held)

    found: dict[str, float] = {}
    for (_, kernel), seconds in profiled(run).items():
        if "nccl" in kernel.lower():
            kind = kernel.removeprefix("ncclDevKernel_").split("(")[0]
            found[kind] = found.get(kind, 0.0) + 1e3 * seconds / PROFILED / jax.device_count()
    return found, held[0]


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


# --- results ----------------------------------------------------------------------------------------------------------


class Saver:
    """Writes each part as soon as it is known, so that a time limit costs only what follows, and says where it ran."""

    def __init__(self, out: pathlib.Path, command: str, options: Any):
        self.file, self.command = out / f"{NAME}.json", command
        out.mkdir(parents=True, exist_ok=True)
        self.about = {
            "command": " ".join(["python", f"experiments/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
            "options": {k: v for k, v in vars(options).items() if not isinstance(v, pathlib.Path)},
        }

    def __call__(self, name: str, values: Any, **more: Any) -> None:
        """Replace the part `name` of this command's results; the others stay."""
        everything = read_results(self.file.parent) if self.file.exists() else {}
        part = {"about": self.about | more, "values": values}
        everything[self.command] = {**everything.get(self.command, {}), name: part}
        self.file.write_text(json.dumps(everything, indent=1) + "\n")


def read_results(out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """By command and part: {"about": where and how it ran, "values": what came out}."""
    return json.loads((out / f"{NAME}.json").read_text())


def main() -> None:
    options = tyro.cli(Measure | Quality, description=__doc__)  # type: ignore[arg-type]
    {Measure: measure, Quality: quality}[type(options)](options)


if __name__ == "__main__":
    main()
