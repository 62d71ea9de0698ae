"""What all baselines share: gradients reach what they should, samples don't mix, sizes follow formulas, they learn."""

import dataclasses
import itertools
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
from batches import random_embedded, small_schema, spoil
from flax import nnx

from kunlun_jax.model_configs import (
    DCNv2Config,
    DINConfig,
    EventConfig,
    InterFormerConfig,
    KunlunConfig,
    WukongConfig,
)
from kunlun_jax.models import MODELS, build, name_of, named
from kunlun_jax.schema import DenseField, FeatureSchema, SparseField, Table

SCHEMA = small_schema(scope="candidate", tasks=("click", "buy"), max_length=5)
SAMPLES, LENGTHS = 4, [3, 5, 0, 4]
QUICK = {"xla_backend_optimization_level": 0}  # these programs run once: compiling them is the cost
INTERFORMER = InterFormerConfig(
    width=8, head_width=4, depth=2, n_sum=2, pma=2, recent=2, hidden=6, cross_rank=3, head_hidden=(6,),
    implementation="reference",
)  # fmt: skip
WUKONG = WukongConfig(width=6, depth=2, factorised=3, compressed=2, rank=2, hidden=(7,), head_hidden=(5,))
CASES = {  # several switches at once, each on a block of its own, since every entry is a compilation
    "wukong": WUKONG,
    "wukong, attentive, unequal fields": dataclasses.replace(
        WUKONG, machine="attentive", attentive_tokens=2, field_embeddings={"item": 2}, field_groups=("tags+seller",)
    ),
    "wukong, plain, no compression": dataclasses.replace(WUKONG, machine="plain", compressed=0, factorised=4),
    "interformer": INTERFORMER,
    "interformer, n2s, no CLS, dot only": dataclasses.replace(
        INTERFORMER, flow="n2s", cls=False, interactions=("dot",)
    ),
    "interformer, s2n, not gated, cross only": dataclasses.replace(
        INTERFORMER, flow="s2n", gating=False, interactions=("cross",)
    ),
    "interformer, sep, no PMA": dataclasses.replace(INTERFORMER, flow="sep", pma=0),
    "interformer, sole": dataclasses.replace(INTERFORMER, flow="sole"),
    "interformer, shared PFFN, nothing recent": dataclasses.replace(INTERFORMER, pffn="shared", recent=0),
    "din": DINConfig(width=6, attention_hidden=(5,), hidden=(7, 4)),
    "dcnv2": DCNv2Config(width=4, cross_rank=3, hidden=(7, 5)),
}


@cache
def pullback(case):
    """A compiled function of parameters, batch and cotangent: logits, and their gradients by parameter and input."""
    graphdef, _ = nnx.split(make(case))

    def run(params, batch, cotangent):
        inputs = {"dense": batch.dense, "sparse": batch.sparse}
        inputs["events"] = {name: sequence.values for name, sequence in batch.events.items()}

        def of(params, inputs):
            events = {name: batch.events[name].with_values(x) for name, x in inputs["events"].items()}
            embedded = dataclasses.replace(batch, dense=inputs["dense"], sparse=inputs["sparse"], events=events)
            return nnx.merge(graphdef, params)(embedded)

        out, pull = jax.vjp(of, params, inputs)
        return out, *pull(cotangent)

    return jax.jit(run, compiler_options=QUICK)


@cache
def make(case):
    return plain.build(lambda: build(CASES[case], SCHEMA, rngs=nnx.Rngs(0)), np.random.default_rng(0), scale=0.6)


def gradients(case, batch, cotangent):
    return pullback(case)(nnx.state(make(case), nnx.Param), batch, cotangent)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns_samples_dont_mix_and_unused_tokens_are_inert(case):
    batch = random_embedded(SCHEMA, np.random.default_rng(0), lengths=LENGTHS)
    cotangent = np.random.default_rng(1).normal(size=(SAMPLES, 2)).astype(np.float32)
    out, of_params, _ = got = gradients(case, batch, cotangent)
    chex.assert_shape(out, (SAMPLES, 2))
    chex.assert_type(out, jnp.float32)
    chex.assert_tree_all_finite((out, of_params))
    leaves = jax.tree_util.tree_leaves_with_path(of_params)
    assert not [jax.tree_util.keystr(path) for path, g in leaves if not jnp.abs(g).max() > 0]

    spoilt = gradients(case, spoil(batch), cotangent)
    chex.assert_trees_all_equal(spoilt[:2], got[:2])

    for i in range(SAMPLES):
        of_inputs = gradients(case, batch, cotangent * (np.arange(SAMPLES) == i)[:, None])[2]
        for kind in ("dense", "sparse"):
            for name, g in of_inputs[kind].items():
                touched = np.abs(g).reshape(SAMPLES, -1).max(-1) > 0
                np.testing.assert_array_equal(touched, np.arange(SAMPLES) == i, err_msg=name)
        for name, columns in of_inputs["events"].items():
            start, length = batch.events[name].starts[0, i], batch.events[name].lengths[0, i]
            for column, g in columns.items():
                touched = np.abs(g[0]).reshape(g.shape[1], -1).max(-1) > 0
                tokens = np.arange(len(touched))
                own = (tokens >= start) & (tokens < start + length) & ("sole" not in case)
                np.testing.assert_array_equal(touched, own, err_msg=f"{name}.{column}")


@pytest.mark.parametrize("case", ["wukong", "interformer", "din"])
def test_batch_shards_change_nothing(case):
    one = random_embedded(SCHEMA, np.random.default_rng(3), lengths=LENGTHS)
    two = random_embedded(SCHEMA, np.random.default_rng(3), lengths=LENGTHS, shards=2)
    graphdef, params = nnx.split(make(case))
    logits = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch), compiler_options=QUICK)
    for name, sequence in two.events.items():  # the same tokens on two shards
        for column, x in sequence.values.items():
            flat = one.events[name].values[column][0]
            for shard in range(2):
                tokens = sequence.lengths[shard].sum()
                first = one.events[name].starts[0, 2 * shard]
                x[shard, :tokens] = flat[first : first + tokens]
    two = dataclasses.replace(two, dense=one.dense, sparse=one.sparse)
    np.testing.assert_allclose(logits(params, two), logits(params, one), rtol=1e-4, atol=1e-5)


def logits_shape(config, schema, batch):
    return jax.eval_shape(lambda: build(config, schema, rngs=nnx.Rngs(0))(batch)).shape


def test_one_history_for_several_candidates():
    shared = random_embedded(SCHEMA, np.random.default_rng(5), samples=4, requests=2)
    for config in (WUKONG, dataclasses.replace(INTERFORMER, flow="s2n"), CASES["dcnv2"]):
        assert logits_shape(config, SCHEMA, shared) == (4, 2)
    with pytest.raises(ValueError, match=r'2 sequences for 4 samples; in flow \'int\'.*flow "s2n" or "sep"'):
        logits_shape(INTERFORMER, SCHEMA, shared)
    with pytest.raises(ValueError, match="2 sequences for 4 samples; target attention"):
        logits_shape(CASES["din"], SCHEMA, shared)


# --- parameter counts -----------------------------------------------------------------------------------------------


def mlp(*widths):
    return sum((a + 1) * b for a, b in itertools.pairwise(widths))


def set_tokens(d):
    """Two scopes with one dense field each; fields of widths 8, 8, 4 and 8, projected where that isn't d."""
    return 2 * mlp(1, 2 * d, d) + sum(w * d for w in (8, 8, 4, 8) if w != d)


def event_tokens(d):
    """MaskNets of click (item 8, tags 4, two times, rank) and view (item 8, seconds, two times, rank)."""
    return sum(mlp(w, d, w) + mlp(w, d, d) for w in (8 + 4 + 3, 8 + 1 + 3))


def pooled(d):
    return mlp(3, 2 * d, d) + mlp(4, 2 * d, d) + sum(w * d for w in (8, 4, 8) if w != d)


def wukong_parameters(c):
    n, m, d = 6 + 5, c.factorised + c.compressed, c.width
    count = set_tokens(d) + pooled(d) + mlp(m * d, *c.head_hidden, 2)
    for tokens in [n] + [m] * (c.depth - 1):
        count += tokens * c.rank + 2 * tokens * c.rank + mlp(tokens * c.rank, *c.hidden, c.factorised * d)
        count += c.compressed * tokens + (m * tokens if tokens != m else 0) + 2 * d
    return count


def interformer_parameters(c):
    n, d, told = 6, c.width, 2 * (c.n_sum + c.pma + c.recent)
    gate, z = mlp(d, d, d), n + told
    set_summary = mlp(n, n, c.n_sum) + gate
    summary = c.pma * d + 2 * d + 4 * d * d + gate
    interaction = mlp(z * (z - 1) // 2, c.hidden, z * d) + c.cross_depth * (2 * z * d * c.cross_rank + z * d)
    interaction += 2 * d + n * z + mlp(d, c.hidden, d)
    sequence = (2 * d + c.n_sum * d) + 4 * d * d
    layer = set_summary + 2 * summary + interaction + 2 * sequence
    head = set_summary + 2 * summary + mlp((c.n_sum + told) * d, *c.head_hidden, 2)
    return set_tokens(d) + event_tokens(d) + c.depth * layer + head


def din_parameters(c):
    d = c.width
    attention = sum(mlp(4 * w + d, *c.attention_hidden, 1) for w in (8 + 4, 8))
    return set_tokens(d) + event_tokens(d) + attention + mlp(8 * d, *c.hidden, 2)


def dcnv2_parameters(c):
    x = (6 + 5) * c.width
    cross = c.cross_depth * (2 * x * c.cross_rank + x)
    return set_tokens(c.width) + pooled(c.width) + cross + mlp(x, *c.hidden) + mlp(x + c.hidden[-1], 2)


@pytest.mark.parametrize(
    ("case", "formula"),
    [
        ("wukong", wukong_parameters),
        ("interformer", interformer_parameters),
        ("din", din_parameters),
        ("dcnv2", dcnv2_parameters),
    ],
)
def test_parameters_are_as_many_as_the_formula_says(case, formula):
    assert sum(x.size for x in jax.tree.leaves(nnx.state(make(case), nnx.Param))) == formula(CASES[case])


# --- learning -------------------------------------------------------------------------------------------------------

EVENT = EventConfig(width=8, head_width=4, depth=1, n_seeds=4, n_tokens=2, window=2)
KUNLUN = KunlunConfig(
    events={"click": EVENT, "view": EVENT}, width=8, depth=1, generated=6, experts=2, interaction_rank=4,
    interaction_hidden=32, kron_rank=2, head_hidden=(32,), tau="one", implementation="reference",
)  # fmt: skip
LEARNERS = {
    "kunlun": KUNLUN,
    "interformer": dataclasses.replace(INTERFORMER, depth=1, hidden=16, head_hidden=(16,)),
    "wukong": dataclasses.replace(WUKONG, width=8, hidden=(32,), rank=4, head_hidden=(16,)),
    "din": DINConfig(width=8, attention_hidden=(8,), hidden=(32,)),
    "dcnv2": DCNv2Config(width=8, cross_depth=2, cross_rank=8, hidden=(32,)),
}


def test_every_model_is_asked_to_learn():
    assert set(LEARNERS) == set(MODELS)
    assert all(name_of(config) == name for name, config in LEARNERS.items())


@pytest.mark.parametrize("name", LEARNERS)
def test_each_model_overfits_64_samples(name):
    schema = small_schema(scope="candidate", max_length=3)
    rng = np.random.default_rng(0)
    batch = random_embedded(schema, rng, samples=64)
    labels = rng.integers(0, 2, (64, 1)).astype(np.float32)
    model = jax.jit(lambda: nnx.split(build(LEARNERS[name], schema, rngs=nnx.Rngs(0)))[1], compiler_options=QUICK)()
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(LEARNERS[name], schema, rngs=nnx.Rngs(0))))
    flat, unravel = jax.flatten_util.ravel_pytree(model)
    adam = optax.adam(1e-2)

    def loss(flat):
        return optax.sigmoid_binary_cross_entropy(nnx.merge(graphdef, unravel(flat))(batch), labels).mean()

    def step(_, carry):
        flat, state, _ = carry
        value, grad = jax.value_and_grad(loss)(flat)
        updates, state = adam.update(grad, state)
        return optax.apply_updates(flat, updates), state, value

    train = jax.jit(
        lambda flat: jax.lax.fori_loop(0, 250, step, (flat, adam.init(flat), 0.0))[2], compiler_options=QUICK
    )
    assert train(flat) < 0.02


# --- names and schemas ----------------------------------------------------------------------------------------------


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match=r"model 'deepfm' is unknown; there are \['dcnv2', 'din', 'interformer'"):
        named("deepfm")


@pytest.mark.parametrize("config", [INTERFORMER, CASES["din"]])
def test_models_that_need_sequences_say_so(config):
    schema = dataclasses.replace(SCHEMA, events=())
    with pytest.raises(ValueError, match="events: the schema has none"):
        build(config, schema, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("config", [WUKONG, CASES["dcnv2"], CASES["interformer, sole"]])
def test_models_that_need_none_work_without(config):
    schema = dataclasses.replace(SCHEMA, events=())
    assert logits_shape(config, schema, random_embedded(schema, np.random.default_rng(0))) == (4, 2)


def test_target_attention_needs_a_shared_table():
    schema = FeatureSchema(
        tables=(*SCHEMA.tables, Table("shop", 3, 4)),
        dense=(DenseField("age"),),
        sparse=(SparseField("shop", "shop", "candidate"), SparseField("user", "user")),
        events=SCHEMA.events,
        group="user",
    )
    with pytest.raises(ValueError, match=r"events 'click': none of its fields shares a table.*'item', 'tag'"):
        build(CASES["din"], schema, rngs=nnx.Rngs(0))
