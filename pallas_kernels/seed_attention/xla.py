"""Seed attention in plain XLA: a loop over groups of samples of similar length, inside it one over chunks of tokens.

Samples are taken longest first, `samples` at a time, so that a group's loop over chunks ends where its longest sample
ends, and little of the work is padding. Softmax statistics are updated from chunk to chunk; scores exist for one group
and chunk only, forward and backward. No two groups write the same row, so results are deterministic.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.jagged import vary_together, zeros


@dataclass(frozen=True)
class Blocking:
    """`samples` samples are computed at a time, `rows` of their tokens in one step."""

    samples: int
    rows: int

    def __post_init__(self):
        if self.samples < 1 or self.rows < 1:
            raise ValueError(f"samples and rows must be positive, got {self.samples} and {self.rows}")


def default_blocking(samples: int, max_length: int, scores_per_row: int) -> Blocking:
    """Short chunks that stay in a CPU's cache (measured), long ones elsewhere; samples as `score_bytes` allows."""
    rows, score_bytes = (32, 2**18) if jax.default_backend() == "cpu" else (128, 2**28)
    rows = min(rows, max(8, max_length))
    return Blocking(min(samples, max(1, score_bytes // (4 * rows * scores_per_row))), rows)


def seed_attention(
    seeds: Float[Array, "S H D"],
    k: Float[Array, "N Hkv D"],
    v: Float[Array, "N Hkv D"],
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    *,
    max_length: int,
    scale: float,
    blocking: Blocking | None = None,
) -> Float[Array, "B S H D"]:
    """Rounding points: unnormalised probabilities and, backward, score gradients to the operands' dtype; everything
    else in float32 (float64 for float64)."""
    S, H, D = seeds.shape
    if k.shape[0] == 0:
        return jnp.zeros((starts.shape[0], S, H, D), v.dtype)
    blocking = blocking or default_blocking(starts.shape[0], max_length, S * H)
    return _attention(*vary_together(seeds, k, v, starts, lengths), scale, blocking)


class _Groups:
    """Groups of samples, longest first, and the rows of one chunk of a group."""

    def __init__(self, starts, lengths, tokens, blocking):
        self.size, self.rows, self.tokens, self.samples = blocking.samples, blocking.rows, tokens, starts.shape[0]
        order = jnp.argsort(-lengths)
        fill = (0, -self.samples % self.size)
        # The last group is filled up with sample B: reads give 0, writes are dropped.
        self.order = jnp.pad(order.astype(jnp.int32), fill, constant_values=self.samples)
        self.starts, self.lengths = jnp.pad(starts[order], fill), jnp.pad(lengths[order], fill)
        self.live = -(-jnp.sum(lengths > 0) // self.size)

    def group(self, i):
        """Samples of group i, and its number of chunks."""
        return self._of(self.order, i), -(-self._of(self.lengths, i)[0] // self.rows)

    def _of(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.size, self.size)

    def chunk(self, i, j):
        """Rows of chunk j of the samples of group i, [size, rows]; N where the sample has ended."""
        t = j * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
        return jnp.where(t < self._of(self.lengths, i)[:, None], self._of(self.starts, i)[:, None] + t, self.tokens)


def _take(x, rows):
    return x.at[rows].get(mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(seeds, k, v, starts, lengths, scale, blocking):
    return _forward(seeds, k, v, starts, lengths, scale, blocking)[0]


def _grouped(x, heads):
    """Split the query heads of axis -2 into [Hkv, H / Hkv]."""
    return x.reshape(*x.shape[:-2], heads, x.shape[-2] // heads, x.shape[-1])


def _scores(seeds, keys, rows, tokens, scale):
    wide = jnp.promote_types(keys.dtype, jnp.float32)
    s = jnp.einsum("skrd,gckd->gkrsc", seeds, keys, preferred_element_type=wide) * scale
    return s, (rows < tokens)[:, None, None, None]


def _forward(seeds, k, v, starts, lengths, scale, blocking):
    groups = _Groups(starts, lengths, k.shape[0], blocking)
    wide, lowest = jnp.promote_types(k.dtype, jnp.float32), jnp.finfo(jnp.promote_types(k.dtype, jnp.float32)).min
    S, H, D = seeds.shape
    Hkv = k.shape[1]
    statistics = groups.size, Hkv, H // Hkv, S
    Q = _grouped(seeds, Hkv)

    def one_group(i, carry):
        out, lse = carry
        samples, chunks = groups.group(i)

        def one_chunk(j, carry):
            highest, total, y = carry
            rows = groups.chunk(i, j)
            s, mask = _scores(Q, _take(k, rows), rows, k.shape[0], scale)
            s = jnp.where(mask, s, -jnp.inf)
            new = jnp.maximum(highest, s.max(-1))
            p, shrink = jnp.exp(s - new[..., None]), jnp.exp(highest - new)
            py = jnp.einsum("gkrsc,gckd->gkrsd", p.astype(v.dtype), _take(v, rows), preferred_element_type=wide)
            return new, total * shrink + p.sum(-1), y * shrink[..., None] + py

        start = zeros(statistics, wide, k) + lowest, zeros(statistics, wide, k), zeros((*statistics, D), wide, k)
        highest, total, y = lax.fori_loop(0, chunks, one_chunk, start)
        total = jnp.where(total == 0, 1, total)
        y = jnp.moveaxis((y / total[..., None]).astype(out.dtype), 3, 1)
        return (
            out.at[samples].set(y.reshape(-1, S, H, D), mode="drop"),
            lse.at[samples].set(highest + jnp.log(total), mode="drop"),
        )

    B = starts.shape[0]
    start = zeros((B, S, H, D), v.dtype, k), zeros((B, *statistics[1:]), wide, k)
    out, lse = lax.fori_loop(0, groups.live, one_group, start)
    return out, (seeds, k, v, starts, lengths, out, lse)


def _backward(scale, blocking, residuals, dout):
    seeds, k, v, starts, lengths, out, lse = residuals
    groups = _Groups(starts, lengths, k.shape[0], blocking)
    wide = jnp.promote_types(k.dtype, jnp.float32)
    Hkv = k.shape[1]
    Q = _grouped(seeds, Hkv)
    out, dO = (jnp.moveaxis(_grouped(x, Hkv), 1, 3) for x in (out, dout))  # [B, Hkv, H / Hkv, S, D]
    delta = jnp.sum(out.astype(wide) * dO.astype(wide), axis=-1)

    def one_group(i, carry):
        samples, chunks = groups.group(i)
        own_do, own_delta, own_lse = (_take(x, samples) for x in (dO, delta, lse))

        def one_chunk(j, carry):
            dseeds, dk, dv = carry
            rows = groups.chunk(i, j)
            keys, values = _take(k, rows), _take(v, rows)
            s, mask = _scores(Q, keys, rows, k.shape[0], scale)
            p = jnp.where(mask, jnp.exp(s - own_lse[..., None]), 0)
            dp = jnp.einsum("gkrsd,gckd->gkrsc", own_do, values, preferred_element_type=wide)
            ds = jnp.where(mask, p * (dp - own_delta[..., None]) * scale, 0).astype(k.dtype)
            dseeds += jnp.einsum("gkrsc,gckd->skrd", ds, keys, preferred_element_type=wide)
            new_k = jnp.einsum("gkrsc,skrd->gckd", ds, Q, preferred_element_type=wide)
            new_v = jnp.einsum("gkrsc,gkrsd->gckd", p.astype(v.dtype), own_do, preferred_element_type=wide)
            return (
                dseeds,
                dk.at[rows].set(new_k.astype(k.dtype), mode="drop"),
                dv.at[rows].set(new_v.astype(v.dtype), mode="drop"),
            )

        return lax.fori_loop(0, chunks, one_chunk, carry)

    start = zeros(Q.shape, wide, k), zeros(k.shape, k.dtype, k), zeros(v.shape, v.dtype, k)
    dseeds, dk, dv = lax.fori_loop(0, groups.live, one_group, start)
    return dseeds.reshape(seeds.shape).astype(seeds.dtype), dk, dv, None, None


_attention.defvjp(_forward, _backward)
