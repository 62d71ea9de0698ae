"""The training step on meshes of eight simulated devices against the step on one device."""

import collections
import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import random_batch, small_schema
from flax import nnx

from kunlun_jax import training
from kunlun_jax.batch import EmbeddedBatch
from kunlun_jax.checkpoint import Checkpoints
from kunlun_jax.config import TrainConfig
from kunlun_jax.embedding.placement import plan_tables
from kunlun_jax.layers.features import SetTokens
from kunlun_jax.layers.mlp import linear
from kunlun_jax.layers.seed_pooling import SeedAttention
from kunlun_jax.layers.wukong import WukongExperts
from kunlun_jax.mesh_learner import MeshLearner, make_learner, most_ids
from kunlun_jax.model_configs import EventConfig, KunlunConfig
from kunlun_jax.models.kunlun import Kunlun
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.sharding import BATCH, REPLICATED, ParallelConfig, experts_of, make_mesh, own_rows, variables
from kunlun_jax.training import Learner, NonFiniteLoss

SAMPLES, STEPS, RATE = 16, 3, 0.5
SETTINGS = OptimizerConfig(table_learning_rate=0.1, clip_norm=0.01)
SCHEMA = dataclasses.replace(small_schema(max_length=4), events=small_schema(max_length=4).events[:1])


class SmallModel(nnx.Module):
    """Set tokens, one jagged operator and eight experts: what differs on a mesh, quick to compile."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        common = {"dtype": "float32", "rngs": rngs}
        self.set_tokens = SetTokens(SCHEMA, 8, dense_tokens=2, **common)
        self.pool = SeedAttention(2, 8, 4, implementation=None, **common)
        self.interaction = WukongExperts(8, 8, 8, experts=8, expert_inputs="all", rank=2, hidden=4, **common)
        self.head = linear(64, 1, **common)

    def __call__(self, batch: EmbeddedBatch):
        clicks = batch.events["click"]
        x = jnp.concatenate([self.set_tokens(batch), self.pool(clicks.with_values(clicks.values["item"]))[0]], axis=1)
        return self.head(self.interaction(x).reshape(x.shape[0], -1))


# user and item are sharded, tag is whole on every device.
MESHES = {
    "1×1": ParallelConfig(),
    "8×1": ParallelConfig(data=8),
    "1×8": ParallelConfig(expert=8),
    "2×4": ParallelConfig(data=2, expert=4),
    "2×4, rows over both": ParallelConfig(data=2, expert=4, table_rows="all", fully_sharded=True),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of this file's time is XLA's; no test here depends on how well it optimises."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def model():
    return SmallModel()


@pytest.fixture(scope="module")
def batches():
    """Shards of very different token counts, one of them empty; weights and labels that differ."""
    rng, drawn = np.random.default_rng(0), []
    for _ in range(STEPS):
        lengths = np.r_[0, 0, 4, 4, rng.integers(0, 5, SAMPLES - 4)]
        batch = random_batch(SCHEMA, rng, samples=SAMPLES, shards=8, lengths=lengths)
        weight = rng.uniform(0, 2, SAMPLES).astype(np.float32)
        weight[:2] = 0  # a whole shard of fillers
        drawn.append(dataclasses.replace(batch, weight=weight))
    return drawn


def plain_descent(patch):
    patch.setattr(training, "dense_optimizer", lambda *_: optax.sgd(RATE))


@pytest.fixture(scope="module")
def runs(model, batches):
    """Per mesh: the learner and its portable states after each step, by plain gradient descent."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        plain_descent(patch)
        learners = {"one device": Learner(model, SCHEMA, SETTINGS, steps=STEPS)}
        learners |= {name: mesh_learner(model, config) for name, config in MESHES.items()}
    for name, learner in learners.items():
        state, states, logits = learner.init(0), [], []
        for batch in batches:
            state, report = learner.train_step(state, learner.place(one_shard(batch) if name == "1×1" else batch))
            states.append(jax.tree.map(np.asarray, learner.portable(state)))
            logits.append(own_rows(report.logits))
        found[name] = (learner, states, logits)
    return found


def one_shard(batch):
    """The same samples on one shard."""
    shards, per_shard = batch.request_index.shape
    events = {}
    for name, sequence in batch.events.items():
        capacity = sequence.values["gap"].shape[1]
        values = {k: v.reshape(1, -1, *v.shape[2:]) for k, v in sequence.values.items()}
        starts = (sequence.starts + capacity * np.arange(shards, dtype=np.int32)[:, None]).reshape(1, -1)
        events[name] = dataclasses.replace(
            sequence, values=values, starts=starts, lengths=sequence.lengths.reshape(1, -1)
        )
    index = (batch.request_index + per_shard * np.arange(shards, dtype=np.int32)[:, None]).reshape(1, -1)
    return dataclasses.replace(batch, events=events, request_index=index)


def mesh_learner(model, config, batch_size=SAMPLES, **options):
    plan = plan_tables(SCHEMA, dataclasses.replace(config, replicate_below=200))
    return MeshLearner(
        model, SCHEMA, SETTINGS, steps=STEPS, mesh=make_mesh(config), tables=plan, batch_size=batch_size, **options
    )


def cut(tables):
    """Without the padding of a mesh."""
    return {t.name: jax.tree.map(lambda x, rows=t.rows: x[:rows], tables[t.name]) for t in SCHEMA.tables}


@pytest.mark.parametrize("mesh", MESHES)
def test_one_step_gives_the_dense_parameters_of_one_device(runs, mesh):
    (_, alone, expected), (_, states, logits) = runs["one device"], runs[mesh]
    chex.assert_trees_all_close(states[0].params, alone[0].params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits[0], expected[0], rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone[0].params, alone[-1].params)
    assert max(jax.tree.leaves(moved)) > 1e-2  # the comparison is of something


def test_dropout_draws_anew_on_every_device_and_in_every_step(model, batches, runs):
    learner = mesh_learner(model, MESHES["2×4"], dropout=0.5, seed=1)
    draws = learner._over_mesh(lambda step: jax.random.key_data(learner._draws(step))[None], (REPLICATED,), BATCH)
    assert len(np.unique(np.concatenate([draws(jnp.int32(step)) for step in (0, 1)]), axis=0)) == 16
    batch = learner.place(batches[0])
    once, again = (learner.train_step(learner.init(0), batch)[1].logits for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - runs["2×4"][2][0]).max() > 1e-2
    state = learner.init(0)
    np.testing.assert_allclose(learner.predict(state.params, state.tables, batch), runs["2×4"][2][0], rtol=1e-5)


@pytest.mark.parametrize("mesh", [name for name, config in MESHES.items() if config.replicas == 1])
def test_with_one_replica_all_steps_and_the_tables_are_those_of_one_device(runs, mesh):
    (_, alone, _), (_, states, _) = runs["one device"], runs[mesh]
    for mine, reference in zip(states, alone, strict=True):
        chex.assert_trees_all_close(cut(mine.tables), reference.tables, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(mine.params, reference.params, rtol=1e-4, atol=1e-5)


def test_with_several_replicas_the_tables_differ_from_one_devices(runs):
    for mesh in ("8×1", "2×4"):
        assert (
            np.abs(runs[mesh][1][0].tables["item"].rows[:13] - runs["one device"][1][0].tables["item"].rows).max()
            > 1e-3
        )


def test_experts_rows_and_moments_live_on_different_devices(runs, model):
    learner = runs["2×4"][0]
    state = learner.init(0)
    experts = [leaf for leaf in variables(learner.portable(state).params) if experts_of(leaf) == 8]
    assert len(experts) > 5
    for leaf in (*experts, state.params["experts_8"]):
        on_device = {s.device: s.index[0] for s in leaf[...].addressable_shards}
        starts = [[on_device[device].start for device in row] for row in learner.mesh.devices]
        assert starts == [[0, 2, 4, 6]] * 2
    for table, rows in (("user", 3), ("item", 4)):
        shards = {s.device: s.index[0].start for s in state.tables[table].rows.addressable_shards}
        assert [[shards[device] for device in row] for row in learner.mesh.devices] == [
            [0, rows, 2 * rows, 3 * rows]
        ] * 2
    assert state.tables["tag"].rows.sharding.is_fully_replicated
    sharded = mesh_learner(model, MESHES["2×4, rows over both"])
    whole = sharded.init(0)
    assert {s.data.shape for s in whole.tables["item"].rows.addressable_shards} == {(2, 8)}
    flat = whole.params["shared"]
    assert {s.data.size for s in flat.addressable_shards} == {flat.size // 8}
    moments = [x for x in jax.tree.leaves(whole.optimizer) if x.size > 1]
    assert moments
    for moment in moments:
        assert {s.data.size for s in moment.addressable_shards} == {moment.size // 8}


EXPECTED = {
    # Per sharded table: ids, and gradients home; rows back. Tokens to the experts and back, and their cotangents. Total
    # weight; gradients; over `data`, which XLA combines: the experts' gradients and the means of the replicas.
    "2×4": {"all-gather": 2 * 2, "reduce-scatter": 2, "all-to-all": 4, "all-reduce": 3},
    "1×8": {"all-gather": 2 * 2, "reduce-scatter": 2, "all-to-all": 4, "all-reduce": 2},
    "8×1": {"all-reduce": 3},
}


@pytest.mark.parametrize("mesh", EXPECTED)
def test_a_step_holds_the_expected_collectives_and_no_others(runs, batches, mesh):
    learner = runs[mesh][0]
    program = learner.train_step.lower(learner.init(0), learner.place(batches[0])).compile().as_text()
    kinds = re.findall(
        r"= .*? (all-\w+(?:-\w+)?|reduce-scatter|collective-\w+|ragged-all-to-all)(?:-start)?\(", program
    )
    assert collections.Counter(kinds) == EXPECTED[mesh]


def test_two_replicas_become_the_mean_of_their_groups_steps(runs, batches):
    """The whole step's tables after one step, from one device's gradients of each group's samples."""
    alone, batch = runs["one device"][0], batches[0]
    gradients = jax.jit(alone._gradients)
    state, total = alone.init(0), float(training.label_weights(batch).sum())
    rate, replicas = float(alone.table_rate(0)), []
    for group in (slice(0, SAMPLES // 2), slice(SAMPLES // 2, SAMPLES)):
        weight = np.zeros_like(batch.weight)
        weight[group] = batch.weight[group]
        part = dataclasses.replace(batch, weight=weight)
        of_rows = gradients(state, part).of_rows
        share = float(training.label_weights(part).sum()) / total
        replicas.append({name: np.asarray(2 * share * grad, np.float64) for name, grad in of_rows.items()})
    for table in ("user", "item"):
        rows = np.asarray(state.tables[table].rows, np.float64)
        moments = [np.mean(grads[table] ** 2, axis=1) for grads in replicas]
        steps = [
            grads[table] / (np.sqrt(moment / 2) + SETTINGS.table_epsilon)[:, None]
            for grads, moment in zip(replicas, moments, strict=True)
        ]
        after = cut(runs["2×4"][1][0].tables)[table]
        np.testing.assert_allclose(after.rows, rows - rate * np.mean(steps, axis=0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(after.accumulator, np.mean(moments, axis=0), rtol=1e-3, atol=1e-9)


def test_kunlun_itself_runs_on_a_mesh():
    """All sequence operators and the experts in one step, dealt over four devices."""
    event = EventConfig(width=4, head_width=2, depth=2, n_seeds=3, n_tokens=2, window=2)
    config = KunlunConfig(
        events={"click": event}, width=4, depth=2, generated=2, dense_tokens=4, comp_skip=False, interaction_rank=2,
        interaction_hidden=4, kron_rank=1, head_hidden=(4,),
    )  # fmt: skip
    model = Kunlun(config, SCHEMA, rngs=nnx.Rngs(0))
    batch = random_batch(SCHEMA, np.random.default_rng(1), samples=8, shards=4)
    alone = Learner(model, SCHEMA, SETTINGS, steps=STEPS)
    learner = mesh_learner(model, ParallelConfig(data=2, expert=2), batch_size=8)
    gradients = jax.jit(alone._gradients)(alone.init(0), batch)
    state, report = learner.train_step(learner.init(0), learner.place(batch))
    np.testing.assert_allclose(report.loss, gradients.loss, rtol=1e-5)
    np.testing.assert_allclose(own_rows(report.logits), gradients.logits, rtol=1e-4, atol=1e-5)
    # AdamW's first moment is (1 - β1) times the clipped gradient.
    norm = float(optax.tree.norm(gradients.flat))
    assert norm > SETTINGS.clip_norm
    moment = next(
        x.mu for x in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")
    )
    factor = (1 - SETTINGS.beta1) * SETTINGS.clip_norm / norm
    for group, grad in gradients.flat.items():
        np.testing.assert_allclose(moment[group], factor * grad, rtol=1e-3, atol=1e-6 * factor * norm, err_msg=group)


def test_a_checkpoint_restores_on_any_mesh(runs, model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        plain_descent(patch)
        other = mesh_learner(model, ParallelConfig(data=4, expert=2))
    for writer in ("2×4", "2×4, rows over both"):
        learner, _, _ = runs[writer]
        state = learner.init(3)
        saved = jax.tree.map(np.asarray, learner.portable(state))
        with Checkpoints(tmp_path / writer, schema=SCHEMA) as checkpoints:
            checkpoints.save(1, learner.portable(state), {"next": 5})
            for reader in (other, runs["one device"][0], runs["2×4, rows over both"][0], runs["1×8"][0]):
                restored = checkpoints.restore(reader.abstract())
                assert restored.data_state == {"next": 5}
                adopted = reader.adopt(restored.state)
                wanted = reader.init(0)
                chex.assert_trees_all_equal_shapes_and_dtypes(adopted, wanted)
                for got, like in zip(jax.tree.leaves(adopted), jax.tree.leaves(wanted), strict=True):
                    assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
                back = jax.tree.map(np.asarray, reader.portable(adopted))
                chex.assert_trees_all_equal(back.params, saved.params)
                chex.assert_trees_all_equal(cut(back.tables), cut(saved.tables))


def test_a_training_goes_on_elsewhere(runs, batches, tmp_path):
    alone, states, _ = runs["one device"]
    with Checkpoints(tmp_path, schema=SCHEMA) as checkpoints:
        checkpoints.save(1, jax.tree.map(jnp.asarray, states[0]))
        for mesh in ("1×8", "2×4, rows over both"):
            learner = runs[mesh][0]
            state = learner.adopt(checkpoints.restore(learner.abstract()).state)
            state, _ = learner.train_step(state, learner.place(batches[1]))
            after = learner.portable(state)
            chex.assert_trees_all_close(after.params, states[1].params, rtol=1e-4, atol=1e-5)
            chex.assert_trees_all_close(cut(after.tables), states[1].tables, rtol=1e-4, atol=1e-6)


def test_a_bad_number_on_one_device_stops_all_and_is_named(runs, batches):
    learner = runs["2×4"][0]
    state = learner.init(0)
    before = jax.tree.map(np.asarray, state)
    age = batches[0].dense["age"].copy()
    age[-1] = np.nan
    batch = dataclasses.replace(batches[0], dense={**batches[0].dense, "age": age})
    state, report = learner.train_step(state, learner.place(batch))
    assert not bool(report.healthy)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, dataclasses.replace(state, healthy=jnp.array(True))), before)
    with pytest.raises(NonFiniteLoss, match=r"step 7: the loss is nan.*input dense\.age"):
        learner.check_healthy(report, state, batch, 7)


def test_replicas_that_wait_for_their_mean_are_saved_only_in_sync(model):
    learner = mesh_learner(model, ParallelConfig(data=2, expert=4, sync_every=2))
    assert [learner.in_sync(step) for step in (1, 2, STEPS)] == [False, True, True]
    state = learner.init(0)
    assert {name: x.shape[0] for name, x in state.touched.items()} == {"user": 16, "item": 16}
    assert learner.portable(state).touched == {}
    chex.assert_trees_all_equal(learner.adopt(learner.portable(state)).touched, state.touched)


def test_the_most_ids_of_a_shard_hold_any_batch():
    counts = most_ids(SCHEMA, 2)
    # 64 tokens is the smallest capacity; an event has one item id and up to two tags.
    assert counts == {"user": 2 + 2, "item": 2 + 64, "tag": 2 * 3 + 64 * 2}


def test_what_the_mesh_does_not_divide_is_refused(model):
    def learner(config, batch_size=SAMPLES):
        plan = plan_tables(SCHEMA, config)
        return MeshLearner(model, SCHEMA, SETTINGS, steps=1, mesh=make_mesh(config), tables=plan, batch_size=batch_size)

    with pytest.raises(ValueError, match=r"batch_size 12 doesn't divide over 8 devices \(data 2 × expert 4\)"):
        learner(MESHES["2×4"], batch_size=12)
    with pytest.raises(ValueError, match=r"8 experts don't divide over parallel.expert 3"):
        learner(ParallelConfig(expert=3), batch_size=12)
    with pytest.raises(ValueError, match=r"fully_sharded: 6 devices must divide 1024"):
        learner(ParallelConfig(data=3, expert=2, fully_sharded=True), batch_size=12)
    with pytest.raises(ValueError, match=r"data 3 × expert 4 takes 12 devices; there are 8"):
        make_mesh(ParallelConfig(data=3, expert=4))


def test_tables_that_do_not_fit_are_refused_before_they_are_made(model, monkeypatch):
    monkeypatch.setattr(training, "init_tables", lambda *_, **__: pytest.fail("allocated"))
    config = TrainConfig(model=KunlunConfig(), batch_size=SAMPLES, parallel=ParallelConfig(device_memory=4000))
    with pytest.raises(ValueError, match=r"the tables don't fit: 964 B of tables"):
        make_learner(model, SCHEMA, config, steps=1, say=print)
    said = []
    parallel = ParallelConfig(expert=8, replicate_below=200)
    learner = make_learner(model, SCHEMA, dataclasses.replace(config, parallel=parallel), steps=1, say=said.append)
    assert learner.shards == 8
    assert "item: 13 × 8, 2 rows per device, 72 B per device" in said[0]
    assert "tag: 5 × 4, whole on every device, 100 B per device" in said[0]


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(data=2)])
def test_the_dropout_and_the_seed_of_a_config_reach_its_learner(model, parallel):
    config = TrainConfig(model=KunlunConfig(), batch_size=SAMPLES, parallel=parallel, embedding_dropout=0.4, seed=3)
    learner = make_learner(model, SCHEMA, config, steps=1, say=print)
    assert (learner.dropout, learner.seed) == (0.4, 3)
