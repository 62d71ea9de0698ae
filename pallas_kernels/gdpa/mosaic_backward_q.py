"""GDPA's dq as one Hopper kernel, for keys of any length; it can finish the gradient behind a norm.

Two warpgroups hold 64 query rows each and pass over the keys. Keys and values stay in shared memory while an item's
query tiles pass where they fit, otherwise they stream past each pair of tiles. Behind a norm, which spans all heads,
the blocks of one item's heads form a cluster and exchange two sums per row.

Numerics: scores, slopes and sums in float32; score gradients are rounded to the inputs' dtype before their product.
Deterministic: two runs give the same bits.
"""

import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.gdpa import mosaic_backward_common as common
from pallas_kernels.gdpa.exchange import AXIS, ROWS, Exchange, exchange_barriers, exchange_memory
from pallas_kernels.gdpa.mosaic_backward_common import COMPUTE, TILE
from pallas_kernels.schedule import Schedule, dealt, dealt_item

KV_BLOCK = 128  # keys of one step
BEHIND_NORM_KV_BLOCK = {64: 128, 128: 64}  # the faster one of both, by the head's width
# More clusters than run at once: how many blocks of a cluster's size an H100 can hold differs from card to card, and a
# second wave of long ones would double the time. Short ones are dealt by the hardware.
CLUSTERS_PER_PLACE = 16


class BehindNorm(NamedTuple):
    """What the gradient of a LayerNorm's operand x needs, where q is the norm's result and also a residual beside GDPA.

    dx = factor (d - mean(d) - q mean(d q)) + residual, with d = dq + do and means over all heads of a row.

    factor: [N] float32, what the norm multiplied each row by. residual: [N, H, D], gradient of x from elsewhere.
    """

    factor: Any
    residual: Any


def gdpa_dq(
    q,
    k,
    v,
    do,
    schedule: Schedule,
    *,
    activation: tuple[str, ...],
    scale: float,
    post_scale: float,
    sms: int,
    behind_norm: BehindNorm | None = None,
    interpret=None,
):
    """dq, or the gradient behind the norm. The schedule is that of the queries, cut into chunks of any length: items
    are query row, query rows, key row, key rows.

    behind_norm: needs at most 8 heads.
    """
    heads, width = q.shape[1:]
    kv_block = BEHIND_NORM_KV_BLOCK[width] if behind_norm else KV_BLOCK
    scratch = dq_scratch(
        q.dtype,
        width // hopper.PANEL,
        kv_block=kv_block,
        behind_norm=behind_norm is not None,
        interpret=interpret,
    )
    clusters = min(schedule.items.shape[0], CLUSTERS_PER_PLACE * max(sms // heads, 1))
    blocks = clusters if behind_norm else sms
    body = functools.partial(
        _dq,
        activations=common.kernel_activations(activation, scale, post_scale, q.dtype),
        names=activation,
        kv_block=kv_block,
        sms=blocks,
        interpret=interpret,
    )
    run = functools.partial(common.persistent, body, scratch=scratch, sms=blocks, interpret=interpret)
    operands = (*schedule, q, k, v, do)
    if behind_norm is None:
        return run(name="gdpa_dq", out_type=common.like(q), operands=operands)
    sums = exchange_memory(clusters=clusters, warpgroups=COMPUTE, blocks=heads, values=2, rows=TILE)
    factor = jnp.pad(behind_norm.factor, (0, TILE))  # a tile reads its rows beyond the sample too
    return run(
        name="gdpa_dq_behind_norm",
        out_type=[common.like(q), sums],
        blocks_of={AXIS: heads},
        operands=(*operands, factor, behind_norm.residual),
    )[0]


def dq_scratch(dtype, panels: int, *, kv_block: int = KV_BLOCK, behind_norm: bool = False, interpret) -> dict:
    kv_slots, q_slots = (256 // kv_block, 1) if panels == 2 else (512 // kv_block, 2)
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    held, stream = (COMPUTE, q_slots, panels, TILE, hopper.PANEL), (kv_slots, panels, kv_block, hopper.PANEL)
    scratch = dict(
        q_smem=buffer(held),
        do_smem=buffer(held),
        k_smem=buffer(stream),
        v_smem=buffer(stream),
        out_smem=buffer((COMPUTE, panels, TILE, hopper.PANEL)),
        q_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=COMPUTE * q_slots),
        q_empty=plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE * q_slots),
        kv_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=kv_slots),
        kv_empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=kv_slots),
        tail_zeroed=plgpu.Barrier(num_arrivals=COMPUTE),
    )
    if behind_norm:
        scratch |= dict(
            residual_full=plgpu.Barrier(num_arrivals=panels, num_barriers=COMPUTE),
            out_empty=plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE),
            sums_full=exchange_barriers(COMPUTE),
        )
    return scratch


def _dq(
    items_gmem,
    fills_gmem,
    counts_gmem,
    q_gmem,
    k_gmem,
    v_gmem,
    do_gmem,
    *rest,
    q_smem,
    do_smem,
    k_smem,
    v_smem,
    out_smem,
    q_full,
    q_empty,
    kv_full,
    kv_empty,
    tail_zeroed,
    residual_full: Any = None,
    out_empty: Any = None,
    sums_full: Any = None,
    activations,
    names,
    kv_block,
    sms,
    interpret,
):
    heads, width = q_gmem.shape[1:]
    group, panels, dtype = heads // k_gmem.shape[1], width // hopper.PANEL, q_gmem.dtype
    kv_slots, q_slots = kv_full.shape[0], q_full.shape[0] // COMPUTE
    (q_tma, q_mma), (do_tma, do_mma), (k_tma, k_mma), (v_tma, v_mma), (out_tma, out_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (q_smem, do_smem, k_smem, v_smem, out_smem)
    )
    behind_norm = len(rest) > 1
    every: Any = rest if behind_norm else (None, None, *rest, None)
    factor_gmem, residual_gmem, dq_gmem, sums_gmem = every
    _, slope_post = common.posts(activations)
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    ranks = heads if behind_norm else 1  # blocks that share an item, each with one head
    rank = lax.axis_index(AXIS) if behind_norm else jnp.int32(0)
    my_items = dealt(counts_gmem[0] * (heads // ranks), sms, sm)
    zero = jnp.int32(0)

    def read_item(turn):
        """(query row, query rows, key row, keys, head, pairs of query tiles, blocks of keys, do they stay)."""
        index = dealt_item(turn, sms, sm)
        row, head = (index, rank) if behind_norm else (lax.div(index, heads), lax.rem(index, heads))
        q_row, q_rows, kv_row, kv_rows = (items_gmem[row, c] for c in range(4))
        pairs = lax.div(q_rows + (COMPUTE * TILE - 1), COMPUTE * TILE)
        blocks = lax.div(kv_rows + (kv_block - 1), kv_block)
        return q_row, q_rows, kv_row, kv_rows, head, pairs, blocks, blocks <= kv_slots

    def memory():
        plgpu.set_max_registers(common.MEMORY_REGISTERS, action="decrease")

        def load_item(turn, counters):
            q_row, q_rows, kv_row, _, head, pairs, blocks, resident = read_item(turn)

            def load_pair(pair, counters):
                *q_counts, kv_count = counters
                for w in range(COMPUTE):
                    offset = (pair * COMPUTE + w) * TILE
                    slot = common.modulo(q_counts[w], q_slots)

                    @pl.when(offset < q_rows)
                    def _(w=w, offset=offset, slot=slot, n=q_counts[w]):
                        barrier = w * q_slots + slot

                        @pl.when(n >= q_slots)
                        def _():
                            plgpu.barrier_wait(q_empty.at[barrier])

                        for p in range(panels):
                            for source, target in ((q_gmem, q_tma), (do_gmem, do_tma)):
                                rows = pl.ds(q_row + offset, TILE)
                                plgpu.copy_gmem_to_smem(
                                    source.at[(rows, *common.panel_columns(head, p))],
                                    target.at[w, slot, p],
                                    q_full.at[barrier],
                                )

                @pl.when((pair == 0) | ~resident)
                def _():
                    def load_block(j, _):
                        slot = common.modulo(kv_count + j, kv_slots)

                        @pl.when(kv_count + j >= kv_slots)
                        def _():
                            plgpu.barrier_wait(kv_empty.at[slot])

                        for p in range(panels):
                            for source, target in ((k_gmem, k_tma), (v_gmem, v_tma)):
                                rows = pl.ds(kv_row + j * kv_block, kv_block)
                                columns = common.panel_columns(lax.div(head, group), p)
                                plgpu.copy_gmem_to_smem(
                                    source.at[(rows, *columns)], target.at[slot, p], kv_full.at[slot]
                                )

                    lax.fori_loop(0, blocks, load_block, None)

                for w in range(COMPUTE):
                    offset = (pair * COMPUTE + w) * TILE
                    if behind_norm:

                        @pl.when(offset < q_rows)
                        def _(w=w, offset=offset, n=q_counts[w]):
                            @pl.when(n > 0)
                            def _():
                                plgpu.barrier_wait(out_empty.at[w])

                            for p in range(panels):
                                plgpu.copy_gmem_to_smem(
                                    residual_gmem.at[(pl.ds(q_row + offset, TILE), *common.panel_columns(head, p))],
                                    out_tma.at[w, p],
                                    residual_full.at[w],
                                )

                    q_counts[w] += (offset < q_rows).astype(jnp.int32)

                last = (pair == pairs - 1) | ~resident
                return *q_counts, jnp.where(last, kv_count + blocks, kv_count)

            return lax.fori_loop(0, pairs, load_pair, counters)

        *q_counts, kv_count = lax.fori_loop(0, my_items, load_item, (zero,) * (COMPUTE + 1))
        for w, n in enumerate(q_counts):
            common.drain(n, q_slots, lambda slot, w=w: q_empty.at[w * q_slots + slot])
        common.drain(kv_count, kv_slots, lambda slot: kv_empty.at[slot])

    def compute():
        plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")

        def zero_kv_tail(slot, left):
            """Zero the rows of a block beyond the sample, one warpgroup K's and one V's."""

            @pl.when(left < kv_block)
            def _():
                for half in range(kv_block // TILE):
                    for w, tensor in enumerate((k_mma, v_mma)):

                        @pl.when((warpgroup == w) & (left < TILE * (half + 1)))
                        def _(half=half, tensor=tensor):
                            rows = pl.ds(TILE * half, TILE)
                            common.zero_tail([tensor.at[slot, p, rows] for p in range(panels)], left - TILE * half)

                common.meet(tail_zeroed)

        def tile(ref):
            return plgpu.load(ref, layout=plgpu.Layout.WGMMA)

        def slices(x):
            return [x[:, c : c + hopper.SLICE] for c in range(0, x.shape[1], hopper.SLICE)]

        def along(values, x):
            return lax.broadcast_in_dim(values, x.shape, [0])

        def of_norm(dq, w, at):
            """Slices of the gradient d that the norm's result gets, those of the result, and both row sums."""
            gradients, results, total, product = [], [], 0.0, 0.0
            for p in range(panels):
                columns = dq[:, hopper.PANEL * p : hopper.PANEL * (p + 1)]
                both = tile(do_mma.at[w, at, p]), tile(q_mma.at[w, at, p])
                for piece, direct, result in zip(*map(slices, (columns, *both)), strict=True):
                    d = piece * slope_post + hopper.widen(direct, interpret)
                    total, product = total + d, product + d * hopper.widen(result, interpret)
                    gradients.append(d)
                    results.append(result)
            return gradients, results, (jnp.sum(total, axis=1), jnp.sum(product, axis=1))

        def stage_behind_norm(dq, factor, w, at, slot, q_barrier):
            """Put the gradient in place of the residual's, which is added while the heads' sums are under way."""
            gradients, results, sums = of_norm(dq, w, at)
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_empty.at[q_barrier])
            exchange = Exchange(sums_gmem, sums_full, sm, rank, w, interpret)
            exchange.send(slot, *sums)
            plgpu.barrier_wait(residual_full.at[w])
            residual = [x for p in range(panels) for x in slices(tile(out_mma.at[w, p]))]
            added = [
                d * along(factor, d) + hopper.widen(x, interpret) for d, x in zip(gradients, residual, strict=True)
            ]
            means = (functools.reduce(jnp.add, x) * (1 / (heads * width)) for x in exchange.receive(slot, len(sums)))
            of_one, of_result = (factor * x for x in means)
            out = [
                (x - along(of_one, x) - hopper.widen(result, interpret) * along(of_result, x)).astype(dtype)
                for x, result in zip(added, results, strict=True)
            ]
            for p in range(panels):
                n = len(out) // panels
                out_mma.at[w, p][...] = lax.concatenate(out[n * p : n * (p + 1)], 1)

        def item_body(turn, counters):
            q_row, q_rows, _, kv_rows, head, pairs, blocks, resident = read_item(turn)

            def pair_body(pair, counters):
                q_count, kv_count = counters
                offset = (pair * COMPUTE + warpgroup) * TILE
                q_slot = common.modulo(q_count, q_slots)
                q_barrier = warpgroup * q_slots + q_slot
                first, last = (pair == 0) | ~resident, (pair == pairs - 1) | ~resident

                def await_block(j):
                    slot = common.modulo(kv_count + j, kv_slots)

                    @pl.when(first)
                    def _():
                        plgpu.barrier_wait(kv_full.at[slot])
                        zero_kv_tail(slot, kv_rows - j * kv_block)

                    return slot

                def release_block(slot):
                    @pl.when(last)
                    def _():
                        plgpu.barrier_arrive(kv_empty.at[slot])

                def active():
                    if behind_norm:
                        rows = factor_gmem.at[pl.ds(q_row + offset, TILE)]
                        factor = plgpu.load(rows, layout=ROWS, optimized=False)
                    plgpu.barrier_wait(q_full.at[q_barrier])

                    def accumulate(dq_acc):
                        def step(j, _):
                            slot, w, at = hopper.hold(await_block(j), warpgroup, q_slot)

                            def score_gradients(s_acc, dp_acc):
                                for p in range(panels):
                                    plgpu.wgmma(s_acc, q_mma.at[w, at, p], k_mma.at[slot, p].transpose((1, 0)))
                                for p in range(panels):
                                    plgpu.wgmma(dp_acc, do_mma.at[w, at, p], v_mma.at[slot, p].transpose((1, 0)))
                                s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running
                                _, slopes = common.weights_and_slopes(activations, names, head, s, dtype)
                                return slopes * plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)

                            square = plgpu.ACC((TILE, kv_block), jnp.float32)
                            ds = pl.run_scoped(score_gradients, square, square).astype(dtype)

                            if behind_norm:

                                @pl.when((j == 0) & (q_count > 0))
                                def _():
                                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                                    plgpu.barrier_arrive(out_empty.at[warpgroup])
                            else:

                                @pl.when(j == blocks - 1)
                                def _():
                                    plgpu.barrier_arrive(q_empty.at[q_barrier])

                            for p in range(panels):
                                plgpu.wgmma(common.acc_panel(dq_acc, p, panels), ds, k_mma.at[slot, p])
                            plgpu.wgmma_wait(0)
                            release_block(slot)

                        lax.fori_loop(0, blocks, step, None)
                        return dq_acc[...]

                    dq = pl.run_scoped(accumulate, plgpu.ACC((TILE, width), jnp.float32))
                    if behind_norm:
                        w, at = hopper.hold(warpgroup, q_slot)
                        stage_behind_norm(dq, factor, w, at, common.modulo(q_count, 2), q_barrier)
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        common.stage(dq, slope_post, out_mma.at[warpgroup])
                    plgpu.commit_smem()
                    common.store_tile(out_tma.at[warpgroup], dq_gmem, q_row + offset, head, q_rows - offset)

                def idle():
                    lax.fori_loop(0, blocks, lambda j, _: release_block(await_block(j)), None)

                lax.cond(offset < q_rows, active, idle)
                q_count += (offset < q_rows).astype(jnp.int32)
                return q_count, jnp.where(last, kv_count + blocks, kv_count)

            return lax.fori_loop(0, pairs, pair_body, counters)

        lax.fori_loop(0, my_items, item_body, (zero, zero))
        worker = (sm * ranks + rank) * COMPUTE + warpgroup
        common.fill_zeros(
            out_mma.at[warpgroup, 0], out_tma.at[warpgroup, 0], fills_gmem, (dq_gmem,), worker, sms * ranks * COMPUTE
        )
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < COMPUTE, compute, memory)
