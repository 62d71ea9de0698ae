"""The MLP of two layers, and what it masks, in XLA."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mlp_in_xla(x, w1, b1, w2, b2) -> Float[Array, "*rest G"]:
    """`silu_mlp` anywhere."""
    return jax.nn.silu(x @ w1 + b1) @ w2 + b2


def masked_in_xla(x, w1, b1, w2, b2) -> Float[Array, "*rest F"]:
    """`masked_by_mlp` anywhere."""
    return _masked(x, jax.nn.silu(x @ w1 + b1) @ w2, b2)


@jax.custom_vjp
def _masked(x, mask, bias):
    """x ⊙ (mask + bias) for rows [*rest, inputs]. The gradients of all three are one pass over the rows."""
    return x * (mask + bias)


def _masked_forward(x, mask, bias):
    return _masked(x, mask, bias), (x, mask, bias)


def _masked_backward(saved, d):
    x, mask, bias = saved
    # XLA adds up columns a multiple of 64 at a time at the speed of memory, 200 of them at 40 % of it.
    inputs = x.shape[-1]
    together = math.lcm(inputs, 64) // inputs
    together = together if math.prod(x.shape[:-1]) % together == 0 else 1
    wide, mask, d = (y.reshape(-1, together * inputs) for y in (x, mask, d))
    d_mask = d * wide
    d_bias = jnp.sum(d_mask.astype(jnp.float32), axis=0).reshape(together, inputs).sum(axis=0)
    d_x = d * (mask + jnp.tile(bias, together))
    return d_x.reshape(x.shape).astype(x.dtype), d_mask.reshape(x.shape).astype(mask.dtype), d_bias.astype(bias.dtype)


_masked.defvjp(_masked_forward, _masked_backward)
