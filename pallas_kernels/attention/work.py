"""What the kernels work on: which rows meet, where they lie, and how warpgroups share a block of the grid.

A work is a static argument of a kernel. `item` reads the tables inside the kernel.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.attention import tables
from pallas_kernels.attention.tables import BLOCK


class Item(NamedTuple):
    """A tile of rows that stays, and the rows of its sample that pass by. Traced scalars."""

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
    warpgroups: int

    tables = tables.Tables

    @property
    def size(self) -> int:
        """Rows of a tile."""
        return self.warpgroups * BLOCK

    @property
    def compute_registers(self) -> int:
        return {2: 240, 3: 160}[self.warpgroups]

    @property
    def memory_registers(self) -> int:
        return {2: 24, 3: 32}[self.warpgroups]

    @property
    def out_rows(self) -> int:
        return self.rows

    @property
    def statistics_rows(self) -> int:
        return tables.statistics_rows(self.rows, self.samples)

    @property
    def gaps(self) -> int:
        return self.samples + 1

    def gap(self, refs, index):
        return tables.read_gap(refs, index, self.rows)

    def count(self, refs):
        return tables.tile_count(refs)

    def item(self, refs, index) -> Item:
        tile = tables.read_tile(refs, index)
        row = tile.start + tile.offset
        rows = jnp.minimum(tile.length - tile.offset, self.size)
        return Item(row, row, rows, tile.start, tile.length, tile.offset, tile.extra + tile.offset)

    kv_gaps, kv_gap, kv_count = gaps, gap, count

    def kv_item(self, refs, index) -> KvItem:
        tile = tables.read_tile(refs, index)
        rows = jnp.minimum(tile.length - tile.offset, self.size)
        return KvItem(tile.start + tile.offset, rows, tile.start, tile.start, tile.length, tile.offset, tile.extra)
