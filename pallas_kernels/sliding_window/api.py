"""The public operator `sliding_window_attention`: checks, then dispatch."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.arguments import check_count, check_float, check_heads, check_parts, check_scale, check_spans
from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.sliding_window import mosaic, reference, xla

NAME = "sliding_window_attention"
PACKED = "packed_sliding_window_attention"


def _supported(*args, **kwargs) -> None:
    return None


def _in_parts(run, qkv, *args, **static):
    return run(*jnp.split(qkv, 3, axis=1), *args, **static)


IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu, mosaic.unsupported),
    Implementation("xla", xla.sliding_window_attention, _supported),
    Implementation("reference", reference.sliding_window_attention, _supported, for_tests=True),
)
PACKED_IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic.mosaic_gpu_packed, mosaic.unsupported_packed),
    *(
        Implementation(i.name, functools.partial(_in_parts, i.run), _supported, i.for_tests)
        for i in IMPLEMENTATIONS[1:]
    ),
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
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{NAME}: q has {q.shape[0]} rows, k and v have {k.shape[0]}; they hold the same tokens")
    spans, static = _checked(NAME, q, starts, lengths, max_length, window, scale, angles)
    return dispatch(NAME, IMPLEMENTATIONS, implementation, q, k, v, *spans, angles, **static)


def packed_sliding_window_attention(
    qkv: Float[Array, "N three_H D"],
    *,
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    max_length: int | None = None,
    window: tuple[int | None, int | None],
    scale: float | None = None,
    angles: Float[Array, "N half_D"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N H D"]:
    """`sliding_window_attention` of one array: its first H heads are q, then come those of k and of v.

    That is what one projection makes, and its gradient is one array as well: two wide products in place of six. The
    Hopper kernels read and write the parts where they lie; the other paths cut them out, which copies.

    Args and Raises: as for `sliding_window_attention`; ValueError if the heads are no multiple of 3.
    """
    check_parts(PACKED, "qkv", qkv, 3)
    check_float(PACKED, qkv=qkv)
    spans, static = _checked(PACKED, qkv, starts, lengths, max_length, window, scale, angles)
    return dispatch(PACKED, PACKED_IMPLEMENTATIONS, implementation, qkv, *spans, angles, **static)


def _checked(name, x, starts, lengths, max_length, window, scale, angles):
    """(starts and lengths, static arguments of the implementations), after the checks that both operators share."""
    N, _, D = x.shape
    starts, lengths, max_length = check_spans(name, starts, lengths, rows=N, max_length=max_length)
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"{name}: window must be a tuple (left, right), got {window!r}")
    farthest = max(max_length - 1, 0)
    left, right = (
        farthest if side is None else min(check_count(name, f"window[{i}]", side), farthest)
        for i, side in enumerate(window)
    )
    scale = check_scale(name, "scale", D**-0.5 if scale is None else scale)
    if angles is not None and (angles.dtype != "float32" or angles.shape != (N, D // 2) or D % 2):
        raise ValueError(
            f"{name}: angles must be float32 [N, D/2] with an even D, here [{N}, {D / 2:g}]; "
            f"got {angles.dtype} {list(angles.shape)}"
        )
    return (starts, lengths), dict(max_length=max_length, left=left, right=right, scale=scale)
