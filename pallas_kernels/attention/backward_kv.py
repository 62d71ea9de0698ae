"""The gradients of keys and values in softmax attention, for Hopper; see `backward_q` for the other half.

Warpgroups hold 64 keys each, and the queries of all heads that read them pass by, so the sum over a group of heads has
a fixed order and no partial sum leaves a register: each gradient row is written once, in its final form.

Numerics: scores, probabilities and sums in float32; probabilities and score gradients are rounded to the operands'
dtype before their products. Deterministic: two runs give the same bits.
"""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.attention import common, rotary
from pallas_kernels.attention.backward_q import (
    FIXED_SLOTS,
    WARPGROUPS,
    stream_slots,
)
from pallas_kernels.attention.tables import BLOCK

ALIGNED = 4  # float32 values in 16 bytes: TMA's first address must be a multiple, also inside an array


def attention_dkv(
    work,
    tables,
    q,
    k,
    v,
    dout,
    statistics,
    delta,
    angles=None,
    *,
    heads: common.Heads,
    target: Any = None,
    scale: float,
    sms: int,
    interpret=None,
):
    """[dk, dv], or of one array that has k and v the gradient; angles as for `attention_dq`.

    target: a reference to such an array, whose heads of k and v are overwritten; then nothing is returned.
    """
    static = dict(work=work, heads=heads, scale=scale, sms=sms, interpret=interpret)
    gradients = [common.like(v)] if heads.keys_beside_values else [common.like(k), common.like(v)]
    return common.persistent(
        functools.partial(_dkv, **static),
        name="attention_dkv",
        out_type=[] if target is not None else gradients,
        scratch=dkv_scratch(q.dtype, q.shape[2] // hopper.PANEL, interpret=interpret),
        sms=sms,
        threads=WARPGROUPS + 1,
        interpret=interpret,
        operands=(*tables, *(angles or ()), q, k, v, dout, statistics, delta, *([] if target is None else [target])),
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
        delta_full=plgpu.Barrier(num_arrivals=1),
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
    delta_full,
    work,
    heads,
    scale,
    sms,
    interpret,
):
    refs, targets = (refs[:-1], refs[-1:] * 2) if heads.keys_beside_values else (refs[:-2], refs[-2:])
    *tables, q_gmem, k_gmem, v_gmem, dout_gmem, statistics_gmem, delta_gmem = refs
    first_heads = heads.first_k, heads.first_v
    tables, angles = common.tables_and_angles(work, tables)
    group, width, dtype = heads.group, q_gmem.shape[2], q_gmem.dtype
    panels = width // hopper.PANEL
    slots = full.shape[0]
    (held_tma, held_mma), (passing_tma, passing_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (held_smem, passing_smem)
    )
    to_log2 = scale * common.LOG2E
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    zero = jnp.int32(0)

    def over_tiles(body, carry):
        walk = work.kv_walk(tables, sm, heads=heads.kv, sms=sms, warpgroups=WARPGROUPS)
        return common.over_tiles(walk, work.kv_item, body, carry)

    def origin_of(item):
        """Where blocks of queries begin, a multiple of ALIGNED. The sample's start at head width 128: there the code
        for a short last block lets registers spill, which costs more than it saves."""
        return common.first_seen(item.position, work.right) & -ALIGNED if panels == 1 else zero

    def blocks_seen(item, first, rows):
        span = item.position + first, rows, item.q_rows, work.right, work.left
        return common.blocks_seen(*span, origin_of(item))

    def memory():
        plgpu.set_max_registers(common.registers(WARPGROUPS)[1], action="decrease")

        def load_statistics(slot, at, left):
            statistics, delta = (statistics_smem.at[slot, i] for i in range(2))
            plgpu.copy_gmem_to_smem(statistics_gmem.at[at], statistics, full.at[slot])

            def whole():
                plgpu.copy_gmem_to_smem(delta_gmem.at[at], delta, full.at[slot])

            def tail():  # behind the sample's deltas may lie NaN, and 0·NaN is NaN
                plgpu.copy_gmem_to_smem(delta_gmem.at[at], delta, delta_full)
                plgpu.barrier_wait(delta_full)
                row = plgpu.layout_cast(lax.iota(jnp.int32, BLOCK), common.ROW)
                delta[...] = jnp.where(row < left, plgpu.load(delta, layout=common.ROW), 0.0)
                plgpu.commit_smem()
                plgpu.barrier_arrive(full.at[slot])

            lax.cond(left >= BLOCK, whole, tail)

        def load_item(item, kv_head, counters):
            *held_counts, count = counters
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
                        common.load_rows(source, target, row, first_heads[i] + kv_head, held_full.at[barrier])

                held_counts[w] += live.astype(jnp.int32)
            begin, end = blocks_seen(item, 0, item.rows)
            origin = origin_of(item)

            def load_head(g, count):
                head = kv_head * group + g

                def load(j, _):
                    n, first = count + j - begin, origin + j * BLOCK
                    slot = common.modulo(n, slots)

                    @pl.when(n >= slots)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    left = item.q_rows - first
                    load_statistics(slot, (head, pl.ds(item.statistics + first, BLOCK)), left)
                    sources = (q_gmem, item.q_row, heads.first_q + head), (dout_gmem, item.out_row, head)
                    for i, (source, row, source_head) in enumerate(sources):
                        target = passing_tma.at[slot, i]
                        common.load_block(source, target, row + first, left, source_head, full.at[slot], tail_full)

                lax.fori_loop(begin, end, load, None)
                return count + end - begin

            return *held_counts, lax.fori_loop(0, group, load_head, count)

        *held_counts, count = over_tiles(load_item, (zero,) * (WARPGROUPS + 1))
        gaps = common.GapFiller(work.kv_gaps(tables), sm, sms)
        for w, n in enumerate(held_counts):
            common.drain(n, FIXED_SLOTS, lambda slot, w=w: held_empty.at[slot * WARPGROUPS + w])
        common.drain(count, slots, lambda slot: empty.at[slot])
        filled = [(target, first, heads.kv) for target, first in zip(targets, first_heads, strict=True)]
        gaps.fill(passing_mma.at[0, 0, 0], passing_tma.at[0, 0, 0], *filled)

    def compute():
        plgpu.set_max_registers(common.registers(WARPGROUPS)[0], action="increase")

        def item_body(item, kv_head, counters):
            held_count, count = counters
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
                position, origin = item.position + first, origin_of(item)
                last = common.end_seen(position, rows, item.q_rows, work.left) - origin
                whole_end = common.whole_end(mine_begin, mine_end, last) if panels == 1 else mine_end
                plgpu.barrier_wait(held_full.at[barrier])

                def all_blocks(dk_acc, dv_acc):
                    def one_head(g, _):
                        count_queries = count + g * (end - begin) - begin  # of query block 0
                        lax.fori_loop(count_queries + begin, count_queries + mine_begin, pass_over, None)

                        def step(j, _, queries: int):
                            slot, w, at = hopper.hold(common.modulo(count_queries + j, slots), warpgroup, held_slot)
                            plgpu.barrier_wait(full.at[slot])

                            def statistic(which, column, like):
                                """The queries' statistics or deltas, spread over a few columns."""
                                part = statistics_smem.at[slot, which, pl.ds(column, common.SLICE)]
                                return common.rows_of(plgpu.load(part, layout=common.COLUMN), like, 1)

                            def score_gradients(s_acc, dp_acc):
                                for acc, i in ((s_acc, 0), (dp_acc, 1)):
                                    for p in range(panels):
                                        part = passing_mma.at[slot, i, p, pl.ds(0, queries)]
                                        plgpu.wgmma(acc, held_mma.at[at, w, i, p], part.transpose((1, 0)))
                                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running

                                def probabilities(column, part):
                                    return jnp.exp2(part * to_log2 - statistic(0, column, part))

                                span = position, origin + j * BLOCK, item.q_rows, work.right, work.left
                                p = common.masked_slices(probabilities, s, 0.0, *span)
                                narrow = common.filled_up(p.astype(dtype))
                                for i in range(panels):
                                    acc = common.acc_panel(dv_acc, i, panels)
                                    plgpu.wgmma(acc, narrow, passing_mma.at[slot, 1, i])
                                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=panels)  # dV is still running
                                parts = [
                                    (part * (dp_part - statistic(1, column, part))).astype(dtype)
                                    for column, part, dp_part in common.slices(p, dp)
                                ]
                                plgpu.commit_smem()  # these reads come before the copy that overwrites them
                                return common.filled_up(lax.concatenate(parts, 1))

                            acc = plgpu.ACC((BLOCK, queries), jnp.float32)
                            ds = pl.run_scoped(score_gradients, acc, acc)
                            for i in range(panels):
                                acc = common.acc_panel(dk_acc, i, panels)
                                plgpu.wgmma(acc, ds, passing_mma.at[slot, 0, i])
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])

                        lax.fori_loop(mine_begin, whole_end, functools.partial(step, queries=BLOCK), None)
                        if panels == 1:
                            lax.fori_loop(whole_end, mine_end, functools.partial(step, queries=common.NARROW), None)
                        lax.fori_loop(count_queries + mine_end, count_queries + end, pass_over, None)

                    one_head(0, None) if group == 1 else lax.fori_loop(0, group, one_head, None)
                    return dk_acc[...], dv_acc[...]

                acc = plgpu.ACC((BLOCK, width), jnp.float32)
                dk, dv = pl.run_scoped(all_blocks, acc, acc)
                row = item.kv_row + first
                turns = None if angles is None else rotary.load_tile(angles, row)

                def store(i, value):
                    # This warpgroup alone reads these keys and values: they make room for their gradients.
                    staging = held_tma.at[held_slot, warpgroup, i]
                    common.stage(value, staging)
                    common.store_block(staging, targets[i], row, first_heads[i] + kv_head, rows)

                store(1, dv)  # while the angles are on their way
                dk = dk * scale
                store(0, dk if turns is None else rotary.turn_back(dk, turns))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(held_empty.at[barrier])

            def idle():
                lax.fori_loop(count, count_end, pass_over, None)

            lax.cond(rows > 0, active, idle)
            return held_count + (rows > 0).astype(jnp.int32), count_end

        over_tiles(item_body, (zero, zero))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < WARPGROUPS, compute, memory)
