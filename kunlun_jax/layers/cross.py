"""The cross network of DCNv2 and the pairwise dot products of set tokens."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.layers.mlp import linear


class CrossNetwork(nnx.Module):
    """x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l on one vector per sample (DCNv2, arXiv 2008.13535).

    With a `rank`, W_l = U_l V_l of that rank, the paper's cheaper form; 0 keeps W_l whole.
    """

    def __init__(self, width: int, depth: int, *, rank: int, dtype: str, rngs: nnx.Rngs):
        self.down = nnx.List(
            [linear(width, rank, bias=False, dtype=dtype, rngs=rngs) for _ in range(depth if rank else 0)]
        )
        self.up = nnx.List([linear(rank or width, width, dtype=dtype, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: Float[Array, "B width"]) -> Float[Array, "B width"]:
        first = x
        for layer, up in enumerate(self.up):
            x = first * up(self.down[layer](x) if self.down else x) + x
        return x


def pair_products(x: Float[Array, "B m d"]) -> Float[Array, "B pairs"]:
    """The dot products of all m(m − 1)/2 pairs of different tokens, divided by √d [choice]."""
    rows, columns = np.triu_indices(x.shape[1], k=1)
    return jnp.einsum("bmd,bnd->bmn", x, x)[:, rows, columns] / np.sqrt(x.shape[-1])
