"""LayerNorm's gradient in closed form against automatic differentiation of its definition."""

import functools

import chex
import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kunlun_jax.layers import norm
from kunlun_jax.layers.mlp import beside_parts, in_parts, linear, mix_tokens
from kunlun_jax.layers.norm import EPSILON, layer_norm, norm_of_groups, split_norm
from pallas_kernels.rows import row_kernel


def plain(x, scale, bias):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON) * scale + bias


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (12,)])
def test_values_and_gradients_are_those_of_the_definition(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x, weights = (jax.random.normal(key, shape) for key in keys[:2])
    scale, bias = (jax.random.normal(key, (12,)) for key in keys[2:])
    graph, params = nnx.split(layer_norm(12, dtype="float32", rngs=nnx.Rngs(0)))
    structure = jax.tree.structure(params)
    assert len(jax.tree.leaves(params)) == 2  # bias, then scale

    def ours(x, scale, bias):
        return nnx.merge(graph, jax.tree.unflatten(structure, [bias, scale]))(x)

    def gradients(function):
        return jax.grad(lambda *operands: jnp.sum(weights * function(*operands)), argnums=(0, 1, 2))(x, scale, bias)

    np.testing.assert_allclose(ours(x, scale, bias), plain(x, scale, bias), atol=1e-5)
    chex.assert_trees_all_close(gradients(ours), gradients(plain), atol=2e-5)


@pytest.mark.parametrize("shape", [(7, 3, 12), (2, 3, 5, 12)])
def test_each_group_has_its_own_scale_and_bias(shape):
    keys = jax.random.split(jax.random.key(2), 4)
    x, weights = (jax.random.normal(key, shape) for key in keys[:2])
    scale, bias = (jax.random.normal(key, (3, 12)) for key in keys[2:])

    def gradients(function):
        return jax.grad(lambda *operands: jnp.sum(weights * function(*operands)), argnums=(0, 1, 2))(x, scale, bias)

    one_by_one = jax.vmap(plain, in_axes=(1, 0, 0), out_axes=1)
    np.testing.assert_allclose(norm_of_groups(x, scale, bias), one_by_one(x, scale, bias), atol=1e-5)
    chex.assert_trees_all_close(gradients(norm_of_groups), gradients(one_by_one), atol=2e-5)


@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_split_norm_passes_its_operand_on_and_adds_both_gradients(shape):
    x, *weights = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))

    def loss(split):
        return lambda x: sum(jnp.sum(w * part) for w, part in zip(weights, split(x), strict=True))

    def definition(x):
        return x, plain(x, 1.0, 0.0)

    chex.assert_trees_all_close(split_norm(x), definition(x), atol=1e-5)
    np.testing.assert_allclose(jax.grad(loss(split_norm))(x), jax.grad(loss(definition))(x), atol=2e-5)


def test_split_norm_through_the_interpreted_kernel(monkeypatch):
    x, *gradients = (
        jax.random.normal(key, (2, 8, 128), jnp.bfloat16) for key in jax.random.split(jax.random.key(1), 3)
    )

    def run(dtype):
        out, pull = jax.vjp(split_norm, x.astype(dtype))
        return [np.asarray(y, np.float32) for y in (*out, *pull(tuple(g.astype(dtype) for g in gradients)))]

    wanted = run(jnp.float32)
    monkeypatch.setattr(norm, "row_pass", functools.partial(row_kernel, interpret=interpreter.RACES))
    for name, a, b in zip(("x", "normed", "gradient"), run(jnp.bfloat16), wanted, strict=True):
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b), name


def test_norm_of_groups_through_the_interpreted_kernel(monkeypatch):
    x, d = (jax.random.normal(jax.random.key(seed), (4, 2, 3, 128), jnp.bfloat16) for seed in (1, 2))
    scale, bias = (jax.random.normal(jax.random.key(seed), (2, 128)) for seed in (3, 4))

    def run(dtype):
        out, pull = jax.vjp(norm_of_groups, x.astype(dtype), scale, bias)
        return [np.asarray(y, np.float32) for y in (out, *pull(d.astype(jnp.float32)))]

    wanted = run(jnp.float32)
    monkeypatch.setattr(norm, "row_pass", functools.partial(row_kernel, interpret=interpreter.RACES))
    for name, a, b in zip(("out", "x", "scale", "bias"), run(jnp.bfloat16), wanted, strict=True):
        assert np.linalg.norm(a - b) <= 4e-3 * np.linalg.norm(b), name


def test_narrow_rows_give_narrow_results_and_float32_gradients_of_the_parameters():
    norm = layer_norm(8, dtype="bfloat16", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 8), jnp.bfloat16)
    out, pull = jax.vjp(lambda x, scale: nnx.merge(*nnx.split(norm))(x) * scale, x, jnp.ones((8,), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert pull(out)[0].dtype == jnp.bfloat16
    assert norm.scale[...].dtype == jnp.float32


def test_parts_of_a_layer_are_its_result_cut_with_its_gradients():
    layer = linear(6, 12, bias=False, dtype="float32", rngs=nnx.Rngs(0))
    x, weights = (jax.random.normal(jax.random.key(seed), (3, 5, n)) for seed, n in ((2, 6), (3, 12)))
    graph, params = nnx.split(layer)

    def cut(params, x):
        return jnp.concatenate(in_parts(nnx.merge(graph, params), x, 3), axis=-1)

    def whole(params, x):
        return nnx.merge(graph, params)(x)

    def gradients(function):
        return jax.grad(lambda *operands: jnp.sum(weights * function(*operands)), argnums=(0, 1))(params, x)

    np.testing.assert_allclose(cut(params, x), whole(params, x), atol=1e-6)
    chex.assert_trees_all_close(gradients(cut), gradients(whole), atol=1e-5)


def test_an_operand_beside_its_parts_is_itself_and_gets_the_gradients_of_all_readers():
    layer = linear(6, 12, bias=False, dtype="bfloat16", rngs=nnx.Rngs(0))
    x, *weights = (jax.random.normal(jax.random.key(seed), (5, n)) for seed, n in ((2, 6), (3, 6), (4, 12)))
    same, parts = beside_parts(layer, x, 3)
    assert same.dtype == jnp.float32
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    np.testing.assert_array_equal(same, x)

    def loss(split):
        return lambda x: sum(jnp.sum(w * y) for w, y in zip(weights, split(x), strict=True))

    def beside(x):
        same, parts = beside_parts(layer, x, 3)
        return same, jnp.concatenate(parts, axis=-1).astype(jnp.float32)

    def definition(x):
        return x, x @ layer.kernel[...]

    np.testing.assert_allclose(jax.grad(loss(beside))(x), jax.grad(loss(definition))(x), atol=0.05)


def test_tokens_are_mixed_sample_by_sample_for_any_leading_axes():
    keys = jax.random.split(jax.random.key(3), 2)
    weights, x = jax.random.normal(keys[0], (2, 4, 3)), jax.random.normal(keys[1], (5, 2, 3, 6))
    np.testing.assert_allclose(mix_tokens(weights, x), jnp.einsum("mon,bmnd->bmod", weights, x), atol=1e-5)
    own = mix_tokens(weights[0], x[:, 0])
    np.testing.assert_allclose(own, jnp.einsum("on,bnd->bod", weights[0], x[:, 0]), atol=1e-5)
