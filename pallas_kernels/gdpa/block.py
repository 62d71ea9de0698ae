"""The PFFN block: LayerNorm, GDPA, residual, RMSNorm, residual.

The norms span all heads of a row. On Hopper the forward pass is one kernel (`mosaic_block`), for every head count that
the backward takes: one pass over the rows, from the block's result to GDPA's, and GDPA's backward, whose dq kernel
finishes the gradient behind the LayerNorm (`mosaic_backward`, `finishes_norm`). The pass' gradient is in closed form,
an automatic one passes over the rows several times. Other calls are the composition, with XLA's norms.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.gdpa import mosaic as mosaic_module
from pallas_kernels.gdpa import reference as reference_module
from pallas_kernels.gdpa import xla as xla_module
from pallas_kernels.gdpa.mosaic_block import block_forward, block_tiles
from pallas_kernels.jagged import segments, vary_together
from pallas_kernels.rows import along, mean, normalise, row_pass


def compose(gdpa, q, k, v, *spans, eps: float, **static):
    """The block around any implementation of GDPA. Norms in float32; rounded to q's dtype are LayerNorm's result
    (the operand of the products), GDPA's and the block's."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    inside = _inside(spans, q)
    residual = jnp.where(inside[:, None, None], q, 0).astype(wide)  # stops NaN, in both directions
    centred = residual - jnp.mean(residual, axis=(1, 2), keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + eps)
    normed = normed.astype(q.dtype)
    mixed = gdpa(normed, k, v, *spans, **static).astype(wide) + normed.astype(wide)
    out = mixed * lax.rsqrt(jnp.mean(mixed**2, axis=(1, 2), keepdims=True) + eps) + residual
    return out.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused(static: mosaic_module.Static, eps: float, *operands):
    """`compose` in own kernels; operands (q, k, v, *spans). Needs `finishes_norm`."""
    return _fused(static, eps, *operands, save=False)[0]


# Under jit of their own, so that equal layers of a model are lowered once: a kernel takes seconds.
@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="save")
def _fused(static, eps, q, k, v, *spans, save: bool):
    tiles = block_tiles(heads=q.shape[1], width=q.shape[2])
    assert tiles is not None
    out = block_forward(
        q,
        k,
        v,
        *spans,
        activation=static.activation,
        scale=static.scale,
        post_scale=static.post_scale,
        eps=eps,
        max_q_length=static.max_q_length,
        tiles=tiles,
        sms=static.sms,
        save=save,
        interpret=static.interpret,
    )
    return vary_together(*out, q)[:-1]


def _fused_forward(static, eps, *operands):
    out, normed, attended = _fused(static, eps, *operands, save=True)
    return out, (operands, normed, attended)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fused_backward(static, eps, residuals, d_out):
    (q, k, v, *spans), normed, attended = residuals

    def d_attended(x, attended, d):
        """Gradient of GDPA's result, and of LayerNorm's as the residual; what LayerNorm multiplied the row by."""
        normed, factor = normalise(x, eps)
        mixed = normed.astype(q.dtype).astype(jnp.float32) + attended
        rms = lax.rsqrt(mean(mixed * mixed) + eps)
        unit = mixed * along(rms, mixed)
        return along(rms, mixed) * (d - unit * along(mean(d * unit), mixed)), factor

    rows = map(_flat, (q, attended, d_out))
    inside = _inside(spans, q)
    do, factor = row_pass(d_attended, *rows, name="gdpa_block_norm_backward", inside=inside, and_value=True)
    do = lax.optimization_barrier(do).reshape(q.shape)
    grads = mosaic_module.backward_behind_norm(static, normed, k, v, *spans, do=do, factor=factor, residual=d_out)
    return *grads, *(None,) * 4


fused.defvjp(_fused_forward, _fused_backward)


def _flat(x):
    """Rows [N, H·D]; the barrier keeps the reshape out of XLA's fusions of a row, which want the parameter as it is."""
    return lax.optimization_barrier(x.reshape(x.shape[0], -1))


def _inside(spans, q):
    """Which rows belong to a sample."""
    return segments(spans[0], spans[1], q.shape[0]) < spans[0].shape[0]


def mosaic_gpu(q, k, v, *spans, eps: float, shared_keys=False, sms: int | None = None, interpret=None, **static):
    """See `gdpa_block`; sms and interpret are for tests on a CPU."""
    sms = hopper.sm_count() if sms is None else sms
    known = mosaic_module.Static(**static, shared_keys=shared_keys, sms=sms, interpret=interpret)
    if not mosaic_module.finishes_norm(known, q.shape[1]):
        return compose(mosaic_module.mosaic_gpu, q, k, v, *spans, eps=eps, **known._asdict())
    return fused(known, eps, *vary_together(q, k, v, *spans))


def xla(*operands, **static):
    """See `gdpa_block`."""
    return compose(xla_module.xla, *operands, **static)


def reference(*operands, **static):
    """See `gdpa_block`."""
    return compose(reference_module.reference, *operands, **static)
