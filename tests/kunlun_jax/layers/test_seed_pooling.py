"""Seed pooling equals its formulas, and an empty sequence gives a finite summary of nothing."""

import jax
import numpy as np
import plain
import pytest
from batches import random_sequence
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.layers.seed_pooling import (
    DenseCompression,
    HierarchicalSeedPooling,
    PooledMultiheadAttention,
    SumKronLinear,
)

SEEDS, TOKENS, EVENT, HEAD, WIDTH, RANK = 7, 3, 8, 4, 6, 2
LENGTHS = [5, 0, 1, 4]
SHARED = {"dtype": "float32", "implementation": None}


def hsp(compression="sum_kron"):
    return HierarchicalSeedPooling(
        SEEDS, TOKENS, EVENT, HEAD, WIDTH, rank=RANK, compression=compression, rngs=nnx.Rngs(0), **SHARED
    )


def pooled(module, s):
    """One sample's seed attention in float64."""
    q = plain.linear(module.query, plain.layer_norm(module.norm, plain.array(module.seeds)))
    k, v = np.split(plain.linear(module.key_value, s.astype(np.float64)), 2, axis=-1)
    return plain.linear(module.output, plain.attention(q, k, v, EVENT // HEAD))


def compressed(module, h):
    if isinstance(module, DenseCompression):
        return plain.linear(module.linear, h.reshape(-1)).reshape(TOKENS, -1)
    return sum(z.T @ h @ w for z, w in zip(plain.array(module.z), plain.array(module.w), strict=True))


def test_sum_kron_linear_is_a_sum_of_kronecker_products():
    rng = np.random.default_rng(0)
    module = plain.build(lambda: SumKronLinear(SEEDS, TOKENS, EVENT, RANK, dtype="float32", rngs=nnx.Rngs(0)), rng)
    x = rng.normal(size=(2, SEEDS, EVENT))
    out = np.asarray(plain.run(module, x))
    for b in range(2):
        np.testing.assert_allclose(out[b], compressed(module, x[b]), rtol=1e-4, atol=1e-4)
    matrix = sum(np.kron(z.T, w.T) for z, w in zip(plain.array(module.z), plain.array(module.w), strict=True))
    np.testing.assert_allclose(out.reshape(2, -1), x.reshape(2, -1) @ matrix.T, rtol=1e-4, atol=1e-4)
    assert sum(p.size for p in jax.tree.leaves(nnx.state(module))) == RANK * (SEEDS * TOKENS + EVENT**2)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("compression", ["sum_kron", "dense"])
def test_hsp_attends_compresses_projects_and_normalises(compression, shards):
    rng = np.random.default_rng(1)
    module = plain.build(lambda: hsp(compression), rng)
    sequence = random_sequence(rng, LENGTHS, EVENT, shards=shards)
    out, same = plain.run(module, sequence)
    np.testing.assert_array_equal(same.values, sequence.values)
    out = np.asarray(out)
    assert out.shape == (len(LENGTHS), TOKENS, WIDTH)
    for got, s in zip(out, unpack(sequence), strict=True):
        tokens = plain.linear(module.project, compressed(module.compress, pooled(module.attention, s)))
        np.testing.assert_allclose(got, plain.layer_norm(module.norm, tokens), rtol=1e-3, atol=1e-3)


def test_pma_has_as_many_seeds_as_tokens_and_no_compression():
    rng = np.random.default_rng(2)
    module = plain.build(lambda: PooledMultiheadAttention(TOKENS, EVENT, HEAD, WIDTH, rngs=nnx.Rngs(0), **SHARED), rng)
    assert module.attention.seeds.shape == (TOKENS, EVENT)
    sequence = random_sequence(rng, LENGTHS, EVENT)
    for got, s in zip(np.asarray(plain.run(module, sequence)[0]), unpack(sequence), strict=True):
        tokens = plain.linear(module.project, pooled(module.attention, s))
        np.testing.assert_allclose(got, plain.layer_norm(module.norm, tokens), rtol=1e-3, atol=1e-3)


def test_an_empty_sequence_gives_the_norms_bias_and_finite_gradients():
    rng = np.random.default_rng(3)
    module = plain.build(hsp, rng)
    sequence = random_sequence(rng, [0, 0], EVENT, max_length=4)
    out = np.asarray(plain.run(module, sequence)[0])
    np.testing.assert_allclose(out, np.broadcast_to(plain.array(module.norm.bias), out.shape), rtol=1e-6)
    graphdef, params = nnx.split(module)
    values = np.nan_to_num(sequence.values)
    grads = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(sequence.with_values(values))[0].sum()))(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
