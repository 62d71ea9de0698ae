"""The order in which a persistent grid works through jagged samples, computed in XLA from their spans.

`Line` cuts the work into equal ranges, one per SM, for kernels that may start anywhere in a sample. `Schedule` is for
those that take a sample whole: sorted longest first and dealt forwards and backwards in turn, which leaves near-equal
sums. No host work and no atomics: the same lengths give the same assignment.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

PAIRWISE = 4096  # up to here one fused comparison of all pairs beats several kernels that sort, scan or search


class Line(NamedTuple):
    """Jagged samples laid out on one line per head; the lines of all heads lie behind each other.

    A tile of a sample's rows takes `Tiling.cost` units of the line, and an SM gets the tiles that begin in its range:
    an exact balance without a sort, from tables that one XLA kernel fills. SMs work on the heads of a sample, which
    lie beside each other in memory, at about the same time.

    starts, lengths: [B] of the rows that are cut; other_starts, other_lengths: [B] of the rows that each tile passes.
    units: [B + 1] units before each sample, and of all of them.
    following: [B + 1] the first sample with work from each on; B: none.
    ends: [B + 1] where the last span before each sample's rows ends, and the last of all.
    covered: [B + 1] rows with work before each sample in the order given, and all of them.
    """

    starts: Any
    lengths: Any
    other_starts: Any
    other_lengths: Any
    units: Any
    following: Any
    ends: Any
    covered: Any


class Tiling(NamedTuple):
    """How a kernel cuts a line: rows of a tile, and rows of one step of its inner loop; powers of two."""

    rows: int
    step: int

    def tiles(self, length):
        return ceil_div(length, self.rows)

    def cost(self, other_length):
        """Units of a tile: its steps, and one for loading and storing it [choice]."""
        return ceil_div(other_length, self.step) + 1


class Item(NamedTuple):
    """Rows of one sample and head."""

    row: Any
    rows: Any
    other_row: Any
    other_rows: Any
    head: Any


class Cursor(NamedTuple):
    """A place in the order of (head, sample); the sample after it is read early."""

    sample: Any
    next_sample: Any
    head: Any


def make_line(starts, lengths, other_starts, other_lengths, tiling: Tiling) -> Line:
    """The line of the samples that have rows of both kinds; the spans of `starts` and `lengths` are disjoint."""
    B = starts.shape[0]
    live = (lengths > 0) & (other_lengths > 0)
    cost = jnp.where(live, tiling.tiles(lengths) * tiling.cost(other_lengths), 0)
    end = jnp.where(live, starts + lengths, 0)
    begin = jnp.concatenate([jnp.where(live, starts, -1), jnp.full(1, jnp.iinfo(jnp.int32).max)])
    if B <= PAIRWISE:
        b, i = (lax.broadcasted_iota(jnp.int32, (B + 1, B), axis) for axis in (0, 1))
        units, following, ends, covered = lax.reduce(
            (
                jnp.where(i < b, cost, 0),
                jnp.where((i >= b) & live, i, B),
                jnp.where(end <= begin[:, None], end, 0),
                jnp.where((i < b) & live, lengths, 0),
            ),
            (jnp.int32(0), jnp.int32(B), jnp.int32(0), jnp.int32(0)),
            lambda x, y: (x[0] + y[0], jnp.minimum(x[1], y[1]), jnp.maximum(x[2], y[2]), x[3] + y[3]),
            (1,),
        )
    else:
        units = jnp.pad(jnp.cumsum(cost), (1, 0))
        index = jnp.where(live, jnp.arange(B, dtype=jnp.int32), B)
        following = jnp.pad(lax.cummin(index, reverse=True), (0, 1), constant_values=B)
        ends = last_at_most(end, begin)
        covered = jnp.pad(jnp.cumsum(jnp.where(live, lengths, 0)), (1, 0))
    return Line(starts, lengths, other_starts, other_lengths, units, following, ends, covered)


class Walk:
    """One SM's way along a line, inside a kernel; `line` holds references to device memory."""

    def __init__(self, line: Line, tiling: Tiling, heads: int, workers: int, worker):
        self.line, self.tiling = line, tiling
        self.samples = line.starts.shape[0]
        self.per_head = line.units[self.samples]
        self.begin = _share(self.per_head * heads, workers, worker)
        self.end = _share(self.per_head * heads, workers, worker + 1)

    def first(self):
        """(cursor, is there work) at the begin of the range."""
        head = lax.div(self.begin, jnp.maximum(self.per_head, 1))
        within = self.begin - head * self.per_head

        sample, stride = jnp.int32(0), 1 << 3 * -(-self.samples.bit_length() // 3)
        while stride > 1:  # units[sample] <= within < units[sample + stride]; a read takes long, seven beside it do not
            stride //= 8
            probes = [jnp.minimum(sample + i * stride, self.samples) for i in range(1, 8)]
            sample += stride * sum(jnp.where(self.line.units[p] <= within, 1, 0) for p in probes)
        sample = jnp.minimum(sample, self.samples - 1)
        cursor = Cursor(sample, self.line.following[sample + 1], head)
        # The range may begin within the last tile of a sample, which belongs to the SM before.
        used_up = self._tiles_before(cursor, self.begin) >= self.tiling.tiles(self.line.lengths[sample])
        after = self._step(cursor)
        cursor = Cursor(*(jnp.where(used_up, a, c) for a, c in zip(after, cursor, strict=True)))
        first_tile = self._tiles_before(cursor, self.begin) * self.tiling.cost(self.line.other_lengths[cursor.sample])
        return cursor, self._position(cursor) + first_tile < self.end

    def after(self, cursor: Cursor):
        """(the next cursor, is there work)."""
        cursor = self._step(cursor)
        return cursor, self._position(cursor) < self.end

    def item(self, cursor: Cursor) -> Item:
        """The rows at a cursor that lie in the range."""
        line, b = self.line, cursor.sample
        first, last = (self._tiles_before(cursor, x) * self.tiling.rows for x in (self.begin, self.end))
        rows = jnp.minimum(line.lengths[b], last) - first
        return Item(line.starts[b] + first, rows, line.other_starts[b], line.other_lengths[b], cursor.head)

    def fill_gaps(self, fill, rows: int, size: int, worker, workers: int):
        """Call fill(row, count <= size) on the rows [0, rows) without work: a worker gets some gaps between samples
        and a part of the one behind the last sample."""
        line = self.line

        def gap(b):
            live = (line.lengths[b] > 0) & (line.other_lengths[b] > 0)
            return line.ends[b], jnp.where(live, line.starts[b] - line.ends[b], 0)

        end = line.ends[self.samples]

        @pl.when(line.covered[self.samples] < rows)  # reading the gaps takes as long as a tile
        def _():
            _fill_gaps(fill, self.samples, gap, (end, rows - end), size, worker, workers)

    def _step(self, cursor: Cursor) -> Cursor:
        wrap = cursor.next_sample == self.samples
        sample = jnp.where(wrap, jnp.minimum(self.line.following[0], self.samples - 1), cursor.next_sample)
        return Cursor(sample, self.line.following[sample + 1], cursor.head + jnp.where(wrap, 1, 0))

    def _position(self, cursor: Cursor):
        return cursor.head * self.per_head + self.line.units[cursor.sample]

    def _tiles_before(self, cursor: Cursor, position):
        """How many tiles of the cursor's sample begin before a position."""
        cost = self.tiling.cost(self.line.other_lengths[cursor.sample])
        distance = jnp.maximum(position - self._position(cursor), 0)
        return jnp.minimum(lax.div(distance + cost - 1, cost), self.tiling.tiles(self.line.lengths[cursor.sample]))


class Schedule(NamedTuple):
    """Tables of items, dealt to the SMs: int32, in device memory.

    items: [M, 4] query row, query rows, key row, key rows; longest first, then unused ones.
    fills: [B + 1, 2] row, rows: what no item writes; behind the last sample lies the last one.
    counts: [1] items in use.
    """

    items: Any
    fills: Any
    counts: Any


class Deal:
    """One SM's items of a schedule, inside a kernel; the interface is `Walk`'s, a cursor is a turn."""

    def __init__(self, schedule: Schedule, heads: int, workers: int, worker):
        self.schedule, self.heads, self.workers, self.worker = schedule, heads, workers, worker
        self.count = dealt(schedule.counts[0] * heads, workers, worker)

    def first(self):
        """(turn, is there work)."""
        return jnp.int32(0), self.count > 0

    def after(self, turn):
        """(the next turn, is there work)."""
        return turn + 1, turn + 1 < self.count

    def item(self, turn) -> Item:
        """The rows of a turn; those of the last one where turns have run out."""
        index = dealt_item(jnp.minimum(turn, self.count - 1), self.workers, self.worker)
        row = lax.div(index, self.heads)
        q_row, q_rows, kv_row, kv_rows = (self.schedule.items[row, c] for c in range(4))
        return Item(q_row, q_rows, kv_row, kv_rows, lax.rem(index, self.heads))

    def fill_gaps(self, fill, rows: int, size: int, worker, workers: int):
        """Call fill(row, count <= size) on the rows without work: a worker gets some gaps between samples and a part
        of the one behind the last sample."""
        fills = self.schedule.fills
        gaps = fills.shape[0] - 1
        _fill_gaps(
            fill, gaps, lambda b: (fills[b, 0], fills[b, 1]), (fills[gaps, 0], fills[gaps, 1]), size, worker, workers
        )


def _fill_gaps(fill, gaps: int, gap, last, size: int, worker, workers: int):
    def whole(turn, _):
        row, rows = gap(turn * workers + worker)

        def piece(i, _):
            fill(row + i * size, jnp.minimum(rows - i * size, size))

        lax.fori_loop(0, ceil_div(rows, size), piece, None)

    def part(turn, _):
        at = (turn * workers + worker) * size
        fill(last[0] + at, jnp.minimum(last[1] - at, size))

    lax.fori_loop(0, _turns(gaps, worker, workers), whole, None)
    lax.fori_loop(0, _turns(ceil_div(last[1], size), worker, workers), part, None)


def dealt(total, workers: int, worker):
    """How many of `total` items `worker` gets; traced, for use in a kernel."""
    full, rest = lax.div(total, workers), lax.rem(total, workers)
    return full + jnp.where(_place(full, workers, worker) < rest, 1, 0)


def dealt_item(turn, workers: int, worker):
    """The item that `worker` gets in its turn: dealing goes forwards and backwards alternately."""
    return turn * workers + _place(turn, workers, worker)


def _place(turn, workers: int, worker):
    return jnp.where(lax.rem(turn, 2) == 0, worker, workers - 1 - worker)


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


def ceil_div(n, size: int):
    """⌈n / size⌉ for n >= 0 and a power of two."""
    return lax.shift_right_logical(n + (size - 1), jnp.int32(size.bit_length() - 1))


def _share(total, workers: int, worker):
    """Where a worker's equal share of `total` begins."""
    full, rest = lax.div(total, jnp.int32(workers)), lax.rem(total, jnp.int32(workers))
    return full * worker + jnp.minimum(rest, worker)


def _turns(total, worker, workers: int):
    """How many of `total` things a worker gets when they are dealt one by one."""
    return lax.div(total - worker + (workers - 1), jnp.int32(workers))


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
    previous = last_at_most(end, begin)
    # An empty span has begin -1 and no gap.
    return jnp.stack([previous, jnp.maximum(begin - previous, 0)], axis=1)


def last_at_most(values, bounds):
    """For each bound the largest value >= 0 that is not above it, else 0."""
    if values.shape[0] <= PAIRWISE:
        return jnp.max(jnp.where(values <= bounds[:, None], values, 0), axis=1, initial=0)
    in_order = jnp.sort(values)
    at = jnp.searchsorted(in_order, bounds, side="right", method="sort")
    return jnp.where(at > 0, in_order[at - 1], 0)


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
