"""What the blocks of a cluster tell each other about the rows that they share: each holds some of the heads."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import hopper

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a tile
SLOTS = 2  # a block is never more than one exchange ahead of another
AXIS = "block"  # of the cluster


def exchange_memory(*, clusters: int, warpgroups: int, blocks: int, values: int, rows: int) -> jax.ShapeDtypeStruct:
    """The device memory of a kernel's exchanges: an output that nobody reads afterwards."""
    return jax.ShapeDtypeStruct((clusters, warpgroups, SLOTS, blocks, values, rows), jnp.float32)


def exchange_barriers(warpgroups: int) -> plgpu.ClusterBarrier:
    """One for each compute warpgroup."""
    return plgpu.ClusterBarrier(collective_axes=(AXIS,), num_barriers=warpgroups)


class Exchange:
    """One warpgroup's exchanges of float32 values per row with its fellows in the other blocks, inside a kernel.

    memory: of `exchange_memory`, it is small and stays in L2. barriers: of `exchange_barriers`. Exchanges use the slots
    in turn.
    """

    def __init__(self, memory, barriers, cluster, rank, warpgroup, interpret):
        self.memory, self.barrier = memory, barriers.at[warpgroup]
        self.place, self.rank, self.interpret = (cluster, warpgroup), rank, interpret

    def send(self, slot, *values):
        """Values [rows] of this block."""
        for i, x in enumerate(values):
            self.memory[(*self.place, slot, self.rank, i)] = x
        hopper.fence_across_blocks(self.interpret)
        plgpu.barrier_arrive(self.barrier)

    def receive(self, slot, count: int):
        """For each of `count` values those of all blocks, in their order."""
        plgpu.barrier_wait(self.barrier)
        hopper.fence_across_blocks(self.interpret)
        blocks = self.memory.shape[3]
        return [[self._load(slot, block, i) for block in range(blocks)] for i in range(count)]

    def _load(self, slot, block, i):
        return plgpu.load(self.memory.at[(*self.place, slot, block, i)], layout=ROWS, optimized=False)
