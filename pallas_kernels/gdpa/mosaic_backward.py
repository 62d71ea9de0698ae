"""The GDPA backward for Hopper: which kernels a call gets, and their schedules.

XLA writes the scores, their weights and their gradients to device memory; here they live in registers.

fused: one kernel with five products, where all samples have at most 256 keys.
split: two kernels with seven products, for keys of any length.

behind a norm: split, where the dq kernel also finishes the gradient behind a LayerNorm whose result q is, which would
take another pass over five arrays of the queries' size.

All need spans of keys that don't overlap: samples that share keys would write the same rows.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper
from pallas_kernels.gdpa.mosaic_backward_common import COMPUTE, TILE
from pallas_kernels.gdpa.mosaic_backward_fused import KEYS, gdpa_fused_backward
from pallas_kernels.gdpa.mosaic_backward_kv import KV_BLOCK, gdpa_dkv
from pallas_kernels.gdpa.mosaic_backward_q import BehindNorm, gdpa_dq
from pallas_kernels.schedule import make_schedule, row_fills

ITEMS_PER_SM = 8  # below that, samples are cut for an even load
FUSED_KEYS = 2 * KEYS  # every further pass would round dq once more
FUSED_ITEMS_PER_SM = 4  # the fused kernel can't cut a sample's queries
CLUSTER = 8  # blocks that every Hopper GPU takes as a cluster: heads, behind a norm


def unsupported(q, k, v, *args, **kwargs) -> str | None:
    """Why the backward kernels can't run this call, or None. Overlapping keys can't be seen while tracing."""
    return hopper.unsupported_device() or hopper.unsupported_operands(q=q, k=k, v=v)


def gdpa_backward(
    q: Float[Array, "Nq H D"],
    k: Float[Array, "Nkv K D"],
    v: Float[Array, "Nkv K D"],
    do: Float[Array, "Nq H D"],
    q_starts: Int32[Array, " B"],
    q_lengths: Int32[Array, " B"],
    kv_starts: Int32[Array, " B"],
    kv_lengths: Int32[Array, " B"],
    *,
    activation: tuple[str, ...],
    scale: float,
    post_scale: float,
    max_q_length: int,
    max_kv_length: int,
    sms: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "Nq H D"], Float[Array, "Nkv K D"], Float[Array, "Nkv K D"]]:
    """(dq, dk, dv) of `gdpa` for the cotangent `do`; both sets of spans must be disjoint.

    activation: one name per query head. sms: blocks of the grid (default: the device's SMs).
    """
    sms = sms or hopper.sm_count()
    if 0 in (max_q_length, max_kv_length):
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
    fused = is_fused(samples=q_starts.shape[0], kv_heads=k.shape[1], max_kv_length=max_kv_length, sms=sms)
    return ROUTES[fused](
        q,
        k,
        v,
        do.astype(q.dtype),
        q_starts,
        q_lengths,
        kv_starts,
        kv_lengths,
        activation=activation,
        scale=scale,
        post_scale=post_scale,
        max_q_length=max_q_length,
        max_kv_length=max_kv_length,
        sms=sms,
        interpret=interpret,
    )


def _by_fused(
    q, k, v, do, q_starts, q_lengths, kv_starts, kv_lengths, *, max_q_length, max_kv_length, sms=None, **static
):
    by_key = make_schedule(kv_starts, kv_lengths, q_starts, q_lengths, rows=k.shape[0], max_q_length=max_kv_length)
    q_fills = row_fills(q_starts, jnp.where(kv_lengths > 0, q_lengths, 0), q.shape[0])
    return gdpa_fused_backward(q, k, v, do, by_key, q_fills, sms=sms or hopper.sm_count(), **static)


def _by_split(
    q, k, v, do, q_starts, q_lengths, kv_starts, kv_lengths, *, max_q_length, max_kv_length, sms=None, **static
):
    sms = sms or hopper.sm_count()
    queries, keys = (q_starts, q_lengths), (kv_starts, kv_lengths)
    by_query, by_key = _schedules(queries, keys, keys, q, k, max_q_length, max_kv_length, sms)
    dk, dv = gdpa_dkv(q, k, v, do, by_key, sms=sms, **static)
    return gdpa_dq(q, k, v, do, by_query, sms=sms, **static), dk, dv


def _schedules(queries, keys, keys_of_queries, q, k, max_q_length: int, max_kv_length: int, sms: int):
    """Of the dq kernel and of the dk, dv kernel."""
    chunk = _q_chunk(samples=queries[0].shape[0], heads=q.shape[1], max_q_length=max_q_length, sms=sms)
    by_query = make_schedule(*queries, *keys_of_queries, rows=q.shape[0], max_q_length=max_q_length, q_chunk=chunk)
    by_key = make_schedule(*keys, *queries, rows=k.shape[0], max_q_length=max_kv_length, q_chunk=KV_BLOCK)
    return by_query, by_key


ROUTES = {True: _by_fused, False: _by_split}


def gdpa_backward_behind_norm(
    q: Float[Array, "Nq H D"],
    k: Float[Array, "Nkv K D"],
    v: Float[Array, "Nkv K D"],
    do: Float[Array, "Nq H D"],
    q_starts: Int32[Array, " B"],
    q_lengths: Int32[Array, " B"],
    kv_starts: Int32[Array, " B"],
    kv_lengths: Int32[Array, " B"],
    behind_norm: BehindNorm,
    *,
    max_q_length: int,
    max_kv_length: int,
    sms: int,
    **static,
) -> tuple[Float[Array, "Nq H D"], Float[Array, "Nkv K D"], Float[Array, "Nkv K D"]]:
    """(dx, dk, dv), dx as in `BehindNorm`; see `gdpa_backward`. Needs `finishes_norm`."""
    # A sample without keys still has its dx: it gets a key from behind the array's end: zeros, from TMA.
    finished = jnp.where(kv_lengths > 0, kv_starts, k.shape[0]), jnp.maximum(kv_lengths, 1)
    spans = (q_starts, q_lengths), (kv_starts, kv_lengths)
    do = do.astype(q.dtype)
    by_query, by_key = _schedules(*spans, finished, q, k, max_q_length, max_kv_length, sms)
    dk, dv = gdpa_dkv(q, k, v, do, by_key, sms=sms, **static)
    return gdpa_dq(q, k, v, do, by_query, sms=sms, behind_norm=behind_norm, **static), dk, dv


def finishes_norm(*, heads: int, max_q_length: int, max_kv_length: int) -> bool:
    """Does `gdpa_backward_behind_norm` take the call?

    One rule for simplicity. It is faster than `gdpa_backward` and a pass over the rows, by up to 15 % of the block both
    ways, but 3 % slower with heads 64 wide and few enough keys for the fused kernel, and with six heads, whose clusters
    leave SMs idle.
    """
    return heads <= CLUSTER and 0 not in (max_q_length, max_kv_length)


def is_fused(*, samples: int, kv_heads: int, max_kv_length: int, sms: int) -> bool:
    """Does the call get the fused kernel?"""
    return max_kv_length <= FUSED_KEYS and samples * kv_heads >= FUSED_ITEMS_PER_SM * sms


def _q_chunk(*, samples: int, heads: int, max_q_length: int, sms: int) -> int | None:
    """Query rows of one item of the dq kernel; None: whole samples, if there are enough of them."""
    pair = COMPUTE * TILE
    pairs = -(-max_q_length // pair)
    per_item = max(samples * heads * pairs // (ITEMS_PER_SM * sms), 2)
    return None if per_item >= pairs else per_item * pair
