"""The GDPA forward kernel for Hopper.

XLA writes the score matrix to device memory and reads it back; here each byte of q, k, v and out moves once while a
sample's keys fit in shared memory, and only k and v are read again (from L2) where they don't.

One persistent block per SM works through (sample, head) items: two warpgroups compute, each on 64 query rows, and one
issues the TMA copies. A compute warpgroup keeps two products in flight: the scores of the next step beside the weighted
sum of this one, and computes the activation of the next scores while the latter still runs; the pipeline runs on from
one query tile to the next, so a single block of keys is enough for it.

Numerics: scores and sums in float32; weights rounded to v's dtype; tanh, erf and exp are the hardware's or Mosaic's
approximations, about 2⁻¹¹ of the score: of a GELU's weight 2⁻⁷ where the score is −2. Every row is written by one
store, so two runs give the same bits.

Limits: bfloat16 and float16, D 64 and 128, arrays of at least 128 rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store  # no public name in JAX 0.11

from pallas_kernels import hopper
from pallas_kernels.gdpa.activations import kernel_activation
from pallas_kernels.gdpa.tiles import WARPGROUP_ROWS, ForwardTiles
from pallas_kernels.schedule import Deal, Item, Line, Schedule, Walk, ceil_div

COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40


class Step(NamedTuple):
    """The scores of one query tile with one block of keys, as a compute warpgroup sees them."""

    q_number: jax.Array  # query tiles before it
    kv_number: jax.Array  # key blocks before it, in the order of the slots
    tile_begins: Any  # first block of keys for the tile
    last_pass: Any  # no tile after it needs the block of keys
    first_pass: Any  # no tile before it needed the block of keys
    tile_ends: Any  # last block of keys for the tile


def gdpa_forward(
    q,
    k,
    v,
    order: Line | Schedule,
    *,
    activation: tuple[str, ...],
    scale: float,
    post_scale: float,
    tiles: ForwardTiles,
    sms: int,
    interpret=None,
):
    """out [N, H, D] of `gdpa`. sms: blocks of the grid.

    order: while keys are resident, `make_line` of the queries for tiles.tiling; while they stream, `make_schedule` with
    one tile of queries per item, so that the SMs that share a sample's keys read them from L2 at about the same time.
    """
    panels = q.shape[2] // hopper.PANEL
    scratch = forward_scratch(q.dtype, panels, tiles, interpret=interpret)
    if (used := hopper.shared_bytes(scratch)) > hopper.SHARED_MEMORY:
        raise ValueError(f"{tiles} takes {used} bytes of shared memory, sm_90 has {hopper.SHARED_MEMORY}")
    body = functools.partial(
        _kernel, activation=activation, scale=scale, post_scale=post_scale, tiles=tiles, sms=sms, interpret=interpret
    )
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(sms,),
        grid_names=("sm",),
        num_threads=tiles.compute + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name="gdpa_forward",
        interpret=interpret,
    )(*order, q, k, v)


def forward_scratch(dtype, panels: int, tiles: ForwardTiles, *, interpret) -> dict:
    """Shared memory and barriers of the kernel."""
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    block = (panels, tiles.kv_block, hopper.PANEL)
    return dict(
        q_smem=buffer((tiles.q_slots, tiles.compute, panels, WARPGROUP_ROWS, hopper.PANEL)),
        k_smem=buffer((tiles.k_slots, *block)),
        v_smem=buffer((tiles.v_slots, *block)),
        out_smem=hopper.store_buffer((tiles.compute, panels, WARPGROUP_ROWS, hopper.PANEL), dtype),
        q_full=plgpu.Barrier(num_arrivals=tiles.compute * panels, num_barriers=tiles.q_slots),
        q_empty=plgpu.Barrier(num_arrivals=tiles.compute, num_barriers=tiles.q_slots),
        k_full=plgpu.Barrier(num_arrivals=panels, num_barriers=tiles.k_slots),
        k_empty=plgpu.Barrier(num_arrivals=tiles.compute, num_barriers=tiles.k_slots),
        v_full=plgpu.Barrier(num_arrivals=panels, num_barriers=tiles.v_slots),
        v_empty=plgpu.Barrier(num_arrivals=tiles.compute, num_barriers=tiles.v_slots),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=2),
        tail_full=plgpu.Barrier(num_arrivals=panels * hopper.tail_arrivals(tiles.kv_block)),
    )


def _kernel(
    *refs,
    q_smem,
    k_smem,
    v_smem,
    out_smem,
    q_full,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turn,
    tail_full,
    activation,
    scale,
    post_scale,
    tiles,
    sms,
    interpret,
):
    *order, q_gmem, k_gmem, v_gmem, out_gmem = refs
    _, heads, width = q_gmem.shape
    group = heads // k_gmem.shape[1]
    dtype, panels, block = q_gmem.dtype, width // hopper.PANEL, tiles.kv_block
    (q_tma, q_mma), (k_tma, k_mma), (v_tma, v_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (q_smem, k_smem, v_smem)
    )
    names = tuple(dict.fromkeys(activation))
    acts = [kernel_activation(name, scale, post_scale, folded=dtype == jnp.bfloat16) for name in names]
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    if tiles.resident:
        route = Walk(Line(*order), tiles.tiling, heads, sms, sm)
    else:
        route = Deal(Schedule(*order), heads, sms, sm)

    # Two warpgroups that issue their products in turns compute their activations beside each other's products. While
    # keys stream, the loads already space them out, and waiting for a turn only costs.
    take_turns = tiles.resident and tiles.compute == 2

    def by_head(head, functions, x):
        """Apply the function of the head's activation."""
        if len(names) == 1:
            return functions[0](x)
        which = sum(jnp.where(head == h, names.index(name), 0) for h, name in enumerate(activation))
        return lax.switch(which, functions, x)

    def extent(item):
        """Query tiles and key blocks of an item."""
        return ceil_div(item.rows, tiles.q_rows), ceil_div(item.other_rows, block)

    def kv_loads(item):
        """How many blocks of keys the item passes through the slots."""
        q_tiles, blocks = extent(item)
        return blocks if tiles.resident else q_tiles * blocks

    def q_slot(n):
        return _modulo(n, tiles.q_slots)

    def k_slot(n):
        return _modulo(n, tiles.k_slots)

    def v_slot(n):
        return _modulo(n, tiles.v_slots)

    def columns(head, p):
        return head, pl.ds(hopper.PANEL * p, hopper.PANEL)

    def panel(acc, p):
        return acc.at[:, pl.ds(hopper.PANEL * p, hopper.PANEL)] if panels > 1 else acc

    # --- the warpgroup that issues copies

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def load_q(item, n, tile):
            slot = q_slot(n)

            @pl.when(n >= tiles.q_slots)
            def _():
                plgpu.barrier_wait(q_empty.at[slot])

            for w in range(tiles.compute):
                row = item.row + tile * tiles.q_rows + w * WARPGROUP_ROWS
                for p in range(panels):
                    plgpu.copy_gmem_to_smem(
                        q_gmem.at[(pl.ds(row, WARPGROUP_ROWS), *columns(item.head, p))],
                        q_tma.at[slot, w, p],
                        q_full.at[slot],
                    )

        def load_kv(item, n, j):
            head, row = lax.div(item.head, group), item.other_row + j * block

            def load(source, target, full, empty, slot, slots):
                @pl.when(n >= slots)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for p in range(panels):
                    plgpu.copy_gmem_to_smem(
                        source.at[(pl.ds(row, block), *columns(head, p))], target.at[slot, p], full.at[slot]
                    )

            load(k_gmem, k_tma, k_full, k_empty, k_slot(n), tiles.k_slots)
            rows = item.other_rows - j * block

            @pl.when(rows >= block)
            def _():
                load(v_gmem, v_tma, v_full, v_empty, v_slot(n), tiles.v_slots)

            @pl.when(rows < block)
            def _():
                slot = v_slot(n)

                @pl.when(n >= tiles.v_slots)
                def _():
                    plgpu.barrier_wait(v_empty.at[slot])

                for p in range(panels):
                    hopper.load_rows_zero_tail(v_gmem, v_tma.at[slot, p], row, rows, columns(head, p), tail_full)
                plgpu.barrier_wait(tail_full)
                for _panel in range(panels):
                    plgpu.barrier_arrive(v_full.at[slot])

        def load_item(state):
            cursor, _, q_count, kv_count = state
            item = route.item(cursor)
            q_tiles, blocks = extent(item)
            if tiles.resident:
                load_q(item, q_count, 0)
                lax.fori_loop(0, blocks, lambda j, _: load_kv(item, kv_count + j, j), None)
                lax.fori_loop(1, q_tiles, lambda t, _: load_q(item, q_count + t, t), None)
            else:

                def load_tile(t, _):
                    load_q(item, q_count + t, t)
                    lax.fori_loop(0, blocks, lambda j, _: load_kv(item, kv_count + t * blocks + j, j), None)

                lax.fori_loop(0, q_tiles, load_tile, None)
            return *route.after(cursor), q_count + q_tiles, kv_count + kv_loads(item)

        zero = jnp.int32(0)
        *_, q_count, kv_count = lax.while_loop(lambda state: state[1], load_item, (*route.first(), zero, zero))

        # Every completed phase must have been waited for when the kernel ends.
        def drain(n, slots, slot, barrier):
            def wait(i, _):
                plgpu.barrier_wait(barrier.at[slot(i)])

            lax.fori_loop(jnp.maximum(n - slots, 0), n, wait, None)

        drain(q_count, tiles.q_slots, q_slot, q_empty)
        drain(kv_count, tiles.k_slots, k_slot, k_empty)
        drain(kv_count, tiles.v_slots, v_slot, v_empty)

    # --- the warpgroups that compute

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        cursor, any_work = route.first()

        @pl.when(any_work)
        def _():
            zero = jnp.int32(0)
            item = route.item(cursor)
            q_tiles, blocks = extent(item)
            first = Step(zero, zero, True, q_tiles == 1 if tiles.resident else True, True, blocks == 1)

            def scores_alone(acc):
                issue_scores(acc, first, True)
                return acc[...]

            s = pl.run_scoped(scores_alone, score_type)
            release_scores(first, True)
            weights = weigh(s, item, zero).astype(dtype)

            def all_items(out_acc):
                state = (cursor, any_work, item, zero, zero, weights)
                lax.while_loop(lambda state: state[1], functools.partial(attend, out_acc), state)

            if take_turns:
                pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            pl.run_scoped(all_items, plgpu.ACC((WARPGROUP_ROWS, width), jnp.float32))
            if take_turns:
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

        fill_zeros()
        plgpu.wait_smem_to_gmem(0)

    score_type = plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32)

    def when(condition, do):
        if isinstance(condition, bool):
            if condition:
                do()
        else:
            pl.when(condition)(do)

    def issue_scores(acc, at, live):
        """Start s = Q Kᵀ; not live: of whatever is in the slots."""
        q_at, kv_at = q_slot(at.q_number), k_slot(at.kv_number)
        when(live & at.tile_begins, lambda: plgpu.barrier_wait(q_full.at[q_at]))
        when(live & at.first_pass, lambda: plgpu.barrier_wait(k_full.at[kv_at]))
        for p in range(panels):
            plgpu.wgmma(acc, q_mma.at[q_at, warpgroup, p], k_mma.at[kv_at, p].transpose((1, 0)))

    def release_scores(at, live):
        when(live & at.tile_ends, lambda: plgpu.barrier_arrive(q_empty.at[q_slot(at.q_number)]))
        when(live & at.last_pass, lambda: plgpu.barrier_arrive(k_empty.at[k_slot(at.kv_number)]))

    def weigh(s, item, j):
        """Weights from raw scores; a sample's end is cut off, K may hold anything behind it."""
        keys = item.other_rows - j * block

        def masked(weights):
            column = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(column < keys, weights, 0.0)

        weights = by_head(item.head, [act.weight for act in acts], s)
        # The branch is wanted: it keeps ptxas from moving the activation behind the wait for the running product.
        return lax.cond(keys < block, masked, lambda weights: weights, weights)

    def attend(out_acc, state):
        """All steps of one item; leaves the weights of the next item's first step."""
        cursor, _, item, q_count, kv_count, weights = state
        q_tiles, blocks = extent(item)
        cursor_next, another = route.after(cursor)
        item_next = route.item(cursor_next)
        q_tiles_next, blocks_next = extent(item_next)
        kv_count_next = kv_count + kv_loads(item)

        def step(_, carry):
            """O += P V of this step beside the scores of the next."""
            weights, t, j, kv_number = carry
            tile_ends = j + 1 == blocks
            t_next, j_next = jnp.where(tile_ends, t + 1, t), jnp.where(tile_ends, 0, j + 1)
            inside = t_next < q_tiles
            if tiles.resident:
                first_pass, last_pass = t == 0, t == q_tiles - 1
                following = Step(
                    q_count + t_next,
                    jnp.where(inside, kv_count, kv_count_next) + j_next,
                    tile_ends,
                    jnp.where(inside, t_next == q_tiles - 1, q_tiles_next == 1),
                    (t_next == 0) | ~inside,
                    j_next + 1 == jnp.where(inside, blocks, blocks_next),
                )
            else:
                first_pass = last_pass = True
                following = Step(
                    q_count + t_next,
                    kv_number + 1,
                    tile_ends,
                    True,
                    True,
                    j_next + 1 == jnp.where(inside, blocks, blocks_next),
                )
            live = inside | another
            v_at = lax.optimization_barrier(
                v_slot(kv_number)
            )  # else a single slot's descriptors leave the loop and spill
            when(first_pass, lambda: plgpu.barrier_wait(v_full.at[v_at]))

            def both(acc):
                if take_turns:
                    plgpu.barrier_wait(turn.at[warpgroup])
                issue_scores(acc, following, live)
                for p in range(panels):
                    plgpu.wgmma(panel(out_acc, p), weights, v_mma.at[v_at, p])
                if take_turns:
                    plgpu.barrier_arrive(turn.at[1 - warpgroup])
                return plgpu.wgmma_accumulator_load(acc, wait_n=panels)

            s = pl.run_scoped(both, score_type)
            release_scores(following, live)
            item_of_scores = Item(*(jnp.where(inside, a, b) for a, b in zip(item, item_next, strict=True)))
            weights_next = weigh(s, item_of_scores, j_next)
            plgpu.wgmma_wait(0)
            when(last_pass, lambda: plgpu.barrier_arrive(v_empty.at[v_at]))
            out = plgpu.wgmma_accumulator_load(out_acc, wait_n=None)
            out = lax.cond(tile_ends, functools.partial(store, item=item, tile=t), lambda o: o, out)
            wgmma_accumulator_store(out_acc, out)
            # Narrow only now: narrow weights that are ready before the wait would be put into the registers of the
            # running product's operand, and ptxas would serialise the products.
            return weights_next.astype(dtype), t_next, j_next, following.kv_number

        zero = jnp.int32(0)
        weights, *_ = lax.fori_loop(0, q_tiles * blocks, step, (weights, zero, zero, kv_count))
        return cursor_next, another, item_next, q_count + q_tiles, kv_count_next, weights

    def store(out, *, item, tile):
        """Write a finished tile; returns the zeros that the next one starts from."""
        head = item.head
        post = by_head(head, [lambda _, post=act.post: jnp.float32(post) for act in acts], head)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for p in range(panels):
            out_smem[warpgroup, p] = (out[:, hopper.PANEL * p : hopper.PANEL * (p + 1)] * post).astype(dtype)
        plgpu.commit_smem()
        offset = tile * tiles.q_rows + warpgroup * WARPGROUP_ROWS
        count = jnp.clip(item.rows - offset, 0, WARPGROUP_ROWS)
        for p in range(panels):
            hopper.store_rows(out_smem.at[warpgroup, p], out_gmem, item.row + offset, count, columns(head, p))
        plgpu.commit_smem_to_gmem_group()
        return plgpu.layout_cast(jnp.zeros_like(out), plgpu.Layout.WGMMA)

    def fill_zeros():
        """Zero the rows of the output that belong to no item: gaps are dealt whole, the last one in pieces."""
        worker, workers = sm * tiles.compute + warpgroup, sms * tiles.compute
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_smem[warpgroup, 0] = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, hopper.PANEL), dtype), plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        def fill(row, count):
            def one_head(head, _):
                for p in range(panels):
                    hopper.store_rows(out_smem.at[warpgroup, 0], out_gmem, row, count, columns(head, p))

            lax.fori_loop(0, heads, one_head, None)

        route.fill_gaps(fill, out_gmem.shape[0], WARPGROUP_ROWS, worker, workers)
        plgpu.commit_smem_to_gmem_group()

    lax.cond(warpgroup < tiles.compute, compute, memory)


def _modulo(n, slots: int):
    """n % slots for n >= 0; a mask is one instruction where a signed remainder takes five."""
    return n & (slots - 1) if slots & (slots - 1) == 0 else lax.rem(n, jnp.int32(slots))
