"""GDPA on Hopper: ties the forward and the backward kernel together."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.gdpa import mosaic_backward, xla
from pallas_kernels.gdpa.mosaic_backward_q import BehindNorm
from pallas_kernels.gdpa.mosaic_forward import gdpa_forward
from pallas_kernels.gdpa.tiles import ForwardTiles, forward_tiles
from pallas_kernels.jagged import vary_together
from pallas_kernels.schedule import Line, Schedule, make_line, make_schedule


class Static(NamedTuple):
    """What is fixed while tracing; interpret and sms are for tests on a CPU."""

    max_q_length: int
    max_kv_length: int
    activation: tuple[str, ...]
    scale: float
    post_scale: float
    shared_keys: bool
    sms: int
    interpret: Any


def unsupported(q, k, v, *spans, **static) -> str | None:
    """Why the Hopper kernels can't run this call, or None."""
    return hopper.unsupported_device() or hopper.unsupported_operands(q=q, k=k, v=v)


def mosaic_gpu(
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
    sms: int | None = None,
    interpret=None,
):
    """See `gdpa`."""
    sms = hopper.sm_count() if sms is None else sms
    static = Static(max_q_length, max_kv_length, activation, scale, post_scale, shared_keys, sms, interpret)
    return _gdpa(static, *vary_together(q, k, v, q_starts, q_lengths, kv_starts, kv_lengths))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gdpa(static: Static, *operands):
    return _forward(static, *operands)


# Under jit of their own, so that equal layers of a model are lowered once: a kernel takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _forward(static: Static, q, k, v, *spans):
    if 0 in (static.max_q_length, static.max_kv_length):
        return jnp.zeros_like(q)
    tiles = forward_tiles(width=q.shape[2], max_kv_length=static.max_kv_length)
    out = gdpa_forward(
        q,
        k,
        v,
        forward_order(*spans, rows=q.shape[0], max_q_length=static.max_q_length, tiles=tiles),
        activation=static.activation,
        scale=static.scale,
        post_scale=static.post_scale,
        tiles=tiles,
        sms=static.sms,
        interpret=static.interpret,
    )
    return vary_together(out, q)[0]


def forward_order(
    q_starts, q_lengths, kv_starts, kv_lengths, *, rows: int, max_q_length: int, tiles: ForwardTiles
) -> Line | Schedule:
    """In which order the forward kernel works, see `gdpa_forward`."""
    spans = q_starts, q_lengths, kv_starts, kv_lengths
    if tiles.resident:
        return make_line(*spans, tiles.tiling)
    return make_schedule(*spans, rows=rows, max_q_length=max_q_length, q_chunk=tiles.q_rows)


def _gdpa_fwd(static, *operands):
    return _forward(static, *operands), operands


@functools.partial(jax.jit, static_argnums=0)
def backward(static: Static, operands, do):
    """Gradients of `_gdpa`'s operands (q, k, v, spans), from its result's."""
    q, k, v, *spans = operands
    if 0 in (static.max_q_length, static.max_kv_length):
        return *map(jnp.zeros_like, (q, k, v)), *(None,) * 4
    if static.shared_keys:  # the kernels give every row of k to one sample
        return *xla.backward(xla.Static(*static[:5]), q, k, v, do, *spans), *(None,) * 4
    known = {name: x for name, x in static._asdict().items() if name != "shared_keys"}
    grads = mosaic_backward.gdpa_backward(q, k, v, do, *spans, **known)
    return *vary_together(*grads, q)[:3], *(None,) * 4


@functools.partial(jax.jit, static_argnums=0)
def backward_behind_norm(static: Static, q, k, v, *spans, do, factor, residual):
    """Gradients of x, k and v where q is the LayerNorm of x; see `BehindNorm`. Needs `finishes_norm`."""
    known = {name: x for name, x in static._asdict().items() if name != "shared_keys"}
    q, k, v, *spans, do, factor, residual = vary_together(q, k, v, *spans, do, factor, residual)
    behind_norm = BehindNorm(factor, residual)
    q_starts, q_lengths, kv_starts, kv_lengths = spans
    grads = mosaic_backward.gdpa_backward_behind_norm(
        q, k, v, do, q_starts, q_lengths, kv_starts, kv_lengths, behind_norm, **known
    )
    return vary_together(*grads, q)[:3]


def finishes_norm(static: Static, heads: int) -> bool:
    """Does `backward_behind_norm` take a call?"""
    lengths = dict(max_q_length=static.max_q_length, max_kv_length=static.max_kv_length)
    return not static.shared_keys and mosaic_backward.finishes_norm(heads=heads, **lengths)


_gdpa.defvjp(_gdpa_fwd, backward)
