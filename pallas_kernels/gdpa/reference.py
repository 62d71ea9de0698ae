"""GDPA as its formula reads, over samples padded to the static maxima: for tests and for counting FLOPs, not for use.

At full lengths the matrix products of the padded form are exactly those of the operator, so XLA's cost analysis of this
function is the operator's FLOP count.
"""

import jax.numpy as jnp

from pallas_kernels.gdpa.activations import ACTIVATIONS
from pallas_kernels.jagged import span_rows


def reference(
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
    """See `gdpa`. Rounding points: scores and weights in float32 (float64 for float64), the weights are rounded to v's
    dtype, the second product accumulates in float32 and is rounded to q's dtype."""
    (n, heads, _), groups = q.shape, q.shape[1] // k.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q_rows = span_rows(q_starts, q_lengths, max_q_length, n)
    kv_rows = span_rows(kv_starts, kv_lengths, max_kv_length, k.shape[0])
    qs = q.at[q_rows].get(mode="fill", fill_value=0)
    ks, vs = (jnp.repeat(x.at[kv_rows].get(mode="fill", fill_value=0), groups, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("bthd,bfhd->bhtf", qs, ks, preferred_element_type=wide)
    weights = jnp.stack([ACTIVATIONS[activation[h]](scores[:, h])[0] for h in range(heads)], axis=1) * post_scale
    out = jnp.einsum("bhtf,bfhd->bthd", weights.astype(v.dtype), vs, preferred_element_type=wide)
    return jnp.zeros(q.shape, q.dtype).at[q_rows].set(out.astype(q.dtype), mode="drop")


def unsupported(*args, **kwargs) -> str | None:
    return None
