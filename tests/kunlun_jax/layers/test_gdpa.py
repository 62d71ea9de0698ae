"""Weight generation and both PFFNs equal their definitions, sample by sample."""

import numpy as np
import plain
import pytest
from batches import random_sequence
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.layers.gdpa import NaivePFFN, PersonalisedFFN, WeightGeneration

TOKENS, WIDTH, F, EVENT, D = 5, 6, 7, 8, 4
HEADS = EVENT // D
LENGTHS = [6, 0, 3, 9]
SIZES = (TOKENS, WIDTH, F, EVENT)
ACTIVATIONS = {"gelu_tanh": plain.gelu_tanh, "relu": lambda x: np.maximum(x, 0), "identity": lambda x: x}


def summary(module, x):
    """X_sum of one sample: the learned map of the token axis, then the MLP over features."""
    return plain.mlp(module.mlp, plain.array(module.compress) @ x)


def test_keys_and_values_are_per_head_maps_of_the_summary():
    rng = np.random.default_rng(0)
    module = plain.build(lambda: WeightGeneration(*SIZES, D, dtype="float32", rngs=nnx.Rngs(0)), rng)
    x = rng.normal(size=(3, TOKENS, WIDTH))
    keys, values = plain.run(module, x)
    assert keys.shape == values.shape == (3, F, HEADS, D)
    w1, w2 = np.split(plain.array(module.key_value.kernel), 2, axis=1)
    for b in range(3):
        x_sum = summary(module, x[b])
        for h in range(HEADS):
            own = slice(h * D, (h + 1) * D)
            np.testing.assert_allclose(keys[b, :, h], x_sum @ w1[:, own], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(values[b, :, h], x_sum @ w2[:, own], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("activation", "tau"),
    [("gelu_tanh", 1.0), ("gelu_tanh", 9.0), (("relu", "gelu_tanh"), 3.0), (("identity", "relu"), 1.0)],
)
def test_personalised_ffn_is_the_production_block(activation, tau, shards):
    rng = np.random.default_rng(1)
    options = {"activation": activation, "tau": tau, "dtype": "float32", "implementation": None}
    module = plain.build(lambda: PersonalisedFFN(*SIZES, D, **options, rngs=nnx.Rngs(0)), rng)
    sequence = random_sequence(rng, LENGTHS, EVENT, shards=shards)
    x = rng.normal(size=(len(LENGTHS), TOKENS, WIDTH))
    of_head = (activation,) * HEADS if isinstance(activation, str) else activation
    out = unpack(plain.run(module, sequence, x))
    for b, (got, s) in enumerate(zip(out, unpack(sequence), strict=True)):
        keys, values = np.split(plain.linear(module.generate.key_value, summary(module.generate, x[b])), 2, axis=-1)
        normed = plain.normalise(s.astype(np.float64))
        heads = [
            ACTIVATIONS[act](q @ k.T / tau) @ v
            for act, q, k, v in zip(of_head, *(np.split(y, HEADS, -1) for y in (normed, keys, values)), strict=True)
        ]
        o = np.concatenate(heads, axis=-1) + normed
        expected = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) + s
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_naive_pffn_multiplies_by_a_generated_matrix(shards):
    rng = np.random.default_rng(2)
    module = plain.build(lambda: NaivePFFN(*SIZES, dtype="float32", rngs=nnx.Rngs(0)), rng)
    sequence = random_sequence(rng, LENGTHS, EVENT, shards=shards)
    x = rng.normal(size=(len(LENGTHS), TOKENS, WIDTH))
    out = unpack(plain.run(module, sequence, x))
    for b, (got, s) in enumerate(zip(out, unpack(sequence), strict=True)):
        matrix = summary(module, x[b]).T @ plain.array(module.weight)
        np.testing.assert_allclose(got, s @ matrix + s, rtol=1e-4, atol=1e-4)
