"""Meshes, where things lie on them, and the table planner's numbers."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kunlun_jax.embedding.placement import plan_tables
from kunlun_jax.schema import FeatureSchema, SparseField, Table
from kunlun_jax.sharding import DATA, EXPERT, ParallelConfig, make_mesh, own_rows, own_shards, place_batch

SCHEMA = FeatureSchema(
    tables=(Table("big", 1_000_003, 15), Table("small", 1000, 15)),
    sparse=(SparseField("a", "big"), SparseField("b", "small")),
)


def ids(mesh):
    return [[device.id for device in row] for row in mesh.devices]


def test_replicas_of_a_shard_are_neighbours_unless_the_group_is():
    assert ids(make_mesh(ParallelConfig(data=2, expert=4))) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert ids(make_mesh(ParallelConfig(data=2, expert=4, neighbours="group"))) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert make_mesh(ParallelConfig(data=2, expert=4)).axis_names == (DATA, EXPERT)


def test_a_batch_comes_back_in_the_order_of_its_shards():
    mesh = make_mesh(ParallelConfig(data=2, expert=4))
    values = np.arange(48).reshape(16, 3)
    placed = place_batch(mesh, {"x": values})["x"]
    for shard, device in enumerate(mesh.devices.flat):
        piece = next(s.data for s in placed.addressable_shards if s.device == device)
        np.testing.assert_array_equal(piece, values[2 * shard : 2 * shard + 2])
    np.testing.assert_array_equal(own_rows(placed), values)
    assert own_shards(mesh) == list(range(8))


@pytest.mark.parametrize(
    ("config", "rows", "replicas", "spec"),
    [
        (ParallelConfig(), 1_000_003, 1, PartitionSpec((EXPERT,))),
        (ParallelConfig(data=2, expert=4), 250_001, 2, PartitionSpec((EXPERT,))),
        (ParallelConfig(data=2, expert=4, table_rows="all"), 125_001, 1, PartitionSpec((DATA, EXPERT))),
        (ParallelConfig(data=8), 1_000_003, 8, PartitionSpec((EXPERT,))),
    ],
)
def test_the_plan_counts_the_bytes_that_are_allocated(config, rows, replicas, spec):
    plan = plan_tables(SCHEMA, config, dense_bytes=1000)
    big, small = plan.placements["big"], plan.placements["small"]
    assert big.padded_rows == rows * config.table_shards >= 1_000_003
    assert big.device_bytes == rows * 64
    assert big.spec == spec
    assert small.replicated == (config.devices > 1)
    assert small.device_bytes == 64_000
    assert plan.table_bytes == rows * 64 + 64_000
    assert plan.dense_bytes == 4000
    assert config.replicas == replicas
    assert f"{rows:,} rows per device" in str(plan)


def test_replicas_cost_what_the_paper_says():
    """S (R - 1) / P bytes per device beyond one-dimensional sharding."""
    two = plan_tables(SCHEMA, ParallelConfig(data=2, expert=4, replicate_below=0)).table_bytes
    one = plan_tables(SCHEMA, ParallelConfig(data=2, expert=4, replicate_below=0, table_rows="all")).table_bytes
    np.testing.assert_allclose(two - one, 1_001_003 * 64 * (2 - 1) / 8, rtol=1e-4)


def test_a_plan_that_does_not_fit_says_so_with_the_numbers():
    fits = ParallelConfig(data=2, expert=4, device_memory=18_000_000)
    plan_tables(SCHEMA, fits).check()
    tight = ParallelConfig(data=2, expert=4, device_memory=17_000_000)
    with pytest.raises(
        ValueError, match=r"16\.1 MB of tables .* 15\.3 MB allowed .* at least 5 table shards; there are 4"
    ):
        plan_tables(SCHEMA, tight).check()
    with pytest.raises(ValueError, match=r"a smaller model"):
        plan_tables(SCHEMA, tight, dense_bytes=10_000_000).check()


def test_memory_is_asked_of_the_device():
    plan = plan_tables(SCHEMA, ParallelConfig())
    assert 1e8 < plan.memory < 1e13
    assert plan.memory * jax.local_device_count() < 1e13


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 0}, r"parallel.data: must be at least 1, got 0"),
        ({"expert": -1}, r"parallel.expert: must be at least 1, got -1"),
        ({"sync_every": 0}, r"parallel.sync_every: must be at least 1, got 0"),
        ({"replicate_below": -1}, r"parallel.replicate_below: must not be negative, got -1"),
        ({"device_memory": 0}, r"parallel.device_memory: must be at least 1 byte, got 0"),
        ({"table_rows": "some"}, r"parallel.table_rows: 'some' is unknown"),
        ({"moment_scale": "two"}, r"parallel.moment_scale: 'two' is unknown"),
        ({"neighbours": "none"}, r"parallel.neighbours: 'none' is unknown"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)
