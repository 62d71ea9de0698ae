"""Linear maps, MLPs and MaskNet."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import masked_by_mlp, silu_mlp


def linear(inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """A linear map over the feature axis: float32 parameters, products in `dtype`.

    Every large dense product of the models is made here, so that operand types and scales change in one place.
    """
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=jnp.dtype(dtype), param_dtype=jnp.float32, rngs=rngs)


def in_parts(layer: nnx.Linear, x: Float[Array, "*rest inputs"], parts: int) -> list[Float[Array, "*rest outputs"]]:
    """The result of a bias-free `layer` in `parts` equal pieces, each a product of its own.

    Cutting one wide result copies all of it, since the pieces are operands of kernels; cutting the weights is free.
    """
    return beside_parts(layer, x, parts)[1]


def beside_parts(
    layer: nnx.Linear, x: Float[Array, "*rest inputs"], parts: int
) -> tuple[Float[Array, "*rest inputs"], list[Float[Array, "*rest outputs"]]]:
    """x itself and `in_parts` of it: the gradients of whoever reads this x are added inside the products."""
    (kernel,) = cast(str(jnp.dtype(layer.dtype)), layer.kernel)
    same, products = _products(x.reshape(-1, x.shape[-1]), jnp.split(kernel, parts, axis=1))
    return same.reshape(x.shape), [part.reshape(*x.shape[:-1], -1) for part in products]


@jax.custom_vjp
def _products(x, weights):
    return x, [x.astype(w.dtype) @ w for w in weights]


def _products_forward(x, weights):
    return _products(x, weights), (x, weights)


def _products_backward(saved, gradients):
    (x, weights), (total, of_products) = saved, gradients
    for d, w in zip(of_products, weights, strict=True):
        total = (d @ w.T).astype(x.dtype) + total  # in this order XLA lets the product start from the sum
    return total, [x.astype(d.dtype).T @ d for d in of_products]


_products.defvjp(_products_forward, _products_backward)


def mix_tokens(weights: Float[Array, "*m o n"], x: Float[Array, "B *m n d"]) -> Float[Array, "B *m o d"]:
    """Σ_n weights[o, n] x[b, n] for every sample b.

    As a batched product with the weights repeated: one plain product over the middle axis of x makes XLA transpose x
    before it and the result after it, which costs more than reading weights of about the size of a sample's tokens.
    """
    return jnp.broadcast_to(weights, (*x.shape[:-2], *weights.shape[-2:])) @ x


class MLP(nnx.Module):
    """Linear maps with SiLU between them; none after the last [choice]."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, *, dtype: str, rngs: nnx.Rngs):
        widths = [inputs, *hidden, outputs]
        self.layers = nnx.List([linear(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x: Float[Array, "*rest inputs"]) -> Float[Array, "*rest outputs"]:
        *others, last = self.layers
        if not others:
            return last(x)
        for layer in others[:-1]:
            x = nnx.silu(layer(x))
        return _two_layers(silu_mlp, x, others[-1], last)


class MaskNet(nnx.Module):
    """MLP_lce(S ⊙ MLP_mask(S)): joins time-aligned sequences, here the fields of an event (InterFormer).

    Shapes: [..., inputs] → [..., outputs]. Hidden widths equal `outputs`, and the mask starts around 1, so that the
    fields pass before it has learned anything [choice].
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: str, rngs: nnx.Rngs):
        self.mask = MLP(inputs, [outputs], inputs, dtype=dtype, rngs=rngs)
        self.mask.layers[-1].bias = nnx.Param(jnp.ones(inputs))
        self.compress = MLP(inputs, [outputs], outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*rest inputs"]) -> Float[Array, "*rest outputs"]:
        return self.compress(_two_layers(masked_by_mlp, x, *self.mask.layers))


def _two_layers(f, x, first: nnx.Linear, last: nnx.Linear):
    """f of x and the layers' weights and biases: of many rows in kernels that don't write the hidden layer."""
    assert first.bias is not None  # nnx.Linear can do without; `MLP` makes none of those
    assert last.bias is not None
    operands = cast(str(jnp.dtype(first.dtype)), first.kernel, first.bias, last.kernel, last.bias)
    return f(x.astype(operands[0].dtype), *operands)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution with standard deviation `scale`."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def cast(dtype: str, *params: nnx.Param) -> list[jax.Array]:
    """Parameters as operands of a product in `dtype`."""
    return [param[...].astype(dtype) for param in params]


Activation = Callable[[jax.Array], jax.Array]
