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
from batches import random_embedded, small_schema, spoil
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
    return plain.build(lambda: Kunlun(config, SCHEMA, rngs=nnx.Rngs(0)), np.random.default_rng(0), scale=0.5)


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


@once_per_config
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
def pullback(config):
    """A compiled function of parameters, batch and cotangents of the taps: the taps, and their gradients."""
    graphdef, _ = nnx.split(build(config))

    def run(params, batch, cotangents):
        def of(params, inputs):
            events = {name: batch.events[name].with_values(x) for name, x in inputs["events"].items()}
            embedded = EmbeddedBatch(inputs["dense"], inputs["sparse"], events, batch.request_index)
            return taps(nnx.merge(graphdef, params), embedded)

        events = {name: sequence.values for name, sequence in batch.events.items()}
        found, pull = jax.vjp(of, params, {"dense": batch.dense, "sparse": batch.sparse, "events": events})
        return found, *pull({name: jnp.zeros_like(x) for name, x in found.items()} | cotangents)

    return jax.jit(run, compiler_options=QUICK)


@once_per_config
def tap_shapes(config):
    graphdef, params = nnx.split(build(config))
    return jax.eval_shape(lambda params, batch: taps(nnx.merge(graphdef, params), batch), params, random_inputs())


def random_projections(config, names):
    """Random cotangents of the taps named, and zero ones of the others."""
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in tap_shapes(config).items()}
    return {name: w if name in names else np.zeros_like(w) for name, w in weights.items()}


def one(config, name, *index):
    """The cotangents that leave one row of a tap: a logit, or a token of a sample."""
    cotangents = random_projections(config, [name])
    kept = np.zeros_like(cotangents[name])
    kept[index] = cotangents[name][index]
    return cotangents | {name: kept}


class Dependencies:
    """What depends on what, with parameters that `change` may cut."""

    def __init__(self, config, change=lambda name, value: value):
        self.config = config
        self.params = jax.tree_util.tree_map_with_path(lambda path, x: change(name_of(path), x), params_of(config))
        self.taps = self._run(random_projections(config, []))[0]

    def _run(self, cotangents):
        return pullback(self.config)(self.params, random_inputs(), cotangents)

    def __call__(self, tap, prefix):
        """Whether a tap depends on all parameters below a prefix (True) or on none (False); else an error."""
        _, grads, _ = self._run(random_projections(self.config, [tap]))
        of = {name_of(path): float(jnp.abs(g).max()) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
        of = {name: g for name, g in of.items() if name.startswith(prefix)}
        assert of, f"no parameter begins with {prefix!r}"
        assert len({g > 0 for g in of.values()}) == 1, of
        return next(iter(of.values())) > 0

    def inputs(self, tap, *index):
        """Gradients of one number or token of a tap by input."""
        return self._run(one(self.config, tap, *index))[2]


def name_of(path):
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


DEFAULT = dataclasses.replace(CONFIG, implementation=None)
FULL = dataclasses.replace(CONFIG, comp_skip=False)


def test_summary_is_tapped_between_pffn_and_attention():
    depends = Dependencies(FULL)
    for layer in range(3):
        summary, stack = f"click{layer}", f"layers.{layer}.sequences.click"
        assert depends(summary, f"{stack}.pffn")
        assert depends(summary, f"{stack}.pool")
        if layer < 2:
            assert not depends(summary, f"{stack}.attend")
            assert depends(f"click{layer + 1}", f"{stack}.attend")
    assert depends("click0", "event_tokens.click")
    # types meet in the interaction only, and the first summary is older than any interaction
    assert not depends("click0", "event_tokens.view")
    assert not depends("click0", "layers.0.interaction")
    assert depends("click1", "layers.0.interaction")
    assert depends("click1", "event_tokens.view")


def test_past_its_depth_a_types_last_summary_stays_in_use():
    found = Dependencies(FULL).taps
    for layer in (1, 2):
        chex.assert_trees_all_equal(found[f"view{layer}"], found["view0"])
        assert jnp.abs(found[f"click{layer}"] - found["click0"]).max() > 1e-3


@pytest.mark.parametrize("config", [FULL, CONFIG], ids=["no CompSkip", "CompSkip"])
def test_set_tokens_reach_the_sequence_through_generated_keys_and_values_only(config):
    depends = Dependencies(config)
    assert depends("click0", "set_tokens")
    assert depends("view0", "set_tokens")
    depends = Dependencies(config, lambda name, x: jnp.zeros_like(x) if "generate.key_value" in name else x)
    for layer in range(3):
        assert not depends(f"click{layer}", "set_tokens")
        assert not depends(f"view{layer}", "set_tokens")
        assert depends(f"X{layer}", "set_tokens")  # the raw X still takes part in every interaction


def test_raw_set_tokens_enter_the_interaction_past_weight_generation_and_pooling():
    depends = Dependencies(
        FULL, lambda name, x: jnp.zeros_like(x) if "generate" in name or "pool.project" in name else x
    )
    model = build(FULL)
    chex.assert_trees_all_close(depends.taps["X0"], plain.run(model.set_tokens, random_inputs()), rtol=1e-5)
    assert not depends("X1", "layers.0.sequences.click.pffn")
    assert not depends("X1", "event_tokens.click")
    for tap in ("X0", "X1", "X2", "logits"):
        assert depends(tap, "set_tokens")


def test_comp_skip_alternates_halves_and_reuses_the_previous_layers_summary():
    parts = [set(vars(x.sequences["click"])) & {"pffn", "pool", "attend"} for x in build(CONFIG).layers]
    assert parts == [{"pffn", "pool"}, {"attend"}, {"pffn", "pool"}]
    depends = Dependencies(CONFIG)
    chex.assert_trees_all_equal(depends.taps["click1"], depends.taps["click0"])
    assert jnp.abs(depends.taps["click2"] - depends.taps["click1"]).max() > 1e-3
    attend = "layers.1.sequences.click.attend"
    assert not depends("X2", attend)  # layer 1's attention is only seen through layer 2's summary
    assert depends("click2", attend)
    assert depends("logits", attend)


@pytest.mark.parametrize("config", [FULL, CONFIG], ids=["no CompSkip", "CompSkip"])
def test_samples_dont_mix(config):
    depends, batch = Dependencies(config), random_inputs()
    for i in range(SAMPLES):
        for task in range(2):
            grads = depends.inputs("logits", i, task)
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
    depends, length = Dependencies(CONFIG), LENGTHS[0]
    for t in range(SET_TOKENS):
        grads = depends.inputs("X2", 0, t)
        of_sample = jax.tree.map(lambda g: np.abs(g[0]), {k: grads[k] for k in ("dense", "sparse")})
        of_sample["events"] = jax.tree.map(lambda g: np.abs(g[0, :length]), grads["events"])
        for path, g in jax.tree_util.tree_leaves_with_path(of_sample):
            per_token = g.reshape(length, -1).max(-1) if "events" in name_of(path) else g.max()
            assert np.all(per_token > 0), (t, name_of(path))


# --- every switch ---------------------------------------------------------------------------------------------------

EVEN = {"click": dataclasses.replace(CLICK, depth=4), "view": dataclasses.replace(VIEW, depth=2)}
UNBOUNDED = {"click": dataclasses.replace(CLICK, window=None), "view": VIEW}
SWITCHES = {  # several at once, each on a block of its own, since every entry is a compilation
    "default": {},
    "no CompSkip": {"comp_skip": False},
    "naive PFFN, PMA, all tokens to every expert": {
        "pffn": "naive", "pooling": "pma", "expert_inputs": "all", "rotary_time": "none",
    },
    "even depths, dense compression, weights of the request": {
        "depth": 4, "events": EVEN, "compression": "dense", "weight_inputs": "request", "rotary_time": "age",
    },
    "one expert, full attention, uniform event types, τ = maxlen": {
        "experts": 1, "events": dataclasses.replace(CONFIG, events=UNBOUNDED).uniform_events().events, "tau": "maxlen",
    },
}  # fmt: skip


def gradients(config, batch):
    """The parameters' gradients of a random projection of the logits, and the logits."""
    found, grads, _ = pullback(config)(params_of(config), batch, random_projections(config, ["logits"]))
    return grads, found["logits"]


@pytest.mark.filterwarnings("ignore:.*has nothing to compute")
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_parameter_learns_and_unused_tokens_are_inert(switch):
    config = dataclasses.replace(CONFIG, **SWITCHES[switch])
    batch = random_inputs()
    grads, out = gradients(config, batch)
    assert out.shape == (SAMPLES, 2)
    assert out.dtype == jnp.float32
    chex.assert_tree_all_finite((grads, out))
    idle = [name_of(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not jnp.abs(g).max() > 0]
    assert not idle
    chex.assert_trees_all_equal(gradients(config, spoil(batch)), (grads, out))


def test_reference_and_default_implementations_agree():
    batch = random_inputs()
    want, got = (gradients(c, batch) for c in (CONFIG, DEFAULT))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_equal(gradients(DEFAULT, spoil(batch)), got)


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

    def exact(params, batch):
        return pullback(CONFIG)(params, batch, random_projections(CONFIG, []))[0]["logits"]

    want = exact(params, batch)
    # what rounding only the parameters and inputs costs; rounding every product may cost a few times as much
    unit = jnp.linalg.norm(exact(*jax.tree.map(rounded, (params, batch))) - want)
    got = forward(low)(params, batch)
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - want) < 4 * unit
