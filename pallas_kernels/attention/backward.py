"""The backward of softmax attention as two Hopper kernels: dq, and dk with dv.

Both compute the scores again, so seven products stand for five useful ones, but nothing is exchanged between blocks of
the grid and no partial sum leaves a register: each gradient row is written once, in its final form.

dq: warpgroups hold 64 query rows each, and blocks of keys pass by. It also computes delta, the row sums of out ∘ dout,
for both kernels: the tile of `out` passes through the slots ahead of the keys.
dk, dv: warpgroups hold 64 keys each, and the queries of all heads that read them pass by, so the sum over a group of
heads has a fixed order.

Numerics: scores, probabilities and sums in float32; probabilities and score gradients are rounded to the operands'
dtype before their products. Deterministic: two runs give the same bits.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.attention import common
from pallas_kernels.attention.tables import BLOCK
from pallas_kernels.gdpa.schedule import dealt, dealt_item

WARPGROUPS = 2  # that compute: three accumulators leave no registers for a third
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24
FIXED_SLOTS = 2  # tiles that stay


def stream_slots(panels: int) -> int:
    """Blocks that pass by, as many as fit beside the tiles that stay."""
    return 3 if panels == 2 else 8


def attention_dq(work, tables, q, k, v, out, dout, statistics, *, scale: float, sms: int, interpret=None):
    """(dq, delta); delta [H, ...] float32 lies as the statistics do."""
    return common.persistent(
        functools.partial(_dq, work=work, scale=scale, sms=sms, interpret=interpret),
        name="attention_dq",
        out_type=[common.like(q), common.like(statistics)],
        scratch=dq_scratch(q.dtype, q.shape[2] // hopper.PANEL, interpret=interpret),
        sms=sms,
        threads=WARPGROUPS + 1,
        interpret=interpret,
        operands=(*tables, q, k, v, out, dout, statistics),
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


def _dq(*refs, held_smem, passing_smem, held_full, held_empty, full, empty, tail_full, work, scale, sms, interpret):
    *tables, q_gmem, k_gmem, v_gmem, out_gmem, dout_gmem, statistics_gmem, dq_gmem, delta_gmem = refs
    tables = work.tables(*tables)
    heads, width = q_gmem.shape[1:]
    group, panels, dtype = heads // k_gmem.shape[1], width // hopper.PANEL, q_gmem.dtype
    slots = full.shape[0]
    (held_tma, held_mma), (passing_tma, passing_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (held_smem, passing_smem)
    )
    to_log2 = scale * common.LOG2E
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    my_items = dealt(work.count(tables) * heads, sms, sm)
    zero = jnp.int32(0)

    def read_item(turn):
        """(item, head)"""
        index = dealt_item(turn, sms, sm)
        return work.item(tables, lax.div(index, jnp.int32(heads))), lax.rem(index, jnp.int32(heads))

    def blocks_seen(item, first, rows):
        return common.blocks_seen(item.position + first, rows, item.kv_rows, work.left, work.right)

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def load_item(turn, counters):
            *held_counts, count = counters
            item, head = read_item(turn)
            kv_head = lax.div(head, jnp.int32(group))
            for w in range(WARPGROUPS):
                slot, live = common.modulo(held_counts[w], FIXED_SLOTS), item.rows > w * BLOCK

                @pl.when(live)
                def _(w=w, slot=slot):
                    barrier = slot * WARPGROUPS + w

                    @pl.when(held_counts[w] >= FIXED_SLOTS)
                    def _():
                        plgpu.barrier_wait(held_empty.at[barrier])

                    target = held_tma.at[slot, w]
                    common.load_rows(q_gmem, target.at[0], item.q_row + w * BLOCK, head, held_full.at[barrier])
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

            def load(j, n):
                slot, row = next_slot(n), item.kv_row + j * BLOCK
                target, left = passing_tma.at[slot], item.kv_rows - j * BLOCK
                common.load_rows(v_gmem, target.at[1], row, kv_head, full.at[slot])
                common.load_block(k_gmem, target.at[0], row, left, kv_head, full.at[slot], tail_full)
                return n + 1

            return *held_counts, lax.fori_loop(*blocks_seen(item, 0, item.rows), load, count + 1)

        *held_counts, count = lax.fori_loop(0, my_items, load_item, (zero,) * (WARPGROUPS + 1))
        gaps = common.GapFiller(work.gaps, lambda i: work.gap(tables, i), sm, sms)
        for w, n in enumerate(held_counts):
            common.drain(n, FIXED_SLOTS, lambda slot, w=w: held_empty.at[slot * WARPGROUPS + w])
        common.drain(count, slots, lambda slot: empty.at[slot])
        gaps.fill(passing_mma.at[0, 0, 0], passing_tma.at[0, 0, 0], dq_gmem)

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        def item_body(turn, carry):
            item, head, held_count, count = carry
            item_next, head_next = read_item(jnp.minimum(turn + 1, my_items - 1))
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
                position = item.position + first
                at_statistics = head, pl.ds(item.statistics + first, BLOCK)
                lse = plgpu.load(statistics_gmem.at[at_statistics], layout=common.ROW, optimized=False)
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

                def all_blocks(dq_acc):
                    def step(j, _):
                        slot, w, at = common.hold(common.modulo(count_keys + j, slots), warpgroup, held_slot)
                        plgpu.barrier_wait(full.at[slot])

                        def score_gradients(s_acc, dp_acc):
                            for acc, i in ((s_acc, 0), (dp_acc, 1)):
                                for p in range(panels):
                                    keys = passing_mma.at[slot, i, p].transpose((1, 0))
                                    plgpu.wgmma(acc, held_mma.at[at, w, i, p], keys)
                            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running
                            p = jnp.exp2(s * to_log2 - common.rows_of(lse, s))
                            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                            ds = p * (dp - common.rows_of(delta, s))
                            return common.masked(ds, 0.0, position, j * BLOCK, item.kv_rows, work.left, work.right)

                        square = plgpu.ACC((BLOCK, BLOCK), jnp.float32)
                        ds = pl.run_scoped(score_gradients, square, square).astype(dtype)
                        for p in range(panels):
                            plgpu.wgmma(common.acc_panel(dq_acc, p, panels), ds, passing_mma.at[slot, 0, p])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])

                    lax.fori_loop(mine_begin, mine_end, step, None)
                    return dq_acc[...]

                dq = pl.run_scoped(all_blocks, plgpu.ACC((BLOCK, width), jnp.float32))
                # This warpgroup alone reads these queries: they make room for their gradient.
                staging = held_tma.at[held_slot, warpgroup, 0]
                common.stage(dq * scale, staging)
                common.store_block(staging, dq_gmem, item.q_row + first, head, rows)
                lax.fori_loop(count_keys + mine_end, count_keys + end, pass_over, None)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(held_empty.at[barrier])

            def idle():
                lax.fori_loop(count, count_keys + end, pass_over, None)

            lax.cond(rows > 0, active, idle)
            return item_next, head_next, held_count + (rows > 0).astype(jnp.int32), count_keys + end

        @pl.when(my_items > 0)
        def _():
            lax.fori_loop(0, my_items, item_body, (*read_item(zero), zero, zero))

        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < WARPGROUPS, compute, memory)


def attention_dkv(work, tables, q, k, v, dout, statistics, delta, *, scale: float, sms: int, interpret=None):
    """(dk, dv)."""
    return common.persistent(
        functools.partial(_dkv, work=work, scale=scale, sms=sms, interpret=interpret),
        name="attention_dkv",
        out_type=[common.like(k), common.like(v)],
        scratch=dkv_scratch(q.dtype, q.shape[2] // hopper.PANEL, interpret=interpret),
        sms=sms,
        threads=WARPGROUPS + 1,
        interpret=interpret,
        operands=(*tables, q, k, v, dout, statistics, delta),
    )


def dkv_scratch(dtype, panels: int, *, interpret) -> dict:
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    slots, tile = stream_slots(panels), (2, panels, BLOCK, hopper.PANEL)
    return dict(
        held_smem=buffer((FIXED_SLOTS, WARPGROUPS, *tile)),  # k, v
        passing_smem=buffer((slots, *tile)),  # q, dout
        statistics_smem=plgpu.SMEM((slots, 2, BLOCK), jnp.float32),  # statistics, delta
        held_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=FIXED_SLOTS * WARPGROUPS),
        held_empty=plgpu.Barrier(num_arrivals=1, num_barriers=FIXED_SLOTS * WARPGROUPS),
        full=plgpu.Barrier(num_arrivals=2 * panels + 2, num_barriers=slots),
        empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        tail_full=plgpu.Barrier(num_arrivals=common.tail_arrivals(panels)),
    )


def _dkv(
    *refs,
    held_smem,
    passing_smem,
    statistics_smem,
    held_full,
    held_empty,
    full,
    empty,
    tail_full,
    work,
    scale,
    sms,
    interpret,
):
    *tables, q_gmem, k_gmem, v_gmem, dout_gmem, statistics_gmem, delta_gmem, dk_gmem, dv_gmem = refs
    tables = work.tables(*tables)
    kv_heads, width = k_gmem.shape[1:]
    group, panels, dtype = q_gmem.shape[1] // kv_heads, width // hopper.PANEL, q_gmem.dtype
    slots = full.shape[0]
    (held_tma, held_mma), (passing_tma, passing_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (held_smem, passing_smem)
    )
    to_log2 = scale * common.LOG2E
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    my_items = dealt(work.kv_count(tables) * kv_heads, sms, sm)
    zero = jnp.int32(0)

    def read_item(turn):
        """(item, head of k)"""
        index = dealt_item(turn, sms, sm)
        return work.kv_item(tables, lax.div(index, jnp.int32(kv_heads))), lax.rem(index, jnp.int32(kv_heads))

    def blocks_seen(item, first, rows):
        return common.blocks_seen(item.position + first, rows, item.q_rows, work.right, work.left)

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def load_item(turn, counters):
            *held_counts, count = counters
            item, kv_head = read_item(turn)
            for w in range(WARPGROUPS):
                slot, live = common.modulo(held_counts[w], FIXED_SLOTS), item.rows > w * BLOCK

                @pl.when(live)
                def _(w=w, slot=slot):
                    barrier = slot * WARPGROUPS + w

                    @pl.when(held_counts[w] >= FIXED_SLOTS)
                    def _():
                        plgpu.barrier_wait(held_empty.at[barrier])

                    for i, source in enumerate((k_gmem, v_gmem)):
                        target, row = held_tma.at[slot, w, i], item.kv_row + w * BLOCK
                        common.load_rows(source, target, row, kv_head, held_full.at[barrier])

                held_counts[w] += live.astype(jnp.int32)
            begin, end = blocks_seen(item, 0, item.rows)

            def load_head(g, count):
                head = kv_head * group + g

                def load(j, n):
                    slot, first = common.modulo(n, slots), j * BLOCK

                    @pl.when(n >= slots)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    at = head, pl.ds(item.statistics + first, BLOCK)
                    for i, source in enumerate((statistics_gmem, delta_gmem)):
                        plgpu.copy_gmem_to_smem(source.at[at], statistics_smem.at[slot, i], full.at[slot])
                    left = item.q_rows - first
                    for i, (source, row) in enumerate(((q_gmem, item.q_row), (dout_gmem, item.out_row))):
                        target = passing_tma.at[slot, i]
                        common.load_block(source, target, row + first, left, head, full.at[slot], tail_full)
                    return n + 1

                return lax.fori_loop(begin, end, load, count)

            return *held_counts, lax.fori_loop(0, group, load_head, count)

        *held_counts, count = lax.fori_loop(0, my_items, load_item, (zero,) * (WARPGROUPS + 1))
        gaps = common.GapFiller(work.kv_gaps, lambda i: work.kv_gap(tables, i), sm, sms)
        for w, n in enumerate(held_counts):
            common.drain(n, FIXED_SLOTS, lambda slot, w=w: held_empty.at[slot * WARPGROUPS + w])
        common.drain(count, slots, lambda slot: empty.at[slot])
        gaps.fill(passing_mma.at[0, 0, 0], passing_tma.at[0, 0, 0], dk_gmem, dv_gmem)

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        def item_body(turn, carry):
            item, kv_head, held_count, count = carry
            item_next, head_next = read_item(jnp.minimum(turn + 1, my_items - 1))
            begin, end = blocks_seen(item, 0, item.rows)
            first = warpgroup * BLOCK
            rows = jnp.clip(item.rows - first, 0, BLOCK)
            count_end = count + (end - begin) * group

            def pass_over(n, _):
                slot = common.modulo(n, slots)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

            def active():
                held_slot = common.modulo(held_count, FIXED_SLOTS)
                barrier = held_slot * WARPGROUPS + warpgroup
                mine_begin, mine_end = blocks_seen(item, first, rows)
                position = item.position + first
                plgpu.barrier_wait(held_full.at[barrier])

                def all_blocks(dk_acc, dv_acc):
                    def one_head(g, _):
                        count_queries = count + g * (end - begin) - begin  # of query block 0
                        lax.fori_loop(count_queries + begin, count_queries + mine_begin, pass_over, None)

                        def step(j, _):
                            slot, w, at = common.hold(common.modulo(count_queries + j, slots), warpgroup, held_slot)
                            plgpu.barrier_wait(full.at[slot])

                            def score_gradients(s_acc, dp_acc):
                                for acc, i in ((s_acc, 0), (dp_acc, 1)):
                                    for p in range(panels):
                                        queries = passing_mma.at[slot, i, p].transpose((1, 0))
                                        plgpu.wgmma(acc, held_mma.at[at, w, i, p], queries)
                                lse = plgpu.load(statistics_smem.at[slot, 0], layout=common.COLUMN)
                                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running
                                p = jnp.exp2(s * to_log2 - common.rows_of(lse, s, 1))
                                p = common.masked(p, 0.0, position, j * BLOCK, item.q_rows, work.right, work.left)
                                narrow = p.astype(dtype)
                                for i in range(panels):
                                    acc = common.acc_panel(dv_acc, i, panels)
                                    plgpu.wgmma(acc, narrow, passing_mma.at[slot, 1, i])
                                delta = plgpu.load(statistics_smem.at[slot, 1], layout=common.COLUMN)
                                plgpu.commit_smem()  # these reads come before the copy that overwrites them
                                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=panels)  # dV is still running
                                return p * (dp - common.rows_of(delta, s, 1))

                            square = plgpu.ACC((BLOCK, BLOCK), jnp.float32)
                            ds = pl.run_scoped(score_gradients, square, square).astype(dtype)
                            for i in range(panels):
                                acc = common.acc_panel(dk_acc, i, panels)
                                plgpu.wgmma(acc, ds, passing_mma.at[slot, 0, i])
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])

                        lax.fori_loop(mine_begin, mine_end, step, None)
                        lax.fori_loop(count_queries + mine_end, count_queries + end, pass_over, None)

                    lax.fori_loop(0, group, one_head, None)
                    return dk_acc[...], dv_acc[...]

                acc = plgpu.ACC((BLOCK, width), jnp.float32)
                dk, dv = pl.run_scoped(all_blocks, acc, acc)
                # This warpgroup alone reads these keys and values: they make room for their gradients.
                for i, (value, target) in enumerate(((dk * scale, dk_gmem), (dv, dv_gmem))):
                    staging = held_tma.at[held_slot, warpgroup, i]
                    common.stage(value, staging)
                    common.store_block(staging, target, item.kv_row + first, kv_head, rows)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(held_empty.at[barrier])

            def idle():
                lax.fori_loop(count, count_end, pass_over, None)

            lax.cond(rows > 0, active, idle)
            return item_next, head_next, held_count + (rows > 0).astype(jnp.int32), count_end

        @pl.when(my_items > 0)
        def _():
            lax.fori_loop(0, my_items, item_body, (*read_item(zero), zero, zero))

        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < WARPGROUPS, compute, memory)
