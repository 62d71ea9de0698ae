"""Generalised dot-product attention (GDPA) on packed samples: the public operators and their checks."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.gdpa import block, mosaic, reference, xla
from pallas_kernels.gdpa.activations import per_head
from pallas_kernels.spans import check_spans, static_length

GDPA = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", xla.xla, xla.unsupported),
    Implementation("reference", reference.reference, reference.unsupported, by_default=False),
)
GDPA_BLOCK = (
    Implementation("xla", block.xla, xla.unsupported),
    Implementation("reference", block.reference, reference.unsupported, by_default=False),
)


def gdpa(
    q: Float[Array, "Nq H D"],
    k: Float[Array, "Nkv K D"],
    v: Float[Array, "Nkv K D"],
    *,
    q_starts: Int32[Array, " B"],
    q_lengths: Int32[Array, " B"],
    kv_starts: Int32[Array, " B"],
    kv_lengths: Int32[Array, " B"],
    max_q_length: int | None = None,
    max_kv_length: int | None = None,
    activation: str | tuple[str, ...] = "gelu_tanh",
    scale: float = 1.0,
    post_scale: float = 1.0,
    implementation: str | None = None,
) -> Float[Array, "Nq H D"]:
    """Attention with an element-wise activation in place of the softmax [fig], on packed samples.

        out[i] = Σ_j act_h(scale · q_i·k_j) · post_scale · v_j        over the keys j of row i's sample

    Sample b has the query rows q_starts[b] … + q_lengths[b] and the keys kv_starts[b] … + kv_lengths[b]. Lengths may be
    0, starts need no alignment and no order. Spans of queries are disjoint; spans of keys may coincide (candidates of
    one request share keys), and their gradients add up. Rows of q outside every sample give 0 and get gradient 0;
    nothing in such a row, NaN included, reaches a sample.

    Args:
      q: queries, H heads of width D.
      k, v: keys and values with K heads; K divides H, and query head h reads head h // (H // K).
      max_q_length, max_kv_length: static bounds on the lengths (default: the arrays' rows). Longer samples are an error
        where lengths are concrete and undefined inside jit.
      activation: identity, relu, relu2, leaky_relu, gelu, gelu_tanh, silu or hardswish, or a tuple with one per head.
      scale: static factor > 0 before the activation: the paper's 1/τ [fig].
      post_scale: static factor after the activation: Meta's released kernel has it [meta].
      implementation: "mosaic_gpu" (Hopper, bfloat16 and float16, D 64 and 128), "xla" or "reference"; None takes the
        first that supports the call and warns about what it passed over.

    Differentiable in q, k and v; works inside jit, grad, vmap and shard_map (starts count from the shard's first row).

    Raises:
      ValueError: shapes, dtypes, spans, activation or scales that don't fit, naming the argument and the numbers.
      NotImplementedError: the named implementation can't run this call.
    """
    operands, static = _checked(q, k, v, q_starts, q_lengths, kv_starts, kv_lengths, max_q_length, max_kv_length,
                                activation, scale, post_scale)
    return dispatch("gdpa", GDPA, implementation, *operands, **static)


def gdpa_block(
    q: Float[Array, "Nq H D"],
    k: Float[Array, "Nkv K D"],
    v: Float[Array, "Nkv K D"],
    *,
    q_starts: Int32[Array, " B"],
    q_lengths: Int32[Array, " B"],
    kv_starts: Int32[Array, " B"],
    kv_lengths: Int32[Array, " B"],
    max_q_length: int | None = None,
    max_kv_length: int | None = None,
    activation: str | tuple[str, ...] = "gelu_tanh",
    scale: float = 1.0,
    post_scale: float = 1.0,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "Nq H D"]:
    """The production PFFN block around `gdpa` [meta]; norms without learned parameters over all H·D features:

        x   = LayerNorm(q)
        out = RMSNorm(gdpa(x, k, v) + x) + q

    Arguments, rows outside the samples and errors as in `gdpa`; eps > 0 is added to the variance and the mean square.
    """
    operands, static = _checked(q, k, v, q_starts, q_lengths, kv_starts, kv_lengths, max_q_length, max_kv_length,
                                activation, scale, post_scale)
    return dispatch("gdpa_block", GDPA_BLOCK, implementation, *operands, **static, eps=_static_float("eps", eps))


def _checked(q, k, v, q_starts, q_lengths, kv_starts, kv_lengths, max_q_length, max_kv_length, activation, scale,
             post_scale):
    q, k, v, *spans = map(jnp.asarray, (q, k, v, q_starts, q_lengths, kv_starts, kv_lengths))
    _check_operands(q, k, v)
    max_q_length = static_length("max_q_length", max_q_length, q.shape[0])
    max_kv_length = static_length("max_kv_length", max_kv_length, k.shape[0])
    check_spans("q_", *spans[:2], rows=q.shape[0], max_length=max_q_length, disjoint=True)
    check_spans("kv_", *spans[2:], rows=k.shape[0], max_length=max_kv_length, disjoint=False)
    if spans[0].shape != spans[2].shape:
        raise ValueError(f"q_starts has {spans[0].shape[0]} samples, kv_starts has {spans[2].shape[0]}")
    static = dict(
        max_q_length=max_q_length,
        max_kv_length=max_kv_length,
        activation=per_head(activation, q.shape[1]),
        scale=_static_float("scale", scale),
        post_scale=_static_float("post_scale", post_scale, positive=False),
    )
    return (q, k, v, *spans), static


def _check_operands(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} must be [N, H, D], not {list(x.shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, not {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, but q is {q.dtype}; cast one of them")
        if x.shape[2] != q.shape[2]:
            raise ValueError(f"{name} has width {x.shape[2]}, but q has {q.shape[2]}")
    for axis, what in ((0, "rows"), (1, "heads")):
        if k.shape[axis] != v.shape[axis]:
            raise ValueError(f"k has {k.shape[axis]} {what}, but v has {v.shape[axis]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k and v")


def _static_float(name: str, value, *, positive: bool = True) -> float:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a number known while tracing, not {value}; don't pass it through jit")
    value = float(value)
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name}={value} must be {'a finite number > 0' if positive else 'finite'}")
    return value
