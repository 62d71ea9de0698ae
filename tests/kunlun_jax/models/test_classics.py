"""DIN and DCNv2 by hand and against float64; what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import plain
import pytest
from batches import random_embedded, small_schema
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.layers.cross import CrossNetwork, pair_products
from kunlun_jax.model_configs import DCNv2Config, DINConfig, matched_fields
from kunlun_jax.models.dcnv2 import DCNv2
from kunlun_jax.models.din import TargetAttention

SCHEMA = small_schema(scope="candidate", max_length=5)
DIN = DINConfig(width=6, attention_hidden=(5,), hidden=(7,))
DCN = DCNv2Config(width=4, cross_rank=2, hidden=(6, 5))


def test_a_cross_layer_by_hand():
    """x_1 = x_0 ⊙ (W x_0 + b) + x_0, then the same once more with x_0 in front."""
    module = CrossNetwork(2, 2, rank=0, dtype="float32", rngs=nnx.Rngs(0))
    for layer in module.up:
        layer.kernel[...], layer.bias[...] = jnp.array([[1.0, 0.0], [2.0, -1.0]]), jnp.array([0.5, 0.0])
    # W x = (x1 + 2 x2, −x2): (5.5, −2) ⊙ (1, 2) + (1, 2) = (6.5, −2); then (3, 2) ⊙ (1, 2) + (6.5, −2)
    np.testing.assert_allclose(plain.run(module, np.array([[1.0, 2.0]])), [[9.5, 2.0]], rtol=1e-6)


def test_pair_products_by_hand():
    x = jnp.array([[[1.0, 0.0, 0.0, 2.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 1.0]]])
    np.testing.assert_allclose(pair_products(x), [[3 / 2, 2 / 2, 0]])


def test_dcnv2_is_cross_network_and_mlp_side_by_side():
    rng = np.random.default_rng(0)
    module = plain.build(lambda: DCNv2(DCN, SCHEMA, rngs=nnx.Rngs(0)), rng, scale=0.3)
    batch = random_embedded(SCHEMA, rng, lengths=[2, 0, 5, 1])
    tokens = np.concatenate([plain.run(module.set_tokens, batch), plain.run(module.pooled, batch)], axis=1)
    x = first = tokens.reshape(4, -1).astype(np.float64)
    for down, up in zip(module.cross.down, module.cross.up, strict=True):
        x = first * plain.linear(up, plain.linear(down, x)) + x
    deep = plain.silu(plain.mlp(module.deep, first))
    expected = plain.linear(module.head, np.concatenate([x, deep], axis=1))
    np.testing.assert_allclose(plain.run(module, batch), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("event", SCHEMA.events, ids=lambda event: event.name)
def test_target_attention_weighs_events_by_the_candidate(event):
    rng = np.random.default_rng(1)
    module = plain.build(lambda: TargetAttention(DIN, SCHEMA, event, rngs=nnx.Rngs(0)), rng)
    batch = random_embedded(SCHEMA, rng, lengths=[2, 0, 5, 1])
    names = {"click": [("item", "item"), ("tags", "tags")], "view": [("item", "item")]}[event.name]
    assert [(own.name, theirs.name) for own, theirs in matched_fields(SCHEMA, event)] == names
    events = batch.events[event.name]
    e = unpack(events.with_values(np.concatenate([events.values[own] for own, _ in names], axis=-1)))
    s = unpack(plain.run(module.tokens, events))
    out = np.asarray(plain.run(module, batch))
    for b in range(4):
        v = np.concatenate([batch.sparse[theirs][b] for _, theirs in names])
        total = np.zeros(6)
        for own, whole in zip(e[b], s[b], strict=True):
            score = plain.mlp(module.score, np.concatenate([own, v, own - v, own * v, whole]))
            total += score * whole
        np.testing.assert_allclose(out[b], total / np.sqrt(5), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DIN, {"width": 0}, "^width: must be at least 1, got 0"),
        (DIN, {"attention_hidden": (0,)}, "attention_hidden: every width must be at least 1"),
        (DIN, {"dtype": "float16"}, "^dtype: 'float16' is unknown"),
        (DCN, {"cross_rank": -1}, "cross_rank: must not be negative, got -1"),
        (DCN, {"cross_depth": 0}, "^cross_depth: must be at least 1, got 0"),
        (DCN, {"hidden": ()}, "hidden: the deep network needs at least one width"),
    ],
)
def test_bad_settings_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)
