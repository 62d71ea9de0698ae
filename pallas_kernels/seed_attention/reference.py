"""Seed attention as plain einsums over padded samples: what the other implementations are tested against."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def seed_attention(seeds: Float[Array, "S H D"], k: Float[Array, "N Hkv D"], v: Float[Array, "N Hkv D"],
                   starts: Int32[Array, "B"], lengths: Int32[Array, "B"], *,
                   max_length: int, scale: float) -> Float[Array, "B S H D"]:
    """Gathers samples to [B, max_length, ...]; memory B · H · S · max_length.

    Rounding points: scores, softmax and both sums in float32 (float64 for float64); the normalised probabilities to
    v's dtype; the result to v's dtype.
    """
    H = seeds.shape[1]
    wide = jnp.promote_types(v.dtype, jnp.float32)
    t = jnp.arange(max_length)
    inside = t < lengths[:, None]
    rows = jnp.where(inside, starts[:, None] + t, k.shape[0])  # N: beyond the end, reads 0

    def gather(x):
        return jnp.repeat(x.at[rows].get(mode="fill", fill_value=0), H // x.shape[1], axis=2)

    scores = jnp.einsum("shd,bjhd->bhsj", seeds, gather(k), preferred_element_type=wide) * scale
    mask = inside[:, None, None]
    highest = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=jnp.finfo(wide).min)
    p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - lax.stop_gradient(highest), 0)), 0)
    p = p / jnp.where(lengths > 0, jnp.moveaxis(p.sum(-1), 0, -1), 1).transpose(2, 0, 1)[..., None]
    out = jnp.einsum("bhsj,bjhd->bshd", p.astype(v.dtype), gather(v), preferred_element_type=wide)
    return out.astype(v.dtype)
