"""The MLP's gradients in one pass over its rows, with the hidden layer computed again, chunk by chunk.

Written are the gradient of x and what XLA's products for the weights need: the hidden layer and the gradient before its
activation. The sums for the biases are of each warpgroup's 64 rows, for XLA to add up. If the MLP masks its input, the
mask's gradient comes first, takes the place of the product's and is written too. What x gets past the MLP is where the
sum for x starts.

Numerics: in float32; rounded are the hidden layer and the gradients, as operands of the products.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store  # no public name in JAX 0.11

from pallas_kernels import hopper
from pallas_kernels.mlp.common import (
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROWS,
    W1,
    W2,
    Deal,
    Tiles,
    Weights,
    ceil_div,
    choose_tiles,
    columns,
    first_row,
    half,
    persistent,
    tiling,
    weight_scratch,
)


def backward_tiles(dtype, F: int, H: int, G: int) -> Tiles:
    # Of more than 192 columns the gradient of x leaves registers for half a panel alone. Elsewhere half panels with two
    # slots are slower than whole ones with one: 3.80 and 3.54 ms for 2,304,000 rows, 192, 320, 320.
    chunk = hopper.PANEL if F <= 192 else hopper.PANEL // 2
    return choose_tiles(functools.partial(backward_scratch, dtype, F, H, G), H, chunk)


def backward_scratch(dtype, F: int, H: int, G: int, tiles: Tiles) -> dict:
    buffer = functools.partial(plgpu.SMEM, dtype=dtype, transforms=tiling(tiles.chunk))
    places = COMPUTE * tiles.row_slots
    return dict(
        x_smem=buffer((places, ROWS, F)),
        dy_smem=buffer((places, ROWS, G)),
        out_smem=buffer((COMPUTE, 2, ROWS, tiles.chunk)),
        bias_smem=plgpu.SMEM((H // tiles.chunk, tiles.chunk), dtype),
        rows_full=plgpu.Barrier(num_arrivals=2, num_barriers=places),
        bias_full=plgpu.Barrier(num_arrivals=1),
        **weight_scratch(dtype, F, G, tiles),
    )


def mlp_backward(x, dy, w1, b1, w2, *mask, masked: bool, tiles: Tiles, sms: int, interpret=None):
    """(db1, db2, dx, hidden, d_hidden) and, masked, d_mask: the gradients of the biases in float32 and of x [N, F], the
    hidden layer [N, H], the gradient before its activation [N, H], the gradient of the mask [N, G].

    mask: from the forward pass; dy is then the gradient of x ⊙ mask. sms: blocks of the grid.
    """
    (N, F), (H, G) = x.shape, w2.shape
    warpgroups = tiles.blocks * COMPUTE
    sums_type = jax.ShapeDtypeStruct((warpgroups * ceil_div(N, warpgroups * ROWS), H + G), jnp.float32)
    types = [jax.ShapeDtypeStruct((N, width), x.dtype) for width in (F, H, H, G)[: 3 + masked]]
    sums, *gradients = persistent(
        functools.partial(_kernel, sms=sms, tiles=tiles, masked=masked, interpret=interpret),
        name="mlp_backward",
        out_type=[sums_type, *types],
        scratch=backward_scratch(x.dtype, F, H, G, tiles),
        blocks=tiles.blocks,
        sms=sms,
        interpret=interpret,
        operands=(x, dy, w1, w2, half(b1).reshape(-1, tiles.chunk), *mask),
    )
    return (*jnp.split(jnp.sum(sums, axis=0), [H]), *gradients)


def _kernel(
    x_gmem,
    dy_gmem,
    w1_gmem,
    w2_gmem,
    bias_gmem,
    *others_gmem,
    x_smem,
    dy_smem,
    out_smem,
    bias_smem,
    rows_full,
    bias_full,
    w1_smem,
    w2_smem,
    w_full,
    w_empty,
    sms,
    tiles,
    masked,
    interpret,
):
    if masked:
        mask_gmem, *others_gmem, d_mask_gmem = others_gmem
    sums_gmem, dx_gmem, hidden_gmem, d_hidden_gmem = others_gmem
    (N, F), (H, G), dtype = x_gmem.shape, w2_gmem.shape, x_gmem.dtype
    chunk, slots, chunks = tiles.chunk, tiles.row_slots, H // tiles.chunk
    warpgroup, mine = lax.axis_index("warpgroup"), Deal(N, tiles.blocks, sms)
    weights = Weights(w1_gmem, w2_gmem, w1_smem, w2_smem, w_full, w_empty, order=(W2, W1), blocks=tiles.blocks)

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        plgpu.copy_gmem_to_smem(bias_gmem, bias_smem, bias_full)
        weights.load_all(mine.turns)

    def panel(p):
        return pl.ds(chunk * p, chunk)

    def place(turn):
        return warpgroup * slots + lax.rem(turn, jnp.int32(slots))

    def load_rows(turn):
        @pl.when(turn < mine.turns)
        def _():
            for source, target in ((x_gmem, x_smem), (dy_gmem, dy_smem)):
                plgpu.copy_gmem_to_smem(source.at[mine.rows(turn)], target.at[place(turn)], rows_full.at[place(turn)])
            if masked:
                plgpu.async_prefetch(mask_gmem.at[mine.rows(turn)])

    def store(values, targets, first=0):
        """Through the warpgroup's two buffers, in turn, from `first` on."""
        for i, value in enumerate(values):
            out_smem[warpgroup, first + i] = value
        plgpu.commit_smem()
        for i, target in enumerate(targets):
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, first + i], target)

    def column_sums(tile):
        """By a product with ones: sums over rows in registers cross the warps, and Mosaic has one place for all
        warpgroups to do so. Waits for all products."""

        def product(acc):
            ones = plgpu.layout_cast(jnp.ones((ROWS, ROWS), dtype), plgpu.Layout.WGMMA)
            plgpu.wgmma(acc, ones, tile)
            return acc[...]

        return first_row(pl.run_scoped(product, chunk_type), interpret)

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for turn in range(slots):
            load_rows(jnp.int32(turn))
        plgpu.barrier_wait(bias_full)
        weights.start()
        lax.fori_loop(0, mine.turns, lambda turn, _: one_tile(turn), None)
        plgpu.wait_smem_to_gmem(0)

    def through_mask(turn, mask):
        """Puts the mask's gradient in the place of the product's. Returns what x gets past the MLP."""
        past = []
        for p in range(G // chunk):
            at = place(turn), slice(None), panel(p)
            x, d = (hopper.widen(buffer[at], interpret) for buffer in (x_smem, dy_smem))
            plgpu.commit_smem()  # all have read before the place is written
            dy_smem[at] = (x * d).astype(dtype)
            past.append(d * hopper.widen(mask[:, chunk * p : chunk * (p + 1)], interpret))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dy_smem.at[place(turn)], d_mask_gmem.at[mine.rows(turn)])
        return lax.concatenate(past, 1)

    def one_tile(turn):
        first = turn * chunks
        if masked:  # shared memory has no room for it
            mask = plgpu.load(mask_gmem.at[mine.rows(turn)], layout=plgpu.Layout.WGMMA, optimized=False)
        plgpu.barrier_wait(rows_full.at[place(turn)])
        past_mlp = through_mask(turn, mask) if masked else None
        for p in range(G // chunk):
            dy = dy_smem.at[place(turn), :, panel(p)]
            sums_gmem[mine.number(turn), pl.ds(H + chunk * p, chunk)] = column_sums(dy)

        def products(c, z_acc, d_acc):
            """Before the activation, less the bias, and the gradient behind it."""
            (at,) = hopper.hold(place(turn))
            plgpu.wgmma(d_acc, dy_smem.at[at], weights.await_(W2, first + c).transpose((1, 0)))
            plgpu.wgmma(z_acc, x_smem.at[at], weights.await_(W1, first + c))
            d = plgpu.wgmma_accumulator_load(d_acc, wait_n=1)
            weights.release(W2, first + c)
            return z_acc[...], d

        def activate(z, half_bias, d):
            half_z = z * 0.5 + half_bias
            t = jnp.tanh(half_z)
            slope = ((t + 1) + half_z * (1 - t * t)) * 0.5
            return (half_z * t + half_z).astype(dtype), (d * slope).astype(dtype)

        def accumulate(dx_acc):
            if masked:
                wgmma_accumulator_store(dx_acc, past_mlp)

            def step(c, _):
                z, d = pl.run_scoped(functools.partial(products, c), chunk_type, chunk_type)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when(c == chunks - 1)
                def _():
                    load_rows(turn + slots)

                hidden, d_hidden = hopper.in_slices(activate)(z, columns(load_bias(c)), d)
                plgpu.wgmma(dx_acc, d_hidden, weights.at(W1, first + c).transpose((1, 0)))
                where = mine.rows(turn), pl.ds(c * chunk, chunk)
                store((hidden, d_hidden), (hidden_gmem.at[where], d_hidden_gmem.at[where]))
                sums_gmem[mine.number(turn), where[1]] = column_sums(out_smem.at[warpgroup, 1])
                weights.release(W1, first + c)

            lax.fori_loop(0, chunks, step, None)
            return dx_acc[...]

        dx = pl.run_scoped(accumulate, plgpu.ACC((ROWS, F), jnp.float32))
        for p in range(F // chunk):
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            part = dx[:, chunk * p : chunk * (p + 1)].astype(dtype)
            store((part,), (dx_gmem.at[mine.rows(turn), panel(p)],), first=p % 2)

    chunk_type = plgpu.ACC((ROWS, chunk), jnp.float32)

    def load_bias(c):
        return plgpu.load(bias_smem.at[c], layout=plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)

    lax.cond(warpgroup < COMPUTE, compute, memory)
