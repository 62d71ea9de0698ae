"""The public operator `sliding_window_attention`: checks, then dispatch."""

from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_count, check_float, check_heads, check_scale, check_spans
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.sliding_window import mosaic, reference, xla

NAME = "sliding_window_attention"


def _supported(*args, **kwargs) -> None:
    return None


IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", xla.sliding_window_attention, _supported),
    Implementation("reference", reference.sliding_window_attention, _supported, for_tests=True),
)


def sliding_window_attention(
    q: Float[Array, "N H D"],
    k: Float[Array, "N Hkv D"],
    v: Float[Array, "N Hkv D"],
    *,
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    max_length: int | None = None,
    window: tuple[int | None, int | None],
    scale: float | None = None,
    angles: Float[Array, "N half_D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N H D"]:
    """Softmax attention of row i over the rows j of the same sample with i - left <= j <= i + right.

    Samples are spans of rows: starts[b] and lengths[b] count rows; any order, gaps and empty samples are allowed, spans
    must not overlap. Rows outside every sample come back 0, and nothing in them or in another sample reaches a sample,
    not even a NaN. Differentiable in q, k and v; works inside jit, grad, vmap and shard_map (with local starts).

    Args:
      q, k, v: one dtype; H is a multiple of Hkv, and query heads h · H/Hkv ... share key head h.
      max_length: static bound on the lengths, by default N.
      window: (left, right), rows seen before and after the row itself; None on a side: no bound there.
      scale: static factor of the scores, by default D ** -0.5.
      angles: float32 rotary angles in radians. The pairs (i, i + D/2) of q and k are rotated by angles[:, i], in
        float32 [choice: half-split pairs, not interleaved ones]. They get no gradient.
      implementation: "mosaic_gpu" (Hopper, bfloat16 and float16, D 64 and 128), "xla" or "reference"; None takes the
        first that supports the call and warns about what it passed over.

    Raises:
      ValueError: shapes, dtypes, head counts, window, scale or max_length that don't fit; where starts and lengths are
        concrete, spans beyond the array, longer than max_length or overlapping; an unknown implementation.
      NotImplementedError: the named implementation can't run this call.
    """
    check_heads(NAME, "q", q, k, v)
    check_float(NAME, q=q, k=k, v=v)
    N, _, D = q.shape
    if k.shape[0] != N:
        raise ValueError(f"{NAME}: q has {N} rows, k and v have {k.shape[0]}; they hold the same tokens")
    starts, lengths, max_length = check_spans(NAME, starts, lengths, rows=N, max_length=max_length)
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"{NAME}: window must be a tuple (left, right), got {window!r}")
    farthest = max(max_length - 1, 0)
    left, right = (
        farthest if side is None else min(check_count(NAME, f"window[{i}]", side), farthest)
        for i, side in enumerate(window)
    )
    scale = check_scale(NAME, "scale", D**-0.5 if scale is None else scale)
    if angles is not None and (angles.dtype != "float32" or angles.shape != (N, D // 2) or D % 2):
        raise ValueError(
            f"{NAME}: angles must be float32 [N, D/2] with an even D, here [{N}, {D / 2:g}]; "
            f"got {angles.dtype} {list(angles.shape)}"
        )
    return dispatch(
        NAME,
        IMPLEMENTATIONS,
        implementation,
        q,
        k,
        v,
        starts,
        lengths,
        angles,
        max_length=max_length,
        left=left,
        right=right,
        scale=scale,
    )
