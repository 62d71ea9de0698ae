"""What both kernels of the MLP share: tiles, the ring of weights, how the kernel runs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mosaic

from pallas_kernels import hopper

ROWS = 64  # of one compute warpgroup's tile
COMPUTE = 2  # warpgroups that compute; a third one issues the loads of weights
MASK_ROWS = 2 * COMPUTE * ROWS  # masks have a multiple of them: whole tiles of clusters of one or two blocks
CLUSTER, BLOCK = "cluster", "block"  # axes of the grid
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
W1, W2 = 0, 1  # of a chunk: its columns of the first weights, its rows of the second


@dataclass(frozen=True)
class Tiles:
    """Tiles of a kernel.

    chunk: columns of the hidden layer in one chunk.
    weight_slots, row_slots: what shared memory holds: chunks of the first and the second weights, and tiles of rows per
      warpgroup.
    blocks: of a cluster. Each loads its share of a chunk for all of them.
    """

    chunk: int
    weight_slots: tuple[int, int]
    row_slots: int
    blocks: int


def choose_tiles(scratch: Callable[[Tiles], dict], H: int, chunk: int) -> Tiles:
    """The first tiles that fit shared memory: all weights at once is best, then rows ahead of their use, then weights
    loaded beside products; of the second weights, which a step is done with early, one slot will do."""
    everything = H // chunk, H // chunk
    for weight_slots, row_slots in (
        *((everything, 2), (everything, 1)),
        *(((2, 2), 2), ((2, 2), 1), ((2, 1), 1)),
        ((1, 1), 1),
    ):
        # Measured on an H100 with one slot: blocks that wait for each other take 3.72 ms, blocks that don't 3.54.
        tiles = Tiles(chunk, weight_slots, row_slots, blocks=1 if weight_slots in (everything, (1, 1)) else 2)
        if hopper.shared_bytes(scratch(tiles)) <= hopper.SHARED_MEMORY:
            return tiles
    raise ValueError(f"an MLP with {H} hidden columns takes more than {hopper.SHARED_MEMORY} bytes of shared memory")


def tiling(columns: int):
    """Transforms of shared memory for wgmma and TMA, with swizzled rows of that many 16-bit elements: 32 or 64."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def weight_scratch(dtype, F: int, G: int, tiles: Tiles) -> dict:
    """The rings of weights: a slot has the chunk's columns of the first weights, or its rows of the second."""
    buffer = functools.partial(plgpu.SMEM, dtype=dtype, transforms=tiling(tiles.chunk))
    shared = functools.partial(plgpu.ClusterBarrier, collective_axes=(BLOCK,)) if tiles.blocks > 1 else plgpu.Barrier
    return dict(
        w1_smem=buffer((tiles.weight_slots[W1], F, tiles.chunk)),
        w2_smem=buffer((tiles.weight_slots[W2], tiles.chunk, G)),
        w_full=plgpu.Barrier(num_arrivals=1, num_barriers=sum(tiles.weight_slots)),
        w_empty=shared(num_arrivals=COMPUTE, num_barriers=sum(tiles.weight_slots)),
    )


class Weights:
    """The rings of weights inside a kernel: step n uses chunk n % chunks. Where all chunks have a slot, they stay.

    order: in which a step is through with them.
    """

    def __init__(self, w1_gmem, w2_gmem, w1_smem, w2_smem, w_full, w_empty, *, order, blocks: int):
        self._gmem, self._smem, self._full, self._empty = (w1_gmem, w2_gmem), (w1_smem, w2_smem), w_full, w_empty
        self._order, self._axis = order, BLOCK if blocks > 1 else None
        self._chunk, self._slots = w1_smem.shape[2], (w1_smem.shape[0], w2_smem.shape[0])
        self._chunks = w1_gmem.shape[1] // self._chunk
        self._stay = self._slots == (self._chunks, self._chunks)

    def load_all(self, tiles):
        """For the warpgroup that issues loads: all that `tiles` tiles need."""
        steps = self._chunks if self._stay else tiles * self._chunks

        def load(n, _):
            for which in self._order:
                if not self._stay:

                    @pl.when(n >= self._slots[which])
                    def _(which=which):
                        plgpu.barrier_wait(self._barrier(self._empty, which, n))

                hidden = pl.ds(lax.rem(n, jnp.int32(self._chunks)) * self._chunk, self._chunk)
                where = (slice(None), hidden) if which == W1 else (hidden,)
                plgpu.copy_gmem_to_smem(
                    self._gmem[which].at[where],
                    self._smem[which].at[self._slot(which, n)],
                    self._barrier(self._full, which, n),
                    collective_axes=self._axis,
                )

        lax.fori_loop(0, steps, load, None)
        if not self._stay:  # every completed phase must have been waited for when the kernel ends
            for which in self._order:

                def drain(n, _, which=which):
                    plgpu.barrier_wait(self._barrier(self._empty, which, n))

                lax.fori_loop(jnp.maximum(steps - self._slots[which], 0), steps, drain, None)

    def start(self):
        """For a compute warpgroup, before its first tile."""
        if self._stay:
            for i in range(sum(self._slots)):
                plgpu.barrier_wait(self._full.at[i])

    def await_(self, which, n):
        """The part of the weights for step n, when it is there."""
        if not self._stay:
            plgpu.barrier_wait(self._barrier(self._full, which, n))
        return self.at(which, n)

    def at(self, which, n):
        """The part of the weights for step n, awaited before."""
        return self._smem[which].at[hopper.hold(self._slot(which, n))[0]]

    def release(self, which, n):
        if not self._stay:
            plgpu.barrier_arrive(self._barrier(self._empty, which, n))

    def _slot(self, which, n):
        return lax.rem(n, jnp.int32(self._slots[which]))

    def _barrier(self, barriers, which, n):
        return barriers.at[self._slot(which, n) + which * self._slots[W1]]


def persistent(body, *, name: str, out_type, scratch: dict, blocks: int, sms: int, interpret, operands) -> Any:
    """Run `body` as one block per SM with two compute warpgroups and one for loads. blocks: of a cluster."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(sms // blocks,),
        grid_names=(CLUSTER,),
        cluster=(blocks,) if blocks > 1 else (),
        cluster_names=(BLOCK,) if blocks > 1 else (),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=interpret,
    )(*operands)


class Deal:
    """Which rows a compute warpgroup gets: clusters are dealt tiles of as many rows as all their warpgroups hold."""

    def __init__(self, rows: int, blocks: int, sms: int):
        clusters, self._warpgroups = sms // blocks, blocks * COMPUTE
        tiles = ceil_div(rows, self._warpgroups * ROWS)
        self._first, self._step = lax.axis_index(CLUSTER), clusters
        self._rank = (lax.axis_index(BLOCK) if blocks > 1 else 0) * COMPUTE + lax.axis_index("warpgroup")
        self.turns = lax.div(tiles - self._first + (clusters - 1), jnp.int32(clusters))

    def number(self, turn):
        """Of the warpgroup's tile of ROWS rows."""
        return (turn * self._step + self._first) * self._warpgroups + self._rank

    def rows(self, turn):
        return pl.ds(self.number(turn) * ROWS, ROWS)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def half(bias):
    """SiLU is computed from half of its argument; halving is exact."""
    return bias * jnp.asarray(0.5, bias.dtype)


def columns(x) -> jax.Array:
    """One value per column, along the columns of a tile."""
    return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), (1,))


def first_row(x, interpret) -> jax.Array:
    """The first row of a tile whose rows are all the same."""
    if interpret:
        return x[0]
    layout = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=layout.reduce(0))

    def first(_, x):
        layout = x.layout.reduce((0,))
        # A thread has elements of two rows of every eight columns: [1, columns / 8, 1, 1, 2, 1, …].
        registers = x.registers[:, :, :, :, 0].reshape(layout.registers_shape(x.shape[1:]))
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    inline: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=out)(first)
    return inline(x)
