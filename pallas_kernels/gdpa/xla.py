"""GDPA in plain XLA: runs everywhere, for every dtype and width.

Samples are cut into chunks of query rows; a loop runs over blocks of the chunks that hold rows, so its time follows the
rows in use and not the capacity of the arrays, and no more than one block of scores is alive. The backward is the same
loop with the scores computed again. On a CPU that is 3–7 times faster than padded einsums.

Numerics: scores, weights and accumulation in float32 (float64 for float64); weights and score gradients are rounded to
the inputs' dtype before the second products; dk and dv are summed in float32 over a sample.

Deterministic on a GPU too: there a chunk holds a whole sample, and samples that share keys are added one after another,
so that no two additions of a scatter meet. (Spans of keys that overlap without being the same are right, but there the
order of additions on a GPU is open.)
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gdpa.activations import ACTIVATIONS
from pallas_kernels.jagged import chunks, span_rows, vary_together, zeros

CPU_CHUNK = 32  # query rows per chunk; a short sample wastes at most 31
CPU_SCORES = 1 << 19  # scores alive at once: 2 MB of float32 stays in a core's cache
GPU_SCORES = 1 << 26


class Static(NamedTuple):
    """What is fixed while tracing."""

    max_q_length: int
    max_kv_length: int
    activation: tuple[str, ...]
    scale: float
    post_scale: float


def unsupported(*args, **kwargs) -> str | None:
    """None: the XLA path runs every call that the operator accepts."""
    return None


def xla(
    q,
    k,
    v,
    q_starts,
    q_lengths,
    kv_starts,
    kv_lengths,
    *,
    max_q_length,
    max_kv_length,
    activation,
    scale,
    post_scale,
    shared_keys=False,
):
    """See `gdpa`. Gradients of shared keys add up anyway."""
    static = Static(max_q_length, max_kv_length, activation, scale, post_scale)
    return _gdpa(static, *vary_together(q, k, v, q_starts, q_lengths, kv_starts, kv_lengths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gdpa(static: Static, q, k, v, q_starts, q_lengths, kv_starts, kv_lengths):
    return forward(static, q, k, v, q_starts, q_lengths, kv_starts, kv_lengths)


def _gdpa_fwd(static, *operands):
    return forward(static, *operands), operands


def _gdpa_bwd(static, operands, do):
    q, k, v, *spans = operands
    return *backward(static, q, k, v, do, *spans), None, None, None, None


_gdpa.defvjp(_gdpa_fwd, _gdpa_bwd)


class _Blocks(NamedTuple):
    """Chunks in blocks: sample [blocks, M], query rows [blocks, M, C]; blocks in use."""

    sample: jax.Array
    rows: jax.Array
    live: jax.Array


def _blocks(static: Static, q, q_starts, q_lengths) -> _Blocks:
    n, heads, _ = q.shape
    on_cpu = jax.default_backend() == "cpu"
    chunk = min(CPU_CHUNK, static.max_q_length) if on_cpu else static.max_q_length
    size = max(1, (CPU_SCORES if on_cpu else GPU_SCORES) // (heads * chunk * static.max_kv_length))
    sample, first, count, live = chunks(q_starts, q_lengths, n, chunk)
    size = min(size, sample.shape[0])

    def block(x):
        return jnp.pad(x, (0, -x.shape[0] % size)).reshape(-1, size)

    first, count = block(first), block(count)
    offset = jnp.arange(chunk, dtype=jnp.int32)
    rows = jnp.where(offset < count[..., None], first[..., None] + offset, n)
    return _Blocks(block(sample), rows, -(-live // size))


def _gather(x, rows):
    return x.at[rows].get(mode="fill", fill_value=0)


def _by_head(functions, x):
    """Apply one function per head to x [M, K, G, ...], heads (k, g) in row-major order."""
    if len(set(functions)) == 1:
        return functions[0](x)
    flat = x.reshape(x.shape[0], -1, *x.shape[3:])
    runs, at = [], 0
    for function, run in itertools.groupby(functions):
        size = len(list(run))
        runs.append(function(flat[:, at : at + size]))
        at += size
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1).reshape(x.shape), *runs)


def _weights(static: Static, scores, *, slopes: bool):
    """act(scale·s)·post_scale of raw scores [M, K, G, C, F], and its derivative with respect to s."""
    pairs = _by_head([ACTIVATIONS[name] for name in static.activation], scores * static.scale)
    weights = pairs[0] * static.post_scale
    return (weights, pairs[1] * (static.scale * static.post_scale)) if slopes else weights


def _scores(a, b):
    """Products of rows: a [M, C, K, G, D], b [M, F, K, D] -> [M, K, G, C, F], accumulated wide."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum("mckgd,mfkd->mkgcf", a, b, preferred_element_type=wide)


def _mix(weights, b):
    """weights [M, K, G, C, F], b [M, F, K, D] -> [M, C, K, G, D], accumulated wide."""
    wide = jnp.promote_types(b.dtype, jnp.float32)
    return jnp.einsum("mkgcf,mfkd->mckgd", weights.astype(b.dtype), b, preferred_element_type=wide)


def _sum_rows(weights, a):
    """weights [M, K, G, C, F], a [M, C, K, G, D] -> [M, F, K, D]: the transpose of `_mix`, summed over the group."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum("mkgcf,mckgd->mfkd", weights.astype(a.dtype), a, preferred_element_type=wide)


def _nothing_to_do(static: Static, q) -> bool:
    return 0 in (q.size, static.max_q_length, static.max_kv_length)


def forward(static: Static, q, k, v, q_starts, q_lengths, kv_starts, kv_lengths):
    """out [N, H, D]."""
    if _nothing_to_do(static, q):
        return zeros(q.shape, q.dtype, q)
    grouped = (k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    kv_rows = span_rows(kv_starts, kv_lengths, static.max_kv_length, k.shape[0])
    keys, values = _gather(k, kv_rows), _gather(v, kv_rows)
    blocks = _blocks(static, q, q_starts, q_lengths)

    def body(i, out):
        sample, rows = blocks.sample[i], blocks.rows[i]
        queries = _gather(q, rows).reshape(*rows.shape, *grouped)
        y = _mix(_weights(static, _scores(queries, keys[sample]), slopes=False), values[sample])
        return out.at[rows].set(y.reshape(*rows.shape, *q.shape[1:]).astype(q.dtype), mode="drop")

    return lax.fori_loop(0, blocks.live, body, zeros(q.shape, q.dtype, q))


def backward(static: Static, q, k, v, do, q_starts, q_lengths, kv_starts, kv_lengths):
    """dq, dk, dv in the operands' dtypes."""
    if _nothing_to_do(static, q):
        return tuple(zeros(x.shape, x.dtype, q) for x in (q, k, v))
    grouped = (k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    kv_rows = span_rows(kv_starts, kv_lengths, static.max_kv_length, k.shape[0])
    keys, values = _gather(k, kv_rows), _gather(v, kv_rows)
    blocks = _blocks(static, q, q_starts, q_lengths)

    def body(i, carry):
        dq, dk, dv = carry
        sample, rows = blocks.sample[i], blocks.rows[i]
        queries = _gather(q, rows).reshape(*rows.shape, *grouped)
        d_out = _gather(do, rows).reshape(*rows.shape, *grouped)
        weights, slopes = _weights(static, _scores(queries, keys[sample]), slopes=True)
        d_scores = _scores(d_out, values[sample]) * slopes
        d_queries = _mix(d_scores, keys[sample]).reshape(*rows.shape, *q.shape[1:])
        return (
            dq.at[rows].set(d_queries.astype(q.dtype), mode="drop"),
            dk.at[sample].add(_sum_rows(d_scores, queries)),
            dv.at[sample].add(_sum_rows(weights, d_out)),
        )

    init = (
        zeros(q.shape, q.dtype, q),
        zeros(keys.shape, wide, q),
        zeros(values.shape, wide, q),
    )
    dq, dk, dv = lax.fori_loop(0, blocks.live, body, init)
    return dq, *(
        add_samples(d, kv_rows, kv_starts, kv_lengths, x.shape[0]).astype(x.dtype) for d, x in ((dk, k), (dv, v))
    )


def add_samples(per_sample, kv_rows, kv_starts, kv_lengths, rows: int):
    """Sum [B, F, ...] into [rows, ...]. Samples may have the same span: one sample of each span is added at a time."""
    b = jnp.arange(kv_starts.shape[0])
    same = (kv_starts[:, None] == kv_starts) & (kv_lengths[:, None] > 0) & (kv_lengths > 0)
    earlier = jnp.sum(same & (b < b[:, None]), axis=1)

    def one_round(r, total):
        chosen = jnp.where((earlier == r)[:, None], kv_rows, rows)
        return total.at[chosen].add(per_sample, mode="drop")

    total = zeros((rows, *per_sample.shape[2:]), per_sample.dtype, per_sample)
    return lax.fori_loop(0, jnp.max(earlier) + 1, one_round, total)
