"""The PFFN block: LayerNorm, GDPA, residual, RMSNorm, residual, as separate XLA operations."""

import jax.numpy as jnp
from jax import lax

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


def xla(*operands, **static):
    """See `gdpa_block`."""
    return compose(xla_module.xla, *operands, **static)


def reference(*operands, **static):
    """See `gdpa_block`."""
    return compose(reference_module.reference, *operands, **static)
