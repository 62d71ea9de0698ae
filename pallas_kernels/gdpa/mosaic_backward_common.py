"""What the backward kernels of GDPA share inside a kernel."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.gdpa.activations import KernelActivation, kernel_activation

TILE = 64  # rows of one wgmma: of queries or of keys
COMPUTE = 2  # warpgroups that compute; a third issues the copies
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24

COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)


def kernel_activations(names: tuple[str, ...], scale: float, post_scale: float, dtype) -> dict[str, KernelActivation]:
    """The activations in kernel form, all with the same `post` and `slope_post`, which one output may thus share.

    Heads of one group add to the same dk and dv: where their constants differ, they stay in the inner loop.
    """
    folded = {n: kernel_activation(n, scale, post_scale, folded=dtype == jnp.bfloat16) for n in names}
    if len({(a.post, a.slope_post) for a in folded.values()}) == 1:
        return folded
    return {n: kernel_activation(n, scale, post_scale, folded=False) for n in names}


def posts(activations: dict[str, KernelActivation]) -> tuple[float, float]:
    """(post, slope_post) of `kernel_activations`."""
    one = next(iter(activations.values()))
    return one.post, one.slope_post


def weights_and_slopes(activations, names, head, scores, dtype):
    """Weights, rounded to `dtype`, and float32 slopes of a tile of scores by the head's activation."""

    def of(activation):
        def one(s):
            weight, slope = activation.weight_and_slope(s)
            return weight.astype(dtype), slope

        return hopper.in_slices(one)

    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return of(activations[distinct[0]])(scores)
    which = sum(jnp.where(head == h, distinct.index(name), 0) for h, name in enumerate(names))
    return lax.switch(which, [of(activations[n]) for n in distinct], scores)


def zero_tail(tiles, rows):
    """Zero the rows from `rows` on of tiles [64, 64] in shared memory, seen by wgmma.

    What lies behind a sample may be NaN, and 0·NaN is NaN. Act(0) = 0, so with both operands of the scores and of the
    products after them cleared, no mask is needed.
    """
    for tile in tiles:
        x = plgpu.load(tile, layout=plgpu.Layout.WGMMA)
        row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
        tile[...] = jnp.where(row < rows, x, jnp.zeros_like(x))


def meet(barrier):
    """All compute warpgroups wait for each other; what they wrote to shared memory is seen by wgmma and TMA."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def panel_columns(head, p):
    return head, pl.ds(hopper.PANEL * p, hopper.PANEL)


def acc_panel(acc, p, panels):
    """Columns of panel p of an accumulator [64, D]."""
    return acc.at[:, pl.ds(hopper.PANEL * p, hopper.PANEL)] if panels > 1 else acc


def stage(value, factor, staging):
    """Registers [64, D] times a constant into shared memory [D/64 or more, 64, 64]."""
    for p in range(value.shape[1] // hopper.PANEL):
        piece = value[:, hopper.PANEL * p : hopper.PANEL * (p + 1)]
        staging.at[p][...] = (piece if factor == 1 else piece * factor).astype(staging.dtype)


def store_tile(staging_tma, target_gmem, row, head, count):
    """Store the first `count` of 64 staged rows as one group of copies."""
    for p in range(staging_tma.shape[0]):
        hopper.store_rows(staging_tma.at[p], target_gmem, row, jnp.minimum(count, TILE), panel_columns(head, p))
    plgpu.commit_smem_to_gmem_group()


_SIZES = (32, 16, 8, 4, 2, 1)
LOAD_ROWS_ARRIVALS = len(_SIZES)


def load_rows(source_gmem, tile_tma, row, count, columns, barrier):
    """Load the first min(count, 64) > 0 rows into a tile [64, 64], and touch no other row of the source.

    Arrives LOAD_ROWS_ARRIVALS times at `barrier`.
    """

    def copy(offset, size):
        source = source_gmem.at[(pl.ds(row + offset, size), *columns)]
        plgpu.copy_gmem_to_smem(source, tile_tma.at[pl.ds(offset, size)], barrier)

    def full():
        copy(0, TILE)
        for _ in _SIZES[1:]:
            plgpu.barrier_arrive(barrier)

    def part():
        for size in _SIZES:
            lax.cond(
                (count & size) != 0,
                lambda size=size: copy(count & ~(2 * size - 1), size),
                lambda: plgpu.barrier_arrive(barrier),
            )

    lax.cond(count >= TILE, full, part)


def fill_zeros(staging, staging_tma, fills_gmem, targets, worker, workers):
    """Zero the rows of `targets` [N, H, D] that no item writes: gaps are dealt whole, the last one in tiles.

    staging, staging_tma: both views of a tile [64, 64] that is this warpgroup's own; every worker calls this.
    """
    heads, width = targets[0].shape[1:]
    gaps = fills_gmem.shape[0] - 1
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    zero = jnp.zeros((TILE, hopper.PANEL), staging.dtype)
    staging[...] = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    plgpu.commit_smem()

    def fill(row, count):
        def one_head(head, _):
            for target in targets:
                for p in range(width // hopper.PANEL):
                    hopper.store_rows(staging_tma, target, row, jnp.minimum(count, TILE), panel_columns(head, p))

        lax.fori_loop(0, heads, one_head, None)

    def gap(turn, _):
        row, rows = (fills_gmem[turn * workers + worker, c] for c in range(2))
        lax.fori_loop(0, tiles_of(rows), lambda i, _: fill(row + i * TILE, rows - i * TILE), None)

    lax.fori_loop(0, turns(gaps, worker, workers), gap, None)
    row, rows = (fills_gmem[gaps, c] for c in range(2))

    def last(turn, _):
        at = (turn * workers + worker) * TILE
        fill(row + at, rows - at)

    lax.fori_loop(0, turns(tiles_of(rows), worker, workers), last, None)
    plgpu.commit_smem_to_gmem_group()


def turns(total, worker, workers: int):
    """How many of `total` things a worker gets when they are dealt one by one."""
    return lax.div(total - worker + (workers - 1), jnp.int32(workers))


def tiles_of(rows):
    return lax.div(rows + (TILE - 1), jnp.int32(TILE))


def modulo(n, slots: int):
    """n % slots for n >= 0 and a power of two, in one instruction."""
    return n & (slots - 1)


def drain(count, slots: int, *barriers):
    """Wait for the last phase of each slot: every completed phase must have been waited for when a kernel ends.

    barriers: functions slot -> barrier.
    """

    def wait(n, _):
        for barrier in barriers:
            plgpu.barrier_wait(barrier(modulo(n, slots)))

    lax.fori_loop(jnp.maximum(count - slots, 0), count, wait, None)


def persistent(body, *, name, out_type, scratch, sms, interpret, operands, blocks_of: dict | None = None):
    """Run `body` as one block per SM with two compute warpgroups and one for copies.

    blocks_of: {axis: blocks}: as that many clusters of blocks instead.
    """
    if (used := hopper.shared_bytes(scratch)) > hopper.SHARED_MEMORY:
        raise ValueError(f"{name} takes {used} bytes of shared memory, sm_90 has {hopper.SHARED_MEMORY}")
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(sms,),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
        cluster=tuple((blocks_of or {}).values()),
        cluster_names=tuple(blocks_of or {}),
        interpret=interpret,
    )(*operands)


def like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
