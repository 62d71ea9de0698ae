"""FLOP formulas: exactly the products of the traced model, near XLA's own count, windows against brute force."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import random_embedded, small_schema
from flax import nnx
from jax.extend.core import jaxprs_in_params

from kunlun_jax.flops import (
    PEAK_FLOPS,
    keys_in_window,
    kunlun_flops,
    mfu,
    model_flops,
    scale_to,
    sequence_share,
    total,
    training_flops,
)
from kunlun_jax.layers import wukong
from kunlun_jax.model_configs import (
    DCNv2Config,
    DINConfig,
    EventConfig,
    InterFormerConfig,
    KunlunConfig,
    WukongConfig,
)
from kunlun_jax.models import build as build_model
from kunlun_jax.models.kunlun import Kunlun
from kunlun_jax.schema import EventType, FeatureSchema, SparseField, Table

T = 9
SCHEMA = small_schema(scope="candidate", tasks=("click", "buy"), max_length=T)
CONFIG = KunlunConfig(
    events={
        "click": EventConfig(width=12, head_width=6, depth=4, n_seeds=7, n_tokens=4, window=None),
        "view": EventConfig(width=8, head_width=4, depth=2, n_seeds=5, n_tokens=2, window=None),
    },
    width=8,  # as wide as two of the three tables: their fields need no projection
    depth=5,
    generated=10,
    dense_tokens=2,
    experts=2,
    interaction_rank=3,
    interaction_hidden=14,
    kron_rank=3,
    head_hidden=(9, 11),
    implementation="reference",
)
SWITCHES = {
    "default": {},
    "no CompSkip": {"comp_skip": False},
    "naive PFFN": {"pffn": "naive"},
    "PMA": {"pooling": "pma"},
    "dense compression": {"compression": "dense"},
    "all tokens to every expert": {"expert_inputs": "all"},
    "one expert": {"experts": 1},
    "linear head": {"head_hidden": ()},
    "another width": {"width": 10},
}


def products(module, *arguments, call=lambda module, *arguments: module(*arguments)) -> int:
    """The FLOPs of all matrix products in the jaxpr of a call; loops don't occur in reference implementations."""
    graphdef, params = nnx.split(module)

    def of(jaxpr):
        count = 0
        for equation in jaxpr.eqns:
            assert equation.primitive.name not in ("while", "scan")
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                count += 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
            count += sum(of(sub) for sub in jaxprs_in_params(equation.params))
        return count

    return of(jax.make_jaxpr(lambda params, *args: call(nnx.merge(graphdef, params), *args))(params, *arguments).jaxpr)


def build(config, schema=SCHEMA):
    """The model with abstract parameters: tracing needs no more."""
    return nnx.eval_shape(lambda: Kunlun(config, schema, rngs=nnx.Rngs(0)))


def full_batch(schema, samples, requests=None):
    count = samples if requests is None else requests
    rng = np.random.default_rng(samples)
    longest = schema.events[0].max_length
    return random_embedded(schema, rng, samples=samples, requests=requests, lengths=[longest] * count, spare=0)


def model_products(config, schema, samples, requests=None):
    return products(build(config, schema), full_batch(schema, samples, requests))


@pytest.fixture(autouse=True)
def machines_as_counted(monkeypatch):
    """The formulas count factorisation machines as X (XᵀY)."""
    monkeypatch.setattr(wukong, "FEW_TOKENS", 0)


def per_batch(config):
    """The query projections of the shared seeds, which the formulas leave out."""
    seeds = "n_seeds" if config.pooling == "hsp" else "n_tokens"
    return sum(
        2 * getattr(e, seeds) * e.width**2 * sum(config.runs_pffn(layer) for layer in range(e.depth))
        for e in config.events.values()
    )


def compressions(config):
    """The experts' linear compressions, which the formulas count and the layers add to the map of the residual."""
    outputs = config.set_tokens(SCHEMA)
    dealt_over = config.experts if config.expert_inputs == "sliced" else 1
    n, m = (outputs + config.summary_tokens) // dealt_over, outputs // config.experts
    return config.depth * config.experts * 2 * (m // 2) * n * config.width


@pytest.mark.filterwarnings("ignore:.*has nothing to compute")
@pytest.mark.parametrize("switch", SWITCHES)
def test_formulas_are_the_products_of_the_traced_model(switch):
    config = dataclasses.replace(CONFIG, **SWITCHES[switch])
    per_sample = total(kunlun_flops(config, SCHEMA, {"click": T, "view": T})) - compressions(config)
    assert model_products(config, SCHEMA, 3) == 3 * per_sample + per_batch(config)


INTERFORMER = InterFormerConfig(
    width=8, head_width=4, depth=2, n_sum=3, hidden=10, cross_rank=5, head_hidden=(7,), implementation="reference"
)
WUKONG = WukongConfig(
    width=6, depth=3, factorised=3, compressed=4, rank=2, attentive_tokens=2, hidden=(9, 5), head_hidden=(7,)
)
BASELINES = {
    "interformer": INTERFORMER,
    **{
        f"interformer, {change}": dataclasses.replace(INTERFORMER, **change)
        for change in (
            {"flow": "n2s"}, {"flow": "s2n"}, {"flow": "sep"}, {"flow": "sole"}, {"cls": False}, {"pma": 0},
            {"recent": 0}, {"gating": False}, {"pffn": "shared"}, {"interactions": ("dot",)},
            {"interactions": ("cross",)},
        )
    },
    "wukong": WUKONG,
    **{
        f"wukong, {change}": dataclasses.replace(WUKONG, **change)
        for change in (
            {"machine": "plain"}, {"machine": "attentive"}, {"factorised": 0}, {"compressed": 0}, {"residual": False},
            {"field_embeddings": {"item": 2}, "field_groups": ("tags+seller",)},
        )
    },
    "din": DINConfig(width=6, attention_hidden=(5, 3), hidden=(9, 7)),
    "dcnv2": DCNv2Config(width=6, cross_rank=3, hidden=(9, 7)),
    "dcnv2, whole weights": DCNv2Config(width=6, cross_rank=0, hidden=(9,)),
}  # fmt: skip


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_formulas_are_the_products_of_the_traced_model(name):
    config = BASELINES[name]
    model = nnx.eval_shape(lambda: build_model(config, SCHEMA, rngs=nnx.Rngs(0)))
    expected = 3 * total(model_flops(config, SCHEMA, {"click": T, "view": T}))
    if isinstance(config, InterFormerConfig) and config.flow != "sole":  # the query projections of the shared seeds
        summaries = len(SCHEMA.events) * (1 + config.depth * config.tells_set)
        expected += summaries * 2 * config.pma * config.width**2
    assert products(model, full_batch(SCHEMA, 3)) == expected


@pytest.mark.parametrize("name", ["interformer", "wukong", "din", "dcnv2"])
def test_recipes_grow_and_reach_a_target(name):
    lengths = {"click": 4, "view": 6}
    start = BASELINES[name]
    sizes = [total(model_flops(size, SCHEMA, lengths)) for size in start.recipe()]
    target = 0.5 * (sizes[3] + sizes[-1]) if name != "interformer" else sizes[40]
    scaled = scale_to(start, SCHEMA, lengths, target, tolerance=0.15)
    assert total(model_flops(scaled, SCHEMA, lengths)) == pytest.approx(target, rel=0.15)
    kind = type(start).__name__
    with pytest.raises(
        ValueError, match=rf"{kind}: no size of the recipe has 1e\+15 FLOPs per sample within 5%; the nearest"
    ):
        scale_to(start, SCHEMA, lengths, 1e15)
    with pytest.raises(ValueError, match="target: must be positive, got 0"):
        scale_to(start, SCHEMA, lengths, 0)


def test_wukongs_recipe_deepens_first_then_widens_all_together():
    sizes = list(WUKONG.recipe())
    assert [s.depth for s in sizes[:4]] == [1, 2, 3, 4]
    assert {s.depth for s in sizes[4:]} == {4}
    assert (8, 6, 4, (18, 10)) in [(s.compressed, s.factorised, s.rank, s.hidden) for s in sizes]  # all of them twice


def test_kunluns_recipe_deepens_widens_then_adds_generated_keys_and_experts():
    config = dataclasses.replace(CONFIG, events={k: dataclasses.replace(e, depth=3) for k, e in CONFIG.events.items()})
    sizes = list(config.recipe())
    order = [(s.depth, s.width, s.generated, s.experts) for s in sizes]
    assert order == sorted(order)
    assert [s.depth for s in sizes[:3]] == [1, 3, 5]
    assert all(e.head_width == config.events[n].head_width for s in sizes for n, e in s.events.items())
    assert sizes[-1].experts == 4 * config.experts


def test_only_kunlun_counts_shared_requests():
    with pytest.raises(
        ValueError, match="candidates: only Kunlun's count knows shared requests, got 2 for WukongConfig"
    ):
        model_flops(WUKONG, SCHEMA, {"click": T, "view": T}, candidates=2)


@pytest.mark.filterwarnings("ignore:.*has nothing to compute")
def test_modules_count_their_own_products():
    flops = kunlun_flops(CONFIG, SCHEMA, {"click": T, "view": T})
    model, batch = build(CONFIG), full_batch(SCHEMA, 1)
    sequences = {
        e.name: batch.events[e.name].with_values(jnp.zeros((1, T, CONFIG.events[e.name].width))) for e in SCHEMA.events
    }
    n = CONFIG.set_tokens(SCHEMA)
    x = jnp.zeros((1, n, CONFIG.width))
    assert flops["set_tokens"] == products(model.set_tokens, batch)
    assert flops["head"] == products(model.head, x.reshape(1, -1))
    both = jnp.zeros((1, n + CONFIG.summary_tokens, CONFIG.width))
    assert flops["interaction"] == CONFIG.depth * products(model.layers[0].interaction, both) + compressions(CONFIG)
    for event, pffns, attentions in (("click", 2, 1), ("view", 1, 0)):
        size, first = CONFIG.events[event], model.layers[0].sequences[event]
        count = {name.removeprefix(event + "/"): value for name, value in flops.items() if name.startswith(event)}
        assert count["event_tokens"] == products(model.event_tokens[event], batch.events[event])
        assert count["weight_generation"] == pffns * products(first.pffn.generate, x)
        assert count["pffn"] == pffns * products(first.pffn, sequences[event], x) - count["weight_generation"]
        seeds = products(first.pool.attention, sequences[event]) - 2 * size.n_seeds * size.width**2
        assert count["seed_projections"] + count["seed_scores"] == pffns * seeds
        assert count["compression"] == pffns * products(
            first.pool,
            jnp.zeros((1, size.n_seeds, size.width)),
            call=lambda pool, h: pool.project(pool.compress(h)),
        )
        attend = model.layers[1].sequences["click"].attend if attentions else None
        assert count["attention_scores"] == attentions * 4 * T * T * size.width
        assert count["attention_projections"] + count["attention_scores"] == attentions * (
            products(attend, sequences[event], jnp.zeros((1, T, size.head_width // 2))) if attend else 0
        )


def test_xla_counts_the_same_within_five_percent():
    """XLA adds the element-wise operations, so the sizes let products dominate: wide heads, a cheap activation."""
    schema = FeatureSchema(
        tables=(Table("item", 10, 32),),
        sparse=(*(SparseField(f"f{i}", "item") for i in range(8)),),
        events=(EventType("click", 64, (SparseField("item", "item"),)),),
    )
    config = KunlunConfig(
        events={"click": EventConfig(width=256, head_width=256, depth=3, n_seeds=32, n_tokens=8, window=None)},
        width=256,
        depth=3,
        generated=64,
        activation="relu",
        implementation="reference",
    )
    model, batch = build(config, schema), full_batch(schema, 2)
    graphdef, params = nnx.split(model)
    compiled = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch)).lower(params, batch).compile()
    ours = 2 * total(kunlun_flops(config, schema, {"click": 64})) + per_batch(config)
    assert compiled.cost_analysis()["flops"] == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("window", [0, 1, 3, 8, 50, None])
def test_windows_count_the_keys_really_in_them(window):
    reach = 10**6 if window is None else window
    brute = [sum(abs(i - j) <= reach for i in range(t) for j in range(t)) for t in range(14)]
    np.testing.assert_array_equal(keys_in_window(np.arange(14.0), window), brute)


@pytest.mark.filterwarnings("ignore:.*has nothing to compute")
def test_lengths_are_averaged_after_the_window_formula():
    config = dataclasses.replace(CONFIG, events={k: dataclasses.replace(e, window=2) for k, e in CONFIG.events.items()})
    lengths = np.array([0, 1, 9, 4])
    mixed = kunlun_flops(config, SCHEMA, {"click": lengths, "view": 3})
    single = [kunlun_flops(config, SCHEMA, {"click": int(t), "view": 3}) for t in lengths]
    assert mixed == {module: pytest.approx(np.mean([s[module] for s in single])) for module in mixed}
    assert single[2]["click/attention_scores"] == 4 * 12 * (9 * 5 - 2 * (2 + 1))  # two ends lack 2 + 1 keys each
    # an empty sequence still generates weights and pools, but nothing of it is per event
    per_event = {m for m in mixed if m.startswith("click") and single[0][m] == 0}
    assert per_event == {
        f"click/{m}" for m in ("event_tokens", "pffn", "seed_scores", "attention_projections", "attention_scores")
    }


def test_comp_skip_and_the_window_leave_work_out():
    lengths = {"click": T, "view": T}
    full = kunlun_flops(dataclasses.replace(CONFIG, comp_skip=False), SCHEMA, lengths)
    skipping = kunlun_flops(CONFIG, SCHEMA, lengths)
    assert skipping["click/attention_scores"] * 3 == full["click/attention_scores"]  # of 4 layers, the last has none
    assert skipping["click/pffn"] * 2 == full["click/pffn"]
    assert skipping["view/attention_scores"] == 0
    assert skipping["interaction"] == full["interaction"]


@pytest.mark.filterwarnings("ignore:.*has nothing to compute")
def test_candidates_share_what_belongs_to_their_request():
    config = dataclasses.replace(CONFIG, weight_inputs="request", width=10)
    lengths = {"click": T, "view": T}
    alone, shared = (kunlun_flops(config, SCHEMA, lengths, candidates=c) for c in (1, 3))
    assert {m for m in alone if shared[m] == alone[m] > 0} == {"interaction", "head"}
    assert all(shared[m] == pytest.approx(alone[m] / 3) for m in alone if "/" in m)
    model, batch = build(config), full_batch(SCHEMA, 6, requests=2)
    # The set tokens of the request are traced twice, as set tokens and for the weight generation.
    again = products(model.set_tokens, batch, call=lambda tokens, batch: tokens.of_scope(batch, "request"))
    expected = 6 * (total(shared) - compressions(config)) + per_batch(config)
    assert model_products(config, SCHEMA, 6, requests=2) - again == pytest.approx(expected)


def test_shares_training_and_utilisation():
    flops = {"set_tokens": 10.0, "interaction": 20.0, "head": 10.0, "click/pffn": 50.0, "view/pffn": 10.0}
    assert total(flops) == 100
    assert sequence_share(flops) == pytest.approx(0.6)
    assert training_flops(flops) == 300
    assert mfu(2.5e11, 300, PEAK_FLOPS["H100"]) == pytest.approx(75 / 989)


@pytest.mark.parametrize("position", range(3))
def test_utilisation_refuses_what_is_not_positive(position):
    arguments = [1.0, 1.0, 1.0]
    arguments[position] = 0.0
    with pytest.raises(ValueError, match="must be positive, got 0"):
        mfu(*arguments)


@pytest.mark.parametrize(
    ("lengths", "candidates", "message"),
    [
        ({"click": 3}, 1, r"given for \['click'\]"),
        ({"click": 3, "view": 3, "buy": 1}, 1, "'buy'"),
        ({"click": 10, "view": 3}, 1, r"'click': need numbers in \[0, 9\]"),
        ({"click": [2, -1], "view": 3}, 1, "'click'"),
        ({"click": 3, "view": []}, 1, "'view'.*got 0 numbers"),
        ({"click": 3, "view": np.nan}, 1, "'view'"),
        ({"click": 3, "view": 3}, 0.5, "at least 1 per request, got 0.5"),
        ({"click": 3, "view": 3}, 2, 'weight_inputs="all"'),
    ],
)
def test_bad_input_raises(lengths, candidates, message):
    with pytest.raises(ValueError, match=message):
        kunlun_flops(CONFIG, SCHEMA, lengths, candidates=candidates)
