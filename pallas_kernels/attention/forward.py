"""The forward kernel of softmax attention for Hopper.

XLA gathers keys and writes scores to device memory; here each byte of q and out moves once, and k and v once from
device memory and from L2 for each tile of queries that sees them.

One persistent block per SM works through (tile of queries, head) items. Each compute warpgroup has 64 query rows of a
tile and passes over the blocks of 64 keys that its rows see; one more warpgroup issues the copies. Blocks are counted
from the first key that the tile sees, and of a last block with a few keys only those are computed: 64 queries with a
window of 100 on both sides see 264 keys, not five blocks.

Numerics: scores, statistics and sums in float32, probabilities rounded to v's dtype before the second product,
unnormalised; exp2 and log2 are the hardware's approximations. Every row is written once: two runs give the same bits.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store  # no public name in JAX 0.11

from pallas_kernels import hopper
from pallas_kernels.attention import common
from pallas_kernels.attention.tables import BLOCK

LOWEST = -1e30  # a running maximum that any score exceeds; finite, so that nothing becomes ∞ - ∞


def attention_forward(
    work,
    tables,
    q,
    k,
    v,
    *,
    heads: common.Heads,
    warpgroups: int,
    scale: float,
    sms: int,
    interpret=None,
):
    """(out, statistics): statistics [H, ...] float32 hold log2 Σ exp2(log2(e) · scale · q·k) of every query row.

    work: which rows meet, see `work.py`; tables: what `work` reads. heads: of q, k and v in their arrays. warpgroups:
    how many compute, 2 to 4, and 4 only at head width 64.
    """
    panels = q.shape[2] // hopper.PANEL
    static = dict(work=work, heads=heads, warpgroups=warpgroups, scale=scale, sms=sms, interpret=interpret)
    return common.persistent(
        functools.partial(_kernel, **static),
        name="attention_forward",
        out_type=[
            jax.ShapeDtypeStruct((work.out_rows, heads.q, q.shape[2]), q.dtype),
            jax.ShapeDtypeStruct((heads.q, work.statistics_rows), jnp.float32),
        ],
        scratch=forward_scratch(q.dtype, panels, warpgroups, interpret=interpret),
        sms=sms,
        threads=warpgroups + 1,
        interpret=interpret,
        operands=(*tables, q, k, v),
        reduces=True,
    )


def forward_scratch(dtype, panels: int, warpgroups: int, *, interpret) -> dict:
    """Shared memory and barriers: two tiles of queries, and as many blocks of keys and values as fit beside them."""
    q_slots, kv_slots = 2, 8 // panels
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    kv = (kv_slots, panels, BLOCK, hopper.PANEL)
    return dict(
        q_smem=buffer((q_slots, warpgroups, panels, BLOCK, hopper.PANEL)),
        k_smem=buffer(kv),
        v_smem=buffer(kv),
        q_full=plgpu.Barrier(num_arrivals=panels, num_barriers=q_slots * warpgroups),
        q_empty=plgpu.Barrier(num_arrivals=1, num_barriers=q_slots * warpgroups),
        k_full=plgpu.Barrier(num_arrivals=panels, num_barriers=kv_slots),
        k_empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=kv_slots),
        v_full=plgpu.Barrier(num_arrivals=panels, num_barriers=kv_slots),
        v_empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=kv_slots),
        tail_full=plgpu.Barrier(num_arrivals=common.tail_arrivals(panels)),
    )


def _kernel(
    *refs,
    q_smem,
    k_smem,
    v_smem,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    tail_full,
    work,
    heads,
    warpgroups,
    scale,
    sms,
    interpret,
):
    *tables, q_gmem, k_gmem, v_gmem, out_gmem, statistics_gmem = refs
    tables = work.tables(*tables)
    width, dtype = q_gmem.shape[2], q_gmem.dtype
    panels = width // hopper.PANEL
    kv_slots = k_full.shape[0]
    q_slots = q_full.shape[0] // warpgroups
    (q_tma, q_mma), (k_tma, k_mma), (v_tma, v_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (q_smem, k_smem, v_smem)
    )
    to_log2 = scale * common.LOG2E
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    zero = jnp.int32(0)

    def over_tiles(body, carry):
        walk = work.walk(tables, sm, heads=heads.q, sms=sms, warpgroups=warpgroups)
        return common.over_tiles(walk, lambda place: work.item(place, warpgroups), body, carry)

    def origin_of(item):
        return common.first_seen(item.position, work.left)

    def blocks_seen(item, first, rows):
        span = item.position + first, rows, item.kv_rows, work.left, work.right
        return common.blocks_seen(*span, origin_of(item))

    def memory():
        plgpu.set_max_registers(common.registers(warpgroups)[1], action="decrease")

        def load_item(item, head, counters):
            *q_counts, kv_count = counters
            for w in range(warpgroups):
                slot, live = common.modulo(q_counts[w], q_slots), item.rows > w * BLOCK

                @pl.when(live)
                def _(w=w, slot=slot):
                    barrier = slot * warpgroups + w

                    @pl.when(q_counts[w] >= q_slots)
                    def _():
                        plgpu.barrier_wait(q_empty.at[barrier])

                    row = item.q_row + w * BLOCK
                    common.load_rows(q_gmem, q_tma.at[slot, w], row, heads.first_q + head, q_full.at[barrier])

                q_counts[w] += live.astype(jnp.int32)
            begin, end = blocks_seen(item, 0, item.rows)
            kv_head = lax.div(head, jnp.int32(heads.group))
            kv_row, kv_rows = item.kv_row + origin_of(item), item.kv_rows - origin_of(item)
            k_head, v_head = heads.first_k + kv_head, heads.first_v + kv_head

            def load(j, _):
                n, row = kv_count + j - begin, kv_row + j * BLOCK
                slot = common.modulo(n, kv_slots)

                @pl.when(n >= kv_slots)
                def _():
                    plgpu.barrier_wait(k_empty.at[slot])

                common.load_rows(k_gmem, k_tma.at[slot], row, k_head, k_full.at[slot])

                @pl.when(n >= kv_slots)
                def _():
                    plgpu.barrier_wait(v_empty.at[slot])

                left = kv_rows - j * BLOCK
                common.load_block(v_gmem, v_tma.at[slot], row, left, v_head, v_full.at[slot], tail_full)

            lax.fori_loop(begin, end, load, None)
            return *q_counts, kv_count + end - begin

        *q_counts, kv_count = over_tiles(load_item, (zero,) * (warpgroups + 1))
        gaps = common.GapFiller(work.gaps(tables), sm, sms)
        for w, n in enumerate(q_counts):
            common.drain(n, q_slots, lambda slot, w=w: q_empty.at[slot * warpgroups + w])
        common.drain(kv_count, kv_slots, lambda slot: k_empty.at[slot], lambda slot: v_empty.at[slot])
        gaps.fill(k_mma.at[0, 0], k_tma.at[0, 0], (out_gmem, 0, heads.q))

    def compute():
        plgpu.set_max_registers(common.registers(warpgroups)[0], action="increase")

        def attend(item, head, counters):
            q_count, kv_count = counters
            begin, end = blocks_seen(item, 0, item.rows)
            first = warpgroup * BLOCK
            rows = jnp.clip(item.rows - first, 0, BLOCK)

            def pass_over(j, _):
                slot = common.modulo(kv_count + j - begin, kv_slots)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_arrive(k_empty.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_arrive(v_empty.at[slot])

            def active():
                q_slot = common.modulo(q_count, q_slots)
                barrier = q_slot * warpgroups + warpgroup
                mine_begin, mine_end = blocks_seen(item, first, rows)
                position, origin = item.position + first, origin_of(item)
                lax.fori_loop(begin, mine_begin, pass_over, None)
                plgpu.barrier_wait(q_full.at[barrier])

                def all_blocks(out_acc):
                    def step(j, carry, keys: int):
                        highest, totals = carry
                        slot, w, at = hopper.hold(common.modulo(kv_count + j - begin, kv_slots), warpgroup, q_slot)
                        plgpu.barrier_wait(k_full.at[slot])

                        def scores(acc):
                            for p in range(panels):
                                k = k_mma.at[slot, p, pl.ds(0, keys)]
                                plgpu.wgmma(acc, q_mma.at[at, w, p], k.transpose((1, 0)))
                            return acc[...]

                        s = pl.run_scoped(scores, plgpu.ACC((BLOCK, keys), jnp.float32))
                        plgpu.barrier_arrive(k_empty.at[slot])
                        span = position, origin + j * BLOCK, item.kv_rows, work.left, work.right
                        s = common.masked(s, -jnp.inf, *span)
                        new = jnp.maximum(highest, jnp.max(s, axis=1) * to_log2)
                        shrink = jnp.exp2(highest - new)
                        p = jnp.exp2(s * to_log2 - common.rows_of(new, s))
                        part = functools.reduce(lax.add, (part for _, part in common.slices(p)))
                        totals = totals * common.rows_of(shrink, totals) + part
                        out = plgpu.wgmma_accumulator_load(out_acc, wait_n=None)
                        wgmma_accumulator_store(out_acc, out * common.rows_of(shrink, out))
                        p = common.filled_up(p.astype(dtype))
                        plgpu.barrier_wait(v_full.at[slot])
                        for i in range(panels):
                            plgpu.wgmma(common.acc_panel(out_acc, i, panels), p, v_mma.at[slot, i])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(v_empty.at[slot])
                        return new, totals

                    last = common.end_seen(position, rows, item.kv_rows, work.right) - origin
                    whole_end = common.whole_end(mine_begin, mine_end, last)
                    lowest = plgpu.layout_cast(jnp.full((BLOCK,), LOWEST, jnp.float32), common.ROW)
                    # Each thread adds up its own columns: sums over a row need threads to wait for each other.
                    zeros = jnp.zeros((BLOCK, common.SLICE), jnp.float32)
                    carry = lowest, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    carry = lax.fori_loop(mine_begin, whole_end, functools.partial(step, keys=BLOCK), carry)
                    narrow = functools.partial(step, keys=common.NARROW)
                    highest, totals = lax.fori_loop(whole_end, mine_end, narrow, carry)
                    return out_acc[...], highest, jnp.sum(totals, axis=1)

                out, highest, total = pl.run_scoped(all_blocks, plgpu.ACC((BLOCK, width), jnp.float32))
                row = item.statistics + first
                statistics_gmem[head, pl.ds(row, BLOCK)] = highest + jnp.log2(total)
                out = out * common.rows_of(1.0 / total, out)
                # This warpgroup alone reads these queries: they make room for their result.
                staging = q_tma.at[q_slot, warpgroup]
                common.stage(out, staging)
                common.store_block(staging, out_gmem, item.out_row + first, head, rows)
                lax.fori_loop(mine_end, end, pass_over, None)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty.at[barrier])

            def idle():
                lax.fori_loop(begin, end, pass_over, None)

            lax.cond(rows > 0, active, idle)
            return q_count + (rows > 0).astype(jnp.int32), kv_count + end - begin

        over_tiles(attend, (zero, zero))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < warpgroups, compute, memory)
