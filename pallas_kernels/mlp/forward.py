"""The MLP's forward pass: one block per SM, tiles of 128 rows, the hidden layer in chunks of 64 columns.

A warpgroup has 64 rows. A chunk of their hidden layer is a product from shared memory; its activation is the operand,
in registers, of the product that adds to the result, which runs beside the next chunk's first one. Where the MLP masks
its own input, the end multiplies the result by the rows, which still lie in shared memory.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.mlp.common import (
    COMPUTE,
    COMPUTE_REGISTERS,
    MASK_ROWS,
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
    half,
    persistent,
    weight_scratch,
)

WIDEST = 4  # panels of one wgmma


def forward_tiles(dtype, F: int, H: int, G: int) -> Tiles:
    return choose_tiles(functools.partial(forward_scratch, dtype, F, H, G), H, hopper.PANEL)


def forward_scratch(dtype, F: int, H: int, G: int, tiles: Tiles) -> dict:
    rows = (COMPUTE * tiles.row_slots, F // hopper.PANEL, ROWS, hopper.PANEL)
    return dict(
        x_smem=plgpu.SMEM(rows, dtype, transforms=hopper.WGMMA_TILES),
        biases_smem=plgpu.SMEM(((H + G) // hopper.PANEL, hopper.PANEL), dtype),
        x_full=plgpu.Barrier(num_arrivals=F // hopper.PANEL, num_barriers=COMPUTE * tiles.row_slots),
        biases_full=plgpu.Barrier(num_arrivals=1),
        **weight_scratch(dtype, F, G, tiles),
    )


def mlp_forward(x, w1, b1, w2, b2, *, masked: bool, tiles: Tiles, sms: int, interpret=None):
    """[silu(x w1 + b1) w2 + b2]: [N, G], or, masked, the product of x and this, and this, with rows added for whole
    tiles. sms: blocks of the grid."""
    (N, F), (H, G) = x.shape, w2.shape
    rows = [N, ceil_div(N, MASK_ROWS) * MASK_ROWS] if masked else [N]
    biases = jnp.concatenate([half(b1), b2])
    return persistent(
        functools.partial(_kernel, sms=sms, tiles=tiles),
        name="mlp_forward",
        out_type=[jax.ShapeDtypeStruct((n, G), x.dtype) for n in rows],
        scratch=forward_scratch(x.dtype, F, H, G, tiles),
        blocks=tiles.blocks,
        sms=sms,
        interpret=interpret,
        operands=(x, w1, w2, biases.reshape(-1, hopper.PANEL)),
    )


def _kernel(
    x_gmem,
    w1_gmem,
    w2_gmem,
    biases_gmem,
    y_gmem,
    mask_gmem=None,
    *,
    x_smem,
    biases_smem,
    x_full,
    biases_full,
    w1_smem,
    w2_smem,
    w_full,
    w_empty,
    sms,
    tiles,
):
    (N, F), G, dtype = x_gmem.shape, w2_gmem.shape[1], x_gmem.dtype
    slots, panels, chunks = tiles.row_slots, F // hopper.PANEL, w1_gmem.shape[1] // hopper.PANEL
    warpgroup, mine = lax.axis_index("warpgroup"), Deal(N, tiles.blocks, sms)
    weights = Weights(w1_gmem, w2_gmem, w1_smem, w2_smem, w_full, w_empty, order=(W1, W2), blocks=tiles.blocks)

    def memory():
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
        plgpu.copy_gmem_to_smem(biases_gmem, biases_smem, biases_full)
        weights.load_all(mine.turns)

    def panel(p):
        return pl.ds(hopper.PANEL * p, hopper.PANEL)

    def place(turn):
        return warpgroup * slots + lax.rem(turn, jnp.int32(slots))

    def load_rows(turn):
        @pl.when(turn < mine.turns)
        def _():
            for p in range(panels):
                source = x_gmem.at[mine.rows(turn), panel(p)]
                plgpu.copy_gmem_to_smem(source, x_smem.at[place(turn), p], x_full.at[place(turn)])

    def bias(i):
        return plgpu.load(biases_smem.at[i], layout=plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)

    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for turn in range(slots):
            load_rows(jnp.int32(turn))
        plgpu.barrier_wait(biases_full)
        weights.start()
        lax.fori_loop(0, mine.turns, lambda turn, _: one_tile(turn), None)
        plgpu.wait_smem_to_gmem(0)

    def one_tile(turn):
        first, x = turn * chunks, x_smem.at[place(turn)]
        plgpu.barrier_wait(x_full.at[place(turn)])

        def issue_hidden(acc, c):
            w1 = weights.await_(W1, first + c)
            for p in range(panels):
                plgpu.wgmma(acc, x.at[p], w1.at[panel(p)])

        def issue_out(acc, hidden, c):
            w2 = weights.await_(W2, first + c)
            for p in range(0, G, WIDEST * hopper.PANEL):
                part = pl.ds(p, min(WIDEST * hopper.PANEL, G - p))
                plgpu.wgmma(acc.at[:, part] if G > part.size else acc, hidden, w2.at[:, part])

        def silu(z, c):
            half_z = z * 0.5 + columns(bias(c))
            return half_z * jnp.tanh(half_z) + half_z

        def alone(acc):
            issue_hidden(acc, 0)
            return acc[...]

        def accumulate(out_acc):
            def step(c, hidden):
                """One chunk's part of the result beside the next chunk of the hidden layer."""

                def both(acc):
                    issue_hidden(acc, c + 1)
                    issue_out(out_acc, hidden, c)
                    return plgpu.wgmma_accumulator_load(acc, wait_n=ceil_div(G, WIDEST * hopper.PANEL))

                z = pl.run_scoped(both, chunk_type)
                weights.release(W1, first + c + 1)
                # The branch is wanted: it keeps ptxas from moving the activation behind the wait for the running
                # product.
                beyond = mine.rows(turn).start >= N
                hidden_next = lax.cond(beyond, lambda h: h * 0.0, lambda h: h, silu(z, c + 1))
                plgpu.wgmma_wait(0)
                weights.release(W2, first + c)
                # Narrow only now: what is narrow before the wait would be put into the registers of the running
                # product's operand, and ptxas would serialise the products.
                return hidden_next.astype(dtype)

            last = chunks - 1
            hidden = lax.fori_loop(0, last, step, hidden_first)
            issue_out(out_acc, hidden, last)
            out = out_acc[...]
            weights.release(W2, first + last)
            return out

        z = pl.run_scoped(alone, chunk_type)
        weights.release(W1, first)
        hidden_first = silu(z, 0).astype(dtype)
        out = pl.run_scoped(accumulate, plgpu.ACC((ROWS, G), jnp.float32))
        store(turn, out)
        load_rows(turn + slots)

    chunk_type = plgpu.ACC((ROWS, hopper.PANEL), jnp.float32)

    def store(turn, out):
        """Through the place of the rows that the result is of."""
        cut = [out[:, hopper.PANEL * p : hopper.PANEL * (p + 1)] for p in range(G // hopper.PANEL)]
        results = [(y_gmem, p, y + columns(bias(chunks + p))) for p, y in enumerate(cut)]
        if mask_gmem is not None:
            products = [(y_gmem, p, x_smem[place(turn), p].astype(jnp.float32) * mask) for _, p, mask in results]
            plgpu.commit_smem()  # all have read the rows before their place is written
            results = [(mask_gmem, p, mask) for _, p, mask in results] + products
        for i, (target, p, result) in enumerate(results):
            if i >= panels:
                plgpu.wait_smem_to_gmem(panels - 1, wait_read_only=True)
            staging = x_smem.at[place(turn), i % panels]
            staging[...] = result.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging, target.at[mine.rows(turn), panel(p)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(warpgroup < COMPUTE, compute, memory)
