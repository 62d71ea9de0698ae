"""Normalisation over the feature axis, in float32 whatever the compute type."""

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
        return norm_of_groups(x[None], self.scale[None], self.bias[None]).astype(self.dtype)[0]


def layer_norm(width: int, *, dtype: str, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm with eps 1e-5, statistics and parameters in float32, output in `dtype`."""
    return LayerNorm(width, epsilon=EPSILON, dtype=jnp.dtype(dtype), param_dtype=jnp.float32, rngs=rngs)


def norm_of_groups(
    x: Float[Array, "M *rest width"], scale: Float[Array, "M width"], bias: Float[Array, "M width"]
) -> Float[Array, "M *rest width"]:
    """LayerNorm of M groups of rows, each with a scale and a bias of its own; float32."""
    return _layer_norm(x.reshape(x.shape[0], -1, x.shape[-1]), scale, bias).reshape(x.shape)


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
    rows, scale, bias = _rows(x, scale, bias)
    mean, factor = _statistics(rows)
    return ((rows.astype(jnp.float32) - mean) * factor * scale + bias).reshape(x.shape)


def _forward(x, scale, bias):
    return _layer_norm(x, scale, bias), (x, scale)


def _backward(residuals, d):
    x, scale = residuals
    rows, d_rows, along = _rows(x, d, scale)
    mean, factor = _statistics(rows)
    dx = _to_rows(d_rows * along, (rows.astype(jnp.float32) - mean) * factor, factor)
    # The barrier keeps the sums over columns from asking the pass over rows for a float32 array of products.
    mean_again, factor_again = lax.optimization_barrier((mean, factor))
    normed = ((rows.astype(jnp.float32) - mean_again) * factor_again).reshape(x.shape)
    return dx.astype(x.dtype).reshape(x.shape), jnp.sum(d * normed, axis=1), jnp.sum(d, axis=1)


_layer_norm.defvjp(_forward, _backward)


def _rows(x, *others):
    """[M, R, F] and what broadcasts to it as rows [M·R, F]: XLA keeps a row in registers over the last of two axes."""
    others = (y[:, None] if y.ndim < x.ndim else y for y in others)
    return tuple(jnp.broadcast_to(y, x.shape).reshape(-1, x.shape[-1]) for y in (x, *others))


def _to_rows(d, normed, factor):
    """The gradient of rows, from that of their normalised form."""
    return factor * (d - jnp.mean(d, axis=1, keepdims=True) - normed * jnp.mean(d * normed, axis=1, keepdims=True))


def _statistics(x):
    """The mean of each row and one over its standard deviation, [rows, 1] float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=1, keepdims=True)
    return mean, lax.rsqrt(jnp.mean((x - mean) ** 2, axis=1, keepdims=True) + EPSILON)
