"""How work is shared out: how a block of the grid walks through its share, and what it reads for that.

Tables that XLA computes from the spans cost launches of a few microseconds each; only whole samples need them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.schedule import dealt, dealt_item, sort_descending

BLOCK = 64  # rows of one wgmma: of queries, or of keys


class Spans(NamedTuple):
    """The samples, in any order: int32 [B], in device memory."""

    starts: Any
    lengths: Any


class Position(NamedTuple):
    """Where a walk is. Traced scalars; they live through a kernel's inner loop, so the rest is read again."""

    sample: Any
    before: Any  # BLOCKs of the samples before it
    skipped: Any  # the sample's first BLOCKs, which belong to another team
    blocks: Any  # of the sample, that belong to this team
    left: Any  # cost of the team's run from here on
    item: Any  # number of the (tile, head) among those of the sample
    place: Any  # of the item among those that the team works on at the same time


class Place(NamedTuple):
    """A tile: up to `most` BLOCKs of rows of a sample, with a head. Traced scalars."""

    start: Any  # the sample's first row
    length: Any  # the sample's rows
    before: Any  # BLOCKs of the samples before it; softmax statistics of a sample begin there
    sample: Any
    head: Any
    block: Any  # the tile's first BLOCK in the sample
    blocks: Any  # of the tile


class TileWalk:
    """Walks through the tiles that one block of the grid gets, in a kernel.

    Blocks of the grid form teams, which work on the heads of one tile, or of neighbouring tiles, at the same time: rows
    of all heads lie side by side in memory. A team gets a run of BLOCKs of rows of near-equal cost; its members get the
    (tile, head)s of the run in turn. A sample's part of a run is cut into tiles of near-equal size.

    No tables are needed but the spans, hence no XLA kernel ahead of a kernel.

    Args:
      blocks: BLOCKs of a tile, at most.
      reach: how many BLOCKs a BLOCK meets at most; None: all cost the same.
      runs: many teams, one for each tile that the grid works on at a time, so that shares are equal whatever the
        lengths. Else the whole grid is one team: keys that neighbouring tiles share are read at about the same time and
        found in L2, but members get equal numbers of tiles, not equal costs, and walk farther from tile to tile.
    """

    def __init__(self, spans: Spans, sm, *, heads: int, sms: int, blocks: int, reach: int | None, runs: bool):
        self.spans, self.heads, self.most, self.reach = spans, heads, blocks, reach
        self.team = math.gcd(heads, sms) if runs else sms
        self.teams = sms // self.team
        self.number, self.member = lax.div(sm, jnp.int32(self.team)), lax.rem(sm, jnp.int32(self.team))
        self.samples = spans.lengths.shape[0]

    def _blocks(self, sample):
        """(BLOCKs, cost of one) of a sample, or of the last one."""
        blocks = _blocks(self.spans.lengths[jnp.minimum(sample, self.samples - 1)])
        return blocks, self._cost(blocks)

    def _cost(self, blocks):
        # Loading and storing a tile costs about as much as meeting two blocks.
        return jnp.int32(1) if self.reach is None else jnp.minimum(blocks, self.reach) + 2

    def _tiles(self, blocks):
        return lax.div(blocks + (self.most - 1), jnp.int32(self.most))

    def first(self) -> Position:
        zero = jnp.int32(0)
        if self.teams == 1:
            return self._settled(self._at(zero, zero, zero, jnp.int32(2**30), self.member, self.member))

        def cost_of(sample):
            blocks, cost = self._blocks(sample)
            return blocks, blocks * cost

        everything = lax.fori_loop(0, self.samples, lambda i, total: total + cost_of(i)[1], zero)
        share = _ceil_div(everything, jnp.int32(self.teams))
        begin = self.number * share

        def look(i, state):
            sample, before, cost_before, blocks_here, cost_here = state
            blocks, cost = cost_of(i)
            blocks_here, cost_here = blocks_here + blocks, cost_here + cost
            passed = cost_here <= begin
            found = (
                jnp.where(passed, x, y) for x, y in ((i + 1, sample), (blocks_here, before), (cost_here, cost_before))
            )
            return *found, blocks_here, cost_here

        sample, before, cost_before = lax.fori_loop(0, self.samples, look, (zero,) * 5)[:3]
        cost = self._blocks(sample)[1]
        skipped = _ceil_div(begin - cost_before, cost)
        left = cost_before + skipped * cost
        return self._settled(self._at(sample, before, skipped, begin + share - left, self.member, self.member))

    def _at(self, sample, before, skipped, left, item, place) -> Position:
        blocks, cost = self._blocks(sample)
        blocks = jnp.clip(blocks - skipped, 0, _ceil_div(left, cost)) if self.teams > 1 else blocks
        return Position(sample, before, skipped, blocks, left, item, place)

    def _settled(self, at: Position) -> Position:
        """On to the sample that has the item."""

        def behind(at):
            return self.more(at) & (at.item >= self._tiles(at.blocks) * self.heads)

        def step(at):
            blocks, cost = self._blocks(at.sample)
            left = at.left - at.blocks * cost if self.teams > 1 else at.left
            item = at.item - self._tiles(at.blocks) * self.heads
            return self._at(at.sample + 1, at.before + blocks, jnp.int32(0), left, item, at.place)

        return lax.while_loop(behind, step, at)

    def more(self, at: Position):
        return (at.sample < self.samples) & (at.left > 0)

    def read(self, at: Position) -> Place:
        tiles = self._tiles(at.blocks)
        short = tiles * self.most - at.blocks  # tiles, the last ones, that have a BLOCK less

        def begin(tile):
            return jnp.maximum(tile * self.most - jnp.maximum(tile - tiles + short, 0), 0)

        tile, head = lax.div(at.item, jnp.int32(self.heads)), lax.rem(at.item, jnp.int32(self.heads))
        start, length = self.spans.starts[at.sample], self.spans.lengths[at.sample]
        first, end = begin(tile), begin(tile + 1)
        return Place(start, length, at.before, at.sample, head, at.skipped + first, end - first)

    def next(self, at: Position) -> Position:
        # Members change places: with samples of equal length one would often get a sample's small tiles.
        place = at.place + self.heads % self.team
        place = jnp.where(place >= self.team, place - self.team, place)
        return self._settled(at._replace(item=at.item + self.team + place - at.place, place=place))


def _blocks(length):
    return lax.shift_right_logical(length + (BLOCK - 1), jnp.int32(6))


def _ceil_div(a, b):
    return lax.div(a + (b - 1), b)


class SpanGaps:
    """Rows that belong to no sample, as gaps: the one before each sample, then the one behind the last; in a kernel.

    One pass over the spans tells if there are any, and if the samples are in order: then a gap begins where the sample
    before it ends, else all samples have to be looked at for each gap.
    """

    def __init__(self, spans: Spans, rows: int):
        self.spans, self.rows, self.samples = spans, rows, spans.starts.shape[0]
        self.count = self.samples + 1
        zero = jnp.int32(0)

        def look(sample, state):
            used, end, ordered = state
            start, length = spans.starts[sample], spans.lengths[sample]
            ordered = jnp.where((length > 0) & (start < end), 0, ordered)
            return used + length, jnp.where(length > 0, start + length, end), ordered

        self.used, _, self.ordered = lax.fori_loop(0, self.samples, look, (zero, zero, zero + 1))

    def exist(self):
        return self.used < self.rows

    def read(self, index):
        """(row, rows) of a gap."""
        starts, lengths = self.spans
        inner, sample = index < self.samples, jnp.minimum(index, self.samples - 1)
        begin = jnp.where(inner, starts[sample], self.rows)

        def end(sample):
            return jnp.where(lengths[sample] > 0, starts[sample] + lengths[sample], 0)

        def of_the_one_before():
            def empty(before):
                return (before > 0) & (lengths[jnp.maximum(before - 1, 0)] == 0)

            before = lax.while_loop(empty, lambda before: before - 1, index)
            return jnp.where(before > 0, end(jnp.maximum(before - 1, 0)), 0)

        def of_all():
            def look(sample, row):
                return jnp.where(end(sample) <= begin, jnp.maximum(row, end(sample)), row)

            return lax.fori_loop(0, self.samples, look, jnp.int32(0))

        row = lax.cond(self.ordered > 0, of_the_one_before, of_all)
        return row, jnp.where(inner & (lengths[sample] == 0), 0, begin - row)


def statistics_rows(rows: int, samples: int) -> int:
    """Rows of the arrays of softmax statistics, in which every sample begins at a multiple of BLOCK."""
    return BLOCK * (rows // BLOCK + samples)


class Samples(NamedTuple):
    """int32, in device memory.

    samples: [B, 3] first row, rows and number of each sample, longest first: dealt in turns, they give near-equal sums.
    lengths: [B] in the samples' own order.
    live: [1] samples that are not empty.
    """

    samples: jax.Array
    lengths: jax.Array
    live: jax.Array


def longest_first(starts, lengths) -> Samples:
    """Tables of whole samples."""
    number = jnp.arange(starts.size, dtype=jnp.int32)
    samples = sort_descending(jnp.stack([starts, lengths, number]), lengths)
    return Samples(samples, lengths, jnp.sum(lengths > 0, dtype=jnp.int32, keepdims=True))


class Turn(NamedTuple):
    """A tile of queries with a sample, and a head. Traced scalars."""

    start: Any  # the sample's first row
    length: Any  # the sample's rows
    sample: Any
    head: Any
    tile: Any


class DealtWalk:
    """Walks through whole samples, dealt in turns, with each tile of queries and head; in a kernel.

    fixed: (head, tile), for one task's samples; None: all of them, side by side.
    """

    def __init__(self, tables, worker, *, heads: int, tiles: int, workers: int, fixed=None):
        self.tables, self.worker, self.workers, self.fixed = tables, worker, workers, fixed
        self.heads, self.tiles = jnp.int32(heads), jnp.int32(tiles)
        self.turns = dealt(tables.live[0] * (1 if fixed else heads * tiles), workers, worker)

    def read(self, turn) -> Turn:
        index = dealt_item(turn, self.workers, self.worker)
        if self.fixed:
            rank, (head, tile) = index, self.fixed
        else:
            rest, tile = lax.div(index, self.tiles), lax.rem(index, self.tiles)
            rank, head = lax.div(rest, self.heads), lax.rem(rest, self.heads)
        start, length, sample = (self.tables.samples[rank, c] for c in range(3))
        return Turn(start, length, sample, head, tile)

    def first(self):
        return jnp.int32(0)

    def more(self, turn):
        return turn < self.turns

    def next(self, turn):
        return turn + 1


class EmptySamples:
    """Result rows of the samples without keys, as gaps like those of `SpanGaps`; the last one has none."""

    def __init__(self, samples: Samples, seeds: int):
        self.tables, self.seeds = samples, seeds
        self.samples = samples.lengths.shape[0]
        self.count = self.samples + 1

    def exist(self):
        return self.tables.live[0] < self.samples

    def read(self, index):
        """(row, rows) of a gap."""
        empty = self.tables.lengths[jnp.minimum(index, self.samples - 1)] == 0
        return index * self.seeds, jnp.where((index < self.samples) & empty, self.seeds, 0)


def window_reach(left: int | None, right: int | None) -> int:
    """How many BLOCKs a BLOCK meets at most."""
    return 2**16 if left is None or right is None else 1 + math.ceil(left / BLOCK) + math.ceil(right / BLOCK)
