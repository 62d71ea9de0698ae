"""One pass over rows [N, F]: what becomes of every row of some arrays, its sums included, read once and written once.

XLA keeps a row in registers only while it is narrow: the wider it is, and the more operands it has, the more of them
are read again for the sums along it. In the kernel here a warp of a Hopper GPU holds whole rows, so that a sum is a few
shuffles between its lanes. Blocks are short and many; while some wait for their rows, others compute or store.

Numerics: a pass computes in float32 and rounds once, to its first operand's dtype. Every row is written by one store,
so two runs give the same bits.

Limits of the kernel: bfloat16 and float16, widths of `WIDTHS`, whole tiles of rows. All else is XLA's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels import hopper
from pallas_kernels.jagged import vary_together

WIDTHS = range(128, 2048 + 1, 64)  # columns of the kernel; a lane's registers hold no more
WARPS = 4


def row_pass(
    body: Callable[..., Any],
    *operands: Float[Array, "N F"],
    name: str,
    values: Sequence[Float[Array, "N"]] = (),
    inside: Bool[Array, "N"] | None = None,
    and_value: bool = False,
) -> Any:
    """body(*operands, *values), row by row, in the dtype of the first operand: [N, F].

    body: from float32 rows of any number; sums over a row by `mean` and `along` alone.
    values: one float32 per row each.
    and_value: body gives (rows, one value per row), and so does this; the values are float32 [N].
    name: of the kernel, in profiles.
    inside: the other rows become zero, whatever they hold.
    """
    if kernel_takes(*operands, and_value=and_value):
        return row_kernel(body, *operands, name=name, values=values, inside=inside, and_value=and_value)
    return row_pass_in_xla(body, *operands, values=values, inside=inside, and_value=and_value)


def mean(x: Float[Array, "n F"]) -> Float[Array, "n"]:
    """The mean of each row."""
    return jnp.sum(x, axis=1) * (1 / x.shape[1])


def along(values: Float[Array, "n"], x: Float[Array, "n F"]) -> Float[Array, "n F"]:
    """One value per row, along the rows of x."""
    return lax.broadcast_in_dim(values, x.shape, (0,))


def normalise(x: Float[Array, "n F"], eps: float) -> tuple[Float[Array, "n F"], Float[Array, "n"]]:
    """Rows less their mean, over their standard deviation, and what they were multiplied by."""
    centred = x - along(mean(x), x)
    factor = lax.rsqrt(mean(centred * centred) + eps)
    return centred * along(factor, x), factor


def normalise_back(
    d: Float[Array, "n F"], normed: Float[Array, "n F"], factor: Float[Array, "n"]
) -> Float[Array, "n F"]:
    """The gradient of rows from that of `normalise`'s, given its results."""
    return along(factor, d) * (d - along(mean(d), d) - normed * along(mean(d * normed), d))


def kernel_takes(*operands: Float[Array, "N F"], and_value: bool = False) -> bool:
    """Does the kernel run a pass over these operands, and faster than XLA? XLA reads a single operand as fast, but
    twice where a value per row comes out, too."""
    N, F = operands[0].shape
    known = all(x.dtype in (jnp.bfloat16, jnp.float16) for x in operands)
    fits = F in WIDTHS and N > 0 and N % tile_rows(F) == 0
    return len(operands) + and_value > 1 and known and fits and hopper.unsupported_device() is None


def tile_rows(F: int) -> int:
    """Rows of a block of the kernel: one for each warp, narrow ones in pairs."""
    return 2 * WARPS if F < 256 else WARPS


def row_pass_in_xla(
    body: Callable[..., Any],
    *operands: Float[Array, "N F"],
    values: Sequence[Float[Array, "N"]] = (),
    inside: Bool[Array, "N"] | None = None,
    and_value: bool = False,
) -> Any:
    """`row_pass` anywhere."""
    out = body(*(x.astype(jnp.float32) for x in operands), *values)
    out, *value = out if and_value else (out,)
    out = (out if inside is None else jnp.where(inside[:, None], out, 0)).astype(operands[0].dtype)
    return (out, *value) if and_value else out


def row_kernel(
    body: Callable[..., Any],
    *operands: Float[Array, "N F"],
    name: str,
    values: Sequence[Float[Array, "N"]] = (),
    inside: Bool[Array, "N"] | None = None,
    and_value: bool = False,
    interpret=None,
) -> Any:
    """`row_pass` on Hopper; N a multiple of `tile_rows(F)`. interpret is for tests on a CPU."""
    N, F = operands[0].shape
    tile = tile_rows(F)
    if N % tile or F not in WIDTHS:
        raise ValueError(f"rows [{N}, {F}]: the kernel takes multiples of {tile} rows and 128, 192, …, 2048 columns")
    # Of each row a lane holds `vector` neighbouring elements in every 32 · vector columns: 16 bytes, or fewer.
    vector = next(n for n in (8, 4, 2) if F % (32 * n) == 0)
    tiling = plgpu.Tiling(((WARPS, 32 * vector), (vector,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    of_rows = (*values, *(() if inside is None else (inside.astype(jnp.int32),)))
    inputs = vary_together(*operands, *of_rows)

    def kernel(*refs):
        rows = pl.ds(lax.axis_index("tile") * tile, tile)

        def load(refs, layout):
            return [plgpu.load(x.at[rows], layout=layout, optimized=False) for x in refs]

        loaded = load(refs[: len(operands)], layout)
        beside = load(refs[len(operands) : len(inputs)], layout.reduce(1))
        out = body(*(x.astype(jnp.float32) for x in loaded), *beside[: len(values)])
        out, *value = out if and_value else (out,)
        if inside is not None:
            out = jnp.where(along(beside[-1], out) > 0, out, 0.0)
        out_gmem, *value_gmem = refs[len(inputs) :]
        out_gmem[rows] = out.astype(out_gmem.dtype)
        for target, x in zip(value_gmem, value, strict=True):
            target[rows] = x

    out_type = [jax.ShapeDtypeStruct((N, F), operands[0].dtype)]
    out_type += [jax.ShapeDtypeStruct((N,), jnp.float32)] * and_value
    out = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(N // tile,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=interpret,
    )(*inputs)
    out = vary_together(*out, inputs[0])[:-1]
    return out if and_value else out[0]
