"""Spans of samples in packed tensors: checks, and the XLA helpers that jagged operators share.

Sample b of a packed tensor [N, ...] is the rows starts[b] … starts[b] + lengths[b] - 1. Spans may come in any order, with
gaps, and may be empty. A padded tensor is the special case starts = b·T.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def static_length(name: str, length: int | None, rows: int) -> int:
    """The static bound on a span's length: `length`, or the number of rows of the array.

    Raises:
      ValueError: the bound is not an int, is negative or exceeds the array.
    """
    if length is None:
        return rows
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
        raise ValueError(f"{name} must be a Python int known while tracing, not {length!r}")
    if not 0 <= length <= rows:
        raise ValueError(f"{name}={length} must lie between 0 and the array's {rows} rows")
    return int(length)


def check_spans(prefix: str, starts, lengths, *, rows: int, max_length: int, disjoint: bool) -> None:
    """Check int32 spans [B] of a packed array: shapes and dtypes always, values where they are concrete.

    Raises:
      ValueError: names `{prefix}starts` or `{prefix}lengths` and the numbers that disagree.
    """
    for name, x in ((f"{prefix}starts", starts), (f"{prefix}lengths", lengths)):
        if x.ndim != 1 or x.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32 [B], not {x.dtype} {list(x.shape)}")
    if starts.shape != lengths.shape:
        raise ValueError(f"{prefix}starts has {starts.shape[0]} samples, {prefix}lengths has {lengths.shape[0]}")
    if isinstance(starts, jax.core.Tracer) or isinstance(lengths, jax.core.Tracer):
        return
    first, count = np.asarray(starts).astype(np.int64), np.asarray(lengths).astype(np.int64)
    for name, x in ((f"{prefix}starts", first), (f"{prefix}lengths", count)):
        if (bad := np.flatnonzero(x < 0)).size:
            raise ValueError(f"{name}[{bad[0]}] = {x[bad[0]]} is negative")
    if (bad := np.flatnonzero(count > max_length)).size:
        raise ValueError(
            f"{prefix}lengths[{bad[0]}] = {count[bad[0]]} exceeds the static maximum {max_length}; "
            "raise the maximum or cut the sample"
        )
    if (bad := np.flatnonzero(first + count > rows)).size:
        b = bad[0]
        raise ValueError(
            f"sample {b} ends at row {first[b] + count[b]} ({prefix}starts + {prefix}lengths), "
            f"but the array has {rows} rows"
        )
    if disjoint:
        used = np.flatnonzero(count > 0)
        order = used[np.argsort(first[used], kind="stable")]
        overlap = np.flatnonzero(first[order[:-1]] + count[order[:-1]] > first[order[1:]])
        if overlap.size:
            a, b = order[overlap[0]], order[overlap[0] + 1]
            raise ValueError(
                f"{prefix}starts: samples {a} and {b} overlap: rows {first[a]}…{first[a] + count[a] - 1} and "
                f"{first[b]}…{first[b] + count[b] - 1}"
            )


def covered(starts, lengths, rows: int):
    """bool [rows]: does the row belong to a sample?"""
    count = jnp.where(lengths > 0, 1, 0)
    edges = jnp.zeros(rows + 1, jnp.int32).at[starts].add(count).at[starts + lengths].add(-count)
    return jnp.cumsum(edges)[:rows] > 0


def span_rows(starts, lengths, max_length: int, rows: int):
    """int32 [B, max_length]: the sample's rows, then `rows`, which mode='fill' and mode='drop' leave out."""
    offset = jnp.arange(max_length, dtype=jnp.int32)
    return jnp.where(offset < lengths[:, None], starts[:, None] + offset, rows)


def chunk_plan(starts, lengths, rows: int, chunk: int):
    """Cut samples into chunks of at most `chunk` rows; the static number of chunks is rows // chunk + B.

    Returns int32 arrays over chunks: sample, first row, number of rows (0 for the unused chunks at the end).
    Chunks are in the order of the samples.
    """
    count = (lengths + chunk - 1) // chunk
    end = jnp.cumsum(count)
    index = jnp.arange(rows // chunk + starts.shape[0], dtype=jnp.int32)
    sample = jnp.minimum(jnp.searchsorted(end, index, side="right"), starts.shape[0] - 1).astype(jnp.int32)
    offset = (index - (end - count)[sample]) * chunk
    return sample, starts[sample] + offset, jnp.clip(lengths[sample] - offset, 0, chunk)


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying


def vary_together(*arrays):
    """Inside shard_map: give all arrays the same varying axes, so that a custom_vjp needs no psum of its own."""
    axes = frozenset().union(*(_varying(x) for x in arrays))

    def one(x):
        missing = tuple(axes - _varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(one, arrays))


def zeros_like_varying(shape, dtype, like):
    """Zeros that may be a loop's carry inside shard_map beside values that vary like `like`."""
    axes = tuple(_varying(like))
    z = jnp.zeros(shape, dtype)
    return lax.pcast(z, axes, to="varying") if axes else z
