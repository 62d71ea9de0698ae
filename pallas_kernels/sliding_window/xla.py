"""Sliding-window attention in plain XLA: a loop over blocks of consecutive tokens, whatever samples they belong to.

Tokens are cut into tiles of `rows` consecutive rows; a tile's queries see the tiles that its window touches, and a mask
keeps each query in its own window and sample. The loop stops after the last live token, so the unused end of the
capacity costs nothing. Scores exist for one block at a time, forward and backward: memory is that of the operands.

Blocks mix samples, and 0 · NaN is NaN, so a mask on the scores alone would let a NaN in one sample reach the next one.
Rows with a non-finite value therefore enter every product as zeros, and a NaN is added to the scores of the pairs that
they take part in: it reaches those results, and nothing else.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.jagged import segments, vary_together, zeros


@dataclass(frozen=True)
class Blocking:
    """`rows` query rows share one set of keys; `tiles` of them are computed at a time."""

    rows: int
    tiles: int

    def __post_init__(self):
        if self.rows < 1 or self.tiles < 1:
            raise ValueError(f"rows and tiles must be positive, got {self.rows} and {self.tiles}")


def default_blocking(left: int, right: int, heads: int) -> Blocking:
    """Tiles of about half the window, and as many at a time as keep the scores of one block small."""
    rows = min(max(8, max(left, right) // 2, min(left, right)), 64)
    keys = (-(-left // rows) + 1 + -(-right // rows)) * rows
    score_bytes = 2**20 if jax.default_backend() == "cpu" else 2**28
    return Blocking(rows, max(1, score_bytes // (4 * rows * keys * heads)))


def sliding_window_attention(
    q: Float[Array, "N H D"],
    k: Float[Array, "N Hkv D"],
    v: Float[Array, "N Hkv D"],
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    angles: Float[Array, "N half_D"] | None,
    *,
    max_length: int,
    left: int,
    right: int,
    scale: float,
    blocking: Blocking | None = None,
) -> Float[Array, "N H D"]:
    """Rounding points: rotated q and k, unnormalised probabilities and, backward, score gradients to the operands'
    dtype; everything else in float32 (float64 for float64)."""
    if q.shape[0] == 0:
        return q
    if angles is not None:
        q, k = rotated(starts, lengths, angles, q, k)
    blocking = blocking or default_blocking(left, right, q.shape[1])
    return _attention(*vary_together(q, k, v, starts, lengths), left, right, scale, blocking)


def rotated(starts, lengths, angles, *arrays):
    """Arrays [N, ..., D] rotated, in a pass of its own; angles of rows outside the samples may be anything."""
    used = segments(starts, lengths, angles.shape[0]) < starts.shape[0]
    angles = jnp.where(used[:, None], lax.stop_gradient(angles), 0)
    return [_rotate(x, angles) for x in arrays]


def _rotate(x, angles):
    """Rotate the pairs (i, i + D/2)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.cos(angles.astype(wide))[:, None], jnp.sin(angles.astype(wide))[:, None]
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class _Layout:
    """Where the tiles of `blocking` lie: rows padded by the reach of the window at both ends and to whole blocks."""

    def __init__(self, q, k, starts, lengths, left, right, blocking):
        self.rows, self.tiles = c, g = blocking.rows, min(blocking.tiles, -(-q.shape[0] // blocking.rows))
        self.tokens, self.block, self.heads, self.kv_heads = q.shape[0], c * g, q.shape[1], k.shape[1]
        before, after = -(-left // c), -(-right // c)
        self.before, self.near = before * c, before + 1 + after
        self.blocks = -(-self.tokens // self.block)
        self.pads = before * c, after * c + self.blocks * self.block - self.tokens
        self.samples = starts.shape[0]
        self.segment = segments(starts, lengths, self.tokens)
        self.live = -(-jnp.max(jnp.where(lengths > 0, starts + lengths, 0)) // self.block)
        ahead = jnp.arange(self.near * c) - before * c - jnp.arange(c)[:, None]
        self.band = (ahead >= -left) & (ahead <= right)
        self.padded_segment = self.pad(self.segment[:, None], self.samples)

    def pad(self, x, fill=0):
        """Rows padded, heads first: [N, H, ...] -> [H, rows, ...]."""
        return jnp.pad(jnp.moveaxis(x, 0, 1), ((0, 0), self.pads, *[(0, 0)] * (x.ndim - 2)), constant_values=fill)

    def pad_grouped(self, x):
        """[N, H, ...] -> [Hkv, rows, H / Hkv, ...]: the query heads of a key head become rows of its products."""
        return self.pad(x.reshape(x.shape[0], self.kv_heads, self.heads // self.kv_heads, *x.shape[2:]))

    def clean(self, x):
        """`x` with 0 for rows outside samples and for (row, head)s with a non-finite value; and NaN for the latter."""
        used = (self.segment < self.samples)[:, None]
        finite = jnp.isfinite(x).all(-1)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.where((used & finite)[..., None], x, 0), jnp.where(used & ~finite, jnp.nan, 0).astype(wide)

    def own(self, x, i):
        """Rows of block i of a padded array, [heads, tiles, rows, ...]."""
        x = lax.dynamic_slice_in_dim(x, i * self.block + self.before, self.block, axis=1)
        return x.reshape(-1, self.tiles, self.rows, *x.shape[2:])

    def _around(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.block, (self.tiles + self.near - 1) * self.rows, axis=1)

    def around(self, x, i):
        """For each tile of block i the rows its window touches, [heads, tiles, near · rows, ...]; static slices."""
        x = self._around(x, i)
        x = x.reshape(x.shape[0], -1, self.rows, *x.shape[2:])
        return jnp.concatenate([x[:, n : n + self.tiles] for n in range(self.near)], axis=2)

    def put(self, x, y, i):
        y = y.reshape(x.shape[0], self.block, *x.shape[2:])
        return lax.dynamic_update_slice_in_dim(x, y, i * self.block, axis=1)

    def add_around(self, x, y, i):
        """Transpose of `around`: shifted adds, always in the same order."""
        y = y.reshape(x.shape[0], self.tiles, self.near, self.rows, *x.shape[2:])
        total = jnp.zeros((x.shape[0], self.tiles + self.near - 1, self.rows, *x.shape[2:]), y.dtype)
        for n in range(self.near):
            total = total.at[:, n : n + self.tiles].add(y[:, :, n])
        total = total.reshape(x.shape[0], -1, *x.shape[2:])
        return lax.dynamic_update_slice_in_dim(x, self._around(x, i) + total, i * self.block, axis=1)

    def mask(self, i):
        """Which pairs of a block attend, [tiles, rows, 1, near · rows]."""
        own, around = self.own(self.padded_segment, i)[0], self.around(self.padded_segment, i)[0]
        same = (own[:, :, None] == around[:, None]) & (own[:, :, None] < self.samples)
        return (self.band & same)[:, :, None]

    def crop(self, x, first):
        """Padded rows, heads first -> [N, H, D]."""
        return jnp.moveaxis(x[:, first : first + self.tokens], 0, 1).reshape(self.tokens, -1, x.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attention(q, k, v, starts, lengths, left, right, scale, blocking):
    return _forward(q, k, v, starts, lengths, left, right, scale, blocking)[0]


def _forward(q, k, v, starts, lengths, left, right, scale, blocking):
    layout = _Layout(q, k, starts, lengths, left, right, blocking)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    (Q, q_nan), (K, k_nan), (V, v_nan) = map(layout.clean, (q, k, v))
    Q, K, V, kv_nan = layout.pad_grouped(Q), layout.pad(K), layout.pad(V), layout.pad(k_nan + v_nan)
    shape = layout.kv_heads, layout.blocks * layout.block, layout.heads // layout.kv_heads

    def body(i, carry):
        out, lse = carry
        s = jnp.einsum("hmcrd,hmsd->hmcrs", layout.own(Q, i), layout.around(K, i), preferred_element_type=wide)
        s = s * scale + layout.around(kv_nan, i)[:, :, None, None]
        s = jnp.where(layout.mask(i), s, -jnp.inf)
        highest = jnp.maximum(s.max(-1), jnp.finfo(wide).min)
        p = jnp.exp(s - highest[..., None])
        total = p.sum(-1)
        total = jnp.where(total == 0, 1, total)
        y = jnp.einsum("hmcrs,hmsd->hmcrd", p.astype(v.dtype), layout.around(V, i), preferred_element_type=wide)
        out = layout.put(out, (y / total[..., None]).astype(out.dtype), i)
        return out, layout.put(lse, highest + jnp.log(total), i)

    start = zeros((*shape, q.shape[2]), q.dtype, q), zeros(shape, wide, q)
    out, lse = lax.fori_loop(0, layout.live, body, start)
    out = layout.crop(out, 0) + q_nan.astype(q.dtype)[..., None]
    lse = layout.crop(lse[..., None], 0)[..., 0] + q_nan
    return out, (q, k, v, starts, lengths, out, lse)


def _backward(left, right, scale, blocking, residuals, dout):
    q, k, v, starts, lengths, out, lse = residuals
    layout = _Layout(q, k, starts, lengths, left, right, blocking)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    (Q, _), (K, _), (V, _), (out, _), (dO, do_nan) = map(layout.clean, (q, k, v, out, dout))
    delta = jnp.sum(out.astype(wide) * dO.astype(wide), axis=-1)
    # Rows that saw a NaN have it in lse, and so in every probability that is recomputed from it.
    Q, dO, lse, delta = map(layout.pad_grouped, (Q, dO, lse + do_nan, delta))
    K, V = layout.pad(K), layout.pad(V)

    def body(i, carry):
        dq, dk, dv = carry
        own_q, own_do, near_k, near_v = layout.own(Q, i), layout.own(dO, i), layout.around(K, i), layout.around(V, i)
        mask = layout.mask(i)
        s = jnp.einsum("hmcrd,hmsd->hmcrs", own_q, near_k, preferred_element_type=wide)
        p = jnp.where(mask, jnp.exp(s * scale - layout.own(lse, i)[..., None]), 0)
        dp = jnp.einsum("hmcrd,hmsd->hmcrs", own_do, near_v, preferred_element_type=wide)
        ds = jnp.where(mask, p * (dp - layout.own(delta, i)[..., None]) * scale, 0).astype(q.dtype)
        p = p.astype(q.dtype)
        dq = layout.put(dq, jnp.einsum("hmcrs,hmsd->hmcrd", ds, near_k, preferred_element_type=wide), i)
        dk = layout.add_around(dk, jnp.einsum("hmcrs,hmcrd->hmsd", ds, own_q, preferred_element_type=wide), i)
        dv = layout.add_around(dv, jnp.einsum("hmcrs,hmcrd->hmsd", p, own_do, preferred_element_type=wide), i)
        return dq, dk, dv

    dq = zeros((layout.kv_heads, layout.blocks * layout.block, *Q.shape[2:]), wide, q)
    dq, dk, dv = lax.fori_loop(0, layout.live, body, (dq, zeros(K.shape, wide, q), zeros(V.shape, wide, q)))
    before = layout.before
    dq, dk, dv = layout.crop(dq, 0), layout.crop(dk, before), layout.crop(dv, before)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)
