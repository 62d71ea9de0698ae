"""What the XLA paths of the jagged operators share: where samples lie, and loops that work inside shard_map."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def segments(starts: Int32[Array, "B"], lengths: Int32[Array, "B"], rows: int) -> Int32[Array, "N"]:
    """Sample of each row, B for the rows of no sample. Spans are disjoint; any order, gaps and empty samples."""
    B = starts.shape[0]
    # B - b, so that 0 is "none" and the running sum of ± marks gives the sample without any assumption on the order.
    mark = jnp.where(lengths > 0, B - jnp.arange(B, dtype=jnp.int32), 0)
    edge = jnp.zeros(rows + 1, jnp.int32).at[starts].add(mark).at[starts + lengths].add(-mark)
    return B - jnp.cumsum(edge)[:rows]


def chunks(starts: Int32[Array, "B"], lengths: Int32[Array, "B"], rows: int, size: int):
    """Cut every sample into chunks of `size` rows, the last one shorter; sample by sample, chunks of a sample in order.

    Returns:
      sample, first row and row count of each chunk, int32 [rows // size + B] each, which always suffices for disjoint
      spans. Chunks after the live ones have count 0.
      live: the number of chunks in use, int32 scalar.
    """
    B = starts.shape[0]
    end = jnp.cumsum(-(-lengths // size))
    j = jnp.arange(rows // size + B, dtype=jnp.int32)
    b = jnp.minimum(jnp.searchsorted(end, j, side="right"), B - 1).astype(jnp.int32)
    offset = (j - (end[b] - -(-lengths[b] // size))) * size
    return b, starts[b] + offset, jnp.clip(lengths[b] - offset, 0, size), end[-1]


def varying(x: Array) -> frozenset[str]:
    """The shard_map axes over which `x` differs; empty outside shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_together(*arrays: Array) -> tuple[Array, ...]:
    """Give all arrays the same varying axes, so that a custom_vjp over them needs no psum of its own."""
    axes = frozenset().union(*map(varying, arrays))
    return tuple(lax.pcast(x, tuple(axes - varying(x)), to="varying") if axes - varying(x) else x for x in arrays)


def zeros(shape: tuple[int, ...], dtype, like: Array) -> Float[Array, "..."]:
    """Zeros that vary like `like`: fresh zeros as a loop's carry are refused inside shard_map."""
    axes = tuple(varying(like))
    z = jnp.zeros(shape, dtype)
    return lax.pcast(z, axes, to="varying") if axes else z


def span_rows(starts: Int32[Array, "B"], lengths: Int32[Array, "B"], max_length: int, rows: int) -> Int32[Array, "B T"]:
    """The rows of each sample, then `rows`, which mode="fill" and mode="drop" leave out."""
    offset = jnp.arange(max_length, dtype=jnp.int32)
    return jnp.where(offset < lengths[:, None], starts[:, None] + offset, rows)
