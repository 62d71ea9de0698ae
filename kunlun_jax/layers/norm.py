"""Normalisation over the feature axis, in float32 whatever the compute type."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.rows import normalise, normalise_back, row_pass

EPSILON = 1e-5


class LayerNorm(nnx.LayerNorm):
    """LayerNorm with scale and bias, whose gradient is one pass over the rows and one over the columns.

    Automatic gradients keep float32 copies of the rows between several passes.
    """

    def __call__(self, x: Float[Array, "*rest width"]) -> Float[Array, "*rest width"]:
        assert self.scale is not None  # nnx.LayerNorm can do without; `layer_norm` makes none of those
        assert self.bias is not None
        rows = x.reshape(-1, 1, x.shape[-1])
        return norm_of_groups(rows, self.scale[None], self.bias[None]).astype(self.dtype).reshape(x.shape)


def layer_norm(width: int, *, dtype: str, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm with eps 1e-5, statistics and parameters in float32, output in `dtype`."""
    return LayerNorm(width, epsilon=EPSILON, dtype=jnp.dtype(dtype), param_dtype=jnp.float32, rngs=rngs)


def norm_of_groups(
    x: Float[Array, "B M *rest width"], scale: Float[Array, "M width"], bias: Float[Array, "M width"]
) -> Float[Array, "B M *rest width"]:
    """LayerNorm of the rows of M groups in each sample, each group with a scale and a bias of its own; float32.

    What is scaled, and kept for the gradient, are the normalised rows in x's dtype.
    """
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return _layer_norm(rows, scale[:, None], bias[:, None]).reshape(x.shape)


def split_norm(x: Float[Array, "*rest width"]) -> tuple[Float[Array, "*rest width"], Float[Array, "*rest width"]]:
    """x itself for the residual connection, and LayerNorm(x) without scale and bias, which the linear map behind it
    can express.

    Both go through here so that one pass over the rows makes the whole gradient of x.
    """
    # The barrier keeps the reshape out of XLA's kernel of a row, which wants the rows as they are.
    residual, normed = _split_norm(lax.optimization_barrier(x.reshape(-1, x.shape[-1])))
    return residual.reshape(x.shape), normed.reshape(x.shape)


@jax.custom_vjp
def _split_norm(x):
    return _split_norm_forward(x)[0]


def _split_norm_forward(x):
    return (x, row_pass(lambda x: normalise(x, EPSILON)[0], x, name="split_norm")), x


def _split_norm_backward(x, gradients):
    def of_rows(x, d_residual, d):
        return normalise_back(d, *normalise(x, EPSILON)) + d_residual  # statistics again: kept ones would cost a pass

    # The barrier lets the products that end here add up in their own results; XLA would add them in this pass instead.
    return (row_pass(of_rows, x, *lax.optimization_barrier(gradients), name="split_norm_backward"),)


_split_norm.defvjp(_split_norm_forward, _split_norm_backward)


@jax.custom_vjp
def _layer_norm(x, scale, bias):
    return _forward(x, scale, bias)[0]


def _forward(x, scale, bias):
    # The barrier keeps what made x out of the pass: XLA holds rows of an array in registers.
    rows = lax.optimization_barrier(x.reshape(-1, x.shape[-1]))
    normed, factor = row_pass(lambda x: normalise(x, EPSILON), rows, name="layer_norm", and_value=True)
    normed = normed.reshape(x.shape)
    return normed.astype(jnp.float32) * scale + bias, (normed, factor, scale)


def _backward(residuals, d):
    normed, factor, scale = residuals
    # In the operands' dtype, so that no float32 array of all rows goes from the sums over columns to the rows' pass.
    d_normed = (d * scale).astype(normed.dtype)
    d_scale, d_bias = _over_samples(d * normed.astype(jnp.float32)), _over_samples(d)
    rows = lax.optimization_barrier([y.reshape(-1, y.shape[-1]) for y in (d_normed, normed)])
    dx = row_pass(normalise_back, *rows, values=(factor,), name="layer_norm_backward")
    return dx.reshape(normed.shape), d_scale, d_bias


_layer_norm.defvjp(_forward, _backward)


def _over_samples(x):
    """Sums of all rows of a group, [B, M, R, F] → [M, 1, F]."""
    if x.shape[2] == 1:  # XLA would leave few columns of up to 4096 rows to few threads
        x = x.reshape(math.gcd(x.shape[0], 32), -1, *x.shape[1:])
        x = lax.optimization_barrier(x.sum(axis=1))
    return x.sum(axis=0).sum(axis=1, keepdims=True)
