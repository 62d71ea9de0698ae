"""The device mesh and where everything lies on it: the one place for axis names, specs and exchanges between devices.

Two axes, both used for the batch: `data` holds replicas of the model-parallel group, `expert` is that group.

    batch                 its shards over (data, expert): shard number data · |expert| + expert
    Wukong experts        over expert, tokens exchanged inside the group
    tables                rows over expert and replicated over data (two-dimensional sparse parallelism, arXiv
                          2508.03854), or rows over both axes (one-dimensional); small ones whole on every device
    dense parameters      replicated, or fully sharded over both axes
    optimiser state       as its parameter

A step's gradients and table updates are one `jax.shard_map`, in which a device sees its own batch shard, its own
experts and its own table rows, and every exchange between devices is written out; so Pallas kernels need no
partitioning rule, and no collective appears that nobody asked for. Outside a mesh nothing of this runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

DATA, EXPERT = "data", "expert"
AXES = (DATA, EXPERT)
BATCH = PartitionSpec(AXES)  # leading axes: batch shards P, and samples or requests, which follow their shard
REPLICATED = PartitionSpec()
EXPERTS = PartitionSpec(EXPERT)

TableRows = Literal["group", "all"]
MomentScale = Literal["one", "replicas"]
Neighbours = Literal["replicas", "group"]


@dataclass(frozen=True)
class ParallelConfig:
    """How a training is spread over devices. The default is one device and no mesh.

    Attributes:
      data, expert: sizes of the mesh axes; their product is the number of devices.
      table_rows: "group" shards rows over `expert` with one replica per `data` position (2D); "all" shards them over
        both axes (1D): one copy of each row, exchanges among all devices.
      moment_scale: c in the tables' step η g / (sqrt(v / c) + ε): "one", or "replicas" for c = R [2nd].
      sync_every: steps between averagings of the table replicas.
      fully_sharded: dense parameters and their optimiser state sharded over all devices and gathered for each step.
      neighbours: devices next to each other hold the "replicas" of one shard, so that their averaging stays inside a
        host [2nd], or form one "group".
      replicate_below: tables of at most so many bytes are whole on every device [choice].
      device_memory: bytes per device that the table planner may assume; None asks the device.

    Raises:
      ValueError: a size is below 1, or a choice is unknown.
    """

    data: int = 1
    expert: int = 1
    table_rows: TableRows = "group"
    moment_scale: MomentScale = "replicas"
    sync_every: int = 1
    fully_sharded: bool = False
    neighbours: Neighbours = "replicas"
    replicate_below: int = 256 * 1024
    device_memory: int | None = None

    def __post_init__(self):
        for name in ("data", "expert", "sync_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: must be at least 1, got {getattr(self, name)}")
        if self.replicate_below < 0:
            raise ValueError(f"parallel.replicate_below: must not be negative, got {self.replicate_below} bytes")
        if self.device_memory is not None and self.device_memory < 1:
            raise ValueError(f"parallel.device_memory: must be at least 1 byte, got {self.device_memory}")
        for name, kind in (("table_rows", TableRows), ("moment_scale", MomentScale), ("neighbours", Neighbours)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"parallel.{name}: {getattr(self, name)!r} is unknown; choose from {get_args(kind)}")

    @property
    def devices(self) -> int:
        return self.data * self.expert

    @property
    def table_axes(self) -> tuple[str, ...]:
        """The axes that a sharded table's rows are spread over, and within which ids and rows are exchanged."""
        return AXES if self.table_rows == "all" else (EXPERT,)

    @property
    def table_shards(self) -> int:
        return self.devices if self.table_rows == "all" else self.expert

    @property
    def replicas(self) -> int:
        """R: copies of each row of a sharded table."""
        return 1 if self.table_rows == "all" else self.data

    @property
    def c(self) -> float:
        return float(self.replicas) if self.moment_scale == "replicas" else 1.0


class ExpertParam(nnx.Param):
    """A parameter whose leading axis counts the experts, which live on different devices of the group."""


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh [data, expert] on `devices`, by default all; one process may leave devices unused, several may not.

    Raises:
      ValueError: there are too few devices, or several processes have more than the mesh.
    """
    devices = list(jax.devices() if devices is None else devices)
    wanted = config.devices
    several = len({d.process_index for d in devices}) > 1
    if len(devices) < wanted or (several and len(devices) != wanted):
        raise ValueError(
            f"a mesh of data {config.data} × expert {config.expert} takes {wanted} devices; there are {len(devices)} "
            f"in {jax.process_count()} process(es). Change parallel.data or parallel.expert, or the number of processes"
        )
    grid = np.empty(wanted, object)
    grid[:] = devices[:wanted]
    if config.neighbours == "replicas":
        grid = grid.reshape(config.expert, config.data).T
    # Auto, not Explicit: indexing into sharded arrays would raise otherwise.
    return Mesh(grid.reshape(config.data, config.expert), AXES, axis_types=(AxisType.Auto,) * 2)


def check_divides(config: ParallelConfig, *, batch_size: int, params: PyTree) -> None:
    """Check that the mesh divides what it shares out.

    Raises:
      ValueError: the batch's samples or some experts don't divide over the mesh; the message has both numbers.
    """
    if batch_size % config.devices:
        raise ValueError(
            f"batch_size {batch_size} doesn't divide over {config.devices} devices (data {config.data} × expert "
            f"{config.expert}); choose a multiple of {config.devices}"
        )
    for experts in sorted({experts_of(leaf) for leaf in variables(params)} - {1}):
        if experts % config.expert:
            raise ValueError(
                f"{experts} experts don't divide over parallel.expert {config.expert}; change model.experts or the mesh"
            )


def variables(params: PyTree) -> list[Any]:
    """The leaves of a module's state with their kind, plain arrays as they are."""
    return jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def experts_of(leaf: Any) -> int:
    """Over how many experts a parameter extends; 1 for all that is no expert's own."""
    return leaf.shape[0] if isinstance(leaf, ExpertParam) else 1


def param_specs(params: PyTree) -> PyTree:
    """Expert parameters over `expert`, the rest replicated; a tree like `params`."""
    specs = [EXPERTS if experts_of(leaf) > 1 else REPLICATED for leaf in variables(params)]
    return jax.tree.unflatten(jax.tree.structure(params), specs)


def on_mesh(mesh: Mesh, specs: PyTree) -> PyTree:
    """Specs as shardings on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


# --- exchanges, inside shard_map --------------------------------------------------------------------------------------


def to_experts(x: Float[Array, "B M *rest"], held: int) -> Float[Array, "group_B held *rest"]:
    """Tokens dealt over M experts, of which this device holds `held`: everyone's tokens for them.

    Where all experts are here nothing is exchanged, so the same model code runs without a mesh.
    """
    return x if held == x.shape[1] else lax.all_to_all(x, EXPERT, 1, 0, tiled=True)


def from_experts(x: Float[Array, "group_B held *rest"], experts: int) -> Float[Array, "B M *rest"]:
    """The inverse of `to_experts`: all M experts' results for this device's own samples."""
    return x if experts == x.shape[1] else lax.all_to_all(x, EXPERT, 0, 1, tiled=True)


# --- placing a batch --------------------------------------------------------------------------------------------------


def own_shards(mesh: Mesh) -> list[int]:
    """The batch shards that this process feeds: those of its own devices, ascending."""
    return [p for p, d in enumerate(mesh.devices.flat) if d.process_index == jax.process_index()]


def place_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """A host batch on the mesh. With several processes each gives the part that `own_shards` lists, in that order."""
    sharding, own = NamedSharding(mesh, BATCH), own_shards(mesh)
    if len(own) == mesh.size:
        return jax.device_put(batch, sharding)

    def place(local):
        local = np.asarray(local)
        rows = local.shape[0] // len(own)

        def piece(index):
            place = own.index((index[0].start or 0) // rows)
            return local[place * rows : (place + 1) * rows]

        return jax.make_array_from_callback((rows * mesh.size, *local.shape[1:]), sharding, piece)

    return jax.tree.map(place, batch)


def own_rows(x: Array) -> np.ndarray:
    """This process's part of an array that is laid out like a batch, in the order of its shards."""
    if x.is_fully_addressable:
        return np.asarray(x)
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def bytes_of(tree: PyTree) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
