"""How work is shared out: tables computed in XLA from the spans, and how a block of the grid walks through its share.

Tables cost launches, so there are as few XLA kernels as possible: two, of a few microseconds each.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.schedule import PAIRWISE, dealt, dealt_item, sort_descending

BLOCK = 64  # rows of one wgmma: of queries, or of keys


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


def team_size(heads: int, sms: int) -> int:
    """Blocks of the grid in a team; divides both, so that every block belongs to one and has as many heads."""
    return math.gcd(heads, sms)


def statistics_rows(rows: int, samples: int) -> int:
    """Rows of the arrays of softmax statistics, in which every sample begins at a multiple of BLOCK."""
    return BLOCK * (rows // BLOCK + samples)


def read_gap(tables, index, rows: int):
    """(row, rows) of gap `index` of B + 1: the rows before a sample that belong to none, then those behind the last."""
    last = tables.starts.shape[0]
    sample = jnp.minimum(index, last - 1)
    empty = (index < last) & (tables.lengths[sample] == 0)
    begin = jnp.where(index < last, tables.starts[sample], rows)
    row = tables.previous[index]
    return row, jnp.where(empty, 0, jnp.maximum(begin - row, 0))


class Position(NamedTuple):
    """Where a walk is. Traced scalars; they live through a kernel's inner loop, so the rest is read again."""

    left: Any  # BLOCKs of the share from here on
    sample: Any
    head: Any
    block: Any  # the tile's first BLOCK in the sample


class Place(NamedTuple):
    """A tile: up to `most` BLOCKs of rows of a sample, with a head. Traced scalars."""

    start: Any  # the sample's first row
    length: Any  # the sample's rows
    before: Any  # BLOCKs of the samples before it
    sample: Any
    head: Any
    block: Any  # the tile's first BLOCK in the sample
    blocks: Any  # of the tile


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

    def first(self) -> Position:
        team, last = lax.div(self.sm, jnp.int32(self.team)), self.teams - 1
        sample, number, begin = (self.tables.first[c, team] for c in range(3))
        following = self.tables.first[2, jnp.minimum(team + 1, last)]
        everything = self.tables.before[self.tables.before.shape[0] - 1] * self.heads
        blocks = jnp.maximum(self._blocks(sample), 1)
        turn, block = lax.div(number, blocks), lax.rem(number, blocks)
        left = jnp.where(team == last, everything, following) - begin
        return Position(left, sample, turn * self.team + self._member, block)

    def more(self, at: Position):
        return at.left > 0

    def _tile(self, at: Position, blocks):
        return jnp.minimum(jnp.minimum(blocks - at.block, at.left), self.most)

    def read(self, at: Position) -> Place:
        start, before = self.tables.starts[at.sample], self.tables.before[at.sample]
        tile = self._tile(at, self._blocks(at.sample))
        return Place(start, self.tables.lengths[at.sample], before, at.sample, at.head, at.block, tile)

    def next(self, at: Position) -> Position:
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
        return Position(left, sample, head, jnp.where(ends, 0, block))


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


def window_reach(left: int | None, right: int | None) -> int:
    """How many BLOCKs a BLOCK meets at most."""
    return 2**16 if left is None or right is None else 1 + math.ceil(left / BLOCK) + math.ceil(right / BLOCK)
