"""The PFFN block: LayerNorm, GDPA, residual, RMSNorm, residual.

The norms are XLA's on every path: they span all heads, and no block of the GDPA kernels sees all heads of a row.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.gdpa import mosaic as mosaic_module
from pallas_kernels.gdpa import reference as reference_module
from pallas_kernels.gdpa import xla as xla_module
from pallas_kernels.jagged import segments


def compose(gdpa, q, k, v, *spans, eps: float, **static):
    """The block around any implementation of GDPA. Norms in float32; rounded to q's dtype are LayerNorm's result
    (the operand of the products), GDPA's and the block's."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    inside = (segments(spans[0], spans[1], q.shape[0]) < spans[0].shape[0])[:, None, None]
    residual = jnp.where(inside, q, 0).astype(wide)  # NaN outside the samples stops here, in both directions
    centred = residual - jnp.mean(residual, axis=(1, 2), keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + eps)
    normed = normed.astype(q.dtype)
    mixed = gdpa(normed, k, v, *spans, **static).astype(wide) + normed.astype(wide)
    out = mixed * lax.rsqrt(jnp.mean(mixed**2, axis=(1, 2), keepdims=True) + eps) + residual
    return out.astype(q.dtype)


def mosaic_gpu(*operands, **static):
    """See `gdpa_block`."""
    return compose(mosaic_module.mosaic_gpu, *operands, **static)


def xla(*operands, **static):
    """See `gdpa_block`."""
    return compose(xla_module.xla, *operands, **static)


def reference(*operands, **static):
    """See `gdpa_block`."""
    return compose(reference_module.reference, *operands, **static)
