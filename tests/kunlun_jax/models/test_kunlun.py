"""Kunlun's wiring, proved by gradients: each tap of the paper's first figure, isolation of samples, every switch."""

import dataclasses
import warnings
from functools import cache, wraps
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from batches import random_embedded, small_schema
from flax import nnx

from kunlun_jax.batch import EmbeddedBatch
from kunlun_jax.config import EventConfig, KunlunConfig
from kunlun_jax.jagged import pack, unpack
from kunlun_jax.layers.gdpa import NaivePFFN, PersonalisedFFN
from kunlun_jax.layers.seed_pooling import DenseCompression, PooledMultiheadAttention, SumKronLinear
from kunlun_jax.layers.wukong import WukongExperts
from kunlun_jax.models.kunlun import Kunlun

# Everything of the items belongs to the candidate; two tasks; sequences of up to 5 events.
SCHEMA = small_schema(scope="candidate", tasks=("click", "buy"), max_length=5)
CLICK = EventConfig(width=8, head_width=4, depth=3, n_seeds=6, n_tokens=2, window=2)
VIEW = EventConfig(width=4, head_width=2, depth=1, n_seeds=5, n_tokens=4, window=1)
CONFIG = KunlunConfig(
    events={"click": CLICK, "view": VIEW},
    width=6,
    depth=3,
    generated=5,
    dense_tokens=2,
    experts=2,
    interaction_rank=2,
    interaction_hidden=6,
    kron_rank=2,
    head_hidden=(6,),
    tau="one",
    implementation="reference",  # the operators have tests of their own; their plain form compiles fastest
)
QUICK = {"xla_backend_optimization_level": 0}  # these programs run once: compiling them is the cost
SET_TOKENS = CONFIG.set_tokens(SCHEMA)
SAMPLES = 4
LENGTHS = [3, 5, 0, 4]


def build(config):
    return plain.build(lambda: Kunlun(config, SCHEMA, rngs=nnx.Rngs(0)), np.random.default_rng(0), scale=0.6)


def once_per_config(function):
    """Compile once; a config holds a dict, so its text is the key."""
    configs = {}
    by_text = cache(lambda text: function(configs[text]))

    @wraps(function)
    def run(config):
        configs[repr(config)] = config
        return by_text(repr(config))

    return run


def random_inputs(seed=0, **kwargs):
    return random_embedded(SCHEMA, np.random.default_rng(seed), **({"lengths": LENGTHS} | kwargs))


@once_per_config
def forward(config):
    """The compiled model as a function of parameters and batch."""
    graphdef, _ = nnx.split(build(config))
    return jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch), compiler_options=QUICK)


def params_of(config):
    return nnx.state(build(config), nnx.Param)


def logits(config, batch):
    return np.asarray(forward(config)(params_of(config), batch))


def rearrange(batch, requests, samples, *, shards=1) -> EmbeddedBatch:
    """The batch of these rows, with R = B: request-scope features of `requests`, the others of `samples`."""
    rows = {"request": np.asarray(requests), "candidate": np.asarray(samples)}
    events = {}
    for event in SCHEMA.events:
        old = batch.events[event.name]
        columns = {name: unpack(old.with_values(x)) for name, x in old.values.items()}
        lengths = old.lengths.reshape(-1)[rows[event.scope]]
        events[event.name] = pack(
            {name: np.concatenate([x[row] for row in rows[event.scope]]) for name, x in columns.items()},
            lengths,
            capacity=int(lengths.reshape(shards, -1).sum(1).max()) + 2,
            shards=shards,
            max_length=event.max_length,
            fill=dict.fromkeys(columns, 0.0),
        )
    index = np.tile(np.arange(len(samples) // shards, dtype=np.int32), (shards, 1))
    return EmbeddedBatch(
        {f.name: batch.dense[f.name][rows[f.scope]] for f in SCHEMA.dense},
        {f.name: batch.sparse[f.name][rows[f.scope]] for f in SCHEMA.sparse},
        events,
        index,
    )


def spoil(batch) -> EmbeddedBatch:
    """The batch with NaN in every token that lies outside all samples."""

    def of_type(sequence):
        outside = np.ones(next(iter(sequence.values.values())).shape[:2], bool)
        for shard, spans in enumerate(zip(sequence.starts, sequence.lengths, strict=True)):
            for start, length in zip(*spans, strict=True):
                outside[shard, start : start + length] = False
        assert outside.any()
        nan = {n: np.where(outside.reshape(*outside.shape, *[1] * (x.ndim - 2)), np.nan, x).astype(np.float32)
               for n, x in sequence.values.items()}  # fmt: skip
        return sequence.with_values(nan)

    return dataclasses.replace(batch, events={name: of_type(sequence) for name, sequence in batch.events.items()})


# --- which quantity depends on what ---------------------------------------------------------------------------------


def taps(model, batch):
    """Logits, and per layer what enters its interaction: the set tokens X and each event type's summary H."""
    joined, interact = [], WukongExperts.__call__
    with mock.patch.object(WukongExperts, "__call__", lambda self, x: (joined.append(x), interact(self, x))[1]):
        out = model(batch)
    n = SET_TOKENS
    found = {"logits": out}
    for layer, x in enumerate(joined):
        parts = jnp.split(x, [n, n + CLICK.n_tokens], axis=1)
        found |= dict(zip((f"X{layer}", f"click{layer}", f"view{layer}"), parts, strict=True))
    return found


@once_per_config
def dependencies(config):
    """A compiled function of parameters and batch: the taps, and how each row below depends on every input.

    Rows are one number each: every logit, every set token of sample 0 after two layers, and random projections of X
    and H of every layer.
    """
    graphdef, _ = nnx.split(build(config))
    rng = np.random.default_rng(1)

    def rows(params, batch):
        found = taps(nnx.merge(graphdef, params), batch)
        weight = {name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in found.items()}
        out = {f"logit{i}{k}": found["logits"][i, k] for i in range(SAMPLES) for k in range(2)}
        out |= {f"token{t}": (found["X2"] * weight["X2"])[0, t].sum() for t in range(SET_TOKENS)}
        out |= {name: (x * weight[name]).sum() for name, x in found.items() if name != "logits"}
        return out, found

    def table(params, batch):
        events = {name: sequence.values for name, sequence in batch.events.items()}
        inputs = {"dense": batch.dense, "sparse": batch.sparse, "events": events}

        def of(params, inputs):
            events = {name: batch.events[name].with_values(x) for name, x in inputs["events"].items()}
            return rows(params, EmbeddedBatch(inputs["dense"], inputs["sparse"], events, batch.request_index))

        return jax.jacrev(of, argnums=(0, 1), has_aux=True)(params, inputs)

    return jax.jit(table, compiler_options=QUICK)


def run_dependencies(config, change=lambda path, value: value):
    """(row → {parameter path: largest gradient}, row → input gradients, taps), with changed parameters."""
    params = jax.tree_util.tree_map_with_path(lambda path, x: change(name_of(path), x), params_of(config))
    table, found = dependencies(config)(params, random_inputs())
    of_params = {
        row: {name_of(path): float(jnp.abs(g).max()) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
        for row, (grads, _) in table.items()
    }
    return of_params, {row: grads for row, (_, grads) in table.items()}, found


def name_of(path):
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def depends(row, prefix):
    """Whether a row depends on all parameters below a prefix (True), on none (False); anything else is an error."""
    reached = [gradient > 0 for name, gradient in row.items() if name.startswith(prefix)]
    assert reached, f"no parameter begins with {prefix!r}: {list(row)}"
    assert len(set(reached)) == 1, {n: g for n, g in row.items() if n.startswith(prefix)}
    return reached[0]


DEFAULT = dataclasses.replace(CONFIG, implementation=None)
FULL = dataclasses.replace(CONFIG, comp_skip=False)


def test_summary_is_tapped_between_pffn_and_attention():
    rows, _, _ = run_dependencies(FULL)
    for layer in range(3):
        summary, stack = rows[f"click{layer}"], f"layers.{layer}.sequences.click"
        assert depends(summary, f"{stack}.pffn")
        assert depends(summary, f"{stack}.pool")
        if layer < 2:
            assert not depends(summary, f"{stack}.attend")
            assert depends(rows[f"click{layer + 1}"], f"{stack}.attend")
    assert depends(rows["click0"], "event_tokens.click")
    # types meet in the interaction only, and the first summary is older than any interaction
    assert not depends(rows["click0"], "event_tokens.view")
    assert not depends(rows["click0"], "layers.0.interaction")
    assert depends(rows["click1"], "layers.0.interaction")
    assert depends(rows["click1"], "event_tokens.view")


def test_past_its_depth_a_types_last_summary_stays_in_use():
    _, _, found = run_dependencies(FULL)
    for layer in (1, 2):
        chex.assert_trees_all_equal(found[f"view{layer}"], found["view0"])
        assert jnp.abs(found[f"click{layer}"] - found["click0"]).max() > 1e-3


@pytest.mark.parametrize("config", [FULL, CONFIG], ids=["no CompSkip", "CompSkip"])
def test_set_tokens_reach_the_sequence_through_generated_keys_and_values_only(config):
    rows, _, _ = run_dependencies(config)
    assert depends(rows["click0"], "set_tokens")
    assert depends(rows["view0"], "set_tokens")
    cut, _, _ = run_dependencies(config, lambda name, x: jnp.zeros_like(x) if "generate.key_value" in name else x)
    for layer in range(3):
        assert not depends(cut[f"click{layer}"], "set_tokens")
        assert not depends(cut[f"view{layer}"], "set_tokens")
    # ... while the raw X still takes part in every interaction
    assert all(depends(cut[f"X{layer}"], "set_tokens") for layer in range(3))


def test_raw_set_tokens_enter_the_interaction_past_weight_generation_and_pooling():
    def cut(name, x):
        return jnp.zeros_like(x) if "generate" in name or "pool.project" in name else x

    rows, _, found = run_dependencies(FULL, cut)
    model = build(FULL)
    chex.assert_trees_all_close(found["X0"], plain.run(model.set_tokens, random_inputs()), rtol=1e-5)
    assert not depends(rows["X1"], "layers.0.sequences.click.pffn")
    assert not depends(rows["X1"], "event_tokens.click")
    for layer in range(3):
        assert depends(rows[f"X{layer}"], "set_tokens")
    assert depends(rows["logit00"], "set_tokens")


def test_comp_skip_alternates_halves_and_reuses_the_previous_layers_summary():
    rows, _, found = run_dependencies(CONFIG)
    layers = build(CONFIG).layers
    parts = [set(vars(layer.sequences["click"])) & {"pffn", "pool", "attend"} for layer in layers]
    assert parts == [{"pffn", "pool"}, {"attend"}, {"pffn", "pool"}]
    chex.assert_trees_all_equal(found["click1"], found["click0"])
    assert jnp.abs(found["click2"] - found["click1"]).max() > 1e-3
    attend = "layers.1.sequences.click.attend"
    assert not depends(rows["X2"], attend)  # layer 1's attention is only seen through layer 2's summary
    assert depends(rows["click2"], attend)
    assert depends(rows["logit00"], attend)


@pytest.mark.parametrize("config", [FULL, CONFIG], ids=["no CompSkip", "CompSkip"])
def test_samples_dont_mix(config):
    _, rows, _ = run_dependencies(config)
    batch = random_inputs()
    for i in range(SAMPLES):
        for task in range(2):
            grads = rows[f"logit{i}{task}"]
            for kind in ("dense", "sparse"):
                for name, g in grads[kind].items():
                    touched = np.abs(g).reshape(SAMPLES, -1).max(-1) > 0
                    np.testing.assert_array_equal(touched, np.arange(SAMPLES) == i, err_msg=name)
            for name, columns in grads["events"].items():
                start, length = batch.events[name].starts[0, i], batch.events[name].lengths[0, i]
                for column, g in columns.items():
                    touched = np.abs(g[0]).reshape(g.shape[1], -1).max(-1) > 0
                    tokens = np.arange(len(touched))
                    own = (tokens >= start) & (tokens < start + length)
                    np.testing.assert_array_equal(touched, own, err_msg=f"{name}.{column}")


def test_after_two_layers_every_token_depends_on_every_input():
    _, rows, _ = run_dependencies(CONFIG)
    length = LENGTHS[0]
    for t in range(SET_TOKENS):
        grads = rows[f"token{t}"]
        of_sample = jax.tree.map(lambda g: np.abs(g[0]), {k: grads[k] for k in ("dense", "sparse")})
        of_sample["events"] = jax.tree.map(lambda g: np.abs(g[0, :length]), grads["events"])
        for path, g in jax.tree_util.tree_leaves_with_path(of_sample):
            per_token = g.reshape(length, -1).max(-1) if "events" in name_of(path) else g.max()
            assert np.all(per_token > 0), (t, name_of(path))


# --- every switch ---------------------------------------------------------------------------------------------------

EVEN = {"click": dataclasses.replace(CLICK, depth=4), "view": dataclasses.replace(VIEW, depth=2)}
UNBOUNDED = {"click": dataclasses.replace(CLICK, window=None), "view": VIEW}
UNIFORM = CONFIG.uniform_events().events
SWITCHES = {
    "default": {},
    "even depths, dense compression": {"depth": 4, "events": EVEN, "compression": "dense", "rotary_time": "age"},
    "no CompSkip": {"comp_skip": False, "activation": "gelu"},
    "naive PFFN": {"pffn": "naive"},
    "PMA, all tokens to every expert": {"pooling": "pma", "expert_inputs": "all", "rotary_time": "none"},
    "one expert, full attention, τ = maxlen": {"experts": 1, "events": UNBOUNDED, "tau": "maxlen"},
    "uniform event types, weights of the request": {"events": UNIFORM, "weight_inputs": "request"},
}


@once_per_config
def gradients(config):
    """Compiled logits and the parameters' gradients of a random projection of them."""
    graphdef, _ = nnx.split(build(config))
    weight = jnp.asarray(np.random.default_rng(2).normal(size=(SAMPLES, 2)), jnp.float32)

    def loss(params, batch):
        out = nnx.merge(graphdef, params)(batch)
        return (out * weight).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)


@pytest.mark.filterwarnings("ignore:.*has nothing to compute")
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_learns_and_unused_tokens_are_inert(switch):
    config = dataclasses.replace(CONFIG, **SWITCHES[switch])
    params, batch = params_of(config), random_inputs()
    grads, out = gradients(config)(params, batch)
    assert out.shape == (SAMPLES, 2)
    assert out.dtype == jnp.float32
    chex.assert_tree_all_finite((grads, out))
    idle = [name_of(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not jnp.abs(g).max() > 0]
    assert not idle
    chex.assert_trees_all_equal(gradients(config)(params, spoil(batch)), (grads, out))


def test_reference_and_default_implementations_agree():
    batch = random_inputs()
    want, got = (gradients(c)(params_of(CONFIG), batch) for c in (CONFIG, DEFAULT))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_equal(gradients(DEFAULT)(params_of(CONFIG), spoil(batch)), got)


def test_switches_exchange_the_blocks_they_name():
    def first(change):
        return build(dataclasses.replace(CONFIG, **change)).layers[0].sequences["click"]

    assert isinstance(first({}).pffn, PersonalisedFFN)
    assert isinstance(first({"pffn": "naive"}).pffn, NaivePFFN)
    assert isinstance(first({}).pool.compress, SumKronLinear)
    assert isinstance(first({"compression": "dense"}).pool.compress, DenseCompression)
    assert isinstance(first({"pooling": "pma"}).pool, PooledMultiheadAttention)
    assert (first({"tau": "maxlen"}).pffn.tau, first({"tau": "one"}).pffn.tau) == (5, 1)
    assert first({"activation": ("relu", "gelu")}).pffn.activation == ("relu", "gelu")
    for name in ("reference", None):
        stack = build(dataclasses.replace(FULL, implementation=name)).layers[0].sequences["click"]
        assert {stack.pffn.implementation, stack.pool.attention.implementation, stack.attend.implementation} == {name}
    for window, events in ((2, CONFIG.events), (None, UNBOUNDED)):
        assert build(dataclasses.replace(CONFIG, events=events)).layers[1].sequences["click"].attend.window == window
    for experts, inputs in ((1, "sliced"), (2, "sliced"), (2, "all")):
        interaction = build(dataclasses.replace(CONFIG, experts=experts, expert_inputs=inputs)).layers[0].interaction
        n = (SET_TOKENS + CONFIG.summary_tokens) // (experts if inputs == "sliced" else 1)
        assert interaction.factor.shape == (experts, n, CONFIG.interaction_rank)
    generate = first({"weight_inputs": "request"}).pffn.generate
    assert generate.compress.shape == (CONFIG.generated, CONFIG.set_tokens(SCHEMA, "request"))


def test_each_event_type_has_sizes_of_its_own():
    model = build(FULL)
    assert [set(layer.sequences) for layer in model.layers] == [{"click", "view"}, {"click"}, {"click"}]
    for name, size in CONFIG.events.items():
        stack = model.layers[0].sequences[name]
        assert stack.pool.attention.seeds.shape == (size.n_seeds, size.width)
        assert stack.pool.attention.heads == size.width // size.head_width
        assert stack.pffn.generate.key_value.kernel.shape == (size.width, 2 * size.width)
        assert stack.pool.project.kernel.shape == (size.width, CONFIG.width)
    assert not hasattr(model.layers[0].sequences["view"], "attend")  # its last layer's would feed nothing


def test_a_dead_last_layer_is_left_out_and_told():
    config = dataclasses.replace(CONFIG, depth=4, events=EVEN)
    with pytest.warns(UserWarning, match="has nothing to compute") as told:
        model = build(config)
    assert [str(w.message).split(":")[0] for w in told] == ["events 'click'", "events 'view'"]
    assert not jax.tree.leaves(nnx.state(model.layers[3].sequences))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(CONFIG)
        build(dataclasses.replace(config, comp_skip=False))


# --- the layout of a batch ------------------------------------------------------------------------------------------


def test_permuting_samples_permutes_logits_and_shards_change_nothing():
    everyone = np.arange(SAMPLES)
    batch = rearrange(random_inputs(3), everyone, everyone)
    want = logits(CONFIG, batch)
    assert np.ptp(want, axis=0).min() > 1e-3
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(logits(CONFIG, rearrange(batch, order, order)), want[order], rtol=1e-4, atol=1e-5)
    sharded = logits(CONFIG, rearrange(batch, everyone, everyone, shards=2))
    np.testing.assert_allclose(sharded, want, rtol=1e-4, atol=1e-5)


def test_candidates_that_share_a_request_get_the_logits_of_requests_of_their_own():
    config = dataclasses.replace(CONFIG, weight_inputs="request")
    shared = random_inputs(4, samples=8, requests=4, shards=2)
    request_of = (shared.request_index + np.array([[0], [2]])).reshape(-1)
    assert sorted(request_of) == [0, 0, 1, 1, 2, 2, 3, 3]
    expanded = rearrange(shared, request_of, np.arange(8))
    want = logits(config, expanded)
    np.testing.assert_allclose(logits(config, shared), want, rtol=1e-4, atol=1e-5)
    assert np.ptp(want, axis=0).min() > 1e-3
    with pytest.raises(ValueError, match='4 sequences for 8 samples; weight_inputs="all"'):
        logits(CONFIG, shared)


def test_bfloat16_is_near_float32():
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    params, batch = params_of(CONFIG), random_inputs()

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(np.float32) if x.dtype == np.float32 else x

    want = forward(CONFIG)(params, batch)
    # what rounding only the parameters and inputs costs; rounding every product may cost a few times as much
    unit = jnp.linalg.norm(forward(CONFIG)(*jax.tree.map(rounded, (params, batch))) - want)
    got = forward(low)(params, batch)
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - want) < 4 * unit
