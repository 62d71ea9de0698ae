"""An MLP of two layers, y = silu(x W1 + b1) W2 + b2, or x ⊙ y, for more rows than memory lets XLA do fast.

XLA writes the hidden layer and reads it again, forward and backward. On Hopper the forward pass here is one kernel that
keeps it in registers (`forward`), and the backward pass another one that computes it again (`backward`), beside XLA's
products for the gradients of the weights, whose operands it writes. Saved for the backward pass are x and, if it masks,
y. For 2.3 M rows of 192 and 320 hidden columns, to write y and to read it takes 0.6 ms at 3 TB/s, to compute it again
1.1 ms at 500 TFLOP/s: its sum has no place in registers beside that of the gradient, so it takes a loop of its own.

Numerics: sums in float32; rounded to x's dtype are the hidden layer, the mask as saved, its gradient, the result, the
gradients of the hidden layer and of x, and those of the weights and biases. Two runs give the same bits.

Limits of the kernels: bfloat16 and float16, widths of multiples of 64, up to 256 inputs and 320 outputs, multiples of 8
rows. All else is XLA's, which also rounds before it adds a bias and before it masks.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.dispatch import SlowerPathWarning
from pallas_kernels.jagged import vary_together
from pallas_kernels.mlp.backward import backward_tiles, mlp_backward
from pallas_kernels.mlp.forward import forward_tiles, mlp_forward
from pallas_kernels.mlp.xla import masked_in_xla, mlp_in_xla

LEAST_ROWS = 16_384  # fewer are not worth a kernel
MOST_INPUTS, MOST_OUTPUTS = 256, 320  # a warpgroup's registers hold no wider sums of 64 rows


class Static(NamedTuple):
    """What is fixed while tracing; interpret and sms are for tests on a CPU."""

    masked: bool
    sms: int
    interpret: Any


def silu_mlp(
    x: Float[Array, "*rest F"],
    w1: Float[Array, "F H"],
    b1: Float[Array, "H"],
    w2: Float[Array, "H G"],
    b2: Float[Array, "G"],
) -> Float[Array, "*rest G"]:
    """silu(x w1 + b1) w2 + b2 for every row of x; all operands of one dtype, that of the result.

    Products add up in float32. On Hopper, calls within the limits of this module run in own kernels; others run in XLA,
    with a `SlowerPathWarning` where only their widths or dtypes are in the way.
    """
    return _kernel_or_xla(x, w1, b1, w2, b2, masked=False)


def masked_by_mlp(
    x: Float[Array, "*rest F"],
    w1: Float[Array, "F H"],
    b1: Float[Array, "H"],
    w2: Float[Array, "H F"],
    b2: Float[Array, "F"],
) -> Float[Array, "*rest F"]:
    """x ⊙ (silu(x w1 + b1) w2 + b2) for every row of x: `silu_mlp` as a mask of its own input."""
    return _kernel_or_xla(x, w1, b1, w2, b2, masked=True)


def _kernel_or_xla(x, *weights, masked: bool):
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] >= LEAST_ROWS and hopper.unsupported_device() is None:
        if not (reason := unsupported(rows, *weights, masked=masked)):
            return mlp_kernel(rows, *weights, masked=masked).reshape(*x.shape[:-1], -1)
        name = masked_by_mlp.__name__ if masked else silu_mlp.__name__
        warnings.warn(f"{name} runs in XLA, its kernel passed over: {reason}", SlowerPathWarning, stacklevel=3)
    return (masked_in_xla if masked else mlp_in_xla)(x, *weights)


def unsupported(x, w1, b1, w2, b2, *, masked: bool = False) -> str | None:
    """Why the kernels can't run the MLP of rows [N, F], whatever the device, or None."""
    (N, F), (H, G) = x.shape, w2.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, the kernels take bfloat16 and float16"
    others = w1, b1, w2, b2
    if any(w.dtype != x.dtype for w in others):
        return f"x is {x.dtype}, weights and biases are {', '.join(str(w.dtype) for w in others)}"
    if any(width % hopper.PANEL for width in (F, H, G)):
        return f"widths are {F}, {H} and {G}, the kernels take multiples of {hopper.PANEL}"
    if F > MOST_INPUTS or G > MOST_OUTPUTS:
        return f"{F} inputs and {G} outputs, the kernels take up to {MOST_INPUTS} and {MOST_OUTPUTS}"
    if masked and F != G:
        return f"{G} outputs mask {F} inputs"
    if N == 0 or N % 8:
        return f"x has {N} rows, the kernels take multiples of 8"
    return None


def mlp_kernel(
    x, w1, b1, w2, b2, *, masked: bool = False, sms: int | None = None, interpret=None
) -> Float[Array, "N G"]:
    """`silu_mlp` or `masked_by_mlp` of rows [N, F] on Hopper. sms and interpret are for tests on a CPU."""
    if reason := unsupported(x, w1, b1, w2, b2, masked=masked):
        raise ValueError(f"silu_mlp: {reason}")
    static = Static(masked, hopper.sm_count() if sms is None else sms, interpret)
    return _mlp(static, *vary_together(x, w1, b1, w2, b2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(static: Static, x, w1, b1, w2, b2):
    return _forward(static, x, w1, b1, w2, b2)[0]


# Under jit of their own, so that equal layers of a model are lowered once: a kernel takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _forward(static: Static, x, w1, b1, w2, b2):
    tiles = forward_tiles(x.dtype, x.shape[1], *w2.shape)
    out = mlp_forward(x, w1, b1, w2, b2, tiles=tiles, **static._asdict())
    y, *mask = vary_together(*out, x)[:-1]
    return y, (x, w1, b1, w2, mask)


@functools.partial(jax.jit, static_argnums=0)
def _backward(static: Static, saved, dy):
    x, w1, b1, w2, mask = saved
    tiles = backward_tiles(x.dtype, x.shape[1], *w2.shape)
    dy = dy.astype(x.dtype)
    out = mlp_backward(x, dy, w1, b1, w2, *mask, tiles=tiles, **static._asdict())
    db1, db2, dx, hidden, d_hidden, *d_mask = vary_together(*out, x)[:-1]
    (d_out,) = d_mask or (dy,)
    return dx, x.T @ d_hidden, db1.astype(x.dtype), hidden.T @ d_out, db2.astype(x.dtype)


_mlp.defvjp(_forward, _backward)
