"""Where each table's rows live on a mesh, and what that costs per device: decided before anything is allocated."""

import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kunlun_jax.embedding.tables import TableState
from kunlun_jax.schema import FeatureSchema
from kunlun_jax.sharding import REPLICATED, ParallelConfig

FLOAT = 4  # bytes
TABLE_SHARE = 0.9  # of a device's memory that tables and dense state may take; the rest is for a step's values [choice]
COPIES = 4  # of every dense parameter: itself, its gradient, AdamW's two moments


@dataclass(frozen=True)
class Placement:
    """A table of V `rows` × `width`: whole on every device (`shards` 1 and `replicated`), or in `shards` blocks.

    Attributes:
      padded_rows: V rounded up so that it divides over the shards; no id reaches the rows beyond V.
      spec: of the rows' leading axis.
    """

    name: str
    rows: int
    width: int
    replicated: bool
    shards: int
    spec: PartitionSpec

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // self.shards) * self.shards

    @property
    def device_bytes(self) -> int:
        """Rows and their accumulator on one device."""
        return self.padded_rows // self.shards * (self.width + 1) * FLOAT


@dataclass(frozen=True)
class TablePlan:
    """A placement per table, with the memory that was found for it.

    `print` it, or `check` it: a plan that can't fit raises.
    """

    config: ParallelConfig
    placements: dict[str, Placement]
    dense_bytes: int
    memory: int

    @property
    def specs(self) -> dict[str, Any]:
        """Per table a TableState of specs."""
        specs: dict[str, Any] = {p.name: p.spec for p in self.placements.values()}
        return {name: TableState(spec, spec) for name, spec in specs.items()}

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables on one device."""
        return sum(p.device_bytes for p in self.placements.values())

    def __str__(self) -> str:
        config = self.config
        whole = sum(p.rows * (p.width + 1) * FLOAT for p in self.placements.values() if not p.replicated)
        extra = whole * (config.replicas - 1) / config.devices
        lines = [
            f"tables on data {config.data} × expert {config.expert} = {config.devices} devices: "
            f"{config.table_shards} shard(s), {config.replicas} replica(s)"
        ]
        for p in self.placements.values():
            how = "whole on every device" if p.replicated else f"{p.padded_rows // p.shards:,} rows per device"
            lines.append(f"  {p.name}: {p.rows:,} × {p.width}, {how}, {_size(p.device_bytes)} per device")
        lines.append(
            f"  tables {_size(self.table_bytes)} per device, of which replicas add {_size(int(extra))}; dense state "
            f"{_size(self.dense_bytes)}; memory {_size(self.memory)}"
        )
        return "\n".join(lines)

    def check(self) -> "TablePlan":
        """Return self.

        Raises:
          ValueError: tables and dense state exceed `TABLE_SHARE` of a device's memory; with all numbers and a way out.
        """
        allowed = int(TABLE_SHARE * self.memory)
        if self.table_bytes + self.dense_bytes > allowed:
            sharded = sum(p.rows * (p.width + 1) * FLOAT for p in self.placements.values() if not p.replicated)
            room = allowed - self.dense_bytes - sum(p.device_bytes for p in self.placements.values() if p.replicated)
            need = f"at least {-(-sharded // room)} table shards" if room > 0 else "a smaller model"
            raise ValueError(
                f"the tables don't fit: {_size(self.table_bytes)} of tables and {_size(self.dense_bytes)} of dense "
                f"state per device, {_size(allowed)} allowed ({TABLE_SHARE:.0%} of {_size(self.memory)}). It takes "
                f"{need}; there are {self.config.table_shards}. Enlarge parallel.expert, or set parallel.table_rows to "
                f'"all"\n{self}'
            )
        return self


def plan_tables(schema: FeatureSchema, config: ParallelConfig, *, dense_bytes: int = 0) -> TablePlan:
    """Choose per table: whole on every device if small (`replicate_below`), else rows over the mesh.

    Args:
      dense_bytes: of the dense parameters alone; their gradient and optimiser state are added here.
    """
    placements = {}
    for table in schema.tables:
        size = table.rows * (table.width + 1) * FLOAT
        replicated = config.devices > 1 and size <= config.replicate_below
        shards = 1 if replicated else config.table_shards
        spec = REPLICATED if replicated else PartitionSpec(config.table_axes)
        placements[table.name] = Placement(table.name, table.rows, table.width, replicated, shards, spec)
    share = config.devices if config.fully_sharded else 1
    # Fully sharded, a step still holds parameters and gradients whole.
    dense = COPIES * dense_bytes if share == 1 else 2 * dense_bytes + COPIES * dense_bytes // share
    return TablePlan(config, placements, dense, config.device_memory or device_memory())


def device_memory() -> int:
    """Bytes that JAX may use on one device; simulated CPU devices share the machine's memory evenly."""
    device = jax.local_devices()[0]
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _size(count: int) -> str:
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError
