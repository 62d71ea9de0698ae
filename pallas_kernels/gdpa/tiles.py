"""Tile configurations of the GDPA kernels, and which one a call gets."""

from dataclasses import dataclass

from pallas_kernels.hopper import SHARED_MEMORY
from pallas_kernels.schedule import Tiling

WARPGROUP_ROWS = 64  # query rows of one wgmma


@dataclass(frozen=True)
class ForwardTiles:
    """Tiles of the forward kernel.

    kv_block: keys of one step: 64 or 128.
    k_slots, v_slots: blocks of keys, and of values, in shared memory.
    q_slots: tiles of query rows in shared memory.
    compute: warpgroups that compute, each on its own 64 rows of a tile.
    resident: keys and values stay in shared memory while an item's query tiles pass; otherwise they stream past every
      tile. Resident needs all blocks of a sample to fit: max_kv_length <= slots · kv_block.
    """

    kv_block: int
    k_slots: int
    v_slots: int
    q_slots: int
    resident: bool
    compute: int = 2

    def __post_init__(self):
        for name, allowed in (
            ("kv_block", (64, 128)),
            ("compute", (1, 2)),
            ("k_slots", range(1, 17)),
            ("v_slots", range(1, 17)),
            ("q_slots", range(1, 9)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"ForwardTiles: {name}={getattr(self, name)} must be in {tuple(allowed)}")

    @property
    def q_rows(self) -> int:
        """Query rows of one tile."""
        return self.compute * WARPGROUP_ROWS

    @property
    def tiling(self) -> Tiling:
        return Tiling(rows=self.q_rows, step=self.kv_block)


def forward_tiles(*, width: int, max_kv_length: int) -> ForwardTiles:
    """The forward kernel's tiles for a call."""
    kv_block = 64 if max_kv_length <= 64 else 128
    per_block = kv_block * width * 2  # of keys or of values, 16-bit
    per_tile = 2 * WARPGROUP_ROWS * width * 2  # queries, or an output
    room = SHARED_MEMORY - 1024 - per_tile  # beside a tile of the output
    if max_kv_length <= kv_block:
        k_slots, v_slots = 2, 1  # the next sample's values are needed a step after its keys
    else:
        k_slots = v_slots = min((room - 2 * per_tile) // (2 * per_block), 4)
    return ForwardTiles(
        kv_block=kv_block,
        k_slots=k_slots,
        v_slots=v_slots,
        q_slots=min((room - (k_slots + v_slots) * per_block) // per_tile, 4),
        resident=max_kv_length <= v_slots * kv_block,
    )
