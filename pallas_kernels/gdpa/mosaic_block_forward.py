"""The PFFN block's forward pass for Hopper in one kernel: LayerNorm, GDPA, residual, RMSNorm, residual.

The norms span all heads of a row. A cluster has one block per head; its blocks work on the same query tiles at the same
time, each with the keys and values of its head resident as in `mosaic_forward`, and tell each other the sums of squares
of their part of a row through distributed shared memory. A tile of queries stays in its slot until it is stored: it is
normalised in place for the products, loaded again (from L2) for the residual, and overwritten by the result.

Four warpgroups: two compute, each on 64 query rows; one issues the loads; one normalises what they bring.

Order of memory: a warpgroup writes its sums into the peers' shared memory, fences at cluster scope, and one thread per
peer arrives there; a buffer is written again only after a second barrier told that all peers have read it.

Numerics: as `mosaic_forward`; LayerNorm's result is rounded to q's dtype as the operand of the products and not as a
residual, GDPA's result is not rounded. Sums over heads have a fixed order: two runs give the same bits.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store  # no public name in JAX 0.11
from jax.experimental.mosaic.gpu import utils as mosaic_utils

from pallas_kernels import hopper
from pallas_kernels.gdpa.activations import kernel_activation
from pallas_kernels.gdpa.mosaic_forward import Step, _modulo
from pallas_kernels.gdpa.tiles import WARPGROUP_ROWS, ForwardTiles
from pallas_kernels.schedule import Line, Walk, ceil_div

COMPUTE, MEMORY, NORM = 2, 2, 3  # compute warpgroups; which one loads, which one normalises
COMPUTE_REGISTERS, MEMORY_REGISTERS, NORM_REGISTERS = 208, 32, 64
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a tile of scores


def block_forward(
    q,
    k,
    v,
    mean,
    rstd,
    order: Line,
    *,
    activation: tuple[str, ...],
    scale: float,
    post_scale: float,
    eps: float,
    tiles: ForwardTiles,
    clusters: int,
    interpret=None,
):
    """out [N, H, D] of `gdpa_block`.

    mean, rstd: float32 [N + 128] of the rows of q over all heads.
    order: `make_line` of the queries for tiles.tiling. clusters: of the grid, each of H blocks.
    """
    rows, heads, width = q.shape
    panels = width // hopper.PANEL
    scratch = block_scratch(q.dtype, heads, panels, tiles, interpret=interpret)
    if (used := hopper.shared_bytes(scratch)) > hopper.SHARED_MEMORY:
        raise ValueError(f"{tiles} takes {used} bytes of shared memory, sm_90 has {hopper.SHARED_MEMORY}")
    body = functools.partial(
        _kernel,
        activation=activation,
        scale=scale,
        post_scale=post_scale,
        eps=eps,
        tiles=tiles,
        clusters=clusters,
        interpret=interpret,
    )
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    # The interpreter has no distributed shared memory: there the sums go through device memory.
    sums = jax.ShapeDtypeStruct((clusters, COMPUTE, heads, WARPGROUP_ROWS), jnp.float32)
    result = plgpu.kernel(
        body,
        out_type=(out, sums) if interpret else (out,),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(heads,),
        cluster_names=("head",),
        num_threads=4,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name="gdpa_block_forward",
        interpret=interpret,
    )(*order, q, k, v, mean, rstd)
    return result[0]


def block_scratch(dtype, heads: int, panels: int, tiles: ForwardTiles, *, interpret) -> dict:
    """Shared memory and barriers of the kernel."""
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    block = (panels, tiles.kv_block, hopper.PANEL)
    return dict(
        q_smem=buffer((tiles.q_slots, COMPUTE, panels, WARPGROUP_ROWS, hopper.PANEL)),
        k_smem=buffer((tiles.k_slots, *block)),
        v_smem=buffer((tiles.v_slots, *block)),
        sums_smem=plgpu.SMEM((COMPUTE, heads, WARPGROUP_ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=COMPUTE * panels, num_barriers=tiles.q_slots),
        q_normed=plgpu.Barrier(num_arrivals=1, num_barriers=tiles.q_slots),
        q_again=plgpu.Barrier(num_arrivals=panels, num_barriers=2 * COMPUTE),
        q_empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiles.q_slots),
        k_full=plgpu.Barrier(num_arrivals=panels, num_barriers=tiles.k_slots),
        k_empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiles.k_slots),
        v_full=plgpu.Barrier(num_arrivals=panels, num_barriers=tiles.v_slots),
        v_empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiles.v_slots),
        turn=plgpu.Barrier(num_arrivals=1, num_barriers=2),
        tail_full=plgpu.Barrier(num_arrivals=panels * hopper.tail_arrivals(tiles.kv_block)),
        sums_full=plgpu.ClusterBarrier(collective_axes=("head",), num_barriers=COMPUTE),
        sums_empty=plgpu.ClusterBarrier(collective_axes=("head",), num_barriers=COMPUTE),
    )


def _publish(sums, values, peers: int):
    """Store a row vector [64] at the same place in the shared memory of all blocks of a cluster, and fence."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS))
    def publish(_, ref, value):
        i32 = ir.IntegerType.get_signless(32)

        def number(n):
            return mosaic_utils.c(n, i32)

        # Row 16·warp + lane / 4 (+ 8) lies in four lanes: each stores it in other blocks.
        thread = arith.remui(mosaic_utils.thread_idx(), number(128))
        lane, warp = arith.remui(thread, number(32)), arith.divui(thread, number(32))
        row = arith.addi(arith.muli(warp, number(16)), arith.divui(lane, number(4)))
        base = arith.addi(llvm.ptrtoint(i32, mosaic_utils.memref_ptr(ref)), arith.muli(row, number(4)))
        first = arith.remui(lane, number(min(peers, 4)))
        for peer in range(0, peers, 4):
            block = arith.addi(first, number(peer))
            for i, register in enumerate(value.registers.flat):
                mosaic_utils.inline_ptx(
                    "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; "
                    f"st.shared::cluster.f32 [a+{32 * i}], $2; }}",
                    base,
                    block,
                    vector.extract(register, [], [0]),
                    has_side_effects=True,
                )
        mosaic_utils.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
        mosaic_utils.warpgroup_barrier()

    publish(sums, values)


def _kernel(
    *refs,
    q_smem,
    k_smem,
    v_smem,
    sums_smem,
    q_full,
    q_normed,
    q_again,
    q_empty,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turn,
    tail_full,
    sums_full,
    sums_empty,
    activation,
    scale,
    post_scale,
    eps,
    tiles,
    clusters,
    interpret,
):
    *order, q_gmem, k_gmem, v_gmem, mean_gmem, rstd_gmem, out_gmem = refs[: len(Line._fields) + 6]
    sums_gmem = refs[-1] if interpret else None
    rows, heads, width = q_gmem.shape
    dtype, panels, block = q_gmem.dtype, width // hopper.PANEL, tiles.kv_block
    (q_tma, q_mma), (k_tma, k_mma), (v_tma, v_mma) = (
        hopper.row_views(x, interpret=interpret) for x in (q_smem, k_smem, v_smem)
    )
    names = tuple(dict.fromkeys(activation))
    acts = [kernel_activation(name, scale, post_scale, folded=dtype == jnp.bfloat16) for name in names]
    cluster, head, warpgroup = (lax.axis_index(name) for name in ("cluster", "head", "warpgroup"))
    kv_head = lax.div(head, heads // k_gmem.shape[1])
    route = Walk(Line(*order), tiles.tiling, 1, clusters, cluster)  # the heads of a line are the blocks of a cluster

    def by_head(functions, x):
        """Apply the function of the head's activation."""
        if len(names) == 1:
            return functions[0](x)
        which = sum(jnp.where(head == h, names.index(name), 0) for h, name in enumerate(activation))
        return lax.switch(which, functions, x)

    def extent(item):
        """Query tiles and key blocks of an item."""
        return ceil_div(item.rows, tiles.q_rows), ceil_div(item.other_rows, block)

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

    def along_rows(x):
        return lax.broadcast_in_dim(x, (WARPGROUP_ROWS, hopper.PANEL), [0])

    def row_statistics(row):
        """Mean and one over the deviation of 64 rows."""
        return (
            plgpu.load(x.at[pl.ds(row, WARPGROUP_ROWS)], layout=ROWS, optimized=False) for x in (mean_gmem, rstd_gmem)
        )

    def queries(slot, w, p):
        """A panel of a tile in float32."""
        return plgpu.load(q_mma.at[slot, w, p], layout=plgpu.Layout.WGMMA).astype(jnp.float32)

    # --- the warpgroup that issues loads

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def load_q(item, n, tile):
            slot = q_slot(n)

            @pl.when(n >= tiles.q_slots)
            def _():
                plgpu.barrier_wait(q_empty.at[slot])

            for w in range(COMPUTE):
                row = item.row + tile * tiles.q_rows + w * WARPGROUP_ROWS
                for p in range(panels):
                    plgpu.copy_gmem_to_smem(
                        q_gmem.at[(pl.ds(row, WARPGROUP_ROWS), *columns(head, p))],
                        q_tma.at[slot, w, p],
                        q_full.at[slot],
                    )

        def load_kv(item, n, j):
            row = item.other_row + j * block

            def load(source, target, full, empty, slot, slots):
                @pl.when(n >= slots)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                for p in range(panels):
                    plgpu.copy_gmem_to_smem(
                        source.at[(pl.ds(row, block), *columns(kv_head, p))], target.at[slot, p], full.at[slot]
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
                    hopper.load_rows_zero_tail(v_gmem, v_tma.at[slot, p], row, rows, columns(kv_head, p), tail_full)
                plgpu.barrier_wait(tail_full)
                for _panel in range(panels):
                    plgpu.barrier_arrive(v_full.at[slot])

        def load_item(state):
            cursor, _, q_count, kv_count = state
            item = route.item(cursor)
            q_tiles, blocks = extent(item)
            load_q(item, q_count, 0)
            lax.fori_loop(0, blocks, lambda j, _: load_kv(item, kv_count + j, j), None)
            lax.fori_loop(1, q_tiles, lambda t, _: load_q(item, q_count + t, t), None)
            return *route.after(cursor), q_count + q_tiles, kv_count + blocks

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

    # --- the warpgroup that normalises

    def norm():
        plgpu.set_max_registers(NORM_REGISTERS, action="decrease")

        def one_item(state):
            cursor, _, count = state
            item = route.item(cursor)
            q_tiles, _ = extent(item)

            def one_tile(t, _):
                slot = q_slot(count + t)
                for w in range(COMPUTE):
                    mean, rstd = row_statistics(item.row + t * tiles.q_rows + w * WARPGROUP_ROWS)
                    if w == 0:
                        plgpu.barrier_wait(q_full.at[slot])
                    for p in range(panels):
                        x = queries(slot, w, p)
                        q_mma[slot, w, p] = ((x - along_rows(mean)) * along_rows(rstd)).astype(dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_normed.at[slot])

            lax.fori_loop(0, q_tiles, one_tile, None)
            return *route.after(cursor), count + q_tiles

        lax.while_loop(lambda state: state[1], one_item, (*route.first(), jnp.int32(0)))

    # --- the warpgroups that compute

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

        cursor, any_work = route.first()

        @pl.when(any_work)
        def _():
            zero = jnp.int32(0)
            item = route.item(cursor)
            q_tiles, blocks = extent(item)
            first = Step(zero, zero, True, q_tiles == 1, True, blocks == 1)

            def scores_alone(acc):
                issue_scores(acc, first, True)
                return acc[...]

            s = pl.run_scoped(scores_alone, score_type)
            release_scores(first, True, item.row)
            weights = weigh(s, item, zero).astype(dtype)

            def all_items(out_acc):
                state = (cursor, any_work, item, zero, zero, weights)
                return lax.while_loop(lambda state: state[1], functools.partial(attend, out_acc), state)[3]

            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            count = pl.run_scoped(all_items, plgpu.ACC((WARPGROUP_ROWS, width), jnp.float32))
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
            plgpu.barrier_wait(sums_empty.at[warpgroup])
            release_tile(count - 1)

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
        """Start s = LN(Q) Kᵀ; not live: of whatever is in the slots."""
        q_at, kv_at = q_slot(at.q_number), k_slot(at.kv_number)
        when(live & at.tile_begins, lambda: plgpu.barrier_wait(q_normed.at[q_at]))
        when(live & at.first_pass, lambda: plgpu.barrier_wait(k_full.at[kv_at]))
        for p in range(panels):
            plgpu.wgmma(acc, q_mma.at[q_at, warpgroup, p], k_mma.at[kv_at, p].transpose((1, 0)))

    def again(n):
        return q_again.at[2 * warpgroup + (n & 1)]

    def release_scores(at, live, row):
        """row: of the tile. Its queries come back as they were, for the residual."""

        def reload():
            for p in range(panels):
                plgpu.copy_gmem_to_smem(
                    q_gmem.at[(pl.ds(row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), *columns(head, p))],
                    q_tma.at[q_slot(at.q_number), warpgroup, p],
                    again(at.q_number),
                )

        when(live & at.tile_ends, reload)
        when(live & at.last_pass, lambda: plgpu.barrier_arrive(k_empty.at[k_slot(at.kv_number)]))

    def weigh(s, item, j):
        """Weights from raw scores; a sample's end is cut off, K may hold anything behind it."""
        keys = item.other_rows - j * block

        def masked(weights):
            column = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(column < keys, weights, 0.0)

        weights = by_head([act.weight for act in acts], s)
        # The branch is wanted: it keeps ptxas from moving the activation behind the wait for the running product.
        return lax.cond(keys < block, masked, lambda weights: weights, weights)

    def attend(out_acc, state):
        """All steps of one item; leaves the weights of the next item's first step."""
        cursor, _, item, q_count, kv_count, weights = state
        q_tiles, blocks = extent(item)
        cursor_next, another = route.after(cursor)
        item_next = route.item(cursor_next)
        q_tiles_next, blocks_next = extent(item_next)
        kv_count_next = kv_count + blocks

        def step(_, carry):
            """O += P V of this step beside the scores of the next."""
            weights, t, j, kv_number = carry
            tile_ends = j + 1 == blocks
            t_next, j_next = jnp.where(tile_ends, t + 1, t), jnp.where(tile_ends, 0, j + 1)
            inside = t_next < q_tiles
            first_pass, last_pass = t == 0, t == q_tiles - 1
            following = Step(
                q_count + t_next,
                jnp.where(inside, kv_count, kv_count_next) + j_next,
                tile_ends,
                jnp.where(inside, t_next == q_tiles - 1, q_tiles_next == 1),
                (t_next == 0) | ~inside,
                j_next + 1 == jnp.where(inside, blocks, blocks_next),
            )
            live = inside | another
            v_at = lax.optimization_barrier(
                v_slot(kv_number)
            )  # else a single slot's descriptors leave the loop and spill
            when(first_pass, lambda: plgpu.barrier_wait(v_full.at[v_at]))

            def both(acc):
                plgpu.barrier_wait(turn.at[warpgroup])
                issue_scores(acc, following, live)
                for p in range(panels):
                    plgpu.wgmma(panel(out_acc, p), weights, v_mma.at[v_at, p])
                plgpu.barrier_arrive(turn.at[1 - warpgroup])
                return plgpu.wgmma_accumulator_load(acc, wait_n=panels)

            s = pl.run_scoped(both, score_type)
            release_scores(following, live, jnp.where(inside, item.row + t_next * tiles.q_rows, item_next.row))
            pl.when((j == 0) & (q_count + t > 0))(lambda: release_tile(q_count + t - 1))
            item_of_scores = type(item)(*(jnp.where(inside, a, b) for a, b in zip(item, item_next, strict=True)))
            weights_next = weigh(s, item_of_scores, j_next)
            plgpu.wgmma_wait(0)
            when(last_pass, lambda: plgpu.barrier_arrive(v_empty.at[v_at]))
            out = plgpu.wgmma_accumulator_load(out_acc, wait_n=None)
            out = lax.cond(
                tile_ends, functools.partial(finish, item=item, tile=t, number=q_count + t), lambda o: o, out
            )
            wgmma_accumulator_store(out_acc, out)
            # Narrow only now: narrow weights that are ready before the wait would be put into the registers of the
            # running product's operand, and ptxas would serialise the products.
            return weights_next.astype(dtype), t_next, j_next, following.kv_number

        zero = jnp.int32(0)
        weights, *_ = lax.fori_loop(0, q_tiles * blocks, step, (weights, zero, zero, kv_count))
        return cursor_next, another, item_next, q_count + q_tiles, kv_count_next, weights

    def total(squares, number):
        """Sum row vectors of all heads; every block gets the same bits."""

        @pl.when(number > 0)
        def _():
            plgpu.barrier_wait(sums_empty.at[warpgroup])

        if interpret:
            here = sums_gmem.at[cluster, warpgroup]
            here[head] = squares
        else:
            here = sums_smem.at[warpgroup]
            _publish(here.at[head], squares, heads)
        plgpu.barrier_arrive(sums_full.at[warpgroup])
        plgpu.barrier_wait(sums_full.at[warpgroup])
        return functools.reduce(
            jnp.add, [plgpu.load(here.at[h], layout=ROWS, optimized=False) for h in range(heads)]
        )

    def finish(out, *, item, tile, number):
        """The epilogue of a tile: residual, RMSNorm, residual, store. Returns the zeros the next tile starts from."""
        post = by_head([lambda _, post=act.post: jnp.float32(post) for act in acts], head)
        slot = q_slot(number)
        offset = tile * tiles.q_rows + warpgroup * WARPGROUP_ROWS
        mean, rstd = row_statistics(item.row + offset)
        plgpu.barrier_wait(again(number))
        mixed, squares = [], None
        for p in range(panels):
            part = out[:, hopper.PANEL * p : hopper.PANEL * (p + 1)] * post
            part += (queries(slot, warpgroup, p) - along_rows(mean)) * along_rows(rstd)
            mixed.append(part)
            square = jnp.sum(part * part, axis=1)
            squares = square if squares is None else squares + square
        rms = lax.rsqrt(total(squares, number) * (1 / (heads * width)) + eps)
        for p in range(panels):
            part = mixed[p] * along_rows(rms) + queries(slot, warpgroup, p)
            q_mma[slot, warpgroup, p] = part.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(sums_empty.at[warpgroup])
        count = jnp.clip(item.rows - offset, 0, WARPGROUP_ROWS)
        for p in range(panels):
            hopper.store_rows(q_tma.at[slot, warpgroup, p], out_gmem, item.row + offset, count, columns(head, p))
        plgpu.commit_smem_to_gmem_group()
        return plgpu.layout_cast(jnp.zeros_like(out), plgpu.Layout.WGMMA)

    def release_tile(number):
        """Give a stored tile's slot back."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_empty.at[q_slot(number)])

    def fill_zeros():
        """Zero the rows of the output that belong to no item: gaps are dealt whole, the last one in pieces."""
        worker, workers = cluster * COMPUTE + warpgroup, clusters * COMPUTE
        q_mma[0, warpgroup, 0] = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, hopper.PANEL), dtype), plgpu.Layout.WGMMA)
        plgpu.commit_smem()

        def fill(row, count):
            for p in range(panels):
                hopper.store_rows(q_tma.at[0, warpgroup, 0], out_gmem, row, count, columns(head, p))

        route.fill_gaps(fill, rows, WARPGROUP_ROWS, worker, workers)
        plgpu.commit_smem_to_gmem_group()

    roles = [compute] * COMPUTE + [memory, norm]
    lax.switch(jnp.minimum(jnp.maximum(warpgroup - 1, 0), 2), roles[1:])
