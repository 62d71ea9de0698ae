"""What the Hopper kernels share: buffers that take any row offset, tails of samples, and what a kernel can't run.

A kernel is Pallas Mosaic GPU code for sm_90a: warpgroups that compute beside one that issues TMA copies.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, vector
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils as mosaic_utils

PANEL = 64  # columns of 16-bit elements in one 128-byte swizzled row
SHARED_MEMORY = 227 * 1024  # bytes one block may use on sm_90
SLICE = 8  # columns that `in_slices` takes at a time

# wgmma reads tiles of 8 rows. TMA with that tiling addresses wrongly from rows that are not multiples of 8
# (github.com/jax-ml/jax/issues/34102). For a 64-column panel, tiles of one row are the same bytes and take any row.
WGMMA_TILES = (plgpu.TilingTransform((8, PANEL)), plgpu.SwizzleTransform(128))
TMA_TILES = (plgpu.TilingTransform((1, PANEL)), plgpu.SwizzleTransform(128))


_assumed = False


@contextlib.contextmanager
def assumed() -> Iterator[None]:
    """Trace as on an H100, whatever the device: for shapes and bytes, nothing of it can run or be lowered."""
    global _assumed
    before, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = before


def unsupported_device() -> str | None:
    """Why the default device can't run a Hopper kernel, or None."""
    if _assumed:
        return None
    if (backend := jax.default_backend()) != "gpu":
        return f"needs an NVIDIA Hopper GPU, the default backend is {backend}"
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "none")
    if not str(capability).startswith("9."):
        return f"needs compute capability 9.0 (Hopper), {device.device_kind} has {capability}"
    return None


def unsupported_operands(**operands) -> str | None:
    """Why arrays [N, H, D] are nothing for the kernels, or None."""
    for name, x in operands.items():
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return f"{name} is {x.dtype}, the kernels take bfloat16 and float16"
        if x.shape[2] not in (64, 128):
            return f"{name} has head width {x.shape[2]}, the kernels have 64 and 128"
        if x.shape[0] < 128:
            return f"{name} has {x.shape[0]} rows, the kernels copy boxes of 128"
    return None


def sm_count() -> int:
    """Streaming multiprocessors of the default device: the size of a persistent grid."""
    return 132 if _assumed else jax.devices()[0].core_count


def row_buffer(shape, dtype, *, interpret):
    """Shared memory [..., rows, 64] that TMA fills at any row offset and wgmma reads; see `row_views`.

    The interpreter keeps the members of a RefUnion apart, so there it is one plain buffer.
    """
    if interpret:
        return plgpu.SMEM(shape, dtype, transforms=WGMMA_TILES)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=TMA_TILES), plgpu.SMEM(shape, dtype, transforms=WGMMA_TILES)
    )


def row_views(buffer, *, interpret):
    """(the view for TMA, the view for wgmma) of a `row_buffer`."""
    return (buffer, buffer) if interpret else buffer


def store_buffer(shape, dtype):
    """Shared memory [..., rows, 64] that registers fill and TMA stores to any row offset."""
    return plgpu.SMEM(shape, dtype, transforms=TMA_TILES)


def shared_bytes(scratch) -> int:
    """Shared memory that these scratch types take: buffers start at multiples of 1024 bytes, a barrier takes 8."""
    barrier_types = (plgpu.Barrier, plgpu.ClusterBarrier)
    buffers = barriers = 0
    for x in jax.tree.leaves(scratch, is_leaf=lambda x: isinstance(x, (plgpu.RefUnion, *barrier_types))):
        if isinstance(x, barrier_types):
            barriers += 8 * math.prod((x.num_barriers,) if isinstance(x.num_barriers, int) else x.num_barriers)
            continue
        members = x.refs if isinstance(x, plgpu.RefUnion) else (x,)
        buffers += max(-(-_bytes(m) // 1024) * 1024 for m in members)
    return buffers + barriers


def _bytes(ref) -> int:
    aval = ref.get_array_aval()
    return aval.size * aval.dtype.itemsize


def _powers(total: int):
    """total/2, …, 2, 1 for a power of two."""
    return [1 << e for e in reversed(range(total.bit_length() - 1))]


def store_rows(src_smem, dst_gmem, row, count, columns):
    """Store rows [0, count) of `src_smem` [R, 64] to rows row… of `dst_gmem` [N, …], R a power of two, 0 <= count <= R.

    No other row is touched: rows are never written twice, so results don't depend on the order of stores. `columns`
    indexes the remaining axes. Commits no group; see `plgpu.commit_smem_to_gmem_group`.
    """
    total = src_smem.shape[0]

    def copy(offset, size):
        plgpu.copy_smem_to_gmem(
            src_smem.at[pl.ds(offset, size)], dst_gmem.at[(pl.ds(row + offset, size), *columns)], commit_group=False
        )

    @pl.when(count == total)
    def _():
        copy(0, total)

    @pl.when(count < total)
    def _():
        for size in _powers(total):

            @pl.when((count & size) != 0)
            def _(size=size):
                copy(count & ~(2 * size - 1), size)


def tail_arrivals(total: int) -> int:
    """Arrivals of one `load_rows_zero_tail` of `total` rows."""
    return 2 * len(_powers(total))


def load_rows_zero_tail(src_gmem, dst_smem, row, count, columns, barrier):
    """Load rows row … row + count - 1 of `src_gmem` [N, …] into `dst_smem` [R, 64] (its TMA view) and zero its other
    rows, 0 < count < R, R a power of two. Arrives `tail_arrivals(R)` times at `barrier`.

    What lies behind a sample may be NaN, and 0·NaN is NaN: masking the other operand of a product is not enough.
    The zeros come from TMA itself, which fills what it reads past the end of an array.
    """
    total, end = dst_smem.shape[0], src_gmem.shape[0]
    zeros = total - count

    def copy(size, source, offset):
        plgpu.copy_gmem_to_smem(src_gmem.at[(pl.ds(source, size), *columns)], dst_smem.at[pl.ds(offset, size)], barrier)

    for size in _powers(total):
        above = ~(2 * size - 1)
        for bits, source, offset in (
            (count, row + (count & above), count & above),
            (zeros, jnp.int32(end) + (count & 0), count + (zeros & above)),
        ):
            lax.cond(
                (bits & size) != 0,
                lambda size=size, source=source, offset=offset: copy(size, source, offset),
                lambda: plgpu.barrier_arrive(barrier),
            )


def widen(x, interpret):
    """A tile in WGMMA layout to float32; from bfloat16 in one instruction per value, Mosaic takes one and a half."""
    if interpret or x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    out = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=plgpu.Layout.WGMMA)

    def widen(_, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        registers = np.empty_like(x.registers)
        for i, pair in np.ndenumerate(x.registers):
            bits = mosaic_utils.bitcast(pair, i32)
            low = arith.shli(bits, mosaic_utils.c(16, i32))
            high = arith.andi(bits, mosaic_utils.c(-(1 << 16), i32))
            both = [arith.bitcast(f32, x) for x in (low, high)]
            registers[i] = vector.from_elements(ir.VectorType.get((2,), f32), both)
        return mosaic.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    inline: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=out)(widen)
    return inline(x)


def fence_across_blocks(interpret) -> None:
    """What the warpgroup wrote to device memory before is there for blocks that it signals afterwards, and what it
    reads afterwards is what the blocks wrote that it has waited for."""
    if interpret:
        return

    def fence(_):
        mosaic_utils.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)
        mosaic_utils.warpgroup_barrier()

    inline: Any = plgpu.inline_mgpu()(fence)
    inline()


def in_slices(f):
    """f over a few columns at a time; f returns a tuple.

    An operation on a whole tile keeps each intermediate of all its elements in registers.
    """

    def sliced(*tiles):
        parts = [f(*(x[:, c : c + SLICE] for x in tiles)) for c in range(0, tiles[0].shape[1], SLICE)]
        return tuple(lax.concatenate(list(x), 1) for x in zip(*parts, strict=True))

    return sliced


def hold(*indices):
    """Scalars the compiler can't move out of the loop.

    Else it computes the descriptors of all wgmma operands before the loop and spills them.
    """
    return lax.optimization_barrier(indices)
