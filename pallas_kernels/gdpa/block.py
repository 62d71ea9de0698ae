"""The PFFN block: LayerNorm, GDPA, residual, RMSNorm, residual.

The norms span all heads of a row. The forward pass is one kernel where an SM can hold all heads of a tile of queries
(`mosaic_block`); the GDPA kernels see one head at a time. Elsewhere the norms are one pass over the rows on each side
of GDPA, which reads and writes every tensor once: rows are flat, and the gradients are in closed form, where automatic
ones pass over the rows several times. In the backward pass, the second of these is part of GDPA's dq kernel with 2, 4
and 8 heads (`mosaic_backward.finishes_norm`). What `pallas_kernels.rows`' kernel doesn't take is XLA's, which only
keeps a row in registers over its last axis.
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
from pallas_kernels.rows import along, mean, normalise, normalise_back, row_pass


def compose(gdpa, q, k, v, *spans, eps: float, **static):
    """The block around any implementation of GDPA. Norms in float32; rounded to q's dtype are LayerNorm's result
    (the operand of the products), GDPA's and the block's."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    residual = jnp.where(_inside(spans, q)[:, None, None], q, 0).astype(wide)  # stops NaN, in both directions
    centred = residual - jnp.mean(residual, axis=(1, 2), keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + eps)
    normed = normed.astype(q.dtype)
    mixed = gdpa(normed, k, v, *spans, **static).astype(wide) + normed.astype(wide)
    out = mixed * lax.rsqrt(jnp.mean(mixed**2, axis=(1, 2), keepdims=True) + eps) + residual
    return out.astype(q.dtype)


def in_two_passes(gdpa, q, k, v, *spans, eps: float, pull_through=None, **static):
    """`compose` with one pass over the rows before GDPA and one behind it, in each direction.

    pull_through: see `_pull_back`; takes GDPA's operands first.
    """
    shape = q.shape
    inside = _inside(spans, q)

    @jax.custom_vjp
    def block(q, k, v):
        return forward(q, k, v)[0]

    def forward(q, k, v):
        q = _flat(q)
        normed = row_pass(lambda q: normalise(q, eps)[0], q, name="layer_norm").reshape(shape)
        if pull_through:
            attended, pull = gdpa(normed, k, v, *spans, **static), (normed, k, v)
        else:
            attended, pull = jax.vjp(lambda x, k, v: gdpa(x, k, v, *spans, **static), normed, k, v)

        def finish(x, attended):
            mixed, _ = _mixed(x, attended, q.dtype, eps)
            return mixed * along(_rms(mixed, eps), mixed) + x

        out = row_pass(finish, q, _flat(attended), name="gdpa_block_norm", inside=inside)
        return out.reshape(shape), (q, attended, pull)

    def backward(residuals, d_out):
        q, attended, pull = residuals
        if pull_through:
            through = functools.partial(pull_through, *pull, *spans)
            return _pull_back(q, attended, d_out, inside, None, eps, through)
        return _pull_back(q, attended, d_out, inside, pull, eps)

    block.defvjp(forward, backward)
    return block(q, k, v)


def _pull_back(q, attended, d_out, inside, pull, eps, pull_through=None):
    """Gradients of q, k and v from q [N, H·D] and GDPA's result [N, H, D].

    pull: GDPA's gradients from its result's. pull_through: all gradients, through the first norm too, from that of
    GDPA's result (do), what the norm multiplied the rows by (factor), and that of the residual around all.
    """
    shape, attended, residual, d_out = d_out.shape, _flat(attended), d_out, _flat(d_out)

    def d_mixed(x, attended, d):
        mixed, factor = _mixed(x, attended, q.dtype, eps)
        rms = _rms(mixed, eps)
        normed = mixed * along(rms, mixed)
        d = along(rms, mixed) * (d - normed * along(mean(d * normed), mixed))
        return (d, factor) if pull_through else d

    def d_q(x, d_normed, d_attended, d_out):
        return normalise_back(d_normed + d_attended, *normalise(x, eps)) + d_out

    name = "gdpa_block_norm_backward"
    d_attended = row_pass(d_mixed, q, attended, d_out, name=name, inside=inside, and_value=pull_through is not None)
    d_attended = lax.optimization_barrier(d_attended)
    if pull_through:
        d_attended, factor = d_attended
        return pull_through(do=d_attended.reshape(shape), factor=factor, residual=residual)
    d_normed, d_k, d_v = pull(d_attended.reshape(shape))
    d = row_pass(d_q, q, _flat(d_normed), d_attended, d_out, name="layer_norm_backward", inside=inside)
    return d.reshape(shape), d_k, d_v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def fused(static: mosaic_module.Static, eps: float, *operands):
    """`compose` with the forward pass in one kernel; operands (q, k, v, *spans). Needs `block_tiles`."""
    return _fused(static, eps, *operands, save=False)


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
    return vary_together(*out, q)[:-1] if save else vary_together(out, q)[0]


def _fused_forward(static, eps, *operands):
    out, normed, attended = _fused(static, eps, *operands, save=True)
    return out, (operands, normed, attended)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fused_backward(static, eps, residuals, d_out):
    (q, k, v, *spans), normed, attended = residuals

    def pull(d):
        return mosaic_module.backward(static, (normed, k, v, *spans), d)[:3]

    pull_through = _pull_through(static, q, k, spans)
    pull_through = pull_through and functools.partial(pull_through, normed, k, v, *spans)
    grads = _pull_back(_flat(q), attended, d_out, _inside(spans, q), pull, eps, pull_through)
    return *grads, *(None,) * 4


def _pull_through(static, q, k, spans):
    """`mosaic.backward_behind_norm` of this call, if it is taken."""
    taken = mosaic_module.finishes_norm(static, q, k, spans[0])
    return functools.partial(mosaic_module.backward_behind_norm, static) if taken else None


fused.defvjp(_fused_forward, _fused_backward)


def _flat(x):
    """Rows [N, H·D]; the barrier keeps the reshape out of XLA's fusions of a row, which want the parameter as it is."""
    return lax.optimization_barrier(x.reshape(x.shape[0], -1))


def _inside(spans, q):
    """Which rows belong to a sample."""
    return segments(spans[0], spans[1], q.shape[0]) < spans[0].shape[0]


def _mixed(x, attended, dtype, eps):
    """What RMSNorm gets, from rows of q and of GDPA's result, and what LayerNorm multiplied the rows by.

    LayerNorm's result is rounded to dtype.
    """
    normed, factor = normalise(x, eps)
    return normed.astype(dtype).astype(jnp.float32) + attended, factor


def _rms(x, eps):
    """One over the root mean square of each row."""
    return lax.rsqrt(mean(x * x) + eps)


def mosaic_gpu(q, k, v, *spans, eps: float, shared_keys=False, sms: int | None = None, interpret=None, **static):
    """See `gdpa_block`; sms and interpret are for tests on a CPU."""
    sms = hopper.sm_count() if sms is None else sms
    known = mosaic_module.Static(**static, shared_keys=shared_keys, sms=sms, interpret=interpret)
    if block_tiles(heads=q.shape[1], width=q.shape[2]) is None:
        gdpa = functools.partial(mosaic_module.mosaic_gpu, **known._asdict())
        return in_two_passes(gdpa, q, k, v, *spans, eps=eps, pull_through=_pull_through(known, q, k, spans))
    return fused(known, eps, *vary_together(q, k, v, *spans))


def xla(*operands, **static):
    """See `gdpa_block`."""
    return compose(xla_module.xla, *operands, **static)


def reference(*operands, **static):
    """See `gdpa_block`."""
    return compose(reference_module.reference, *operands, **static)
