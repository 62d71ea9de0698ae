"""What the attention kernels share inside a kernel."""

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.attention.rotary import Angles
from pallas_kernels.attention.tables import BLOCK

LOG2E = math.log2(math.e)
NARROW = 16  # others of a short last block
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a tile in the accumulators' layout
COLUMN = plgpu.Layout.WGMMA.reduce(0)
REDUCTION = 16  # bytes of shared memory that a reduction to a scalar asks for; within warps it uses none


class Heads(NamedTuple):
    """How many heads queries and keys have, and where they begin: operands may be ranges of heads of one array."""

    q: int
    kv: int
    first_q: int = 0
    first_k: int = 0
    first_v: int = 0

    @property
    def group(self) -> int:
        """Query heads that read the same keys."""
        return self.q // self.kv

    @property
    def keys_beside_values(self) -> bool:
        """One array has both, and its gradient is one array too."""
        return self.first_k != self.first_v


def modulo(n, slots: int):
    """n % slots for n >= 0; a mask is one instruction where a signed remainder takes several."""
    return n & (slots - 1) if slots & (slots - 1) == 0 else lax.rem(n, jnp.int32(slots))


def blocks_of(rows):
    """⌈rows / BLOCK⌉ for rows >= 0."""
    return lax.shift_right_logical(rows + (BLOCK - 1), jnp.int32(BLOCK.bit_length() - 1))


def blocks_seen(first, rows, others, before: int | None, after: int | None, origin: Any = 0):
    """[begin, end) of the blocks of `others` rows that rows first … first + rows - 1 meet, counted from row `origin`.

    A row i meets i - before … i + after; None: no bound there. No row before `origin` may be met.
    """
    begin = 0 * first
    if before is not None:
        begin = lax.shift_right_logical(jnp.maximum(first - before - origin, 0), jnp.int32(6))
    return begin, jnp.maximum(blocks_of(end_seen(first, rows, others, after) - origin), begin)


def first_seen(first, before: int | None):
    """The first of the others that row `first` meets. Blocks counted from there are fewer, and fewer need masks."""
    return 0 * first if before is None else jnp.maximum(first - before, 0)


def whole_end(begin, end, last):
    """Behind the blocks of begin … end - 1 of which more than the first NARROW others are met; `last`: behind the last
    other that is met, counted as the blocks are."""
    return jnp.maximum(jnp.where(last > (end - 1) * BLOCK + NARROW, end, end - 1), begin)


def end_seen(first, rows, others, after: int | None):
    """Behind the last of `others` rows that rows first … first + rows - 1 meet."""
    return others if after is None else jnp.minimum(others, first + rows + after)


def _cuts(columns: int, first, other, others, before: int | None, after: int | None):
    """Do elements of a tile of BLOCK rows first … and columns other … lie before what their row meets; behind it?"""
    begins = None if before is None else other < first - before + (BLOCK - 1)
    ends = others - other < columns
    if after is not None:
        ends |= other > first + after - (columns - 1)
    return begins, ends


def masked(x, fill: float, first, other, others, before: int | None, after: int | None):
    """A tile of rows first … and columns other …, with `fill` where they don't meet.

    Columns from `others` on are outside the sample. Branches around each of the two comparisons where no element needs
    it.
    """
    begins, ends = _cuts(x.shape[1], first, other, others, before, after)
    if before is not None:
        x = lax.cond(begins, lambda x: _begins(x, fill, first, other, before), lambda x: x, x)
    return lax.cond(ends, lambda x: _ends(x, fill, first, other, others, after), lambda x: x, x)


def masked_slices(f, x, fill: float, first, other, others, before: int | None, after: int | None):
    """`masked` of f(column, slice) of all slices of x, which takes fewer registers."""
    begins, ends = _cuts(x.shape[1], first, other, others, before, after)

    def run(x, before: int | None, ends: bool):
        parts = []
        for column, part in slices(x):
            part = f(column, part)
            if ends:
                part = _ends(part, fill, first, other + column, others, after)
            parts.append(part if before is None else _begins(part, fill, first, other + column, before))
        return lax.concatenate(parts, 1)

    def begun(x):
        return lax.cond(ends, lambda x: run(x, None, True), lambda x: run(x, None, False), x)

    return begun(x) if before is None else lax.cond(begins, lambda x: run(x, before, True), begun, x)


def _iota(x, axis: int):
    return plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=plgpu.Layout.WGMMA)


def _begins(x, fill: float, first, other, before: int):
    return jnp.where(_iota(x, 1) >= _iota(x, 0) + (first - before - other), x, fill)


def _ends(x, fill: float, first, other, others, after: int | None):
    end = others - other
    if after is not None:
        end = jnp.minimum(_iota(x, 0) + (first + after + 1 - other), end)  # one comparison per element
    return jnp.where(_iota(x, 1) < end, x, fill)


SLICE = 8  # columns of an accumulator that lie in the same registers of all threads


def slices(*tiles):
    """(column, the tiles' SLICE columns from there) one after the other.

    An operation on a whole tile keeps each intermediate of all its elements in registers.
    """
    for column in range(0, tiles[0].shape[1], SLICE):
        yield column, *(x[:, column : column + SLICE] for x in tiles)


def filled_up(x):
    """The columns of a narrow tile and zeros: a product takes whole swizzled rows."""
    missing = BLOCK - x.shape[1]
    if not missing:
        return x
    zeros = plgpu.layout_cast(jnp.zeros((x.shape[0], missing), x.dtype), plgpu.Layout.WGMMA)
    return lax.concatenate([x, zeros], 1)


def rows_of(x, like, axis: int = 0):
    """A vector per row (axis 0) or per column (axis 1), spread over a tile."""
    return lax.broadcast_in_dim(x, like.shape, [axis])


def panel_columns(head, p: int):
    return head, pl.ds(hopper.PANEL * p, hopper.PANEL)


def acc_panel(acc, p: int, panels: int):
    """Columns of panel p of an accumulator [BLOCK, D]."""
    return acc.at[:, pl.ds(hopper.PANEL * p, hopper.PANEL)] if panels > 1 else acc


def load_rows(source_gmem, target_tma, row, head, barrier):
    """Load BLOCK rows into [panels, BLOCK, 64]; one arrival per panel."""
    for p in range(target_tma.shape[0]):
        plgpu.copy_gmem_to_smem(source_gmem.at[(pl.ds(row, BLOCK), *panel_columns(head, p))], target_tma.at[p], barrier)


def load_block(source_gmem, target_tma, row, rows, head, full, tail_full):
    """Load BLOCK rows into [panels, BLOCK, 64], zeros from `rows` on; one arrival per panel at `full`.

    tail_full: a barrier for `tail_arrivals(panels)`, which only the calling warpgroup uses.
    """
    panels = target_tma.shape[0]

    def tail():
        for p in range(panels):
            columns = panel_columns(head, p)
            hopper.load_rows_zero_tail(source_gmem, target_tma.at[p], row, rows, columns, tail_full)
        plgpu.barrier_wait(tail_full)
        for _ in range(panels):
            plgpu.barrier_arrive(full)

    lax.cond(rows >= BLOCK, lambda: load_rows(source_gmem, target_tma, row, head, full), tail)


def tail_arrivals(panels: int) -> int:
    return panels * hopper.tail_arrivals(BLOCK)


def stage(value, staging):
    """Registers [BLOCK, D] into shared memory [panels, BLOCK, 64], seen by TMA."""
    for p in range(staging.shape[0]):
        staging.at[p][...] = value[:, hopper.PANEL * p : hopper.PANEL * (p + 1)].astype(staging.dtype)
    plgpu.commit_smem()


def store_block(staging_tma, target_gmem, row, head, count):
    """Store the first `count` of BLOCK staged rows as one group of copies."""
    for p in range(staging_tma.shape[0]):
        hopper.store_rows(staging_tma.at[p], target_gmem, row, count, panel_columns(head, p))
    plgpu.commit_smem_to_gmem_group()


def drain(count, slots: int, *barriers):
    """Wait for the last phase of each slot: every completed phase must have been waited for when a kernel ends.

    barriers: functions slot -> barrier.
    """

    def wait(n, _):
        for barrier in barriers:
            plgpu.barrier_wait(barrier(modulo(n, slots)))

    lax.fori_loop(jnp.maximum(count - slots, 0), count, wait, None)


def registers(warpgroups: int) -> tuple[int, int]:
    """Registers of a thread of the warpgroups that compute, and of the one that issues copies.

    A block starts with the same number for every thread, a multiple of 8, and only moves registers about: more than
    there were at the start would be waited for in vain.
    """
    return {2: (232, 40), 3: (152, 56), 4: (112, 32)}[warpgroups]


def tables_and_angles(work, refs) -> tuple[Any, Any]:
    """The first operands of a kernel: the work's tables, and the angles if there are any."""
    count = len(work.tables._fields)
    return work.tables(*refs[:count]), Angles(*refs[count:]) if refs[count:] else None


def over_tiles(walk, item_of, body, carry):
    """body(item, head, carry) for each place of a walk."""

    def step(state):
        position, carry = state
        place = walk.read(position)
        carry = body(item_of(place), place.head, carry)
        return walk.next(position), carry

    return lax.while_loop(lambda state: walk.more(state[0]), step, (walk.first(), carry))[1]


def turns(total, worker, workers: int):
    """How many of `total` things a worker gets when they are dealt one by one."""
    return lax.div(total - worker + (workers - 1), jnp.int32(workers))


class GapFiller:
    """Zeros the rows that no item writes: gaps between samples are dealt whole, the last one in blocks.

    One warpgroup of every block makes it early, while others compute, and lets it `fill` when a tile of shared memory
    is free: where there are no gaps this costs nothing at the end.
    """

    def __init__(self, gaps, worker, workers: int):
        """gaps: see `tables.SpanGaps`."""
        self.gaps, self.worker, self.workers = gaps, worker, workers
        self.any = gaps.exist(worker, workers)

    def fill(self, tile, tile_tma, *targets):
        """tile, tile_tma: both views of [BLOCK, 64] in shared memory; targets: (array [N, H, D], first head, heads)."""

        @pl.when(self.any)
        def _():
            zero = jnp.zeros((BLOCK, hopper.PANEL), tile.dtype)
            tile[...] = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
            plgpu.commit_smem()

            def store(row, count):
                for target, first, heads in targets:

                    def one_head(head, _, target=target):
                        for p in range(target.shape[2] // hopper.PANEL):
                            hopper.store_rows(tile_tma, target, row, jnp.minimum(count, BLOCK), panel_columns(head, p))

                    lax.fori_loop(first, first + heads, one_head, None)

            def gap(turn, _):
                row, rows = self.gaps.read(turn * self.workers + self.worker)
                lax.fori_loop(0, blocks_of(rows), lambda i, _: store(row + i * BLOCK, rows - i * BLOCK), None)

            lax.fori_loop(0, turns(self.gaps.count - 1, self.worker, self.workers), gap, None)
            row, rows = self.gaps.read(jnp.int32(self.gaps.count - 1))

            def last(turn, _):
                at = (turn * self.workers + self.worker) * BLOCK
                store(row + at, rows - at)

            lax.fori_loop(0, turns(blocks_of(rows), self.worker, self.workers), last, None)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)


def persistent(body, *, name, out_type, scratch, sms, threads, interpret, operands, reduces: bool = False):
    """Run `body` as one block per SM; each of its threads is a warpgroup."""
    if (used := hopper.shared_bytes(scratch)) > hopper.SHARED_MEMORY:
        raise ValueError(f"{name} takes {used} bytes of shared memory, sm_90 has {hopper.SHARED_MEMORY}")
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(sms,),
        grid_names=("sm",),
        num_threads=threads,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=REDUCTION if reduces else 0
        ),
        kernel_name=name,
        interpret=interpret,
    )(*operands)


def like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
