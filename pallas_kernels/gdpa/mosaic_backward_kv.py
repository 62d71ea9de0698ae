"""GDPA's dk and dv as one Hopper kernel, for keys of any length.

Two warpgroups hold 64 keys each and pass over the queries of all heads that read them, so the sum over a group of heads
has a fixed order. It and the dq kernel (`mosaic_backward_q`) both compute the scores, so seven products stand for five
useful ones, but nothing is exchanged between blocks and no partial sum leaves a register: each gradient row is written
once, in its final form.

Numerics: scores, slopes and sums in float32; weights and score gradients are rounded to the inputs' dtype before their
products. Deterministic: two runs give the same bits.
"""

import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.gdpa import mosaic_backward_common as common
from pallas_kernels.gdpa.mosaic_backward_common import COMPUTE, TILE
from pallas_kernels.schedule import Schedule, dealt, dealt_item

KV_BLOCK = COMPUTE * TILE  # keys of one item


def gdpa_dkv(
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
    interpret=None,
):
    """(dk, dv). The schedule is that of the keys, cut into chunks of KV_BLOCK: items are key row, key rows, query row,
    query rows."""
    width = q.shape[2]
    scratch = dkv_scratch(q.dtype, width // hopper.PANEL, stages=2 if width == 128 else 4, interpret=interpret)
    body = functools.partial(
        _dkv,
        activations=common.kernel_activations(activation, scale, post_scale, q.dtype),
        names=activation,
        sms=sms,
        interpret=interpret,
    )
    return common.persistent(
        body,
        name="gdpa_dkv",
        out_type=[common.like(k), common.like(v)],
        scratch=scratch,
        sms=sms,
        interpret=interpret,
        operands=(*schedule, q, k, v, do),
    )


def dkv_scratch(dtype, panels: int, *, stages: int, interpret) -> dict:
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    stream, held = (stages, panels, TILE, hopper.PANEL), (COMPUTE, 2, panels, TILE, hopper.PANEL)
    return dict(
        q_smem=buffer(stream),
        do_smem=buffer(stream),
        k_smem=buffer(held),
        v_smem=buffer(held),
        q_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=stages),
        q_empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        kv_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=COMPUTE * 2),
        kv_empty=plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE * 2),
        tail_zeroed=plgpu.Barrier(num_arrivals=COMPUTE),
    )


def _dkv(
    items_gmem,
    fills_gmem,
    counts_gmem,
    q_gmem,
    k_gmem,
    v_gmem,
    do_gmem,
    dk_gmem,
    dv_gmem,
    *,
    q_smem,
    do_smem,
    k_smem,
    v_smem,
    q_full,
    q_empty,
    kv_full,
    kv_empty,
    tail_zeroed,
    activations,
    names,
    sms,
    interpret,
):
    kv_heads, width = k_gmem.shape[1:]
    group, panels, dtype = q_gmem.shape[1] // kv_heads, width // hopper.PANEL, q_gmem.dtype
    stages, kv_slots = q_full.shape[0], 2
    (q_tma, q_mma), (do_tma, do_mma), (k_tma, k_mma), (v_tma, v_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (q_smem, do_smem, k_smem, v_smem)
    )
    post, slope_post = common.posts(activations)
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    my_items = dealt(counts_gmem[0] * kv_heads, sms, sm)
    zero = jnp.int32(0)

    def read_item(turn):
        """(key row, keys, query row, query rows, head of k, query tiles of one head)."""
        index = dealt_item(turn, sms, sm)
        row = lax.div(index, kv_heads)
        kv_row, kv_rows, q_row, q_rows = (items_gmem[row, c] for c in range(4))
        return kv_row, kv_rows, q_row, q_rows, lax.rem(index, kv_heads), common.tiles_of(q_rows)

    def memory():
        plgpu.set_max_registers(common.MEMORY_REGISTERS, action="decrease")

        def load_item(turn, passed):
            kv_row, _, q_row, _, kv_head, tiles = read_item(turn)
            for w in range(COMPUTE):
                slot = w * kv_slots + common.modulo(turn, kv_slots)

                @pl.when(turn >= kv_slots)
                def _(slot=slot):
                    plgpu.barrier_wait(kv_empty.at[slot])

                for p in range(panels):
                    for source, target in ((k_gmem, k_tma), (v_gmem, v_tma)):
                        rows = pl.ds(kv_row + w * TILE, TILE)
                        plgpu.copy_gmem_to_smem(
                            source.at[(rows, *common.panel_columns(kv_head, p))],
                            target.at[w, common.modulo(turn, kv_slots), p],
                            kv_full.at[slot],
                        )

            def load_head(g, passed):
                def load_tile(t, _):
                    slot = common.modulo(passed + t, stages)

                    @pl.when(passed + t >= stages)
                    def _():
                        plgpu.barrier_wait(q_empty.at[slot])

                    for p in range(panels):
                        for source, target in ((q_gmem, q_tma), (do_gmem, do_tma)):
                            rows = pl.ds(q_row + t * TILE, TILE)
                            columns = common.panel_columns(kv_head * group + g, p)
                            plgpu.copy_gmem_to_smem(source.at[(rows, *columns)], target.at[slot, p], q_full.at[slot])

                lax.fori_loop(0, tiles, load_tile, None)
                return passed + tiles

            return lax.fori_loop(0, group, load_head, passed)

        passed = lax.fori_loop(0, my_items, load_item, zero)
        common.drain(passed, stages, lambda slot: q_empty.at[slot])
        common.drain(my_items, kv_slots, *(lambda slot, w=w: kv_empty.at[w * kv_slots + slot] for w in range(COMPUTE)))

    def compute():
        plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")

        def item_body(turn, passed):
            kv_row, kv_rows, _, q_rows, kv_head, tiles = read_item(turn)
            kv_slot = common.modulo(turn, kv_slots)
            barrier = warpgroup * kv_slots + kv_slot
            rows = jnp.clip(kv_rows - warpgroup * TILE, 0, TILE)
            plgpu.barrier_wait(kv_full.at[barrier])

            def await_tile(n, t):
                """The slot of query tile t, its rows beyond the sample zeroed."""
                slot = common.modulo(n, stages)
                plgpu.barrier_wait(q_full.at[slot])
                left = q_rows - t * TILE

                @pl.when(left < TILE)
                def _():
                    for w, tensor in enumerate((q_mma, do_mma)):

                        @pl.when(warpgroup == w)
                        def _(tensor=tensor):
                            common.zero_tail([tensor.at[slot, p] for p in range(panels)], left)

                    common.meet(tail_zeroed)

                return slot

            def over_tiles(body):
                """body(head, slot) for each query tile of each head of the group."""

                def one_head(g, passed):
                    def one_tile(t, _):
                        slot = await_tile(passed + t, t)
                        body(kv_head * group + g, slot)
                        plgpu.barrier_arrive(q_empty.at[slot])

                    lax.fori_loop(0, tiles, one_tile, None)
                    return passed + tiles

                lax.fori_loop(0, group, one_head, passed)

            def active():
                def accumulate(dk_acc, dv_acc):
                    def step(head, slot):
                        slot, w, at = hopper.hold(slot, warpgroup, kv_slot)

                        def score_gradients(s_acc, dp_acc):
                            for p in range(panels):
                                plgpu.wgmma(s_acc, k_mma.at[w, at, p], q_mma.at[slot, p].transpose((1, 0)))
                            for p in range(panels):
                                plgpu.wgmma(dp_acc, v_mma.at[w, at, p], do_mma.at[slot, p].transpose((1, 0)))
                            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running
                            weights, slopes = common.weights_and_slopes(activations, names, head, s, dtype)
                            for p in range(panels):
                                plgpu.wgmma(common.acc_panel(dv_acc, p, panels), weights, do_mma.at[slot, p])
                            return slopes * plgpu.wgmma_accumulator_load(dp_acc, wait_n=panels)  # dV is running

                        square = plgpu.ACC((TILE, TILE), jnp.float32)
                        ds = pl.run_scoped(score_gradients, square, square).astype(dtype)
                        for p in range(panels):
                            plgpu.wgmma(common.acc_panel(dk_acc, p, panels), ds, q_mma.at[slot, p])
                        plgpu.wgmma_wait(0)

                    over_tiles(step)
                    return dk_acc[...], dv_acc[...]

                acc = plgpu.ACC((TILE, width), jnp.float32)
                dk, dv = pl.run_scoped(accumulate, acc, acc)
                # This warpgroup alone read these keys and values, so they make room for their gradients.
                staging = (k_tma.at[warpgroup, kv_slot], v_tma.at[warpgroup, kv_slot])
                for value, factor, target in ((dk, slope_post, staging[0]), (dv, post, staging[1])):
                    common.stage(value, factor, target)
                plgpu.commit_smem()
                for source, target in zip(staging, (dk_gmem, dv_gmem), strict=True):
                    common.store_tile(source, target, kv_row + warpgroup * TILE, kv_head, rows)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            lax.cond(rows > 0, active, lambda: over_tiles(lambda head, slot: None))
            plgpu.barrier_arrive(kv_empty.at[barrier])
            return passed + tiles * group

        lax.fori_loop(0, my_items, item_body, zero)
        plgpu.wait_smem_to_gmem(0)
        # All items are done, and no copy into the first slots is under way.
        common.fill_zeros(
            k_mma.at[warpgroup, 0, 0],
            k_tma.at[warpgroup, 0, 0],
            fills_gmem,
            (dk_gmem, dv_gmem),
            sm * COMPUTE + warpgroup,
            sms * COMPUTE,
        )
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < COMPUTE, compute, memory)
