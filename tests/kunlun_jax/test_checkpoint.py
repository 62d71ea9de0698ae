"""Checkpoints: bit-exact, bound to their schema, and clear about damage, misfits and full disks."""

import errno
import gc
import json
import resource
import shutil
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kunlun_jax import processes
from kunlun_jax.checkpoint import CheckpointError, Checkpoints, _own_state, describe
from kunlun_jax.embedding import init_tables
from kunlun_jax.schema import DenseField, FeatureSchema, SparseField, Table

SCHEMA = FeatureSchema(
    tables=(Table("item", 300, 8), Table("tag", 7, 3)),
    dense=(DenseField("age"),),
    sparse=(SparseField("item", "item"), SparseField("tags", "tag", max_ids=2)),
)
# Reading a damaged file leaves orbax coroutines behind that complain when they are collected: here, by this fixture.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


def make_state(seed: int, width: int = 64):
    model = nnx.Linear(width, 40, rngs=nnx.Rngs(seed))
    _, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(optax.linear_schedule(1e-3, 0, 100))
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "tables": init_tables(SCHEMA, key=jax.random.key(seed), scale=1.0, initial_accumulator=0.1),
        "key": jax.random.key(seed),
        "half": jax.random.normal(jax.random.key(seed), (5, 3), jnp.bfloat16),
        "step": jnp.int32(seed),
        "host": np.arange(4, dtype=np.float32) + seed,
    }


def small_state(value: float):
    return {"w": value + jax.random.normal(jax.random.key(0), (120, 120)), "n": jnp.float32(value)}


def plain(state):
    """A copy on the host, random keys as their data."""
    return jax.tree.map(
        lambda x: np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), state
    )


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run", schema=SCHEMA, config={"width": 64}, keep=3) as made:
        yield made


class Position:
    """Like a data iterator."""

    def __init__(self):
        self.state = {"batches": 0, "epoch": [0]}

    def get_state(self):
        return self.state


def test_restores_every_bit_into_the_same_structure(checkpoints):
    state = make_state(1)
    checkpoints.save(10, state, {"batches": 7}, meta={"ne": 0.83})
    restored = checkpoints.restore(jax.eval_shape(lambda: make_state(2)))
    chex.assert_trees_all_equal_structs(restored.state, state)
    chex.assert_trees_all_equal(plain(restored.state), plain(state))
    chex.assert_trees_all_equal_dtypes(restored.state, state)
    assert restored.step == 10
    assert restored.data_state == {"batches": 7}
    assert restored.meta == {"ne": 0.83}
    np.testing.assert_array_equal(jax.random.normal(restored.state["key"], (3,)), jax.random.normal(state["key"], (3,)))


def test_the_latest_or_a_named_step_is_restored_and_old_ones_go(checkpoints):
    assert checkpoints.latest_step() is None
    for step in (1, 2, 5, 9):
        checkpoints.save(step, small_state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 9]
    assert checkpoints.latest_step() == 9
    for step, expected in ((None, 9), (5, 5), (2, 2)):
        restored = checkpoints.restore(small_state(0), step)
        assert restored.step == expected
        chex.assert_trees_all_equal(restored.state, small_state(expected))


def test_description_needs_no_target(checkpoints):
    checkpoints.save(3, make_state(3), meta={"seed": 3})
    checkpoints.wait()
    found = describe(checkpoints.directory)
    assert (found.step, found.schema, found.config, found.meta) == (3, SCHEMA, {"width": 64}, {"seed": 3})
    assert found.arrays["tables/item/rows"] == [[300, 8], "float32"]


def test_neither_donation_nor_a_moving_iterator_reaches_a_save_under_way(checkpoints):
    state, position = make_state(4), Position()
    state["tables"]["item"] = state["tables"]["item"]._replace(rows=jnp.full((200_000, 8), 3.0))
    before = plain(state)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x.at[0].add(1.0), state), donate_argnums=0)
    checkpoints.save(1, state, position)
    tables = state["tables"]
    for _ in range(5):
        tables = step(tables)
        position.state["batches"] += 1
        position.state["epoch"][0] += 1
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {**state, "tables": tables})
    restored = checkpoints.restore(target)
    chex.assert_trees_all_equal(plain(restored.state), before)
    assert restored.data_state == {"batches": 0, "epoch": [0]}


def test_a_checkpoint_of_one_mesh_restores_on_another(checkpoints):
    def placed(rows, columns):
        mesh = jax.make_mesh((rows, columns), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, PartitionSpec("expert")), NamedSharding(mesh, PartitionSpec())

    by_rows, everywhere = placed(2, 4)
    table = jax.random.normal(jax.random.key(0), (320, 8))
    state = {"rows": jax.device_put(table, by_rows), "w": jax.device_put(table[0], everywhere)}
    checkpoints.save(1, state)
    by_rows, everywhere = placed(4, 2)
    target = {
        "rows": jax.ShapeDtypeStruct((320, 8), jnp.float32, sharding=by_rows),
        "w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=everywhere),
    }
    restored = checkpoints.restore(target).state
    assert restored["rows"].sharding.is_equivalent_to(by_rows, 2)
    assert restored["w"].sharding.is_equivalent_to(everywhere, 1)
    alone = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)).state
    assert len(alone["rows"].sharding.device_set) == 1
    for found in (restored, alone):
        np.testing.assert_array_equal(found["rows"], table)
        np.testing.assert_array_equal(found["w"], table[0])


def test_tables_may_be_padded_to_other_lengths_beyond_their_rows(checkpoints):
    def padded(rows):
        values = np.zeros((rows, 8), np.float32)
        values[:300] = np.arange(2400).reshape(300, 8)
        return {"tables": {"item": {"rows": jnp.asarray(values)}}}

    checkpoints.save(1, padded(304))
    for rows in (300, 302, 304, 320):
        restored = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), padded(rows)))
        chex.assert_trees_all_equal(restored.state, padded(rows))
    short = {"tables": {"item": {"rows": jax.ShapeDtypeStruct((299, 8), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"tables/item/rows: float32 \[304, 8\] in the checkpoint, float32 \[299, 8\]"):
        checkpoints.restore(short)


def test_positions_of_several_processes_go_to_each_or_must_agree(checkpoints, monkeypatch):
    state = {"w": jnp.zeros(3)}
    for step, positions in ((1, [{"next": 7}] * 4), (2, [{"next": 7}, {"next": 8}])):
        monkeypatch.setattr(processes, "gather", lambda _, positions=positions: positions)
        checkpoints.save(step, state, {"next": 7})
    assert checkpoints.restore(state, 1).data_state == {"next": 7}
    with pytest.raises(ValueError, match=r"run/2 holds the positions of 2 processes in the data, which differ"):
        checkpoints.restore(state, 2)
    states = describe(checkpoints.directory, 2).data_states
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert _own_state(states, "there") == {"next": 8}
    monkeypatch.undo()


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_another_schema_is_refused_by_entry(checkpoints):
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    other = replace(SCHEMA, tables=(Table("item", 301, 8), Table("tag", 7, 3)))
    with (
        Checkpoints(checkpoints.directory, schema=other) as again,
        pytest.raises(ValueError, match=r"run/1 differs(?s:.)*tables 'item'.*rows=301.*rows=300"),
    ):
        again.restore(make_state(1))


def test_arrays_that_do_not_fit_are_listed_by_path_with_both_shapes(checkpoints):
    checkpoints.save(1, make_state(1))
    target = make_state(1, width=65)
    target["new"] = target.pop("half")
    target["step"] = jnp.float32(1)
    with pytest.raises(ValueError, match="does not fit the state to restore") as caught:
        checkpoints.restore(target)
    text = str(caught.value)
    for line in (
        "new: not in the checkpoint",
        "half: only in the checkpoint",
        "step: int32 [] in the checkpoint, float32 [] wanted",
        "float32 [64, 40] in the checkpoint, float32 [65, 40] wanted",
    ):
        assert line in text
    assert "params/kernel" in text


def test_missing_checkpoints_are_named(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*run"):
        checkpoints.restore(make_state(1))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
        describe(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    checkpoints.save(4, {"x": jnp.ones(3)})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .*there are \[4\]"):
        checkpoints.restore({"x": jnp.ones(3)}, 5)


def test_a_step_that_exists_or_lies_behind_is_refused(checkpoints):
    checkpoints.save(4, {"x": jnp.ones(3)})
    for step in (4, 3):
        with pytest.raises(ValueError, match=rf"step {step} can't be saved: .*run already holds step 4"):
            checkpoints.save(step, {"x": jnp.zeros(3)})
    np.testing.assert_array_equal(checkpoints.restore({"x": jnp.zeros(3)}).state["x"], 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": 3}}, "state 'a/b' is of type int"),
        ({"a": np.arange(3)}, "state 'a' is int64, which JAX would cut"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "same path"),
    ],
)
def test_states_that_would_not_come_back_are_refused(checkpoints, state, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.save(1, state)
    assert checkpoints.latest_step() is None


def test_what_is_no_json_is_refused_by_name(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="data_state must be JSON"):
        checkpoints.save(1, {}, b"position")
    with pytest.raises(ValueError, match="meta must be JSON"):
        checkpoints.save(1, {}, meta={"x": np.ones(3)})
    with pytest.raises(ValueError, match="config must be JSON"):
        Checkpoints(tmp_path, schema=SCHEMA, config={"x": object()})


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, schema=SCHEMA, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        Checkpoints(tmp_path / "file", schema=SCHEMA)


# --- damage --------------------------------------------------------------------------------------------------------


def damage(path, how: str) -> None:
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def outcome(checkpoints):
    try:
        return checkpoints.restore(small_state(0)), None
    except CheckpointError as error:
        return None, str(error)


def test_a_damaged_latest_step_is_an_error_or_harmless_whichever_file_it_is(tmp_path):
    """Never another step, never other numbers."""
    with Checkpoints(tmp_path / "whole", schema=SCHEMA) as whole:
        whole.save(1, small_state(1))
        whole.save(2, small_state(2))
    files = [x.relative_to(tmp_path / "whole") for x in sorted((tmp_path / "whole" / "2").rglob("*")) if x.is_file()]
    largest = max(files, key=lambda x: (tmp_path / "whole" / x).stat().st_size)
    noticed = []
    for number, file in enumerate(files):
        for how in ("removed", "truncated"):
            directory = tmp_path / f"{number}{how}"
            shutil.copytree(tmp_path / "whole", directory)
            damage(directory / file, how)
            with Checkpoints(directory, schema=SCHEMA) as checkpoints:
                restored, error = outcome(checkpoints)
                if error is None:
                    assert restored.step == 2
                    chex.assert_trees_all_equal(restored.state, small_state(2))
                    continue
                noticed.append((file, how))
                assert f"checkpoint {directory / '2'} is damaged" in error
                assert "Delete it to resume from step 1, or restore that by number" in error
                chex.assert_trees_all_equal(checkpoints.restore(small_state(0), 1).state, small_state(1))
    assert {(largest, "removed"), (largest, "truncated")} <= set(noticed)
    assert {x.name for x, _ in noticed} >= {"metadata", "manifest.ocdbt"}


@pytest.mark.parametrize("part", ["state", "description"])
def test_a_missing_part_is_named(checkpoints, part):
    checkpoints.save(1, small_state(1))
    checkpoints.save(2, small_state(2))
    checkpoints.wait()
    shutil.rmtree(checkpoints.directory / "2" / part)
    with pytest.raises(CheckpointError, match=rf"run/2 is damaged: its {part} can't be read .*resume from step 1"):
        checkpoints.restore(small_state(0))
    shutil.rmtree(checkpoints.directory / "1")
    with pytest.raises(CheckpointError, match=r"Other checkpoints: none\. Start afresh"):
        checkpoints.restore(small_state(0))


def test_an_interrupted_save_is_ignored_and_swept_up_by_the_next(checkpoints):
    checkpoints.save(1, small_state(1))
    checkpoints.wait()
    unfinished = checkpoints.directory / "2.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.directory / "1" / "state", unfinished / "state.orbax-checkpoint-tmp")
    with Checkpoints(checkpoints.directory, schema=SCHEMA) as again:
        assert again.latest_step() == 1
        assert again.restore(small_state(0)).step == 1
        assert unfinished.exists()  # a reader must not touch what another process may be writing
        again.save(2, small_state(2))
        chex.assert_trees_all_equal(again.restore(small_state(0)).state, small_state(2))
    assert sorted(x.name for x in checkpoints.directory.iterdir()) == ["1", "2"]


# --- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_room():
    """Writing stops within the file, as on a full disk: nothing above 20 kB can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit:
        def __enter__(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return Limit()


def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tmp_path, no_room):
    checkpoints = Checkpoints(tmp_path, schema=SCHEMA, keep=1)
    checkpoints.save(1, small_state(1))
    checkpoints.wait()
    message = "step {} could not be saved in .*: .*File too large.*intact: \\[1\\]"
    with no_room:
        checkpoints.save(2, small_state(2))
        with pytest.raises(CheckpointError, match=message.format(2)):
            checkpoints.wait()
        checkpoints.save(3, small_state(3))
        with pytest.raises(CheckpointError, match=message.format(3)):  # the next save sees it as well
            checkpoints.save(4, small_state(4))
    assert [x.name for x in tmp_path.iterdir()] == ["1"]
    chex.assert_trees_all_equal(checkpoints.restore(small_state(0)).state, small_state(1))
    checkpoints.save(3, small_state(3))
    chex.assert_trees_all_equal(checkpoints.restore(small_state(0)).state, small_state(3))
    checkpoints.close()
    with Checkpoints(tmp_path, schema=SCHEMA) as again:
        assert again.restore(small_state(0)).step == 3


def test_a_save_that_fails_at_once_is_reported_alike(checkpoints, monkeypatch):
    checkpoints.save(1, small_state(1))
    checkpoints.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved .*No space left on device.*\[1\]"):
            checkpoints.save(2, small_state(2))
    checkpoints.save(2, small_state(2))
    assert checkpoints.restore(small_state(0)).step == 2


@pytest.mark.parametrize("call", ["save", "wait_until_finished"])
@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_another_process_that_dies_during_a_save_is_not_taken_for_a_full_disk(checkpoints, monkeypatch, call, kind):
    checkpoints.save(1, small_state(1))
    checkpoints.wait()

    def nobody_there(*_, **__):
        raise kind("UNAVAILABLE: Failed to send RPC to coordination service")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, call, nobody_there)
        patch.setattr("kunlun_jax.processes.failed_exchange", lambda error: isinstance(error, kind))
        patch.setattr(checkpoints._manager, "close", lambda: pytest.fail("waits for processes that are gone"))
        with pytest.raises(kind, match="UNAVAILABLE"), checkpoints:
            checkpoints.save(2, small_state(2))
    checkpoints.save(2, small_state(2))
    assert checkpoints.restore(small_state(0)).step == 2


def test_the_device_running_out_of_memory_is_not_taken_for_the_disk(checkpoints, monkeypatch):
    checkpoints.save(1, small_state(1))
    checkpoints.wait()

    def out_of_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch:
        for call in ("save", "restore"):
            patch.setattr(checkpoints._manager, call, out_of_memory)
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore(small_state(0))
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            checkpoints.save(2, small_state(2))
    checkpoints.save(2, small_state(2))
    assert checkpoints.restore(small_state(0)).step == 2


def test_the_description_is_readable_by_anybody(checkpoints):
    checkpoints.save(1, small_state(1), {"batches": 3})
    checkpoints.wait()
    raw = json.loads((checkpoints.directory / "1" / "description" / "metadata").read_text())
    assert raw["data_states"] == [{"batches": 3}]
    assert FeatureSchema.from_json(json.dumps(raw["schema"])) == SCHEMA
