"""The public operator `seed_attention`: checks, then dispatch."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_float, check_heads, check_parts, check_scale, check_spans
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.seed_attention import mosaic, reference, xla

NAME = "seed_attention"
PACKED = "packed_seed_attention"


def _supported(*args, **kwargs) -> None:
    return None


def _in_parts(run, seeds, kv, *args, **static):
    return run(seeds, *jnp.split(kv, 2, axis=1), *args, **static)


IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", xla.seed_attention, _supported),
    Implementation("reference", reference.seed_attention, _supported, for_tests=True),
)
PACKED_IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu_packed, mosaic.unsupported_packed),
    *(
        Implementation(i.name, functools.partial(_in_parts, i.run), _supported, i.for_tests)
        for i in IMPLEMENTATIONS[1:]
    ),
)


def seed_attention(
    seeds: Float[Array, "S H D"],
    k: Float[Array, "N Hkv D"],
    v: Float[Array, "N Hkv D"],
    *,
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    max_length: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B S H D"]:
    """Softmax attention of the same S seed queries over the tokens of each sample.

    out[b, s] = Σ_j softmax_j(scale · seeds[s] · k[j]) v[j] over the rows j of sample b. Samples are spans of rows:
    starts[b] and lengths[b] count rows; any order, gaps and empty samples are allowed, spans must not overlap. An empty
    sample gives 0 and adds nothing to any gradient. Rows outside every sample reach nothing, not even with a NaN, and
    get gradient 0. Differentiable in seeds, k and v; works inside jit, grad, vmap and shard_map (with local starts).

    Args:
      seeds, k, v: one dtype; H is a multiple of Hkv, and query heads h · H/Hkv ... share key head h.
      max_length: static bound on the lengths, by default N.
      scale: static factor of the scores, by default D ** -0.5.
      implementation: "mosaic_gpu" (Hopper, bfloat16 and float16, D 64 and 128), "xla" or "reference"; None takes the
        first that supports the call and warns about what it passed over.

    Raises:
      ValueError: shapes, dtypes, head counts, scale or max_length that don't fit; where starts and lengths are
        concrete, spans beyond the array, longer than max_length or overlapping; an unknown implementation.
      NotImplementedError: the named implementation can't run this call.
    """
    check_heads(NAME, "seeds", seeds, k, v)
    check_float(NAME, seeds=seeds, k=k, v=v)
    spans, static = _checked(NAME, k, starts, lengths, max_length, scale)
    return dispatch(NAME, IMPLEMENTATIONS, implementation, seeds, k, v, *spans, **static)


def packed_seed_attention(
    seeds: Float[Array, "S H D"],
    kv: Float[Array, "N two_Hkv D"],
    *,
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    max_length: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B S H D"]:
    """`seed_attention` with keys and values in one array: its first Hkv heads are k, the others v.

    That is what one projection makes, and its gradient is one array as well. The Hopper kernels read and write the
    parts where they lie; the other paths cut them out, which copies.

    Args and Raises: as for `seed_attention`; ValueError if the heads of kv are no multiple of 2.
    """
    check_parts(PACKED, "kv", kv, 2)
    k = kv[:, : kv.shape[1] // 2]
    check_heads(PACKED, "seeds", seeds, k, k)
    check_float(PACKED, seeds=seeds, kv=kv)
    spans, static = _checked(PACKED, kv, starts, lengths, max_length, scale)
    return dispatch(PACKED, PACKED_IMPLEMENTATIONS, implementation, seeds, kv, *spans, **static)


def _checked(name, x, starts, lengths, max_length, scale):
    """(starts and lengths, static arguments of the implementations), after the checks that both operators share."""
    N, _, D = x.shape
    starts, lengths, max_length = check_spans(name, starts, lengths, rows=N, max_length=max_length)
    scale = check_scale(name, "scale", D**-0.5 if scale is None else scale)
    return (starts, lengths), dict(max_length=max_length, scale=scale)
