"""Rotary encoding: a pass of its own rotates q and k, the backward kernels turn gradients back in registers.

Numerics: sine and cosine are the hardware's approximation after an exact reduction to one turn; rotated q and k are
rounded to their dtype, as on the other paths.
"""

import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention.tables import BLOCK
from pallas_kernels.jagged import vary_together, varying

_SLICE = 16  # columns at a time: what an angle becomes does not outlive them
_TURN = 2 * math.pi
_TURN_HIGH = 6.28125  # eight bits: its multiples are exact in float32
_TURN_LOW = _TURN - _TURN_HIGH


class Angles(NamedTuple):
    """Angles [N, D/2] float32; and their last BLOCK rows with as many zeros behind: tiles are read whole."""

    rows: jax.Array
    last: jax.Array


def pass_rows(width: int) -> int:
    """Rows of a block of the grid of `rotate_pass`."""
    return 1024 // (width // 2)


def rotate_pass(x: Float[Array, "N H D"], angles: Float[Array, "N half"], *, heads: int, interpret=None):
    """(array whose first `heads` heads are those of x rotated, array with the others); N a multiple of `pass_rows`.

    Both are x itself, rotated in place; where x differs between the devices of a `shard_map`, to which JAX makes no
    references, the rotated heads are an array of their own.

    Sine and cosine are computed once for all heads; XLA computes them for every element. Rows whose angle is NaN become
    NaN.
    """
    N, _, D = x.shape
    half, tile = D // 2, pass_rows(D)
    # A thread has eight neighbouring columns of both halves: 16 bytes of each.
    tiling = plgpu.Tiling(((tile, half), (tile // 4, half), (8,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    def kernel(angles, *arrays):
        source, target = arrays[0], arrays[-1]
        rows = pl.ds(lax.axis_index("tile") * tile, tile)
        cos, sin = _turns(plgpu.load(angles.at[rows], layout=layout, optimized=False))
        places = [[(rows, head, pl.ds(column, half)) for column in (0, half)] for head in range(heads)]
        loaded = [[plgpu.load(source.at[at], layout=layout, optimized=False) for at in pair] for pair in places]
        for (first, second), values in zip(places, loaded, strict=True):
            a, b = (y.astype(jnp.float32) for y in values)
            target[first] = (a * cos - b * sin).astype(x.dtype)
            target[second] = (a * sin + b * cos).astype(x.dtype)

    in_place = not varying(x)
    run = plgpu.kernel(
        kernel,
        out_type=[] if in_place else [jax.ShapeDtypeStruct((N, heads, D), x.dtype)],
        grid=(N // tile,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name="rotate_pass",
        interpret=interpret,
    )
    if in_place:
        target = jax.new_ref(x)
        run(angles, target)
        whole = jax.freeze(target)
        return whole, whole
    (rotated,) = run(angles, x)
    return vary_together(rotated, x)


def with_end(angles: Float[Array, "N half"]) -> Angles:
    return Angles(angles, jnp.pad(angles[-BLOCK:], ((0, BLOCK), (0, 0))))


def _turns(angle):
    """(cos, sin)"""
    turns = lax.round(angle * (1 / _TURN), lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = (angle - turns * _TURN_HIGH) - turns * _TURN_LOW
    return jnp.cos(rest), jnp.sin(rest)


def load_tile(angles: Angles, row):
    """Angles of the BLOCK rows from `row` on, in registers."""
    rows = angles.rows.shape[0]

    def load(source, row):
        return plgpu.load(source.at[pl.ds(row, BLOCK)], layout=plgpu.Layout.WGMMA, optimized=False)

    return lax.cond(
        row + BLOCK <= rows, lambda: load(angles.rows, row), lambda: load(angles.last, row - (rows - BLOCK))
    )


def turn_back(x, angles):
    """Gradient [BLOCK, D] in registers with respect to what was rotated; angles: a `load_tile`."""
    half, parts = x.shape[1] // 2, []
    for column in range(0, half, _SLICE):
        a, b = (x[:, column + shift : column + shift + _SLICE] for shift in (0, half))
        cos, sin = _turns(angles[:, column : column + _SLICE])
        parts.append((a * cos + b * sin, b * cos - a * sin))
    return lax.concatenate([part for side in zip(*parts, strict=True) for part in side], 1)
