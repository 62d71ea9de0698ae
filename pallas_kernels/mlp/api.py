"""An MLP of two layers, y = silu(x W1 + b1) W2 + b2, for more rows than memory lets XLA do fast.

XLA writes the hidden layer and reads it again, forward and backward. On Hopper the forward pass here is one kernel that
keeps it in registers (`forward`), and the backward pass another one that computes it again (`backward`), beside XLA's
products for the gradients of the weights, whose operands it writes. Saved for the backward pass is x alone.

Numerics: sums in float32; rounded to x's dtype are the hidden layer, the result, the gradients of the hidden layer and
of x, and those of the weights and biases. Two runs give the same bits.

Limits of the kernels: bfloat16 and float16, widths of multiples of 64, up to 256 inputs and 320 outputs, multiples of 8
rows. All else is XLA's, which also adds the bias after rounding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.jagged import vary_together
from pallas_kernels.mlp.backward import backward_tiles, mlp_backward
from pallas_kernels.mlp.forward import forward_tiles, mlp_forward

LEAST_ROWS = 16_384  # fewer are not worth a kernel
MOST_INPUTS, MOST_OUTPUTS = 256, 320  # a warpgroup's registers hold no wider sums of 64 rows


class Static(NamedTuple):
    """What is fixed while tracing; interpret and sms are for tests on a CPU."""

    sms: int
    interpret: Any


def silu_mlp(
    x: Float[Array, "*rest F"],
    w1: Float[Array, "F H"],
    b1: Float[Array, "H"],
    w2: Float[Array, "H G"],
    b2: Float[Array, "G"] | None = None,
) -> Float[Array, "*rest G"]:
    """silu(x w1 + b1) w2 + b2 for every row of x; all operands of one dtype, that of the result.

    Products add up in float32. On Hopper, calls within the limits of this module run in own kernels, others in XLA.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] >= LEAST_ROWS and not (hopper.unsupported_device() or unsupported(rows, w1, b1, w2, b2)):
        return mlp_kernel(rows, w1, b1, w2, b2).reshape(*x.shape[:-1], w2.shape[1])
    return mlp_in_xla(x, w1, b1, w2, b2)


def unsupported(x, w1, b1, w2, b2=None) -> str | None:
    """Why the kernels can't run the MLP of rows [N, F], whatever the device, or None."""
    (N, F), (H, G) = x.shape, w2.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x is {x.dtype}, the kernels take bfloat16 and float16"
    others = [w1, b1, w2] + [b2] * (b2 is not None)
    if any(w.dtype != x.dtype for w in others):
        return f"x is {x.dtype}, weights and biases are {', '.join(str(w.dtype) for w in others)}"
    if any(width % hopper.PANEL for width in (F, H, G)):
        return f"widths are {F}, {H} and {G}, the kernels take multiples of {hopper.PANEL}"
    if F > MOST_INPUTS or G > MOST_OUTPUTS:
        return f"{F} inputs and {G} outputs, the kernels take up to {MOST_INPUTS} and {MOST_OUTPUTS}"
    if N == 0 or N % 8:
        return f"x has {N} rows, the kernels take multiples of 8"
    return None


def mlp_in_xla(x, w1, b1, w2, b2=None) -> Float[Array, "*rest G"]:
    """`silu_mlp` anywhere."""
    y = jax.nn.silu(x @ w1 + b1) @ w2
    return y if b2 is None else y + b2


def mlp_kernel(x, w1, b1, w2, b2=None, *, sms: int | None = None, interpret=None) -> Float[Array, "N G"]:
    """`silu_mlp` of rows [N, F] on Hopper. sms and interpret are for tests on a CPU."""
    if reason := unsupported(x, w1, b1, w2, b2):
        raise ValueError(f"silu_mlp: {reason}")
    static = Static(hopper.sm_count() if sms is None else sms, interpret)
    biases = (b1,) if b2 is None else (b1, b2)
    x, w1, w2, *biases = vary_together(x, w1, w2, *biases)
    return _mlp(static, x, w1, w2, biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(static: Static, x, w1, w2, biases):
    return _forward(static, x, w1, w2, biases)[0]


# Under jit of their own, so that equal layers of a model are lowered once: a kernel takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _forward(static: Static, x, w1, w2, biases):
    tiles = forward_tiles(x.dtype, x.shape[1], *w2.shape)
    y = mlp_forward(x, w1, w2, *biases, tiles=tiles, **static._asdict())
    return vary_together(y, x)[0], (x, w1, w2, biases)


@functools.partial(jax.jit, static_argnums=0)
def _backward(static: Static, saved, dy):
    x, w1, w2, biases = saved
    tiles = backward_tiles(x.dtype, x.shape[1], *w2.shape)
    dy, b1 = dy.astype(x.dtype), biases[0]
    out = mlp_backward(x, dy, w1, w2, b1, with_db2=len(biases) > 1, tiles=tiles, **static._asdict())
    dx, hidden, d_hidden, *d_biases = vary_together(*out, x)[:-1]
    return dx, x.T @ d_hidden, hidden.T @ dy, [d.astype(x.dtype) for d in d_biases]


_mlp.defvjp(_forward, _backward)
