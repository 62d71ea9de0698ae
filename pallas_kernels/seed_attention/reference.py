"""Seed attention as plain einsums over padded samples: what the other implementations are tested against."""

import jax.numpy as jnp
from jax import lax


def seed_attention(seeds, k, v, starts, lengths, *, max_length, scale):
    """Gathers samples to [B, max_length, H, D]; memory B · H · S · max_length.

    Rounding points: scores, softmax and both sums in float32 (float64 for float64); the normalised probabilities and
    the result to v's dtype.
    """
    wide = jnp.promote_types(v.dtype, jnp.float32)
    t = jnp.arange(max_length)
    inside = t < lengths[:, None]
    rows = jnp.where(inside, starts[:, None] + t, k.shape[0])  # N: beyond the end, reads 0

    def gather(x):
        return jnp.repeat(x.at[rows].get(mode="fill", fill_value=0), seeds.shape[1] // x.shape[1], axis=2)

    scores = jnp.einsum("shd,bjhd->bhsj", seeds, gather(k), preferred_element_type=wide) * scale
    mask = inside[:, None, None]
    highest = lax.stop_gradient(jnp.max(scores, -1, keepdims=True, where=mask, initial=jnp.finfo(wide).min))
    p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0)), 0)
    p = p / jnp.where((lengths > 0)[:, None, None, None], p.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bhsj,bjhd->bshd", p.astype(v.dtype), gather(v), preferred_element_type=wide)
    return out.astype(v.dtype)
