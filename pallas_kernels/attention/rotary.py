"""Rotary encoding inside the kernels: tiles are rotated in shared memory between their copy and their first product.

The warpgroup that issues copies does it, one tile behind the copies it has issued. Angles are read where they lie; no
rotated q or k ever reaches device memory, and gradients are turned back in registers.

Numerics: sine and cosine are the hardware's approximation after an exact reduction to one turn; rotated tiles are
rounded to the operands' dtype, as on the other paths.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention.tables import BLOCK

_SLICE = 8  # columns at a time: what an angle becomes does not outlive them
_TURN = 2 * math.pi
_TURN_HIGH = 6.28125  # eight bits: its multiples are exact in float32
_TURN_LOW = _TURN - _TURN_HIGH


class Angles(NamedTuple):
    """Angles [N, D/2] float32; and their last BLOCK rows with as many zeros behind: tiles are read whole."""

    rows: jax.Array
    last: jax.Array


def with_end(angles: Float[Array, "N half"]) -> Angles:
    return Angles(angles, jnp.pad(angles[-BLOCK:], ((0, BLOCK), (0, 0))))


def _turns(angle):
    """(cos, sin)"""
    turns = lax.round(angle * (1 / _TURN), lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = (angle - turns * _TURN_HIGH) - turns * _TURN_LOW
    return jnp.cos(rest), jnp.sin(rest)


def _over_halves(f, x, angles: Angles, row):
    """f(column, first half's columns, second half's, cos, sin) for a few columns at a time; returns both halves."""
    rows = angles.rows.shape[0]

    def on(source, row, x):
        half = x.shape[1] // 2
        parts = []
        for column in range(0, half, _SLICE):
            angle = source.at[pl.ds(row, BLOCK), pl.ds(column, _SLICE)]
            angle = plgpu.load(angle, layout=plgpu.Layout.WGMMA, optimized=False)
            a, b = (x[:, column + shift : column + shift + _SLICE] for shift in (0, half))
            parts.append(f(a.astype(jnp.float32), b.astype(jnp.float32), *_turns(angle)))
        return lax.concatenate([p for half in zip(*parts, strict=True) for p in half], 1)

    inside = row + BLOCK <= rows
    main, end = functools.partial(on, angles.rows), functools.partial(on, angles.last)
    return lax.cond(inside, lambda x: main(row, x), lambda x: end(row - (rows - BLOCK), x), x)


def turn_back(x, angles: Angles, row):
    """Gradient [BLOCK, D] in registers with respect to what was rotated."""
    return _over_halves(lambda a, b, cos, sin: (a * cos + b * sin, b * cos - a * sin), x, angles, row)


def rotate(tile, angles: Angles, row, rows, ready):
    """Rotate the rows of a tile [panels, BLOCK, 64] in shared memory (its wgmma view); zeros from `rows` on.

    What lies there, angles included, may be NaN. Arrives at `ready`.
    """
    panels = tile.shape[0]
    x = [plgpu.load(tile.at[p], layout=plgpu.Layout.WGMMA) for p in range(panels)]
    x = lax.concatenate(x, 1) if panels > 1 else x[0]

    def forward(a, b, cos, sin):
        seen = plgpu.broadcasted_iota(jnp.int32, a.shape, 0, layout=plgpu.Layout.WGMMA) < rows
        turned = a * cos - b * sin, a * sin + b * cos
        return tuple(jnp.where(seen, y, 0.0).astype(tile.dtype) for y in turned)

    x = _over_halves(forward, x, angles, row)
    for p in range(panels):
        tile.at[p][...] = x[:, p * (x.shape[1] // panels) : (p + 1) * (x.shape[1] // panels)]
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready)
