"""Tables over eight simulated devices: against a plain NumPy model of two-dimensional sparse parallelism."""

import dataclasses
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kunlun_jax.batch import Batch
from kunlun_jax.embedding import TableState, embed
from kunlun_jax.embedding.placement import plan_tables
from kunlun_jax.embedding.sharded import ShardedTables
from kunlun_jax.schema import PADDING_ID, FeatureSchema, SparseField, Table
from kunlun_jax.sharding import AXES, BATCH, REPLICATED, ParallelConfig, make_mesh, on_mesh, place_batch

ROWS, WIDTH, IDS, STEPS, SAMPLES = 211, 4, 3, 5, 16
RATE, EPSILON = 0.3, 1e-6
SCHEMA = FeatureSchema(
    tables=(Table("item", ROWS, WIDTH), Table("brand", 19, 3), Table("tag", 3, 2)),
    sparse=(
        SparseField("item", "item", max_ids=IDS),
        SparseField("brand", "brand"),
        SparseField("tags", "tag", max_ids=2),
    ),
)
# item has more rows in a block than a step has ids, brand has fewer; tag is small enough to be whole on every device.
SMALL = 3 * (2 + 1) * 4
CASES = {
    "one replica": ParallelConfig(data=1, expert=8),
    "rows over both axes": ParallelConfig(data=2, expert=4, table_rows="all"),
    "two replicas": ParallelConfig(data=2, expert=4),
    "two replicas, neighbours in a group": ParallelConfig(data=2, expert=4, neighbours="group"),
    "two replicas, c = 1": ParallelConfig(data=2, expert=4, moment_scale="one"),
    "two replicas, averaged every 3 steps": ParallelConfig(data=2, expert=4, sync_every=3),
    "eight replicas": ParallelConfig(data=8, expert=1),
    "eight replicas, c = 1, every 2 steps": ParallelConfig(data=8, expert=1, moment_scale="one", sync_every=2),
}


class Steps(NamedTuple):
    ids: dict[str, np.ndarray]  # [steps, samples, max_ids]
    targets: dict[str, np.ndarray]  # [steps, samples, width]


def batch_of(ids) -> Batch:
    none = np.zeros((SAMPLES, 1), np.float32)
    return Batch({}, ids, {}, np.zeros((8, SAMPLES // 8), np.int32), none, none, none[:, 0])


def draw(rng) -> Steps:
    def ids(table, k):
        drawn = np.minimum(rng.geometric(0.15, (STEPS, SAMPLES, k)) - 1, table.rows - 1)
        return np.where(rng.random(drawn.shape) < 0.3, PADDING_ID, drawn).astype(np.int32)

    return Steps(
        {f.name: ids(SCHEMA.table(f.table), f.max_ids) for f in SCHEMA.sparse},
        {f.name: rng.normal(size=(STEPS, SAMPLES, SCHEMA.table(f.table).width)) for f in SCHEMA.sparse},
    )


def loss_of(embedded, targets):
    """A part of the global mean of squared distances."""
    return sum(jnp.sum((embedded.sparse[name] - targets[name]) ** 2) for name in targets) / SAMPLES


def on_devices(config: ParallelConfig, tables, steps: Steps, ok=True):
    """All tables of all replicas after every step: {name: [steps, R, V, width]}, accumulators likewise."""
    plan = plan_tables(SCHEMA, dataclasses.replace(config, replicate_below=SMALL))
    sharded, mesh = ShardedTables(SCHEMA, plan, STEPS), make_mesh(config)
    most = {f.table: SAMPLES // 8 * f.max_ids for f in SCHEMA.sparse}
    sizes = sharded.touched_sizes(most)
    specs = plan.specs
    touched_specs = dict.fromkeys(sizes, BATCH)

    def step(tables, touched, batch, targets, number):
        rows, requests = sharded.look_up(tables, batch)
        plans = {name: request.plan for name, request in requests.items()}
        grads = jax.grad(lambda rows: loss_of(embed(SCHEMA, batch, rows, plans), targets))(rows)
        grads["tag"] = jax.lax.psum(grads["tag"], AXES)
        tables, touched = sharded.update(
            tables, requests, grads, touched, step=number, learning_rate=RATE, epsilon=EPSILON, ok=jnp.asarray(ok)
        )
        # Replicas as a leading axis, since between averagings they differ.
        replicas = jax.tree.map(lambda x: x[None], tables)
        return tables, touched, replicas

    def seen(spec):
        return PartitionSpec("data", "expert") if spec == PartitionSpec("expert") else PartitionSpec(None, *spec)

    shown = {name: TableState(*map(seen, spec)) for name, spec in specs.items()}
    if config.data > 1 and config.table_rows == "group":
        shown["tag"] = TableState(PartitionSpec("data"), PartitionSpec("data"))
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(specs, touched_specs, BATCH, BATCH, REPLICATED),
            out_specs=(specs, touched_specs, shown), check_vma=False,
        ),
        donate_argnums=0,
    )  # fmt: skip

    def padded(name, x):
        extra = plan.placements[name].padded_rows - len(x)
        return np.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1))).astype(np.float32)

    state = {name: TableState(*(padded(name, x) for x in table)) for name, table in tables.items()}
    state = jax.tree.map(jax.device_put, state, on_mesh(mesh, specs))
    touched = {name: np.full((8 * k, m), rows, np.int32) for name, (k, m, rows) in sizes.items()}
    touched = jax.tree.map(jax.device_put, touched, on_mesh(mesh, touched_specs))
    history = []
    for i in range(STEPS):
        batch = place_batch(mesh, batch_of({name: x[i] for name, x in steps.ids.items()}))
        targets = place_batch(mesh, {name: x[i].astype(np.float32) for name, x in steps.targets.items()})
        state, touched, replicas = step(state, touched, batch, targets, np.int32(i))
        history.append(jax.tree.map(np.asarray, replicas))
    return history


def by_hand(config: ParallelConfig, tables, steps: Steps):
    """The algorithm in float64, sample by sample, in the same form."""
    replicas = {name: 1 if name == "tag" else config.replicas for name in tables}
    state = {
        name: [[np.array(x, np.float64) for x in table] for _ in range(replicas[name])]
        for name, table in tables.items()
    }
    touched, history = set(), []
    for i in range(STEPS):
        for field in SCHEMA.sparse:
            name, count = field.table, replicas[field.table]
            samples = np.split(np.arange(SAMPLES), count)
            for (rows, moment), own in zip(state[name], samples, strict=True):
                grad = np.zeros_like(rows)
                for b in own:
                    used = [j for j in steps.ids[field.name][i, b] if j < len(rows)]
                    mean = rows[used].mean(0) if used else np.zeros(rows.shape[1])
                    for j in used:
                        grad[j] += 2 * (mean - steps.targets[field.name][i, b]) / len(used) / SAMPLES * count
                        touched.add((name, j))
                c = count if config.moment_scale == "replicas" else 1
                moment += (grad**2).mean(1)
                rows -= RATE * grad / (np.sqrt(moment / c) + EPSILON)[:, None]
            if (i + 1) % config.sync_every == 0 or i + 1 == STEPS:
                for row in [j for table, j in touched if table == name]:
                    for part in (0, 1):
                        mean = np.mean([replica[part][row] for replica in state[name]], axis=0)
                        for replica in state[name]:
                            replica[part][row] = mean
                touched = {entry for entry in touched if entry[0] != name}
        history.append({name: [np.stack(x) for x in zip(*table, strict=True)] for name, table in state.items()})
        history[-1] = {name: [x.copy() for x in parts] for name, parts in history[-1].items()}
    return history


def fresh_tables(rng):
    return {t.name: TableState(rng.normal(size=(t.rows, t.width)), rng.random(t.rows) * 0.01) for t in SCHEMA.tables}


@pytest.mark.parametrize("case", CASES)
def test_tables_follow_the_algorithm_on_every_replica(case):
    rng = np.random.default_rng(0)
    tables, steps = fresh_tables(rng), draw(rng)
    got, expected = on_devices(CASES[case], tables, steps), by_hand(CASES[case], tables, steps)
    for i in range(STEPS):
        for name in tables:
            real = len(tables[name].accumulator)
            for part, actual, wanted in zip(("rows", "accumulator"), got[i][name], expected[i][name], strict=True):
                wanted = np.broadcast_to(wanted, (len(actual), *wanted.shape[1:]))
                np.testing.assert_allclose(
                    actual[:, :real], wanted, rtol=2e-5, atol=2e-6, err_msg=f"{case}: {part} of {name} after {i}"
                )
                if CASES[case].sync_every == 1:  # the next step builds on it: drifting apart would go unnoticed
                    np.testing.assert_array_equal(actual, np.broadcast_to(actual[0], actual.shape))


def test_replicas_of_a_large_table_change_in_place_and_exchange_what_the_ids_ask_for():
    temporaries = []
    for rows in (10_000, 1_000_000):
        schema = FeatureSchema(tables=(Table("t", rows, WIDTH),), sparse=(SparseField("f", "t", max_ids=IDS),))
        plan = plan_tables(schema, dataclasses.replace(CASES["eight replicas"], replicate_below=0))
        sharded = ShardedTables(schema, plan, STEPS)

        def step(tables, ids, sharded=sharded):
            found, requests = sharded.look_up(tables, batch_of({"f": ids}))
            settings = {"step": 0, "learning_rate": RATE, "epsilon": EPSILON, "ok": jnp.asarray(True)}
            return sharded.update(tables, requests, found, {}, **settings)[0]

        step = jax.shard_map(
            step, mesh=make_mesh(plan.config), in_specs=(plan.specs, BATCH), out_specs=plan.specs, check_vma=False
        )
        tables = {"t": TableState(*(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((rows, WIDTH), (rows,))))}
        ids = jax.ShapeDtypeStruct((SAMPLES, IDS), jnp.int32)
        compiled = jax.jit(step, donate_argnums=0).lower(tables, ids).compile()
        program = compiled.as_text()
        whole = set(re.findall(rf"= f32\[{rows}[\],]\S* ([\w-]+)\(", program))
        assert whole <= {"parameter", "get-tuple-element", "tuple", "bitcast", "scatter", "fusion"}, rows
        exchanged = set(re.findall(r"\[([\d,]+)\]\S* all-gather\(", program))
        ids = SAMPLES // 8 * IDS
        assert exchanged == {f"8,{ids}", f"8,{ids},{WIDTH}"}
        assert "all-reduce" not in program
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    assert max(temporaries) - min(temporaries) < 4096, temporaries


def test_a_bad_step_changes_no_replica():
    rng = np.random.default_rng(1)
    tables, steps = fresh_tables(rng), draw(rng)
    for replicas in on_devices(CASES["two replicas"], tables, steps, ok=False):
        for name, table in tables.items():
            for actual, before in zip(replicas[name], table, strict=True):
                before = np.broadcast_to(np.float32(before), (len(actual), *before.shape))
                np.testing.assert_array_equal(actual[:, : before.shape[1]], before)


def test_the_first_step_grows_with_the_root_of_c():
    """One row, touched by every replica with the same gradient, which therefore is that of one replica."""
    steps = Steps(
        {f.name: np.full((STEPS, SAMPLES, f.max_ids), 1, np.int32) for f in SCHEMA.sparse},
        {f.name: np.ones((STEPS, SAMPLES, SCHEMA.table(f.table).width)) for f in SCHEMA.sparse},
    )
    zeros = {t.name: TableState(np.zeros((t.rows, t.width)), np.zeros(t.rows)) for t in SCHEMA.tables}
    run = partial(on_devices, tables=zeros, steps=steps)
    alone, scaled, plain = (
        run(CASES[c])[0]["item"].rows[0, 1, 0] for c in ("one replica", "two replicas", "two replicas, c = 1")
    )
    np.testing.assert_allclose([alone, plain, scaled], [RATE, RATE, RATE * 2**0.5], rtol=1e-4)
