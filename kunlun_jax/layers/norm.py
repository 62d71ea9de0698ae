"""Normalisation over the feature axis, in float32 whatever the compute type."""

import jax.numpy as jnp
from flax import nnx


def layer_norm(width: int, *, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with scale and bias, eps 1e-5, statistics and parameters in float32, output in `dtype`."""
    return nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.dtype(dtype), param_dtype=jnp.float32, rngs=rngs)
