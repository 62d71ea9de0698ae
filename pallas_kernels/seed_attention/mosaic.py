"""Seed attention on Hopper: ties the forward and the backward kernels together.

Forward and the seeds' gradient hold a tile of seeds while a sample's keys pass by; the tiles of one sample run side by
side, so that k and v come from device memory once. The seeds' gradient is summed over samples in registers and then
over blocks of the grid, in a fixed order.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.attention.backward_kv import attention_dkv
from pallas_kernels.attention.backward_q import WARPGROUPS, attention_dq
from pallas_kernels.attention.common import Heads
from pallas_kernels.attention.forward import attention_forward
from pallas_kernels.attention.tables import BLOCK, longest_first, ranges
from pallas_kernels.attention.work import SeedKeys, SeedQueries
from pallas_kernels.jagged import vary_together

FORWARD_WARPGROUPS = 2


class Static(NamedTuple):
    """What is fixed while tracing; interpret and sms are for tests on a CPU."""

    heads: Heads
    scale: float
    sms: int
    interpret: Any


def unsupported(seeds, k, v, starts, lengths, **static) -> str | None:
    """Why the Hopper kernels can't run this call, or None."""
    return hopper.unsupported_device() or hopper.unsupported_operands(k=k, v=v)


def unsupported_packed(seeds, kv, starts, lengths, **static) -> str | None:
    """Why the Hopper kernels can't run this call of the packed operator, or None."""
    return hopper.unsupported_device() or hopper.unsupported_operands(kv=kv)


def mosaic_gpu(seeds, k, v, starts, lengths, **static):
    """See `seed_attention`; static: see `_run`."""
    return _run(seeds, (k, v), Heads(seeds.shape[1], k.shape[1]), starts, lengths, **static)


def mosaic_gpu_packed(seeds, kv, starts, lengths, **static):
    """See `packed_seed_attention`. The kernels read k and v where they lie, and write one gradient."""
    H = kv.shape[1] // 2
    return _run(seeds, (kv,), Heads(seeds.shape[1], H, first_v=H), starts, lengths, **static)


def _run(
    seeds,
    arrays,
    heads: Heads,
    starts,
    lengths,
    *,
    max_length: int,
    scale: float,
    sms: int | None = None,
    interpret=None,
):
    """arrays: k and v, or one array that has the heads of both."""
    if max_length == 0 or seeds.shape[0] == 0:
        return jnp.zeros((starts.shape[0], *seeds.shape), seeds.dtype)
    static = Static(heads, scale, hopper.sm_count() if sms is None else sms, interpret)
    seeds, starts, lengths, *arrays = vary_together(seeds, starts, lengths, *arrays)
    return _attention(static, seeds, arrays, starts, lengths)


def _padded(seeds):
    """Seeds filled up to whole tiles of a warpgroup: copies in boxes of BLOCK rows."""
    return jnp.pad(seeds, ((0, -seeds.shape[0] % BLOCK), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, *operands):
    return _forward(static, *operands)[0]


# Under jit of their own, so that equal layers of a model are lowered once: a kernel takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _forward(static: Static, seeds, arrays, starts, lengths):
    k, v = arrays[0], arrays[-1]
    S, H, D = seeds.shape
    work = SeedQueries(S, starts.size)
    out, statistics = attention_forward(
        work,
        longest_first(starts, lengths),
        _padded(seeds),
        k,
        v,
        warpgroups=FORWARD_WARPGROUPS,
        **static._asdict(),
    )
    out, statistics = vary_together(out, statistics, k)[:2]
    return out.reshape(starts.size, S, H, D), (seeds, arrays, starts, lengths, out, statistics)


@functools.partial(jax.jit, static_argnums=0)
def _backward(static: Static, residuals, dout):
    seeds, arrays, starts, lengths, out, statistics = residuals
    k, v = arrays[0], arrays[-1]
    S, H, _ = seeds.shape
    dout = dout.astype(seeds.dtype).reshape(out.shape)
    work, run = SeedQueries(S, starts.size), static._asdict()
    work = dataclasses.replace(work, splits=max(1, static.sms // (work.tiles(WARPGROUPS) * H)))
    tables = longest_first(starts, lengths)
    parts, delta = attention_dq(work, tables, _padded(seeds), k, v, out, dout, statistics, **run)
    dseeds = jnp.moveaxis(jnp.sum(parts, axis=0)[:, :S], 0, 1) * static.scale
    work = SeedKeys(S, starts.size, k.shape[0])
    tables = ranges(starts, lengths, rows=k.shape[0], heads=static.heads.kv, reach=None, sms=static.sms)
    gradients = attention_dkv(work, tables, _padded(seeds), k, v, dout, statistics, delta, **run)
    dseeds, *gradients, _ = vary_together(dseeds.astype(seeds.dtype), *gradients, k)
    return dseeds, gradients, None, None


_attention.defvjp(_forward, _backward)
