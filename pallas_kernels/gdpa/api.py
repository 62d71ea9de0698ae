"""Generalised dot-product attention (GDPA) on packed samples: the public operators and their checks."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_float, check_heads, check_scale, check_spans, known_to_overlap
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.gdpa import block, mosaic, reference, xla
from pallas_kernels.gdpa.activations import per_head

GDPA = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", xla.xla, xla.unsupported),
    Implementation("reference", reference.reference, reference.unsupported, for_tests=True),
)
GDPA_BLOCK = (
    Implementation("mosaic_gpu", block.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", block.xla, xla.unsupported),
    Implementation("reference", block.reference, reference.unsupported, for_tests=True),
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
    shared_keys: bool = False,
    implementation: str | None = None,
) -> Float[Array, "Nq H D"]:
    """Attention with an element-wise activation in place of the softmax [fig], on packed samples.

        out[i] = Σ_j act_h(scale · q_i·k_j) · post_scale · v_j        over the keys j of row i's sample

    Sample b has the query rows q_starts[b] … + q_lengths[b] and the keys kv_starts[b] … + kv_lengths[b]. Lengths may be
    0, starts need no alignment and no order. Spans of queries are disjoint; spans of keys may coincide (see
    `shared_keys`), and their gradients add up. Rows of q outside every sample give 0 and get gradient 0;
    nothing in such a row, NaN included, reaches a sample.

    Args:
      q: queries, H heads of width D.
      k, v: keys and values with K heads; K divides H, and query head h reads head h // (H // K).
      max_q_length, max_kv_length: static bounds on the lengths (default: the arrays' rows). Longer samples are an error
        where lengths are concrete and undefined inside jit.
      activation: identity, relu, relu2, leaky_relu, gelu, gelu_tanh, silu or hardswish, or a tuple with one per head.
      scale: static factor > 0 before the activation: the paper's 1/τ [fig].
      post_scale: static factor > 0 after the activation: Meta's released kernel has it [meta].
      shared_keys: samples may share keys, as the candidates of one request do. Needed where the spans are traced: then
        the kernels' backward, which gives every key to one sample, leaves the call to the XLA path; without it the
        gradients of shared keys are undefined. Concrete spans are looked at.
      implementation: "mosaic_gpu" (Hopper, bfloat16 and float16, D 64 and 128), "xla" or "reference"; None takes the
        first that supports the call and warns about what it passed over.

    Differentiable in q, k and v; works inside jit, grad, vmap and shard_map (starts count from the shard's first row).

    Raises:
      ValueError: shapes, dtypes, spans, activation or scales that don't fit, naming the argument and the numbers.
      NotImplementedError: the named implementation can't run this call.
    """
    operands, static = _checked(
        "gdpa",
        q,
        k,
        v,
        q_starts,
        q_lengths,
        kv_starts,
        kv_lengths,
        max_q_length,
        max_kv_length,
        activation,
        scale,
        post_scale,
        shared_keys,
    )
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
    shared_keys: bool = False,
    eps: float = 1e-5,
    implementation: str | None = None,
) -> Float[Array, "Nq H D"]:
    """The production PFFN block around `gdpa` [meta]; norms without learned parameters over all H·D features:

        x   = LayerNorm(q)
        out = RMSNorm(gdpa(x, k, v) + x) + q

    Arguments, rows outside the samples and errors as in `gdpa`; eps > 0 is added to the variance and the mean square.
    """
    operands, static = _checked(
        "gdpa_block",
        q,
        k,
        v,
        q_starts,
        q_lengths,
        kv_starts,
        kv_lengths,
        max_q_length,
        max_kv_length,
        activation,
        scale,
        post_scale,
        shared_keys,
    )
    eps = check_scale("gdpa_block", "eps", eps)
    return dispatch("gdpa_block", GDPA_BLOCK, implementation, *operands, **static, eps=eps)


def _checked(
    operator,
    q,
    k,
    v,
    q_starts,
    q_lengths,
    kv_starts,
    kv_lengths,
    max_q_length,
    max_kv_length,
    activation,
    scale,
    post_scale,
    shared_keys,
):
    """Operands and static arguments as the implementations take them, after all checks."""
    q, k, v = map(jnp.asarray, (q, k, v))
    check_heads(operator, "q", q, k, v)
    check_float(operator, q=q, k=k, v=v)
    q_starts, q_lengths, max_q_length = check_spans(
        operator, q_starts, q_lengths, rows=q.shape[0], max_length=max_q_length, prefix="q_"
    )
    kv_starts, kv_lengths, max_kv_length = check_spans(
        operator, kv_starts, kv_lengths, rows=k.shape[0], max_length=max_kv_length, prefix="kv_", may_coincide=True
    )
    if q_starts.shape != kv_starts.shape:
        raise ValueError(f"{operator}: q_starts has {q_starts.shape[0]} samples, kv_starts has {kv_starts.shape[0]}")
    static = dict(
        max_q_length=max_q_length,
        max_kv_length=max_kv_length,
        activation=per_head(operator, activation, q.shape[1]),
        scale=check_scale(operator, "scale", scale),
        post_scale=check_scale(operator, "post_scale", post_scale),
        shared_keys=bool(shared_keys) or known_to_overlap(kv_starts, kv_lengths),
    )
    return (q, k, v, q_starts, q_lengths, kv_starts, kv_lengths), static
