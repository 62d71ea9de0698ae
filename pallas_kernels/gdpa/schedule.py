"""The order in which a persistent grid works through jagged samples, computed in XLA from their spans.

Items are (row of a table, head); the table is sorted longest first and dealt to the SMs forwards and backwards in turn,
which leaves them near-equal sums. No host work and no atomics, so the same lengths give the same assignment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

PAIRWISE = 4096  # up to here one fused comparison of all pairs beats a sort's several kernels
FILL_ROWS = 512  # rows of one item of zero-filling


class Schedule(NamedTuple):
    """Tables for a kernel: int32, in device memory.

    items: [M, 4] query row, query rows, key row, key rows; longest first, then unused ones.
    fills: [Z, 2] row, rows: pieces of the output that no item writes.
    counts: [2] items and fills in use.
    """

    items: jax.Array
    fills: jax.Array
    counts: jax.Array


def make_schedule(q_starts, q_lengths, kv_starts, kv_lengths, *, rows: int, max_q_length: int,
                  q_chunk: int | None = None) -> Schedule:
    """Schedule of a query-stationary kernel over samples that have queries and keys.

    rows: of the output. q_chunk: longest run of query rows in one item (None: whole samples).
    """
    live = (q_lengths > 0) & (kv_lengths > 0)
    lengths = jnp.where(live, q_lengths, 0)
    if q_chunk is None or max_q_length <= q_chunk:
        first, count, sample = q_starts, lengths, jnp.arange(q_starts.shape[0])
    else:
        sample, first, count, _ = pieces(q_starts, lengths, rows, q_chunk)
    table = jnp.stack([first, count, kv_starts[sample], kv_lengths[sample]], axis=1)
    cost = jnp.where(count > 0, ((count + 127) // 128) * ((table[:, 3] + 63) // 64), 0)
    fills, fill_count = row_fills(q_starts, lengths, rows)
    counts = jnp.stack([jnp.sum(count > 0, dtype=jnp.int32), fill_count])
    return Schedule(sort_descending(table, cost), fills, counts)


def sort_descending(table, cost):
    """Rows of the table in the order of falling cost; ties keep their order."""
    n = cost.shape[0]
    if n > PAIRWISE:
        return table[jnp.argsort(-cost, stable=True)]
    index = jnp.arange(n, dtype=jnp.int32)
    before = (cost[None] > cost[:, None]) | ((cost[None] == cost[:, None]) & (index[None] < index[:, None]))
    return jnp.zeros_like(table).at[jnp.sum(before, axis=1)].set(table, unique_indices=True)


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


def row_fills(starts, lengths, rows: int):
    """Rows [0, rows) outside disjoint spans, in pieces: int32 [Z, 2] (row, rows) and the number of pieces."""
    begin = jnp.concatenate([jnp.where(lengths > 0, starts, rows), jnp.array([rows], jnp.int32)])
    end = jnp.where(lengths > 0, starts + lengths, 0)
    if end.shape[0] <= PAIRWISE:
        previous = jnp.max(jnp.where(end[None] <= begin[:, None], end[None], 0), axis=1, initial=0)
    else:
        order = jnp.argsort(begin)
        ends = jnp.concatenate([end, jnp.zeros(1, jnp.int32)])[order]
        begin, previous = begin[order], jnp.concatenate([jnp.zeros(1, jnp.int32), lax.cummax(ends)[:-1]])
    # Every empty sample asks for the gap at the end; it is filled once.
    at_end = jnp.arange(begin.shape[0]) < begin.shape[0] - 1
    gap = jnp.where(at_end & (begin >= rows), 0, jnp.maximum(begin - previous, 0))
    _, row, count, live = pieces(previous, gap, rows, FILL_ROWS)
    return jnp.stack([row, count], axis=1), live


def dealt(total, workers: int, worker):
    """How many of `total` items `worker` gets; traced, for use in a kernel."""
    full, rest = lax.div(total, workers), lax.rem(total, workers)
    return full + jnp.where(_place(full, workers, worker) < rest, 1, 0)


def dealt_item(turn, workers: int, worker):
    """The item that `worker` gets in its turn: dealing goes forwards and backwards alternately."""
    return turn * workers + _place(turn, workers, worker)


def _place(turn, workers: int, worker):
    return jnp.where(lax.rem(turn, 2) == 0, worker, workers - 1 - worker)
