"""The public operator `seed_attention`: checks, then dispatch."""

from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_float, check_heads, check_scale, check_spans
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.seed_attention import mosaic, reference, xla

NAME = "seed_attention"


def _supported(*args, **kwargs) -> None:
    return None


IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", xla.seed_attention, _supported),
    Implementation("reference", reference.seed_attention, _supported, for_tests=True),
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
    starts, lengths, max_length = check_spans(NAME, starts, lengths, rows=k.shape[0], max_length=max_length)
    scale = check_scale(NAME, "scale", k.shape[2] ** -0.5 if scale is None else scale)
    return dispatch(
        NAME, IMPLEMENTATIONS, implementation, seeds, k, v, starts, lengths, max_length=max_length, scale=scale
    )
