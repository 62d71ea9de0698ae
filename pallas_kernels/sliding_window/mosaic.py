"""Sliding-window attention on Hopper: ties the forward and the backward kernels together.

Memory: besides the operands and the result two float32 values per query row and head, one of them only backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.attention.backward_kv import attention_dkv
from pallas_kernels.attention.backward_q import attention_dq
from pallas_kernels.attention.common import Heads
from pallas_kernels.attention.forward import attention_forward
from pallas_kernels.attention.rotary import pass_rows, rotate_pass, with_end
from pallas_kernels.attention.tables import Spans, ranges, window_reach
from pallas_kernels.attention.work import Window, WindowWithoutTables
from pallas_kernels.jagged import vary_together
from pallas_kernels.sliding_window import xla

NARROW = 128  # rows that a query sees, up to which blocks of keys for three warpgroups pass most of them by


class Static(NamedTuple):
    """What is fixed while tracing; interpret and sms are for tests on a CPU."""

    heads: Heads
    left: int | None
    right: int | None
    scale: float
    dense: bool  # as many rows as samples of the greatest length have
    sms: int
    interpret: Any


def unsupported(q, k, v, starts, lengths, angles, **static) -> str | None:
    """Why the Hopper kernels can't run this call, or None."""
    return hopper.unsupported_device() or hopper.unsupported_operands(q=q, k=k, v=v)


def unsupported_packed(qkv, starts, lengths, angles, **static) -> str | None:
    """Why the Hopper kernels can't run this call of the packed operator, or None."""
    return hopper.unsupported_device() or hopper.unsupported_operands(qkv=qkv)


def mosaic_gpu(q, k, v, starts, lengths, angles, **static):
    """See `sliding_window_attention`; static: see `_run`."""
    return _run((q, k, v), Heads(q.shape[1], k.shape[1]), starts, lengths, angles, **static)


def mosaic_gpu_packed(qkv, starts, lengths, angles, **static):
    """See `packed_sliding_window_attention`. The kernels read q, k and v where they lie, and write one gradient."""
    H = qkv.shape[1] // 3
    return _run((qkv,), Heads(H, H, 0, H, 2 * H), starts, lengths, angles, **static)


def _run(
    arrays,
    heads: Heads,
    starts,
    lengths,
    angles,
    *,
    max_length: int,
    left: int,
    right: int,
    scale: float,
    sms: int | None = None,
    interpret=None,
):
    """arrays: q, k and v, or one array that has all of their heads.

    Queries and keys are rotated in a pass before the kernels, which turn the gradients back themselves: inside the
    kernels, tiles would be rotated once for every tile that sees them, which was slower.
    """
    rows, _, width = arrays[0].shape
    if max_length == 0:
        return jnp.zeros((rows, heads.q, width), arrays[0].dtype)
    farthest = max_length - 1
    static = Static(
        heads,
        None if left >= farthest else left,
        None if right >= farthest else right,
        scale,
        rows == starts.shape[0] * max_length,
        hopper.sm_count() if sms is None else sms,
        interpret,
    )
    angles = () if angles is None else (lax.stop_gradient(angles),)
    starts, lengths, *others = vary_together(starts, lengths, *angles, *arrays)
    return _attention(static, others[len(angles) :], starts, lengths, *others[: len(angles)])


def _ranges(static: Static, rows: int, starts, lengths, heads: int):
    reach = window_reach(static.left, static.right)
    return ranges(starts, lengths, rows=rows, heads=heads, reach=reach, sms=static.sms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, arrays, starts, lengths, angles=None):
    return _forward(static, arrays, starts, lengths, angles)[0]


def forward_warpgroups(width: int, left: int | None, right: int | None) -> int:
    """How many compute: more of them hide each other's waits, as long as registers last and they see the same keys."""
    if width == 64:
        return 4
    return 2 if left is not None and right is not None and left + right < NARROW else 3


# Under jit of their own, so that equal layers of a model are lowered once: a kernel takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _forward(static: Static, arrays, starts, lengths, angles=None):
    q, k, v = arrays * 3 if len(arrays) == 1 else arrays
    if angles is not None:
        rotated_heads = static.heads.first_v
        if len(arrays) == 3:
            q, k = xla.rotated(starts, lengths, angles, q, k)
        elif q.shape[0] % pass_rows(q.shape[2]) == 0:
            q, v = rotate_pass(q, angles, heads=rotated_heads, interpret=static.interpret)
            k = q
        else:
            (q,) = (k,) = xla.rotated(starts, lengths, angles, q[:, :rotated_heads])
    angles = None if angles is None else with_end(angles)
    warpgroups = forward_warpgroups(q.shape[2], static.left, static.right)
    run: dict[str, Any] = dict(heads=static.heads, scale=static.scale, sms=static.sms, interpret=static.interpret)
    # Measured on an H100, D 128, window (100, 100): the whole grid as one team takes 0.20 ms for 64 samples of 2048,
    # runs 0.23; but 1.08 and 0.98 for 1152 samples of 1 … 1024. Narrow windows and D 64 share too little to gain.
    runs = warpgroups != 3 or not static.dense
    work = WindowWithoutTables(q.shape[0], starts.shape[0], static.left, static.right, runs)
    out, statistics = attention_forward(work, Spans(starts, lengths), q, k, v, warpgroups=warpgroups, **run)
    out, statistics, _ = vary_together(out, statistics, q)
    # Each array once: eager code keeps as many as are returned, and an estimate of a step's memory counts them.
    arrays = [x for i, x in enumerate((q, k, v)) if not any(x is y for y in (q, k, v)[:i])]
    return out, (arrays, starts, lengths, angles, out, statistics)


@functools.partial(jax.jit, static_argnums=0)
def _backward(static: Static, residuals, dout):
    arrays, starts, lengths, angles, out, statistics = residuals
    q, k, v = arrays[0], arrays[len(arrays) // 3], arrays[-1]  # two arrays: q and k are heads of one
    dout, work = dout.astype(q.dtype), Window(q.shape[0], starts.shape[0], static.left, static.right)
    heads = static.heads
    by_query, by_key = (_ranges(static, q.shape[0], starts, lengths, n) for n in (heads.q, heads.kv))
    run: dict[str, Any] = dict(heads=heads, scale=static.scale, sms=static.sms, interpret=static.interpret)
    room = v.shape[1] if heads.keys_beside_values else None
    dq, delta = attention_dq(work, by_query, q, k, v, out, dout, statistics, angles, room=room, **run)
    dkv = functools.partial(attention_dkv, work, by_key, q, k, v, dout, statistics, delta, angles, **run)
    if heads.keys_beside_values:
        gradient = jax.new_ref(dq)  # dkv goes on where dq has stopped: no pass over memory joins them
        dkv(target=gradient)
        gradients = [jax.freeze(gradient)]
    else:
        gradients = [dq, *dkv()]
    return (
        list(vary_together(*gradients, q)[:-1]),
        None,
        None,
        None if angles is None else jnp.zeros_like(angles.rows),
    )


_attention.defvjp(_forward, _backward)
