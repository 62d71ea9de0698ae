"""Window attention equals its formula sample by sample, and reaches exactly its window."""

import jax
import numpy as np
import plain
import pytest
from batches import random_sequence
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.layers.attention import WindowAttention

WIDTH, HEAD, LENGTHS = 8, 4, [7, 0, 5, 2]


def build(window, rng):
    return plain.build(
        lambda: WindowAttention(WIDTH, HEAD, window, dtype="float32", implementation=None, rngs=nnx.Rngs(0)), rng
    )


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("window", [2, None])
def test_equals_softmax_attention_within_the_window(window, shards):
    rng = np.random.default_rng(0)
    module = build(window, rng)
    sequence = random_sequence(rng, LENGTHS, WIDTH, shards=shards)
    angles = rng.normal(size=(*sequence.values.shape[:2], HEAD // 2)).astype(np.float32)
    out = unpack(plain.run(module, sequence, angles))
    inputs, turns = unpack(sequence), unpack(sequence.with_values(angles))
    for got, s, angle in zip(out, inputs, turns, strict=True):
        q, k, v = np.split(plain.linear(module.query_key_value, plain.normalise(s)), 3, axis=-1)
        q, k = (plain.rotate(x, angle, WIDTH // HEAD) for x in (q, k))
        apart = np.abs(np.subtract.outer(np.arange(len(s)), np.arange(len(s))))
        mixed = plain.attention(q, k, v, WIDTH // HEAD, visible=True if window is None else apart <= window)
        np.testing.assert_allclose(got, s + plain.linear(module.output, mixed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 2, None])
def test_reaches_exactly_the_window_of_its_own_sample(window):
    rng = np.random.default_rng(1)
    module = build(window, rng)
    sequence = random_sequence(rng, [5, 4], WIDTH, spare=0)
    angles = np.zeros((1, 9, HEAD // 2), np.float32)
    jacobian = jax.jit(jax.jacrev(lambda v: module(sequence.with_values(v), angles).values[0].sum(-1)))
    reached = np.abs(jacobian(sequence.values)[:, 0]).max(-1) > 0
    i, j = np.indices((9, 9))
    same = (i < 5) == (j < 5)
    np.testing.assert_array_equal(reached, same if window is None else same & (abs(i - j) <= window))
