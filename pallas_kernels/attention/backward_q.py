"""The gradient of queries in softmax attention, for Hopper.

The backward is two kernels, this one and `backward_kv`. Both compute the scores again, so seven products stand for five
useful ones, but nothing is exchanged between blocks of the grid.

Warpgroups hold 64 query rows each, and blocks of keys pass by. The kernel also computes delta, the row sums of
out ∘ dout, for both: the tile of `out` passes through the slots ahead of the keys.

Queries that all samples share get the sum over the samples: each block of the grid adds up the samples dealt to it in
registers, in a fixed order, and XLA adds the blocks.

Numerics: scores, probabilities and sums in float32, score gradients rounded to the operands' dtype before their
product. Deterministic: two runs give the same bits.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.attention import common, rotary
from pallas_kernels.attention.tables import BLOCK

WARPGROUPS = 2  # that compute: three accumulators leave no registers for a third
FIXED_SLOTS = 2  # tiles that stay


def stream_slots(panels: int) -> int:
    """Blocks that pass by, as many as fit beside the tiles that stay."""
    return 3 if panels == 2 else 8


def attention_dq(
    work,
    tables,
    q,
    k,
    v,
    out,
    dout,
    statistics,
    angles=None,
    *,
    heads: common.Heads,
    room: int | None = None,
    scale: float,
    sms: int,
    interpret=None,
):
    """(dq, delta); delta [H, ...] float32 lies as the statistics do.

    angles: of rotary encoding, an `Angles`: dq is turned back by them.

    room: heads of the array that dq is written to, from heads.first_q on; the others are left for `attention_dkv`.

    Where all samples share the queries, dq is float32 [work.splits, H, rows, D], to be summed and scaled.
    """
    if work.splits:
        dq = jax.ShapeDtypeStruct((work.splits, heads.q, q.shape[0], q.shape[2]), jnp.float32)
    else:
        dq = jax.ShapeDtypeStruct((q.shape[0], room or heads.q, q.shape[2]), q.dtype)
    static = dict(work=work, heads=heads, scale=scale, sms=sms, interpret=interpret)
    return common.persistent(
        functools.partial(_dq, **static),
        name="attention_dq",
        out_type=[dq, common.like(statistics)],
        scratch=dq_scratch(q.dtype, q.shape[2] // hopper.PANEL, interpret=interpret),
        sms=sms,
        threads=WARPGROUPS + 1,
        interpret=interpret,
        operands=(*tables, *(angles or ()), q, k, v, out, dout, statistics),
    )


def dq_scratch(dtype, panels: int, *, interpret) -> dict:
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    slots, tile = stream_slots(panels), (2, panels, BLOCK, hopper.PANEL)
    return dict(
        held_smem=buffer((FIXED_SLOTS, WARPGROUPS, *tile)),  # q, dout
        passing_smem=buffer((slots, *tile)),  # k, v; or out of both warpgroups
        held_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=FIXED_SLOTS * WARPGROUPS),
        held_empty=plgpu.Barrier(num_arrivals=1, num_barriers=FIXED_SLOTS * WARPGROUPS),
        full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=slots),
        empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        tail_full=plgpu.Barrier(num_arrivals=common.tail_arrivals(panels)),
    )


def _dq(
    *refs,
    held_smem,
    passing_smem,
    held_full,
    held_empty,
    full,
    empty,
    tail_full,
    work,
    heads,
    scale,
    sms,
    interpret,
):
    *tables, q_gmem, k_gmem, v_gmem, out_gmem, dout_gmem, statistics_gmem, dq_gmem, delta_gmem = refs
    tables, angles = common.tables_and_angles(work, tables)
    width, dtype = q_gmem.shape[2], q_gmem.dtype
    panels = width // hopper.PANEL
    slots = full.shape[0]
    (held_tma, held_mma), (passing_tma, passing_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (held_smem, passing_smem)
    )
    to_log2 = scale * common.LOG2E
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    zero = jnp.int32(0)
    shared = work.splits > 0  # one accumulator for the samples of a task
    combinations = work.tiles(WARPGROUPS) * heads.q if shared else 1
    tasks = common.turns(combinations * work.splits, sm, sms) if shared else 1

    def task_of(turn):
        """(function that goes through the tiles of a task, and of shared queries (split, tile, head) of their sum)."""
        if shared:
            index = sm + turn * sms
            split, rest = lax.div(index, jnp.int32(combinations)), lax.rem(index, jnp.int32(combinations))
            tile, head = lax.div(rest, jnp.int32(heads.q)), lax.rem(rest, jnp.int32(heads.q))
            walk, target = work.split_walk(tables, split, head, tile), (split, tile, head)
        else:
            walk, target = work.walk(tables, sm, heads=heads.q, sms=sms, warpgroups=WARPGROUPS), None
        return functools.partial(common.over_tiles, walk, lambda place: work.item(place, WARPGROUPS)), target

    def origin_of(item):
        return common.first_seen(item.position, work.left)

    def blocks_seen(item, first, rows):
        span = item.position + first, rows, item.kv_rows, work.left, work.right
        return common.blocks_seen(*span, origin_of(item))

    def memory():
        plgpu.set_max_registers(common.registers(WARPGROUPS)[1], action="decrease")

        def load_item(item, head, counters):
            *held_counts, count = counters
            kv_head = lax.div(head, jnp.int32(heads.group))
            q_head, k_head, v_head = heads.first_q + head, heads.first_k + kv_head, heads.first_v + kv_head
            for w in range(WARPGROUPS):
                slot, live = common.modulo(held_counts[w], FIXED_SLOTS), item.rows > w * BLOCK

                @pl.when(live)
                def _(w=w, slot=slot):
                    barrier = slot * WARPGROUPS + w

                    @pl.when(held_counts[w] >= FIXED_SLOTS)
                    def _():
                        plgpu.barrier_wait(held_empty.at[barrier])

                    target = held_tma.at[slot, w]
                    common.load_rows(q_gmem, target.at[0], item.q_row + w * BLOCK, q_head, held_full.at[barrier])
                    common.load_rows(dout_gmem, target.at[1], item.out_row + w * BLOCK, head, held_full.at[barrier])

                held_counts[w] += live.astype(jnp.int32)

            def next_slot(n):
                slot = common.modulo(n, slots)

                @pl.when(n >= slots)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                return slot

            slot = next_slot(count)
            for w in range(WARPGROUPS):
                common.load_rows(out_gmem, passing_tma.at[slot, w], item.out_row + w * BLOCK, head, full.at[slot])

            begin, end = blocks_seen(item, 0, item.rows)
            kv_row, kv_rows = item.kv_row + origin_of(item), item.kv_rows - origin_of(item)

            def load(j, _):
                row, left = kv_row + j * BLOCK, kv_rows - j * BLOCK
                slot = next_slot(count + 1 + j - begin)
                target = passing_tma.at[slot]
                common.load_rows(v_gmem, target.at[1], row, v_head, full.at[slot])
                common.load_block(k_gmem, target.at[0], row, left, k_head, full.at[slot], tail_full)

            lax.fori_loop(begin, end, load, None)
            return *held_counts, count + 1 + end - begin

        def load_task(turn, counters):
            over_tiles, _ = task_of(turn)
            return over_tiles(load_item, counters)

        *held_counts, count = lax.fori_loop(0, tasks, load_task, (zero,) * (WARPGROUPS + 1))
        gaps = None if shared else common.GapFiller(work.gaps(tables), sm, sms)
        for w, n in enumerate(held_counts):
            common.drain(n, FIXED_SLOTS, lambda slot, w=w: held_empty.at[slot * WARPGROUPS + w])
        common.drain(count, slots, lambda slot: empty.at[slot])
        if gaps:
            gaps.fill(passing_mma.at[0, 0, 0], passing_tma.at[0, 0, 0], (dq_gmem, heads.first_q, heads.q))

    def compute():
        plgpu.set_max_registers(common.registers(WARPGROUPS)[0], action="increase")

        def item_body(shared_acc, item, head, counters):
            held_count, count = counters
            begin, end = blocks_seen(item, 0, item.rows)
            first = warpgroup * BLOCK
            rows = jnp.clip(item.rows - first, 0, BLOCK)
            count_keys = count + 1 - begin  # of key block 0

            def pass_over(n, _):
                slot = common.modulo(n, slots)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

            def active():
                held_slot = common.modulo(held_count, FIXED_SLOTS)
                barrier = held_slot * WARPGROUPS + warpgroup
                mine_begin, mine_end = blocks_seen(item, first, rows)
                position, origin = item.position + first, origin_of(item)
                at_statistics = head, pl.ds(item.statistics + first, BLOCK)
                lse = plgpu.load(statistics_gmem.at[at_statistics], layout=common.ROW, optimized=False)
                # They are on their way while the blocks pass by.
                turns = None if angles is None else rotary.load_tile(angles, item.q_row + first)
                plgpu.barrier_wait(held_full.at[barrier])
                slot = common.modulo(count, slots)
                plgpu.barrier_wait(full.at[slot])
                delta = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), common.ROW)
                for p in range(panels):
                    o, do = (
                        plgpu.load(x, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                        for x in (passing_mma.at[slot, warpgroup, p], held_mma.at[held_slot, warpgroup, 1, p])
                    )
                    delta += jnp.sum(o * do, axis=1)
                plgpu.commit_smem()  # these reads come before the copy that overwrites them
                plgpu.barrier_arrive(empty.at[slot])
                row = plgpu.layout_cast(lax.iota(jnp.int32, BLOCK), common.ROW)
                delta_gmem[at_statistics] = jnp.where(row < rows, delta, 0.0)
                lax.fori_loop(count_keys + begin, count_keys + mine_begin, pass_over, None)

                def add_blocks(dq_acc):
                    def step(j, _, keys: int):
                        slot, w, at = hopper.hold(common.modulo(count_keys + j, slots), warpgroup, held_slot)
                        plgpu.barrier_wait(full.at[slot])

                        def score_gradients(s_acc, dp_acc):
                            for acc, i in ((s_acc, 0), (dp_acc, 1)):
                                for p in range(panels):
                                    part = passing_mma.at[slot, i, p, pl.ds(0, keys)]
                                    plgpu.wgmma(acc, held_mma.at[at, w, i, p], part.transpose((1, 0)))
                            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running
                            p = jnp.exp2(s * to_log2 - common.rows_of(lse, s))
                            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                            ds = p * (dp - common.rows_of(delta, s))
                            span = position, origin + j * BLOCK, item.kv_rows, work.left, work.right
                            return common.masked(ds, 0.0, *span)

                        acc = plgpu.ACC((BLOCK, keys), jnp.float32)
                        ds = common.filled_up(pl.run_scoped(score_gradients, acc, acc).astype(dtype))
                        for p in range(panels):
                            plgpu.wgmma(common.acc_panel(dq_acc, p, panels), ds, passing_mma.at[slot, 0, p])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    last = common.end_seen(position, rows, item.kv_rows, work.right) - origin
                    whole_end = common.whole_end(mine_begin, mine_end, last)
                    lax.fori_loop(mine_begin, whole_end, functools.partial(step, keys=BLOCK), None)
                    lax.fori_loop(whole_end, mine_end, functools.partial(step, keys=common.NARROW), None)

                def pass_over_rest():
                    lax.fori_loop(count_keys + mine_end, count_keys + end, pass_over, None)

                if shared:
                    add_blocks(shared_acc)
                    pass_over_rest()
                else:

                    def alone(acc):
                        add_blocks(acc)
                        return acc[...]

                    dq = pl.run_scoped(alone, acc_type)
                    # This warpgroup alone reads these queries: they make room for their gradient.
                    staging = held_tma.at[held_slot, warpgroup, 0]
                    dq = dq * scale
                    if turns is not None:
                        dq = rotary.turn_back(dq, turns)
                    common.stage(dq, staging)
                    common.store_block(staging, dq_gmem, item.q_row + first, heads.first_q + head, rows)
                    pass_over_rest()
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(held_empty.at[barrier])

            def idle():
                lax.fori_loop(count, count_keys + end, pass_over, None)

            lax.cond(rows > 0, active, idle)
            return held_count + (rows > 0).astype(jnp.int32), count_keys + end

        def task(turn, counters):
            over_tiles, target = task_of(turn)

            def all_items(shared_acc):
                counters_after = over_tiles(functools.partial(item_body, shared_acc), counters)
                if not shared:
                    return counters_after
                split, tile, head = target
                row = (tile * WARPGROUPS + warpgroup) * BLOCK

                @pl.when(row < q_gmem.shape[0])
                def _():
                    dq_gmem[split, head, pl.ds(row, BLOCK)] = shared_acc[...]

                return counters_after

            return pl.run_scoped(all_items, acc_type) if shared else all_items(None)

        lax.fori_loop(0, tasks, task, (zero, zero))
        plgpu.wait_smem_to_gmem(0)

    acc_type = plgpu.ACC((BLOCK, width), jnp.float32)
    lax.cond(warpgroup < WARPGROUPS, compute, memory)
