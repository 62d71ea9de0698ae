"""The training step against its definition, and what it does when a number is not finite."""

import dataclasses
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from batches import random_batch, small_schema
from flax import nnx

from kunlun_jax.batch import EmbeddedBatch
from kunlun_jax.data.pipeline import Placed
from kunlun_jax.embedding import embed, look_up, update
from kunlun_jax.layers.features import SetTokens
from kunlun_jax.metrics import Evaluation
from kunlun_jax.optimizer import FlatParameters, OptimizerConfig, dense_optimizer, schedule
from kunlun_jax.sharding import ExpertParam
from kunlun_jax.training import Learner, NonFiniteLoss, fit, groups_of, log_loss

CONFIG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, warmup=0.2, table_learning_rate=0.05)
STEPS = 10


class SmallModel(nnx.Module):
    """Set tokens and the mean of the clicked items' embeddings into one linear map: quick to compile."""

    def __init__(self, schema, *, rngs):
        self.set_tokens = SetTokens(schema, 8, dense_tokens=1, dtype="float32", rngs=rngs)
        n = sum(self.set_tokens.count(scope) for scope in ("request", "candidate"))
        self.head = nnx.Linear(8 * n + 8, len(schema.tasks), rngs=rngs)

    def __call__(self, batch: EmbeddedBatch):
        clicked = batch.events["click"].values["item"].mean((0, 1))
        x = self.set_tokens(batch)
        return self.head(jnp.concatenate([x.reshape(x.shape[0], -1), jnp.tile(clicked, (x.shape[0], 1))], axis=1))


@pytest.fixture(scope="module")
def schema():
    return small_schema(tasks=("click", "buy"))


@pytest.fixture(scope="module")
def learner(schema):
    return Learner(SmallModel(schema, rngs=nnx.Rngs(0)), schema, CONFIG, steps=STEPS)


@pytest.fixture
def batch(schema):
    return random_batch(schema, np.random.default_rng(0), samples=6, lengths=[3, 0, 9, 1, 4, 4])


def test_log_loss_weighs_samples_and_leaves_unknown_labels_out(batch):
    rng = np.random.default_rng(1)
    weight = rng.uniform(0.5, 2, 6).astype(np.float32)
    mask = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [1, 1], [0, 0]], np.float32)
    logits = rng.normal(size=(6, 2))
    p = 1 / (1 + np.exp(-logits))
    terms = -np.log(np.where(batch.labels == 1, p, 1 - p)) * weight[:, None] * mask
    expected = terms.sum() / (weight[:, None] * mask).sum()
    batch = dataclasses.replace(batch, weight=weight, label_mask=mask)
    np.testing.assert_allclose(log_loss(jnp.asarray(logits, jnp.float32), batch), expected, rtol=1e-5)


def test_a_step_is_adamw_on_parameters_and_row_wise_adagrad_on_rows(learner, schema, batch):
    state = learner.init(0)
    params = learner.portable(state).params
    rows, plans = look_up(schema, state.tables, batch)

    def loss(params, rows):
        return log_loss(nnx.merge(learner.graphdef, params)(embed(schema, batch, rows, plans)), batch)

    grads, row_grads = jax.grad(loss, argnums=(0, 1))(params, rows)
    adamw = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(
            schedule(CONFIG, CONFIG.learning_rate, STEPS), b1=CONFIG.beta1, b2=CONFIG.beta2,
            weight_decay=CONFIG.weight_decay, mask=jax.tree.map(lambda p: p.ndim >= 2, params),
        ),
    )  # fmt: skip
    updates, _ = adamw.update(grads, adamw.init(params), params)
    expected = optax.apply_updates(params, updates)
    rate = schedule(CONFIG, CONFIG.table_learning_rate, STEPS)(0)
    tables = update(state.tables, plans, row_grads, learning_rate=rate, epsilon=CONFIG.table_epsilon)
    new, report = learner.train_step(state, batch)
    chex.assert_trees_all_close(learner.portable(new).params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(new.tables, tables, rtol=1e-5, atol=1e-6)
    assert int(new.step) == 1
    assert bool(report.healthy)


def test_schedule_rises_then_falls_to_its_final_share():
    config = OptimizerConfig(warmup=0.3, final=0.25)
    rates = np.array([schedule(config, 2.0, 10)(step) for step in range(11)])
    np.testing.assert_allclose(rates[3], 2.0)
    np.testing.assert_allclose(rates[10], 0.5, rtol=1e-6)
    assert (np.diff(rates[:4]) > 0).all()
    assert (np.diff(rates[3:]) < 0).all()
    assert rates[0] > 0


def test_weight_decay_spares_vectors():
    params = {"a_bias": jnp.ones(2), "matrix": jnp.ones((2, 2)), "z_bias": jnp.ones(3)}
    flat = FlatParameters(params)
    optimizer = dense_optimizer(OptimizerConfig(weight_decay=0.5), 4, flat)
    raveled, zero = flat.ravel(params), flat.ravel(jax.tree.map(jnp.zeros_like, params))
    updates = flat.unravel(optimizer.update(zero, optimizer.init(raveled), raveled, norm=0.0)[0])
    assert (updates["matrix"] < 0).all()
    assert (updates["a_bias"] == 0).all()
    assert (updates["z_bias"] == 0).all()


LOWERED = """
import hashlib
import numpy as np
from batches import random_batch, small_schema
from flax import nnx
from kunlun_jax import Kunlun, KunlunConfig
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.training import Learner
schema = small_schema()
model = nnx.eval_shape(lambda: Kunlun(KunlunConfig.tiny(schema), schema, rngs=nnx.Rngs(0)))
learner = Learner(model, schema, OptimizerConfig(), steps=3)
step = learner.train_step.lower(learner.abstract_state(), random_batch(schema, np.random.default_rng(0)))
print(hashlib.sha256(step.as_text().encode()).hexdigest())
"""


def test_every_process_makes_the_same_program_or_a_second_start_would_not_find_it_compiled():
    def start(seed):  # of the order in which sets of strings are walked through
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", LOWERED], env=env, stdout=subprocess.PIPE)

    processes = [start(seed) for seed in ("1", "4")]
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert first == second
    assert len(first.strip()) == 64


@pytest.mark.parametrize(("norm", "kept"), [(0.5, 1.0), (4.0, 0.5)])
def test_gradients_are_clipped_by_the_norm_that_is_given(norm, kept):
    params = {"matrix": jnp.ones((2, 2))}
    flat = FlatParameters(params)
    optimizer = dense_optimizer(OptimizerConfig(clip_norm=2.0, beta1=0.0), 4, flat)
    raveled, grads = flat.ravel(params), flat.ravel({"matrix": jnp.full((2, 2), 3.0)})
    _, state = optimizer.update(grads, optimizer.init(raveled), raveled, norm=jnp.asarray(norm))
    moment = next(x.mu for x in state if hasattr(x, "mu"))
    np.testing.assert_allclose(flat.unravel(moment)["matrix"], 3.0 * kept, rtol=1e-6)


def test_raveling_keeps_the_experts_apart_and_is_undone():
    rng = np.random.default_rng(0)
    shapes = {"bias": (3,), "one": (1, 5), "two": (4, 3, 2), "matrix": (5, 7), "w": (4, 6)}
    values = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    params = {k: ExpertParam(v) if k in ("one", "two", "w") else v for k, v in values.items()}
    flat = FlatParameters(params)
    raveled = flat.ravel(params)
    assert {k: v.shape for k, v in raveled.items()} == {"shared": (1024,), "experts_4": (4, 1024)}
    assert flat.decayed == {"shared": 40, "experts_4": 12}
    chex.assert_trees_all_equal(flat.unravel(raveled), params)
    for expert in range(4):
        own = np.concatenate([values["two"][expert].ravel(), values["w"][expert]])
        np.testing.assert_array_equal(raveled["experts_4"][expert, :12], own)


def test_samples_of_weight_zero_change_nothing(learner, schema):
    rng = np.random.default_rng(3)
    batch = random_batch(schema, rng, samples=6)
    weight = np.array([1, 1, 1, 1, 0, 0], np.float32)
    batch = dataclasses.replace(batch, weight=weight)
    flipped = dataclasses.replace(batch, labels=np.where(weight[:, None] > 0, batch.labels, 1 - batch.labels))
    (one, _), (two, _) = (learner.train_step(learner.init(0), b) for b in (batch, flipped))
    chex.assert_trees_all_equal(one, two)


@pytest.mark.parametrize("poison", ["dense", "parameter", "table"])
def test_a_bad_number_stops_the_run_and_is_named(learner, schema, batch, poison):
    state = learner.init(0)
    if poison == "dense":
        batch = dataclasses.replace(batch, dense={**batch.dense, "price": np.full(6, np.nan, np.float32)})
        name = "input dense.price"
    elif poison == "parameter":
        state = learner.portable(state)
        kernel = state.params["head"]["kernel"]
        state.params["head"]["kernel"] = kernel.replace(kernel[...].at[3, 1].set(jnp.inf))
        state = learner.adopt(state)
        name = "parameter head.kernel"
    else:
        table = state.tables["item"]
        state.tables["item"] = table._replace(rows=table.rows.at[:].set(jnp.nan))
        name = "embeddings of table item"
    before = jax.tree.map(np.asarray, (state.params, state.optimizer, state.tables))
    with pytest.raises(NonFiniteLoss, match=rf"step 1: the loss is .*{name}"):
        fit(
            learner, state, Placed(iter([batch, batch]), learner.place), base_rates={"click": 0.5, "buy": 0.5},
            log_every=1, on_log=lambda *_: None, after_step=lambda step, state: keep(state),
        )  # fmt: skip
    last = kept.pop()
    kept.clear()
    assert int(last.step) == 0
    chex.assert_trees_all_equal((last.params, last.optimizer, last.tables), before)


kept = []


def keep(state):
    kept.append(jax.tree.map(np.asarray, state))
    return True


def test_evaluation_of_parts_equals_evaluation_of_the_whole(learner, schema, capsys):
    rng = np.random.default_rng(4)
    batches = [random_batch(schema, rng, samples=6, lengths=[2, 3, 0, 1, 5, 9]) for _ in range(3)]
    state, rates = learner.init(1), {"click": 0.4, "buy": 0.2}
    whole = learner.evaluate(state, batches, rates).results()
    said = capsys.readouterr()
    assert said.err.count("evaluation: compiling for batches of 6 samples") == 1  # one shape
    assert not said.out  # there evaluate.py prints JSON
    logits = np.concatenate([np.asarray(learner.predict(state.params, state.tables, b)) for b in batches])
    labels = np.concatenate([b.labels for b in batches])
    groups = np.concatenate([groups_of(b, schema) for b in batches])
    ones = np.ones(len(labels), np.float32)
    at_once = Evaluation(tasks=schema.tasks, base_rates=rates)
    at_once = at_once.update(logits, labels, np.ones_like(labels), ones, groups).results()
    assert whole.keys() == at_once.keys()
    for key, value in at_once.items():
        np.testing.assert_allclose(whole[key], value, rtol=1e-12, err_msg=key)


def test_groups_follow_the_request_of_each_sample(schema):
    schema = small_schema(scope="candidate")
    batch = random_batch(schema, np.random.default_rng(5), samples=8, requests=4, shards=2)
    users = batch.sparse["user"][:, 0].reshape(2, 2)
    expected = [users[shard, batch.request_index[shard, i]] for shard in range(2) for i in range(4)]
    np.testing.assert_array_equal(groups_of(batch, schema), expected)


def test_fit_reports_every_stretch_and_the_rest(learner, schema, batch, capsys):
    logged = []
    fit(
        learner, learner.init(0), Placed(iter([batch] * 5), learner.place), base_rates={"click": 0.5, "buy": 0.5},
        log_every=2, on_log=lambda step, values: logged.append((step, values["click/samples"])),
        after_step=lambda *_: True,
    )  # fmt: skip
    assert logged == [(2, 12), (4, 12), (5, 6)]
    assert capsys.readouterr().err.count("step 1: compiling for batches of 6 samples and event capacities") == 1
