"""How work is shared out: how a block of the grid walks through its share, and what it reads for that.

Tables that XLA computes from the spans cost launches of a few microseconds each; only whole samples need them.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.schedule import PAIRWISE, dealt, dealt_item, sort_descending

BLOCK = 64  # rows of one wgmma: of queries, or of keys
LANES = 32
# Every warp of a warpgroup holds the same vector of LANES elements: sums and maxima need no exchange between warps.
IN_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((LANES,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)


class Spans(NamedTuple):
    """The samples, in any order: int32 [B], in device memory."""

    starts: Any
    lengths: Any

    def fold(self, value, combine, reduce):
        """value(sample, start, length) >= 0 of all samples, combined; in a kernel, by one warpgroup.

        combine, reduce: of two arrays and of all elements of one, e.g. jnp.add and jnp.sum.
        """
        samples = self.starts.shape[0]
        if samples < LANES:

            def one(i, result):
                return combine(result, value(i, self.starts[i], self.lengths[i]))

            return lax.fori_loop(0, samples, one, jnp.int32(0))

        def some(i, result):
            first = jnp.minimum(i * LANES, samples - LANES)
            start, length = (plgpu.load(x.at[pl.ds(first, LANES)], layout=IN_A_WARP, optimized=False) for x in self)
            number = first + plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=IN_A_WARP)
            # The last ones overlap with those before.
            return combine(result, jnp.where(number >= i * LANES, value(number, start, length), 0))

        zeros = plgpu.layout_cast(jnp.zeros(LANES, jnp.int32), IN_A_WARP)
        turns = lax.optimization_barrier(jnp.int32(-(-samples // LANES)))  # unrolled, the loop would spill registers
        return reduce(lax.fori_loop(0, turns, some, zeros))


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
        self.team = all_heads(heads, sms) if runs else sms
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

        def cost_before(sample):
            def cost(i, _, length):
                blocks = _blocks(length)
                return jnp.where(i < sample, blocks * self._cost(blocks), 0)

            return self.spans.fold(cost, jnp.add, jnp.sum)

        share = _ceil_div(cost_before(self.samples), jnp.int32(self.teams))
        begin = self.number * share

        def closer(i, sample):
            further = sample + lax.shift_left(jnp.int32(1), bits - 1 - i)
            return jnp.where((further < self.samples) & (cost_before(further) <= begin), further, sample)

        bits = self.samples.bit_length()
        sample = lax.fori_loop(0, bits, closer, zero)
        before = self.spans.fold(lambda i, _, length: jnp.where(i < sample, _blocks(length), 0), jnp.add, jnp.sum)
        cost = self._blocks(sample)[1]
        within = begin - cost_before(sample)
        skipped = _ceil_div(within, cost)
        return self._settled(
            self._at(sample, before, skipped, share + within - skipped * cost, self.member, self.member)
        )

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
    """Rows that belong to no sample, as gaps: the one before each sample, then the one behind the last; in a kernel."""

    def __init__(self, spans: Spans, rows: int):
        self.spans, self.rows, self.samples = spans, rows, spans.starts.shape[0]
        self.count = self.samples + 1

    def exist(self, worker, workers: int):
        return self.spans.fold(lambda i, start, length: length, jnp.add, jnp.sum) < self.rows

    def read(self, index):
        """(row, rows) of a gap."""
        sample = jnp.minimum(index, self.samples - 1)
        inner = index < self.samples
        begin = jnp.where(inner, self.spans.starts[sample], self.rows)

        def end_before(i, start, length):
            return jnp.where((length > 0) & (start + length <= begin), start + length, 0)

        row = self.spans.fold(end_before, jnp.maximum, jnp.max)
        return row, jnp.where(inner & (self.spans.lengths[sample] == 0), 0, begin - row)


class Ranges(NamedTuple):
    """Shares of a grid's blocks, int32, in device memory.

    Blocks of the grid form teams, whose members work on the same rows of different heads at the same time: rows of all
    heads lie side by side in memory. A team gets a run of BLOCKs of rows of near-equal cost, in order, so that
    neighbouring tiles read the same keys soon after each other. A member with several heads takes one after the other,
    sample by sample.

    first: [3, G] for each team: sample, number of the BLOCK among those of the sample's heads of one member, number
      among all.
    starts, lengths: [B] of the samples.
    before: [B + 1] BLOCKs of the samples before each; in the end all. Softmax statistics of a sample begin there.
    previous: [B + 1] the end of the sample before each in memory; in the end, of the last one.
    """

    first: jax.Array
    starts: jax.Array
    lengths: jax.Array
    before: jax.Array
    previous: jax.Array


def ranges(starts, lengths, *, rows: int, heads: int, reach: int | None, sms: int) -> Ranges:
    """Shares of `sms` blocks of a grid. `reach`: how many BLOCKs a BLOCK meets at most; None: all cost the same."""
    team = team_size(heads, sms)
    heads, sms = heads // team, sms // team
    blocks = (lengths + (BLOCK - 1)) // BLOCK
    # Loading and storing a tile costs about as much as meeting two blocks.
    weight = jnp.minimum(blocks, reach) + 2 if reach else jnp.ones_like(blocks)
    before, cost, previous = _running(starts, lengths, blocks, blocks * weight, rows)
    # One reduction that picks each share's sample: it has exactly one, or lies behind all of them, in sample B - 1.
    begin, end = cost * heads, jnp.append(cost[1:] * heads, jnp.iinfo(jnp.int32).max)
    share = jnp.arange(sms, dtype=jnp.int32) * lax.div(cost[-1] * heads + (sms - 1), jnp.int32(sms))
    mine = (begin <= share[:, None]) & (share[:, None] < end)
    sample = jnp.arange(starts.size + 1, dtype=jnp.int32)
    number = lax.div(share[:, None] - begin, jnp.append(weight, 1) + 0 * share[:, None])
    number = jnp.where(sample < starts.size, number, 0)
    values = jnp.stack(jnp.broadcast_arrays(jnp.minimum(sample, starts.size - 1), number, before * heads + number))
    first = jnp.sum(jnp.where(mine, values, 0), axis=2)
    return Ranges(first, starts, lengths, before, previous)


def _running(starts, lengths, blocks, cost, rows: int):
    """Sums over the samples before each and in the end, of blocks and of cost; and the ends of the ones before."""
    begin, end = jnp.where(lengths > 0, starts, -1), jnp.where(lengths > 0, starts + lengths, 0)
    begin = jnp.concatenate([begin, jnp.array([rows], jnp.int32)])
    if starts.size > PAIRWISE:
        in_order = jnp.sort(end)
        at = jnp.searchsorted(in_order, begin, side="right", method="sort")
        previous = jnp.where(at > 0, in_order[at - 1], 0)
        return *(jnp.pad(jnp.cumsum(x, dtype=jnp.int32), (1, 0)) for x in (blocks, cost)), previous
    index = jnp.arange(starts.size + 1, dtype=jnp.int32)
    earlier = index[:-1] < index[:, None]
    operands = *(jnp.where(earlier, x, 0) for x in (blocks, cost)), jnp.where(end <= begin[:, None], end, 0)

    def combine(a, b):
        return a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2])

    return lax.reduce(operands, (jnp.int32(0),) * 3, combine, (1,))


def all_heads(heads: int, sms: int) -> int:
    """Blocks of the grid in a team that works on all heads of a tile at the same time; divides the grid."""
    part = team_size(heads, sms)
    return next(team for team in range(part, sms + 1, part) if sms % team == 0 and team >= min(heads, sms))


def team_size(heads: int, sms: int) -> int:
    """Blocks of the grid in a team; divides both, so that every block belongs to one and has as many heads."""
    return math.gcd(heads, sms)


def read_gap(tables, index, rows: int):
    """(row, rows) of gap `index` of B + 1: the rows before a sample that belong to none, then those behind the last."""
    last = tables.starts.shape[0]
    sample = jnp.minimum(index, last - 1)
    empty = (index < last) & (tables.lengths[sample] == 0)
    begin = jnp.where(index < last, tables.starts[sample], rows)
    row = tables.previous[index]
    return row, jnp.where(empty, 0, jnp.maximum(begin - row, 0))


class RangePosition(NamedTuple):
    """Where a walk is. Traced scalars; they live through a kernel's inner loop, so the rest is read again."""

    left: Any  # BLOCKs of the share from here on
    sample: Any
    head: Any
    block: Any  # the tile's first BLOCK in the sample


class RangeWalk:
    """Walks through the share of one block of the grid, in a kernel."""

    def __init__(self, tables, sm, *, heads: int, sms: int, blocks: int):
        self.tables, self.team, self.most = tables, team_size(heads, sms), blocks
        self.sm, self.heads, self.teams = sm, heads // self.team, sms // self.team

    def _blocks(self, sample):
        return lax.shift_right_logical(self.tables.lengths[sample] + (BLOCK - 1), jnp.int32(6))

    @property
    def _member(self):
        return lax.rem(self.sm, jnp.int32(self.team))

    def first(self) -> RangePosition:
        team, last = lax.div(self.sm, jnp.int32(self.team)), self.teams - 1
        # Inside shard_map what is read differs between devices and what is computed doesn't say so: all is computed.
        sample, number, begin = (jnp.maximum(self.tables.first[c, team], 0) for c in range(3))
        following = self.tables.first[2, jnp.minimum(team + 1, last)]
        everything = self.tables.before[self.tables.before.shape[0] - 1] * self.heads
        blocks = jnp.maximum(self._blocks(sample), 1)
        turn, block = lax.div(number, blocks), lax.rem(number, blocks)
        left = jnp.where(team == last, everything, following) - begin
        return RangePosition(left, sample, turn * self.team + self._member, block)

    def more(self, at: RangePosition):
        return at.left > 0

    def _tile(self, at: RangePosition, blocks):
        return jnp.minimum(jnp.minimum(blocks - at.block, at.left), self.most)

    def read(self, at: RangePosition) -> Place:
        start, before = self.tables.starts[at.sample], self.tables.before[at.sample]
        tile = self._tile(at, self._blocks(at.sample))
        return Place(start, self.tables.lengths[at.sample], before, at.sample, at.head, at.block, tile)

    def next(self, at: RangePosition) -> RangePosition:
        blocks = self._blocks(at.sample)
        tile = self._tile(at, blocks)
        left, block = at.left - tile, at.block + tile
        ends = block == blocks
        head = jnp.where(ends, at.head + self.team, at.head)

        def next_sample():
            last = self.tables.lengths.shape[0] - 1

            def empty(sample):
                return (sample < last) & (self.tables.lengths[sample] == 0)

            sample = lax.while_loop(empty, lambda sample: sample + 1, jnp.minimum(at.sample + 1, last))
            return sample, self._member

        all_heads = head >= self.heads * self.team
        sample, head = lax.cond(all_heads & (left > 0), next_sample, lambda: (at.sample, head))
        return RangePosition(left, sample, head, jnp.where(ends, 0, block))


class RangeGaps:
    """Rows that belong to no sample, as `SpanGaps` has them, read from tables."""

    def __init__(self, tables: Ranges, rows: int):
        self.tables, self.rows, self.count = tables, rows, tables.starts.shape[0] + 1

    def exist(self, worker, workers: int):
        """For this worker: among the gaps that are dealt to it, or the last one."""
        mine = lax.div(self.count - 1 - worker + (workers - 1), jnp.int32(workers))
        rows = lax.fori_loop(0, mine, lambda turn, n: n + self.read(turn * workers + worker)[1], jnp.int32(0))
        return rows + self.read(jnp.int32(self.count - 1))[1] > 0

    def read(self, index):
        """(row, rows) of a gap."""
        return read_gap(self.tables, index, self.rows)


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

    def exist(self, worker, workers: int):
        return self.tables.live[0] < self.samples

    def read(self, index):
        """(row, rows) of a gap."""
        empty = self.tables.lengths[jnp.minimum(index, self.samples - 1)] == 0
        return index * self.seeds, jnp.where((index < self.samples) & empty, self.seeds, 0)


def window_reach(left: int | None, right: int | None) -> int:
    """How many BLOCKs a BLOCK meets at most."""
    return 2**16 if left is None or right is None else 1 + math.ceil(left / BLOCK) + math.ceil(right / BLOCK)
