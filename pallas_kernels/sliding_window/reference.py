"""Sliding-window attention as plain einsums over padded samples: what the other implementations are tested against."""

import jax.numpy as jnp
from jax import lax


def sliding_window_attention(q, k, v, starts, lengths, angles, *, max_length, left, right, scale):
    """Gathers samples to [B, max_length, H, D]; memory B · H · max_length².

    Rounding points: rotated q and k to their dtype; scores, softmax and both sums in float32 (float64 for float64);
    the normalised probabilities to v's dtype; the result to q's.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    t = jnp.arange(max_length)
    inside = t < lengths[:, None]
    rows = jnp.where(inside, starts[:, None] + t, q.shape[0])  # N: beyond the end, reads 0 and is not written

    def gather(x, rotated=True):
        x = x.at[rows].get(mode="fill", fill_value=0)
        if rotated and angles is not None:
            angle = lax.stop_gradient(angles).at[rows].get(mode="fill", fill_value=0).astype(wide)[:, :, None]
            a, b = jnp.split(x.astype(wide), 2, axis=-1)
            turned = [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)]
            x = jnp.concatenate(turned, -1).astype(x.dtype)
        return jnp.repeat(x, q.shape[1] // x.shape[2], axis=2)

    scores = jnp.einsum("bihd,bjhd->bhij", gather(q), gather(k), preferred_element_type=wide) * scale
    ahead = t - t[:, None]
    mask = ((ahead >= -left) & (ahead <= right) & inside[:, None] & inside[:, :, None])[:, None]
    highest = lax.stop_gradient(jnp.max(scores, -1, keepdims=True, where=mask, initial=jnp.finfo(wide).min))
    p = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0)), 0)
    p = p / jnp.where(inside[:, None, :, None], p.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bhij,bjhd->bihd", p.astype(v.dtype), gather(v, rotated=False), preferred_element_type=wide)
    return jnp.zeros_like(q).at[rows].set(out.astype(q.dtype), mode="drop")
