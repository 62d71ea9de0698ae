"""The order in which a persistent grid works through jagged samples, computed in XLA from their spans.

Items are (row of a table, head); the table is sorted longest first and dealt to the SMs forwards and backwards in turn,
which leaves them near-equal sums. No host work and no atomics, so the same lengths give the same assignment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PAIRWISE = 4096  # up to here one fused comparison of all pairs beats a sort's several kernels


class Schedule(NamedTuple):
    """Tables for a kernel: int32, in device memory.

    items: [M, 4] query row, query rows, key row, key rows; longest first, then unused ones.
    fills: [B + 1, 2] row, rows: what no item writes; behind the last sample lies the last one.
    counts: [1] items in use.
    """

    items: jax.Array
    fills: jax.Array
    counts: jax.Array


def make_schedule(
    q_starts, q_lengths, kv_starts, kv_lengths, *, rows: int, max_q_length: int, q_chunk: int | None = None
) -> Schedule:
    """Schedule of a query-stationary kernel over samples that have queries and keys.

    rows: of the output. q_chunk: longest run of query rows in one item (None: whole samples).
    """
    lengths = jnp.where(kv_lengths > 0, q_lengths, 0)
    if q_chunk is None or max_q_length <= q_chunk:
        table = jnp.stack([q_starts, lengths, kv_starts, kv_lengths])
    else:
        sample, first, count, _ = pieces(q_starts, lengths, rows, q_chunk)
        table = jnp.stack([first, count, kv_starts[sample], kv_lengths[sample]])
    cost = ((table[1] + 127) // 128) * ((table[3] + 63) // 64)
    live = jnp.sum(table[1] > 0, dtype=jnp.int32, keepdims=True)
    return Schedule(sort_descending(table, cost), row_fills(q_starts, lengths, rows), live)


def sort_descending(table, cost):
    """Columns of the table [C, M] in the order of falling cost, as rows [M, C]; ties keep their order.

    Below PAIRWISE columns it compares all pairs: two kernels, each a fused reduction.
    """
    n = cost.shape[0]
    if n > PAIRWISE:
        return table[:, jnp.argsort(-cost, stable=True)].T
    index = jnp.arange(n, dtype=jnp.int32)
    before = (cost[None] > cost[:, None]) | ((cost[None] == cost[:, None]) & (index[None] < index[:, None]))
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(place == index[:, None, None], table, 0), axis=2)


def row_fills(starts, lengths, rows: int):
    """Rows [0, rows) outside disjoint spans: int32 [B + 1, 2] (row, rows): before each span, and behind the last."""
    begin, end = jnp.where(lengths > 0, starts, -1), jnp.where(lengths > 0, starts + lengths, 0)
    begin = jnp.concatenate([begin, jnp.array([rows], jnp.int32)])
    if end.shape[0] <= PAIRWISE:
        previous = jnp.max(jnp.where(end <= begin[:, None], end, 0), axis=1, initial=0)
    else:
        in_order = jnp.sort(end)
        at = jnp.searchsorted(in_order, begin, side="right", method="sort")
        previous = jnp.where(at > 0, in_order[at - 1], 0)
    # An empty span has begin -1 and no gap.
    return jnp.stack([previous, jnp.maximum(begin - previous, 0)], axis=1)


def pieces(starts, lengths, rows: int, size: int):
    """Cut disjoint spans of an array into pieces of at most `size` rows, as `pallas_kernels.jagged.chunks` does, in
    kernels of one pass: its search is a loop, which costs a GPU more than all comparisons at once.

    Returns span, first row and rows of each piece, int32 [rows // size + B], and the number of pieces in use.
    """
    count = (lengths + size - 1) // size
    end = jnp.cumsum(count)
    index = jnp.arange(rows // size + starts.shape[0], dtype=jnp.int32)
    method = "compare_all" if index.size * end.size <= PAIRWISE**2 else "sort"
    span = jnp.minimum(jnp.searchsorted(end, index, side="right", method=method), starts.shape[0] - 1)
    offset = (index - (end - count)[span]) * size
    return span, starts[span] + offset, jnp.clip(lengths[span] - offset, 0, size), end[-1]


def dealt(total, workers: int, worker):
    """How many of `total` items `worker` gets; traced, for use in a kernel."""
    full, rest = lax.div(total, workers), lax.rem(total, workers)
    return full + jnp.where(_place(full, workers, worker) < rest, 1, 0)


def dealt_item(turn, workers: int, worker):
    """The item that `worker` gets in its turn: dealing goes forwards and backwards alternately."""
    return turn * workers + _place(turn, workers, worker)


def _place(turn, workers: int, worker):
    return jnp.where(lax.rem(turn, 2) == 0, worker, workers - 1 - worker)
