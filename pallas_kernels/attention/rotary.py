"""Rotary encoding: in a pass of its own, or inside the kernels.

Inside, tiles are rotated in shared memory between their copy and their first product. The warpgroup that issues copies
does it, one tile behind the copies it has issued. Angles are read where they lie; no rotated q or k ever reaches device
memory, and gradients are turned back in registers.

Numerics: sine and cosine are the hardware's approximation after an exact reduction to one turn; rotated tiles are
rounded to the operands' dtype, as on the other paths.
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


def _over_halves(f, x, angles: Angles, row):
    """f(first half's columns, second half's, cos, sin) for a few columns at a time; returns both halves."""
    half, rows = x.shape[1] // 2, angles.rows.shape[0]

    def load(source, row, column):
        source = source.at[pl.ds(row, BLOCK), pl.ds(column, _SLICE)]
        return plgpu.load(source, layout=plgpu.Layout.WGMMA, optimized=False)

    parts = []
    for column in range(0, half, _SLICE):
        angle = lax.cond(
            row + BLOCK <= rows,
            lambda column=column: load(angles.rows, row, column),
            lambda column=column: load(angles.last, row - (rows - BLOCK), column),
        )
        a, b = (x[:, column + shift : column + shift + _SLICE].astype(jnp.float32) for shift in (0, half))
        parts.append(f(a, b, *_turns(angle)))
    return lax.concatenate([part for side in zip(*parts, strict=True) for part in side], 1)


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


def rotate_held(tile_of, counts, slots: int, angles: Angles, row, rows, full, ready):
    """Rotate the tiles that stay, one of each warpgroup that has rows.

    tile_of: (slot, warpgroup) -> tile; counts: tiles of each warpgroup until now; slots: of each, a power of two; full,
    ready: barriers [slots · warpgroups].
    """

    def one(w, _):
        count = sum(jnp.where(w == i, n, 0) for i, n in enumerate(counts))
        slot = (count - 1) & (slots - 1)
        barrier = slot * len(counts) + w
        plgpu.barrier_wait(full.at[barrier])
        rotate(tile_of(slot, w), angles, row + w * BLOCK, rows - w * BLOCK, ready.at[barrier])

    lax.fori_loop(0, lax.div(rows + (BLOCK - 1), jnp.int32(BLOCK)), one, None)
