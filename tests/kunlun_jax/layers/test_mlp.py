"""MLP and MaskNet equal their formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import plain
from flax import nnx

from kunlun_jax.layers.mlp import MLP, MaskNet


def test_mlp_is_linear_maps_with_silu_between():
    rng = np.random.default_rng(0)
    for hidden in ((), (5,), (5, 3)):
        module = plain.build(lambda h=hidden: MLP(4, h, 2, dtype="float32", rngs=nnx.Rngs(0)), rng)
        x = rng.normal(size=(6, 4))
        np.testing.assert_allclose(plain.run(module, x), plain.mlp(module, x), rtol=1e-5, atol=1e-5)


def test_masknet_compresses_what_its_own_mask_scales():
    rng = np.random.default_rng(1)
    module = plain.build(lambda: MaskNet(5, 3, dtype="float32", rngs=nnx.Rngs(0)), rng)
    x = rng.normal(size=(2, 7, 5))
    expected = plain.mlp(module.compress, x * plain.mlp(module.mask, x))
    np.testing.assert_allclose(plain.run(module, x), expected, rtol=1e-5, atol=1e-5)


def test_masknet_gradients_equal_automatic_ones():
    rng = np.random.default_rng(2)
    module = plain.build(lambda: MaskNet(24, 8, dtype="float32", rngs=nnx.Rngs(0)), rng)
    x = jnp.asarray(rng.normal(size=(2, 7, 24)), jnp.float32)
    graph, params = nnx.split(module)

    def automatic(params, x):
        module = nnx.merge(graph, params)
        return module.compress(x * module.mask(x))

    found, expected = (
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1))(params, x)
        for f in (lambda params, x: nnx.merge(graph, params)(x), automatic)
    )
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-5)


def test_masknet_starts_with_fields_that_pass():
    """A mask around 0 instead would start every field at a small random share of itself."""
    x = np.random.default_rng(1).normal(size=(64, 20)).astype(np.float32)
    mask = plain.run(MaskNet(20, 16, dtype="float32", rngs=nnx.Rngs(0)).mask, x)
    assert abs(mask.mean() - 1) < 0.2
