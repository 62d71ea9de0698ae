"""What the kernels work on: which rows meet, where they lie, and how warpgroups share a block of the grid.

A work is a static argument of a kernel. Its `walk` goes through the tiles of one block of the grid, in the kernel;
`item` says what a place of the walk means.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.attention import tables
from pallas_kernels.attention.tables import BLOCK, DealtWalk, EmptySamples, RangeGaps, RangeWalk, SpanGaps, TileWalk


class Item(NamedTuple):
    """A tile of queries that stays, and the keys of its sample that pass by. Traced scalars."""

    q_row: Any  # first query row of the tile
    out_row: Any  # where the result goes
    rows: Any  # query rows
    kv_row: Any  # first key row of the sample
    kv_rows: Any  # key rows of the sample
    position: Any  # of the first query row among the keys
    statistics: Any  # statistics row of the first query row


class KvItem(NamedTuple):
    """A tile of keys that stays, and the query rows of its sample that pass by. Traced scalars."""

    kv_row: Any  # first key row of the tile
    rows: Any  # key rows
    q_row: Any  # query row of position 0
    out_row: Any  # of its result
    q_rows: Any  # query rows
    position: Any  # of the first key row among the queries
    statistics: Any  # statistics row of position 0


@dataclass(frozen=True)
class Window:
    """Queries and keys are the same rows; query i meets keys i - left … i + right."""

    rows: int
    samples: int
    left: int | None
    right: int | None

    tables = tables.Ranges
    splits = 0  # every query row belongs to one sample

    @property
    def out_rows(self) -> int:
        return self.rows

    @property
    def statistics_rows(self) -> int:
        return tables.statistics_rows(self.rows, self.samples)

    def gaps(self, refs) -> RangeGaps | SpanGaps:
        return RangeGaps(refs, self.rows)

    def walk(self, refs, sm, *, heads: int, sms: int, warpgroups: int) -> RangeWalk | TileWalk:
        return RangeWalk(refs, sm, heads=heads, sms=sms, blocks=warpgroups)

    kv_gaps, kv_walk = gaps, walk

    def item(self, place, warpgroups: int) -> Item:
        offset = place.block * BLOCK
        row = place.start + offset
        rows = jnp.minimum(place.length - offset, place.blocks * BLOCK)
        return Item(row, row, rows, place.start, place.length, offset, (place.before + place.block) * BLOCK)

    def kv_item(self, place) -> KvItem:
        item = self.item(place, 0)
        start = place.start
        return KvItem(item.q_row, item.rows, start, start, place.length, item.position, place.before * BLOCK)


@dataclass(frozen=True)
class WindowWithoutTables(Window):
    """The same for a kernel that looks for its tiles itself, by vectors of samples. The backward kernels have no shared
    memory left for that; looking sample by sample cost them a tenth where lengths differ."""

    runs: bool  # see `TileWalk`

    tables = tables.Spans

    def gaps(self, refs) -> SpanGaps:
        return SpanGaps(refs, self.rows)

    def walk(self, refs, sm, *, heads: int, sms: int, warpgroups: int) -> TileWalk:
        reach = tables.window_reach(self.left, self.right)
        return TileWalk(refs, sm, heads=heads, sms=sms, blocks=warpgroups, reach=reach, runs=self.runs)


@dataclass(frozen=True)
class SeedQueries:
    """All samples have the same queries, which meet all keys of a sample: what the query-stationary kernels work on."""

    seeds: int
    samples: int
    splits: int = 0  # of the samples, for the sum over them

    tables = tables.Samples
    left = right = None

    def tiles(self, warpgroups: int) -> int:
        """Tiles of one sample's queries."""
        return -(-self.seeds // (warpgroups * BLOCK))

    @property
    def out_rows(self) -> int:
        return self.samples * self.seeds

    @property
    def padded(self) -> int:
        """Statistics rows of one sample."""
        return -(-self.seeds // BLOCK) * BLOCK

    @property
    def statistics_rows(self) -> int:
        return self.samples * self.padded

    def gaps(self, refs) -> EmptySamples:
        return EmptySamples(refs, self.seeds)

    def walk(self, refs, sm, *, heads: int, sms: int, warpgroups: int) -> DealtWalk:
        return DealtWalk(refs, sm, heads=heads, tiles=self.tiles(warpgroups), workers=sms)

    def split_walk(self, refs, split, head, tile) -> DealtWalk:
        """The samples of one split, for one tile of queries and one head."""
        return DealtWalk(refs, split, heads=1, tiles=1, workers=self.splits, fixed=(head, tile))

    def item(self, place, warpgroups: int) -> Item:
        first = place.tile * (warpgroups * BLOCK)
        rows = jnp.minimum(self.seeds - first, warpgroups * BLOCK)
        out_row, statistics = place.sample * self.seeds + first, place.sample * self.padded + first
        return Item(first, out_row, rows, place.start, place.length, jnp.int32(0), statistics)


@dataclass(frozen=True)
class SeedKeys:
    """All samples have the same queries, which meet all keys of a sample: what the key-stationary kernel works on."""

    seeds: int
    samples: int
    rows: int

    tables = tables.Ranges
    left = right = None
    kv_gaps, kv_walk = Window.kv_gaps, Window.kv_walk

    def kv_item(self, place) -> KvItem:
        offset = place.block * BLOCK
        rows = jnp.minimum(place.length - offset, place.blocks * BLOCK)
        out_row, padded = place.sample * self.seeds, -(-self.seeds // BLOCK) * BLOCK
        zero = jnp.int32(0)
        return KvItem(place.start + offset, rows, zero, out_row, self.seeds, zero, place.sample * padded)
