"""GDPA's backward as one Hopper kernel with five products, for few keys.

One block holds 128 keys and values of an item in shared memory, and their gradients in registers, while the item's
queries pass: the scores and the gradients of the scores are computed once, where two kernels compute them twice. A
compute warpgroup owns 64 of the keys. It writes its part of dSᵀ to shared memory, and the tiles of dq = dS·K are dealt
to the two warpgroups in turn, one tile late, so that neither waits for the other in every step.

Longer spans of keys take several passes over the queries. Each pass adds to the dq that the one before it stored; that
stays in L2 and takes no extra memory, but it rounds dq once more per pass, so it is for two passes.

Numerics: scores, slopes and sums in float32; weights and score gradients are rounded to the inputs' dtype before their
products, dq after each pass. No atomics: two runs give the same bits.
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

KEYS = COMPUTE * TILE  # keys of one pass
STAGES, DS_SLOTS = 2, 4  # tiles of queries, and of dS, in shared memory


def gdpa_fused_backward(
    q,
    k,
    v,
    do,
    schedule: Schedule,
    q_fills,
    *,
    activation: tuple[str, ...],
    scale: float,
    post_scale: float,
    sms: int,
    interpret=None,
):
    """(dq, dk, dv). The schedule is that of the keys in whole samples: items are key row, key rows, query row, query
    rows. q_fills: `row_fills` of the rows of dq that no item writes."""
    scratch = fused_scratch(q.dtype, q.shape[2] // hopper.PANEL, interpret=interpret)
    body = functools.partial(
        _fused,
        activations=common.kernel_activations(activation, scale, post_scale, q.dtype),
        names=activation,
        sms=sms,
        interpret=interpret,
    )
    return common.persistent(
        body,
        name="gdpa_backward",
        out_type=[common.like(x) for x in (q, k, v)],
        scratch=scratch,
        sms=sms,
        interpret=interpret,
        operands=(*schedule, q_fills, q, k, v, do),
    )


def fused_scratch(dtype, panels: int, *, interpret) -> dict:
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    stream, held = (STAGES, panels, TILE, hopper.PANEL), (COMPUTE, panels, TILE, hopper.PANEL)
    return dict(
        q_smem=buffer(stream),
        do_smem=buffer(stream),
        k_smem=buffer(held),
        v_smem=buffer(held),
        ds_smem=buffer((DS_SLOTS, COMPUTE, TILE, hopper.PANEL)),
        dq_smem=buffer(held),
        q_full=plgpu.Barrier(num_arrivals=2 * panels, num_barriers=STAGES),
        q_empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        k_full=plgpu.Barrier(num_arrivals=panels * COMPUTE),
        k_empty=plgpu.Barrier(num_arrivals=COMPUTE),
        v_full=plgpu.Barrier(num_arrivals=panels * COMPUTE),
        v_empty=plgpu.Barrier(num_arrivals=COMPUTE),
        ds_full=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=DS_SLOTS),
        ds_empty=plgpu.Barrier(num_arrivals=1, num_barriers=DS_SLOTS),
        dq_full=plgpu.Barrier(num_arrivals=panels * common.LOAD_ROWS_ARRIVALS, num_barriers=COMPUTE),
        dq_empty=plgpu.Barrier(num_arrivals=1, num_barriers=COMPUTE),
        pass_stored=plgpu.Barrier(num_arrivals=COMPUTE),
        tail_zeroed=plgpu.Barrier(num_arrivals=COMPUTE),
    )


def _fused(
    items_gmem,
    kv_fills_gmem,
    counts_gmem,
    q_fills_gmem,
    q_gmem,
    k_gmem,
    v_gmem,
    do_gmem,
    dq_gmem,
    dk_gmem,
    dv_gmem,
    *,
    q_smem,
    do_smem,
    k_smem,
    v_smem,
    ds_smem,
    dq_smem,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    ds_full,
    ds_empty,
    dq_full,
    dq_empty,
    pass_stored,
    tail_zeroed,
    activations,
    names,
    sms,
    interpret,
):
    kv_heads, width = k_gmem.shape[1:]
    group, panels, dtype = q_gmem.shape[1] // kv_heads, width // hopper.PANEL, q_gmem.dtype
    views = (hopper.row_views(x, interpret=interpret) for x in (q_smem, do_smem, k_smem, v_smem, ds_smem, dq_smem))
    (q_tma, q_mma), (do_tma, do_mma), (k_tma, k_mma), (v_tma, v_mma), (ds_tma, ds_mma), (dq_tma, dq_mma) = views
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

    def passes(kv_rows):
        return lax.div(kv_rows + (KEYS - 1), KEYS)

    def memory():
        plgpu.set_max_registers(common.MEMORY_REGISTERS, action="decrease")

        def load_item(turn, counters):
            kv_row, kv_rows, q_row, q_rows, kv_head, tiles = read_item(turn)

            def load_pass(b, counters):
                done, passed = counters  # passes; query tiles
                end = passed + tiles * group

                def load_held(source, target, full, empty):
                    @pl.when(done > 0)
                    def _():
                        plgpu.barrier_wait(empty)

                    for w in range(COMPUTE):
                        for p in range(panels):
                            rows = pl.ds(kv_row + b * KEYS + w * TILE, TILE)
                            plgpu.copy_gmem_to_smem(
                                source.at[(rows, *common.panel_columns(kv_head, p))], target.at[w, p], full
                            )

                def place(n):
                    """(first row, rows that are left, head) of query tile n."""
                    g, t = group_and_tile(n - passed, tiles)
                    return q_row + t * TILE, q_rows - t * TILE, kv_head * group + g

                def load_tile(n):
                    row, _, head = place(n)
                    slot = common.modulo(n, STAGES)

                    @pl.when(n >= STAGES)
                    def _():
                        plgpu.barrier_wait(q_empty.at[slot])

                    for p in range(panels):
                        for source, target in ((q_gmem, q_tma), (do_gmem, do_tma)):
                            plgpu.copy_gmem_to_smem(
                                source.at[(pl.ds(row, TILE), *common.panel_columns(head, p))],
                                target.at[slot, p],
                                q_full.at[slot],
                            )

                def load_next(n, _):
                    """A tile, and the stored dq of the one before it, which is needed that much later."""

                    @pl.when(n < end)
                    def _():
                        load_tile(n)

                    @pl.when(b > 0)
                    def _():
                        load_stored_dq(n - 1, n - 1 - passed, *place(n - 1))

                load_tile(passed)
                load_held(v_gmem, v_tma, v_full, v_empty)
                load_held(k_gmem, k_tma, k_full, k_empty)
                lax.fori_loop(passed + 1, end + 1, load_next, None)
                return done + 1, end

            return lax.fori_loop(0, passes(kv_rows), load_pass, counters)

        def load_stored_dq(n, index, row, left, head):
            w = common.modulo(n, COMPUTE)

            @pl.when(index == 0)
            def _():
                plgpu.barrier_wait(pass_stored)

            # The warpgroups are through with the buffers of the pass before when they tell `pass_stored`.
            @pl.when(index >= COMPUTE)
            def _():
                plgpu.barrier_wait(dq_empty.at[w])

            for p in range(panels):
                common.load_rows(dq_gmem, dq_tma.at[w, p], row, left, common.panel_columns(head, p), dq_full.at[w])

        done, passed = lax.fori_loop(0, my_items, load_item, (zero, zero))
        common.drain(passed, STAGES, lambda slot: q_empty.at[slot])

        @pl.when(done > 0)
        def _():
            plgpu.barrier_wait(v_empty)
            plgpu.barrier_wait(k_empty)

    def group_and_tile(index, tiles):
        """Head within the group, and query tile, of an item's tile number `index`."""
        return (0, index) if group == 1 else (lax.div(index, tiles), lax.rem(index, tiles))

    def compute():
        plgpu.set_max_registers(common.COMPUTE_REGISTERS, action="increase")

        def item_body(turn, passed):
            _, kv_rows, _, _, _, tiles = read_item(turn)

            def one_pass(b, passed):
                pass_body(turn, b, passed)
                return passed + tiles * group

            return lax.fori_loop(0, passes(kv_rows), one_pass, passed)

        def pass_body(turn, b, passed):
            """128 keys of an item and all its queries; `passed` tiles came before them."""
            _, kv_rows, q_row, q_rows, kv_head, tiles = read_item(turn)
            end = passed + tiles * group
            adds = b > 0  # to the dq of the pass before
            plgpu.barrier_wait(v_full)
            plgpu.barrier_wait(k_full)

            @pl.when(passed > 0)
            def _():
                release_staged(passed, adds)

            keys = kv_rows - b * KEYS

            @pl.when(keys < KEYS)
            def _():
                left = keys - TILE * warpgroup

                @pl.when(left < TILE)
                def _():
                    common.zero_tail([x.at[warpgroup, p] for x in (k_mma, v_mma) for p in range(panels)], left)

                common.meet(tail_zeroed)

            def zero_q_tail(slot, left):
                @pl.when(left < TILE)
                def _():
                    for w, tensor in enumerate((q_mma, do_mma)):

                        @pl.when(warpgroup == w)
                        def _(tensor=tensor):
                            common.zero_tail([tensor.at[slot, p] for p in range(panels)], left)

                    common.meet(tail_zeroed)

            def dq_tile(n):
                """dq of tile n, if it is this warpgroup's turn."""
                slot, w, first = hopper.hold(common.modulo(n, DS_SLOTS), warpgroup, zero)
                plgpu.barrier_wait(ds_full.at[slot])

                @pl.when(common.modulo(n, COMPUTE) == w)
                def _():
                    def product(acc):
                        for half in range(COMPUTE):
                            for p in range(panels):
                                plgpu.wgmma(
                                    common.acc_panel(acc, p, panels),
                                    ds_mma.at[slot, half].transpose((1, 0)),
                                    k_mma.at[first + half, p],
                                )
                        return acc[...]

                    dq = pl.run_scoped(product, plgpu.ACC((TILE, width), jnp.float32))
                    staging = ds_mma.at[slot]  # dS of this tile has been read

                    @pl.when(jnp.logical_not(adds))
                    def _():
                        common.stage(dq, slope_post, staging)
                        plgpu.commit_smem()

                    @pl.when(adds)
                    def _():
                        plgpu.barrier_wait(dq_full.at[w])
                        add_stored(dq, w, staging)
                        plgpu.commit_smem()

                        @pl.when(n + COMPUTE < end)
                        def _():
                            plgpu.barrier_arrive(dq_empty.at[w])

                    g, t = group_and_tile(n - passed, tiles)
                    common.store_tile(
                        ds_tma.at[slot, pl.ds(0, panels)],
                        dq_gmem,
                        q_row + t * TILE,
                        kv_head * group + g,
                        q_rows - t * TILE,
                    )

            def add_stored(dq, w, staging):
                def add(new, stored):
                    return ((new * slope_post + stored.astype(jnp.float32)).astype(dtype),)

                for p in range(panels):
                    stored = plgpu.load(dq_mma.at[w, p], layout=plgpu.Layout.WGMMA)
                    piece = dq[:, hopper.PANEL * p : hopper.PANEL * (p + 1)]
                    staging.at[p][...] = hopper.in_slices(add)(piece, stored)[0]

            def release_ds(n):
                """The copy from the slot of tile n, staged by this warpgroup, is done."""

                @pl.when((n >= passed) & (common.modulo(n, COMPUTE) == warpgroup))
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(ds_empty.at[common.modulo(n, DS_SLOTS)])

            def accumulate(dk_acc, dv_acc):
                def step(n, _):
                    g, t = group_and_tile(n - passed, tiles)
                    slot, ds_slot, w = hopper.hold(common.modulo(n, STAGES), common.modulo(n, DS_SLOTS), warpgroup)
                    plgpu.barrier_wait(q_full.at[slot])
                    zero_q_tail(slot, q_rows - t * TILE)

                    def score_gradients(s_acc, dp_acc):
                        for p in range(panels):
                            plgpu.wgmma(s_acc, k_mma.at[w, p], q_mma.at[slot, p].transpose((1, 0)))
                        for p in range(panels):
                            plgpu.wgmma(dp_acc, v_mma.at[w, p], do_mma.at[slot, p].transpose((1, 0)))
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=panels)  # dP is still running
                        head = kv_head * group + g
                        weights, slopes = common.weights_and_slopes(activations, names, head, s, dtype)
                        for p in range(panels):
                            plgpu.wgmma(common.acc_panel(dv_acc, p, panels), weights, do_mma.at[slot, p])
                        return slopes * plgpu.wgmma_accumulator_load(dp_acc, wait_n=panels)  # dV is still running

                    square = plgpu.ACC((TILE, TILE), jnp.float32)
                    ds = pl.run_scoped(score_gradients, square, square).astype(dtype)
                    release_ds(n - 2)

                    @pl.when((passed > 0) | (n >= DS_SLOTS))
                    def _():
                        plgpu.barrier_wait(ds_empty.at[ds_slot])

                    ds_mma.at[ds_slot, w][...] = ds
                    plgpu.commit_smem()
                    for p in range(panels):
                        plgpu.wgmma(common.acc_panel(dk_acc, p, panels), ds, q_mma.at[slot, p])
                    # Products left running over the branch of `dq_tile` make ptxas serialise them all.
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(ds_full.at[ds_slot])
                    plgpu.barrier_arrive(q_empty.at[slot])

                    @pl.when(n > passed)
                    def _():
                        dq_tile(n - 1)

                lax.fori_loop(passed, end, step, None)
                plgpu.barrier_arrive(v_empty)
                release_ds(end - 2)
                dq_tile(end - 1)
                release_ds(end - 1)
                return dk_acc[...], dv_acc[...]

            acc = plgpu.ACC((TILE, width), jnp.float32)
            gradients = pl.run_scoped(accumulate, acc, acc)

            # The slots of dS carry these results out, while the keys and values of the next pass come in. Both
            # warpgroups see all slots empty before either can fill and empty them again.
            for i in range(DS_SLOTS):

                @pl.when((passed > 0) | (end + i >= DS_SLOTS))
                def _(i=i):
                    plgpu.barrier_wait(ds_empty.at[common.modulo(end + i, DS_SLOTS)])

            plgpu.barrier_arrive(k_empty)
            slots = staging_slots(end)
            for value, factor, slot in zip(gradients, (slope_post, post), slots, strict=True):
                common.stage(value, factor, ds_mma.at[slot])
            plgpu.commit_smem()
            kv_row, kv_rows, *_rest, kv_head, _next = read_item(*hopper.hold(turn))  # read again, to free registers
            first = b * KEYS + warpgroup * TILE
            rows = jnp.clip(kv_rows - first, 0, TILE)
            for slot, target in zip(slots, (dk_gmem, dv_gmem), strict=True):
                common.store_tile(ds_tma.at[slot, pl.ds(0, panels)], target, kv_row + first, kv_head, rows)

        def staging_slots(end):
            """Where this warpgroup stages dk and dv after tile end - 1."""
            return tuple(common.modulo(end + 2 * warpgroup + i, DS_SLOTS) for i in range(2))

        def release_staged(end, whole):
            """The copies of dk and dv, staged after tile end - 1, are done; whole: dq is written too, not only read."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(whole)
            def _():
                plgpu.wait_smem_to_gmem(0)
                plgpu.barrier_arrive(pass_stored)

            for slot in staging_slots(end):
                plgpu.barrier_arrive(ds_empty.at[slot])

        passed = lax.fori_loop(0, my_items, item_body, zero)

        @pl.when(passed > 0)
        def _():
            common.meet(tail_zeroed)
            release_staged(passed, False)
            for slot in range(DS_SLOTS):
                plgpu.barrier_wait(ds_empty.at[slot])

        worker, workers = sm * COMPUTE + warpgroup, sms * COMPUTE
        for fills, targets in ((q_fills_gmem, (dq_gmem,)), (kv_fills_gmem, (dk_gmem, dv_gmem))):
            common.fill_zeros(dq_mma.at[warpgroup, 0], dq_tma.at[warpgroup, 0], fills, targets, worker, workers)
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup < COMPUTE, compute, memory)
