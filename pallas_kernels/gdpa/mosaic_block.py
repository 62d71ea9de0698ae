"""The PFFN block's forward pass for Hopper in one kernel: LayerNorm, GDPA, residual, RMSNorm, residual.

The norms span all heads of a row, so a block of the grid holds all heads of its query tile: 128 rows, of which each of
two compute warpgroups owns 64. Wider rows than fit take a cluster of two blocks, each with half of the heads: they
exchange the sums of their parts of a row, for either norm. A third warpgroup streams keys and values of head after head
through a ring of slots; the tiles of a sample run on different SMs at about the same time, so that they come from L2.

A compute warpgroup's rows stay in one place. They arrive as queries; head by head LayerNorm's result is made of them in
registers, and GDPA's result replaces them. When all heads are done the mean square of a row is known: the queries come
a second time, from L2 through the ring, and the block's result is stored from where it lies. The warpgroup itself then
loads its rows of the next tile.

Numerics: as `mosaic_forward`; norms in float32; rounded to q's dtype are the operand of the products, GDPA's result and
the block's. Every row is written by one store, so two runs give the same bits.

Limits: as `mosaic_forward`, and H·D up to 1024.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.gdpa.activations import kernel_activation
from pallas_kernels.gdpa.exchange import AXIS, ROWS, Exchange, exchange_barriers, exchange_memory
from pallas_kernels.gdpa.tiles import WARPGROUP_ROWS
from pallas_kernels.schedule import Deal, Schedule, ceil_div, make_schedule

COMPUTE = 2  # compute warpgroups
TILE_ROWS = COMPUTE * WARPGROUP_ROWS
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
CLUSTER = 2  # blocks; more of them leave SMs idle


@dataclass(frozen=True)
class BlockTiles:
    """Tiles of the kernel: heads of one block of the grid, keys of one step, and slots of the ring, each for a block of
    keys and one of values."""

    heads: int
    kv_block: int
    slots: int

    def blocks(self, heads: int) -> int:
        """Blocks that hold all heads of a tile; the last one may have fewer than the others."""
        return -(-heads // self.heads)


def block_tiles(*, heads: int, width: int) -> BlockTiles | None:
    """The kernel's tiles for a call, or None where a cluster's shared memory can't hold the rows of all heads."""
    kv_block = 64 * 128 // width
    for blocks in range(1, CLUSTER + 1):
        own = -(-heads // blocks)
        room = hopper.SHARED_MEMORY - 1024 - TILE_ROWS * own * width * 2
        slots = min(room // (2 * kv_block * width * 2), 4)
        if slots >= 3:
            return BlockTiles(own, kv_block, slots)
    return None


def block_forward(
    q,
    k,
    v,
    q_starts,
    q_lengths,
    kv_starts,
    kv_lengths,
    *,
    activation: tuple[str, ...],
    scale: float,
    post_scale: float,
    eps: float,
    max_q_length: int,
    tiles: BlockTiles,
    sms: int,
    save: bool,
    interpret=None,
):
    """(out,) [N, H, D] of `gdpa_block`; with `save` also, for the backward pass, LayerNorm's result and GDPA's, both
    undefined outside the samples.

    tiles: of `block_tiles`. sms: blocks of the grid.
    """
    panels, blocks = q.shape[2] // hopper.PANEL, tiles.blocks(q.shape[1])
    clusters = max(sms // blocks, 1)
    scratch = block_scratch(q.dtype, panels, tiles, shared=blocks > 1, interpret=interpret)
    if (used := hopper.shared_bytes(scratch)) > hopper.SHARED_MEMORY:
        raise ValueError(f"{tiles} takes {used} bytes of shared memory, sm_90 has {hopper.SHARED_MEMORY}")
    schedule = make_schedule(
        q_starts,
        q_lengths,
        # A sample without keys still has its residuals: it gets a key from behind the array's end: zeros, from TMA.
        jnp.where(kv_lengths > 0, kv_starts, k.shape[0]),
        jnp.maximum(kv_lengths, 1),
        rows=q.shape[0],
        max_q_length=max_q_length,
        q_chunk=TILE_ROWS,
    )
    body = functools.partial(
        _kernel,
        activation=activation,
        scale=scale,
        post_scale=post_scale,
        eps=eps,
        tiles=tiles,
        clusters=clusters,
        save=save,
        interpret=interpret,
    )
    results = 3 if save else 1
    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)] * results
    if blocks > 1:
        parts = dict(clusters=clusters, blocks=blocks, warpgroups=COMPUTE, rows=WARPGROUP_ROWS)
        out_type.append(exchange_memory(**parts, values=2))
    out = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(blocks,) if blocks > 1 else (),
        cluster_names=(AXIS,) if blocks > 1 else (),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name="gdpa_block_forward",
        interpret=interpret,
    )(*schedule, q, k, v)
    return tuple(out[:results])


def block_scratch(dtype, panels: int, tiles: BlockTiles, *, shared: bool, interpret) -> dict:
    """Shared memory and barriers of the kernel. shared: blocks share rows."""
    buffer = functools.partial(hopper.row_buffer, dtype=dtype, interpret=interpret)
    return dict(
        q_smem=buffer((COMPUTE, tiles.heads * panels, WARPGROUP_ROWS, hopper.PANEL)),
        kv_smem=buffer((tiles.slots, 2, panels, tiles.kv_block, hopper.PANEL)),
        q_full=plgpu.Barrier(num_arrivals=panels, num_barriers=COMPUTE * tiles.heads),
        full=plgpu.Barrier(num_arrivals=panels, num_barriers=2 * tiles.slots),
        empty=plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=2 * tiles.slots),
        tail_full=plgpu.Barrier(num_arrivals=panels * hopper.tail_arrivals(tiles.kv_block)),
        **(dict(sums_full=exchange_barriers(COMPUTE)) if shared else {}),
    )


def _kernel(
    *refs,
    q_smem,
    kv_smem,
    q_full,
    full,
    empty,
    tail_full,
    sums_full: Any = None,
    activation,
    scale,
    post_scale,
    eps,
    tiles,
    clusters,
    save,
    interpret,
):
    schedule, refs = Schedule(*refs[: len(Schedule._fields)]), refs[len(Schedule._fields) :]
    q_gmem, k_gmem, v_gmem, out_gmem, *rest = refs
    saved, sums_gmem = rest[: 2 * save], rest[2 * save] if len(rest) > 2 * save else None
    rows, all_heads, width = q_gmem.shape
    group = all_heads // k_gmem.shape[1]
    dtype, panels, block = q_gmem.dtype, width // hopper.PANEL, tiles.kv_block
    (q_tma, q_mma), (kv_tma, kv_mma) = (hopper.row_views(x, interpret=interpret) for x in (q_smem, kv_smem))
    names = tuple(dict.fromkeys(activation))
    acts = [kernel_activation(name, scale, post_scale, folded=dtype == jnp.bfloat16) for name in names]
    cluster, warpgroup = lax.axis_index("cluster"), lax.axis_index("warpgroup")
    shared = tiles.blocks(all_heads) > 1  # the rows, by a cluster's blocks
    rank = lax.axis_index(AXIS) if shared else 0
    route = Deal(schedule, 1, clusters, cluster)  # an item is one tile of a sample, with all its heads
    first = rank * tiles.heads  # the block has `heads` of them, from this one on
    heads = tiles.heads if all_heads % tiles.heads == 0 else jnp.minimum(all_heads - first, tiles.heads)
    exchange = Exchange(sums_gmem, sums_full, cluster, rank, warpgroup, interpret) if shared else None

    def by_head(head, functions, x):
        """Apply the function of the head's activation."""
        if len(names) == 1:
            return functions[0](x)
        which = sum(jnp.where(first + head == h, names.index(name), 0) for h, name in enumerate(activation))
        return lax.switch(which, functions, x)

    def columns(head, p):
        return head, pl.ds(hopper.PANEL * p, hopper.PANEL)

    def along_rows(x):
        return lax.broadcast_in_dim(x, (WARPGROUP_ROWS, hopper.PANEL), [0])

    # Step n of the ring passes two blocks through slot n % slots: keys and values, or queries of either warpgroup.
    def at(n):
        return lax.rem(n, jnp.int32(tiles.slots))

    # --- the warpgroup that issues loads

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

        def await_slot(n, which):
            @pl.when(n >= tiles.slots)
            def _():
                plgpu.barrier_wait(empty.at[2 * at(n) + which])

        def load(source, n, which, head, row, count):
            await_slot(n, which)
            for p in range(panels):
                target = kv_tma.at[at(n), which, p]
                plgpu.copy_gmem_to_smem(
                    source.at[(pl.ds(row, count), *columns(head, p))],
                    target.at[pl.ds(0, count)] if count < block else target,
                    full.at[2 * at(n) + which],
                )

        def load_kv(item, head, n, j):
            head, row = lax.div(first + head, group), item.other_row + j * block
            load(k_gmem, n, 0, head, row, block)
            count = item.other_rows - j * block

            @pl.when(count >= block)
            def _():
                load(v_gmem, n, 1, head, row, block)

            @pl.when(count < block)
            def _():
                await_slot(n, 1)
                for p in range(panels):
                    target = kv_tma.at[at(n), 1, p]
                    hopper.load_rows_zero_tail(v_gmem, target, row, count, columns(head, p), tail_full)
                plgpu.barrier_wait(tail_full)
                for _panel in range(panels):
                    plgpu.barrier_arrive(full.at[2 * at(n) + 1])

        def load_item(state):
            cursor, _, n = state
            item = route.item(cursor)
            blocks = ceil_div(item.other_rows, block)

            def load_head(head, n):
                lax.fori_loop(0, blocks, lambda j, _: load_kv(item, head, n + j, j), None)
                return n + blocks

            def load_again(head, n):
                for w in range(COMPUTE):
                    load(q_gmem, n, w, first + head, item.row + w * WARPGROUP_ROWS, WARPGROUP_ROWS)
                return n + 1

            n = lax.fori_loop(0, heads, load_head, n)
            return *route.after(cursor), lax.fori_loop(0, heads, load_again, n)

        *_, n = lax.while_loop(lambda state: state[1], load_item, (*route.first(), jnp.int32(0)))

        # Every completed phase must have been waited for when the kernel ends.
        def drain(i, _):
            for which in range(2):
                plgpu.barrier_wait(empty.at[2 * at(i) + which])

        lax.fori_loop(jnp.maximum(n - tiles.slots, 0), n, drain, None)

    # --- the warpgroups that compute

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        cursor, any_work = route.first()

        @pl.when(any_work)
        def _():
            item = route.item(cursor)
            lax.fori_loop(0, heads, lambda head, _: load_queries(item, head), None)
            lax.while_loop(lambda state: state[1], one_item, (cursor, any_work, item, jnp.int32(0)))

        fill_zeros()
        plgpu.wait_smem_to_gmem(0)

    def load_queries(item, head):
        """Load one head of the warpgroup's rows."""
        for p in range(panels):
            plgpu.copy_gmem_to_smem(
                q_gmem.at[(pl.ds(item.row + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), *columns(first + head, p))],
                q_tma.at[warpgroup, head * panels + p],
                q_full.at[warpgroup * tiles.heads + head],
            )

    def mine(head, p):
        """A panel of the warpgroup's rows in float32."""
        x = plgpu.load(q_mma.at[warpgroup, head * panels + p], layout=plgpu.Layout.WGMMA)
        return hopper.widen(x, interpret)

    def put(head, p, x):
        q_mma[warpgroup, head * panels + p] = x.astype(dtype)

    def store(target, item, head):
        """Store those of the warpgroup's rows of a head that belong to the item."""
        offset = warpgroup * WARPGROUP_ROWS
        count = jnp.clip(item.rows - offset, 0, WARPGROUP_ROWS)
        for p in range(panels):
            source = q_tma.at[warpgroup, head * panels + p]
            hopper.store_rows(source, target, item.row + offset, count, columns(first + head, p))
        plgpu.commit_smem_to_gmem_group()

    def one_item(state):
        cursor, _, item, n = state
        cursor_next, another = route.after(cursor)
        item_next = route.item(cursor_next)
        mean, rstd = moments()
        squares = plgpu.layout_cast(jnp.zeros(WARPGROUP_ROWS, jnp.float32), ROWS)
        one = functools.partial(one_head, item, rstd, mean * rstd)
        squares, n = lax.fori_loop(0, heads, one, (squares, n))
        rms = lax.rsqrt(over_blocks(1, squares) * (1 / (all_heads * width)) + eps)
        n = finish(item, rstd, mean * rstd, rms, n, another, item_next)
        return cursor_next, another, item_next, n

    def over_blocks(slot, x):
        """The sum over the blocks that share the rows."""
        if exchange is None:
            return x
        exchange.send(slot, x)
        (parts,) = exchange.receive(slot, 1)
        return functools.reduce(jnp.add, parts)

    def moments():
        """Mean and one over the deviation of the warpgroup's rows."""
        plgpu.barrier_wait(q_full.at[warpgroup * tiles.heads])
        # Sums of what is left of a mean of few columns: rows may lie far from zero.
        near = jnp.sum(mine(0, 0), axis=1) * (1 / hopper.PANEL)

        def add(head, sums):
            total, squares = sums
            for p in range(panels):
                x = mine(head, p) - along_rows(near)
                total, squares = total + x, squares + x * x
            return total, squares

        def await_and_add(head, sums):
            plgpu.barrier_wait(q_full.at[warpgroup * tiles.heads + head])
            return add(head, sums)

        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, hopper.PANEL), jnp.float32), plgpu.Layout.WGMMA)
        total, squares = lax.fori_loop(1, heads, await_and_add, add(0, (zeros, zeros)))
        share = 1 / jnp.float32(heads * width)
        mean = jnp.sum(total, axis=1) * share
        variance = jnp.maximum(jnp.sum(squares, axis=1) * share - mean * mean, 0.0)
        mean, variance = moments_over_blocks(mean + near, variance)
        return mean, lax.rsqrt(variance + eps)

    def moments_over_blocks(mean, variance):
        """Mean and variance of whole rows from those of the block's heads."""
        if exchange is None:
            return mean, variance
        exchange.send(0, mean, variance)
        means, variances = exchange.receive(0, 2)
        held = [min(all_heads - h, tiles.heads) / all_heads for h in range(0, all_heads, tiles.heads)]
        mean = sum(x * share for x, share in zip(means, held, strict=True))
        apart = ((x - mean) * (x - mean) for x in means)
        variance = sum((x + y) * share for x, y, share in zip(variances, apart, held, strict=True))
        return mean, variance

    def one_head(item, rstd, shift, head, state):
        """Put GDPA's result in place of the head's queries; add the squares of what RMSNorm gets."""
        squares, n = state
        blocks = ceil_div(item.other_rows, block)
        normed = [
            (mine(head, p) * along_rows(rstd) - along_rows(shift)).astype(dtype)  # LayerNorm's result
            for p in range(panels)
        ]
        if save:
            for p in range(panels):
                put(head, p, normed[p])
            plgpu.commit_smem()
            store(saved[0], item, head)

        def issue_scores(acc, n):
            for p in range(panels):
                plgpu.wgmma(acc, normed[p], kv_mma.at[at(n), 0, p].transpose((1, 0)))

        def issue_sum(acc, weights, n):
            for p in range(panels):
                part = acc.at[:, pl.ds(hopper.PANEL * p, hopper.PANEL)] if panels > 1 else acc
                plgpu.wgmma(part, weights, kv_mma.at[at(n), 1, p])

        def weigh(s, j):
            """Weights from raw scores; a sample's end is cut off, K may hold anything behind it."""
            keys = item.other_rows - j * block

            def masked(weights):
                column = plgpu.broadcasted_iota(jnp.int32, weights.shape, 1, layout=plgpu.Layout.WGMMA)
                return jnp.where(column < keys, weights, 0.0)

            weights = by_head(head, [act.weight for act in acts], s)
            # The branch is wanted: it keeps ptxas from moving the activation behind the wait for the running product.
            return lax.cond(keys < block, masked, lambda weights: weights, weights)

        def scores_alone(acc):
            issue_scores(acc, n)
            return acc[...]

        def attend(out_acc):
            def step(j, weights):
                """O += P V of this step beside the scores of the next."""
                plgpu.barrier_wait(full.at[2 * at(n + j + 1)])
                plgpu.barrier_wait(full.at[2 * at(n + j) + 1])

                def both(acc):
                    issue_scores(acc, n + j + 1)
                    issue_sum(out_acc, weights, n + j)
                    return plgpu.wgmma_accumulator_load(acc, wait_n=panels)

                s = pl.run_scoped(both, score_type)
                plgpu.barrier_arrive(empty.at[2 * at(n + j + 1)])
                weights_next = weigh(s, j + 1)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[2 * at(n + j) + 1])
                # Narrow only now: narrow weights that are ready before the wait would be put into the registers of the
                # running product's operand, and ptxas would serialise the products.
                return weights_next.astype(dtype)

            last = n + blocks - 1
            weights_last = lax.fori_loop(0, blocks - 1, step, weights)
            plgpu.barrier_wait(full.at[2 * at(last) + 1])
            issue_sum(out_acc, weights_last, last)
            out = out_acc[...]
            plgpu.barrier_arrive(empty.at[2 * at(last) + 1])
            return out

        plgpu.barrier_wait(full.at[2 * at(n)])
        s = pl.run_scoped(scores_alone, score_type)
        plgpu.barrier_arrive(empty.at[2 * at(n)])
        weights = weigh(s, jnp.int32(0)).astype(dtype)
        out = pl.run_scoped(attend, plgpu.ACC((WARPGROUP_ROWS, width), jnp.float32))
        post = by_head(head, [lambda _, post=act.post: jnp.float32(post) for act in acts], head)
        if save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for p in range(panels):
            attended = out[:, hopper.PANEL * p : hopper.PANEL * (p + 1)] * post
            mixed = attended + hopper.widen(normed[p], interpret)
            squares += jnp.sum(mixed * mixed, axis=1)
            put(head, p, attended)
        if save:
            plgpu.commit_smem()
            store(saved[1], item, head)
        return squares, n + blocks

    score_type = plgpu.ACC((WARPGROUP_ROWS, block), jnp.float32)

    def finish(item, rstd, shift, rms, n, another, item_next):
        """Residual, RMSNorm, residual and store; then load the queries of the next item, if there is another one."""
        # (attended + rstd x - shift) rms + x
        of_x, rest = along_rows(rstd * rms + 1), along_rows(shift * rms)
        if save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def one_head(head, n):
            for which in range(2):
                plgpu.barrier_wait(full.at[2 * at(n) + which])
            for p in range(panels):
                again = kv_mma.at[at(n), warpgroup, p]
                again = again.at[pl.ds(0, WARPGROUP_ROWS)] if block > WARPGROUP_ROWS else again
                x = hopper.widen(plgpu.load(again, layout=plgpu.Layout.WGMMA), interpret)
                put(head, p, mine(head, p) * along_rows(rms) + (x * of_x - rest))
            plgpu.commit_smem()
            for which in range(2):
                plgpu.barrier_arrive(empty.at[2 * at(n) + which])
            store(out_gmem, item, head)

            @pl.when(head > 0)
            def _():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                pl.when(another)(lambda: load_queries(item_next, head - 1))

            return n + 1

        n = lax.fori_loop(0, heads, one_head, n)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(another)(lambda: load_queries(item_next, heads - 1))
        return n

    def fill_zeros():
        """Zero the rows of the output that belong to no item: gaps are dealt whole, the last one in pieces."""
        worker, workers = cluster * COMPUTE + warpgroup, clusters * COMPUTE
        put(0, 0, plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, hopper.PANEL), dtype), plgpu.Layout.WGMMA))
        plgpu.commit_smem()

        def fill(row, count):
            def one_head(head, _):
                for p in range(panels):
                    hopper.store_rows(q_tma.at[warpgroup, 0], out_gmem, row, count, columns(first + head, p))

            lax.fori_loop(0, heads, one_head, None)

        route.fill_gaps(fill, rows, WARPGROUP_ROWS, worker, workers)
        plgpu.commit_smem_to_gmem_group()

    lax.cond(warpgroup < COMPUTE, compute, memory)
