"""Where the kernels find their work: tables computed in XLA from the spans, in as few kernels as possible.

A tile is a run of at most `size` rows of one sample; an item is a tile with a head. Items are dealt to a persistent
grid in order, so that blocks of the grid that run at the same time read the same rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gdpa.schedule import PAIRWISE

BLOCK = 64  # rows of one wgmma: of queries, or of keys


class Tile(NamedTuple):
    """What the tables say about a tile; positions count from a sample's first row. Traced scalars."""

    start: Any  # the sample's first row
    length: Any  # the sample's rows
    offset: Any  # position of the tile's first row
    extra: Any  # statistics of position 0 (sliding window), or the sample's number (seeds)


class Tables(NamedTuple):
    """int32, in device memory.

    tiles: [4, M] the fields of `Tile`, live tiles first.
    starts, lengths: [B] of the samples.
    before: [B + 1] tiles of the samples before each, all tiles at the end.
    previous: [B + 1] the end of the sample before each in memory; at the end, of the last one.
    """

    tiles: jax.Array
    starts: jax.Array
    lengths: jax.Array
    before: jax.Array
    previous: jax.Array


def read_tile(tables, index) -> Tile:
    """Tile `index`; in a kernel."""
    return Tile(*(tables.tiles[c, index] for c in range(4)))


def tile_count(tables):
    return tables.before[tables.before.shape[0] - 1]


def read_gap(tables, index, rows: int):
    """(row, rows) of gap `index` of B + 1: the rows before a sample that belong to none, then those behind the last."""
    last = tables.starts.shape[0]
    sample = jnp.minimum(index, last - 1)
    empty = (index < last) & (tables.lengths[sample] == 0)
    begin = jnp.where(index < last, tables.starts[sample], rows)
    row = tables.previous[index]
    return row, jnp.where(empty, 0, jnp.maximum(begin - row, 0))


def statistics_rows(rows: int, samples: int) -> int:
    """Rows of the arrays of softmax statistics, in which every sample begins at a multiple of BLOCK."""
    return BLOCK * (rows // BLOCK + samples)


def window_tables(starts, lengths, *, rows: int, size: int) -> Tables:
    """Tables of samples cut into tiles of `size` rows. `extra` is the statistics row of the sample's first row."""
    before, blocks, previous = _running(starts, lengths, rows, size)
    index = jnp.arange(rows // size + starts.shape[0], dtype=jnp.int32)
    fields = jnp.stack([starts, lengths, before[:-1], blocks[:-1] * BLOCK])
    if index.size * starts.size <= PAIRWISE**2:
        # One reduction that picks each tile's sample; a tile has exactly one.
        mine = (before[:-1] <= index[:, None]) & (index[:, None] < before[1:])
        first = jnp.arange(4, dtype=jnp.int32)[:, None, None] == 2
        values = jnp.where(first, (index[:, None] - before[:-1]) * size, fields[:, None])
        tiles = jnp.sum(jnp.where(mine, values, 0), axis=2)
    else:
        sample = jnp.searchsorted(before[1:], index, side="right", method="sort")
        picked = fields[:, jnp.minimum(sample, starts.size - 1)]
        tiles = picked.at[2].set((index - picked[2]) * size)
    return Tables(tiles, starts, lengths, before, previous)


def _running(starts, lengths, rows: int, size: int):
    """Per sample, and at the end: tiles before it, BLOCKs of rows before it, end of the sample before it in memory."""
    begin, end = jnp.where(lengths > 0, starts, -1), jnp.where(lengths > 0, starts + lengths, 0)
    begin = jnp.concatenate([begin, jnp.array([rows], jnp.int32)])
    tiles, blocks = ((lengths + (n - 1)) // n for n in (size, BLOCK))
    if starts.size > PAIRWISE:
        in_order = jnp.sort(end)
        at = jnp.searchsorted(in_order, begin, side="right", method="sort")
        previous = jnp.where(at > 0, in_order[at - 1], 0)
        return *(jnp.pad(jnp.cumsum(x, dtype=jnp.int32), (1, 0)) for x in (tiles, blocks)), previous
    index = jnp.arange(starts.size + 1, dtype=jnp.int32)
    earlier = index[:-1] < index[:, None]
    operands = *(jnp.where(earlier, x, 0) for x in (tiles, blocks)), jnp.where(end <= begin[:, None], end, 0)

    def combine(a, b):
        return a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2])

    return lax.reduce(operands, (jnp.int32(0),) * 3, combine, (1,))
