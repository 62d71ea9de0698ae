"""Look-up and update of tables whose rows are spread over devices: two-dimensional sparse parallelism.

P devices are R replicas × G shards (arXiv 2508.03854). Inside a group every device sends the distinct ids that its
samples use to all others, reads the rows it owns (zero for the others) and returns the sum of all answers to who asked;
gradients take the same way home. The buffers hold every id of every device, so none is ever dropped. Rows lie in
contiguous blocks, unhashed [choice]: each device looks at all ids of the group, so popular rows burden none more than
the others, and a checkpoint knows nothing of the number of shards.

Each replica takes its own step with the gradient of R times the global mean loss,

    v_r ← v_r + mean_j g_rj²;   w_r ← w_r − η g_r / (sqrt(v_r / c) + ε)

and every `sync_every` steps, and after the last, replicas become the mean of the weights and of the second moments, of
the rows touched since the last time only. That the second moments are averaged is ours: the sources leave it open. With
`sync_every` 1 replicas are equal before each step, so their changes are exchanged and not their rows.
Between these averagings replicas differ, though JAX takes them for copies of one array: what reads a table as a whole
(a checkpoint) waits for one. Tables that are whole on every device have one replica's meaning: all devices take the
same plain step.

Everything here runs inside `shard_map`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from kunlun_jax.batch import Batch
from kunlun_jax.embedding.adagrad import DISTINCT, existing_if, row_changes, step_all_rows, step_rows
from kunlun_jax.embedding.placement import Placement, TablePlan
from kunlun_jax.embedding.tables import Plan, TableState, distinct, ids_by_table, plan_distinct
from kunlun_jax.schema import FeatureSchema
from kunlun_jax.sharding import DATA


class Request(NamedTuple):
    """What one table's look-up leaves for its update.

    Attributes:
      plan: of this device's own ids; `places` point into the rows that it received.
      owned: [group · n] the ids of the whole exchange as rows of this device's block; the block's length where another
        device owns them. None for a table that is whole here.
    """

    plan: Plan
    owned: Int[Array, "gn"] | None


@dataclass(frozen=True)
class ShardedTables:
    """The tables of a schema as a plan places them.

    Attributes:
      steps: length of the training, whose last step synchronises.
    """

    schema: FeatureSchema
    plan: TablePlan
    steps: int

    def look_up(
        self, tables: Mapping[str, TableState], batch: Batch
    ) -> tuple[dict[str, Float[Array, "n width"]], dict[str, Request]]:
        """The rows that this device's batch shard uses, as `Plan.uids` lists them, or a whole table."""
        rows, requests = {}, {}
        for name, ids in ids_by_table(self.schema, batch).items():
            placement, block = self.plan.placements[name], tables[name].rows
            if placement.replicated:
                rows[name], requests[name] = block, Request(Plan(None, ids), None)
                continue
            plan = plan_distinct(ids, placement.padded_rows)
            if placement.shards == 1:
                owned, rows[name] = plan.uids, block.at[plan.uids].get(mode="fill", fill_value=0, **DISTINCT)
            else:
                asked = lax.all_gather(plan.uids, self.plan.config.table_axes, tiled=True)
                owned = _own(asked, block.shape[0], self.plan.config.table_axes)
                found = block.at[owned].get(mode="fill", fill_value=0)
                rows[name] = lax.psum_scatter(found, self.plan.config.table_axes, tiled=True)
            requests[name] = Request(plan, owned)
        # As in the look-up on one device: all reads before any write.
        return lax.optimization_barrier((rows, requests))

    def update(
        self,
        tables: Mapping[str, TableState],
        requests: Mapping[str, Request],
        grads: Mapping[str, Float[Array, "n width"]],
        touched: Mapping[str, Int[Array, "k m"]],
        *,
        step: Int[Array, ""],
        learning_rate: ArrayLike,
        epsilon: float,
        ok: Bool[Array, ""],
    ) -> tuple[dict[str, TableState], dict[str, Int[Array, "k m"]]]:
        """One step on the looked-up rows, and the averaging of replicas where it is due.

        Args:
          grads: of the global mean loss with respect to this device's looked-up rows; of a table that is whole on
            every device the sum over all devices.
          touched: the rows of the steps since the last averaging, from `empty_touched`.
          ok: false leaves everything as it is.
        """
        config, updated, noted = self.plan.config, dict(tables), dict(touched)
        for name, request in requests.items():
            if request.owned is None:
                updated[name] = step_all_rows(tables[name], grads[name], learning_rate, epsilon, ok)
                continue
            block_rows = tables[name].rows.shape[0]
            uids, grad = request.owned, config.replicas * grads[name]
            if config.table_shards > 1:
                uids, places = distinct(request.owned, block_rows)
                grad = lax.all_gather(grad, config.table_axes, tiled=True)
                grad = jax.ops.segment_sum(grad, places, uids.size)
            uids = existing_if(ok, uids, block_rows)
            if config.replicas > 1 and config.sync_every == 1:
                change, _ = row_changes(tables[name], uids, grad, learning_rate, epsilon, config.c)
                updated[name] = _add_mean(tables[name], uids, change)
                continue
            updated[name] = step_rows(tables[name], uids, grad, learning_rate, epsilon, config.c)
            if config.replicas > 1:
                updated[name], noted[name] = self._average_when_due(updated[name], uids, touched[name], step)
        return updated, noted

    def _average_when_due(self, table: TableState, uids: Int[Array, "m"], touched: Int[Array, "k m"], step):
        every, none = self.plan.config.sync_every, table.rows.shape[0]
        line = jnp.pad(uids, (0, touched.shape[1] - uids.size), constant_values=none)
        touched = touched.at[step % every].set(line)

        def average(table, touched):
            return _mean_of_replicas(table, touched.reshape(-1)), jnp.full_like(touched, none)

        due = ((step + 1) % every == 0) | (step + 1 == self.steps)
        return lax.cond(due, average, lambda *same: same, table, touched)

    def touched_sizes(self, ids: Mapping[str, int]) -> dict[str, tuple[int, int, int]]:
        """Per sharded table [sync_every, rows touched in a step at most, rows of a block]; {} if none are kept.

        Args:
          ids: per table, the most ids that one device's batch shard holds.
        """
        config = self.plan.config
        if config.replicas == 1 or config.sync_every == 1:
            return {}
        sharded = [p for p in self.plan.placements.values() if not p.replicated and p.name in ids]
        return {p.name: (config.sync_every, config.table_shards * ids[p.name], _block(p)) for p in sharded}


def _block(placement: Placement) -> int:
    return placement.padded_rows // placement.shards


def _own(asked: Int[Array, "gn"], block_rows: int, axes: tuple[str, ...]) -> Int[Array, "gn"]:
    """Ids as rows of this device's block, `block_rows` for another's: never negative, which would wrap."""
    local = asked - lax.axis_index(axes) * block_rows
    return jnp.where((local >= 0) & (local < block_rows), local, block_rows)


def _add_mean(table: TableState, uids: Int[Array, "n"], change: TableState) -> TableState:
    """What averaging equal replicas after their own steps gives: the mean of all replicas' changes, added.

    No replica reads a row for this, and a change travels once where the mean of rows would travel twice. All replicas
    add in the same order, so they stay equal to the last bit.
    """
    replicas, (block_rows, width) = lax.axis_size(DATA), table.rows.shape
    change = TableState(change.rows / replicas, change.accumulator / replicas)
    if uids.size * replicas >= 2 * block_rows:
        # The block itself is less to send, twice, than all changes once, and no ids.
        sent = jnp.column_stack([change.rows, change.accumulator])
        block = jnp.zeros((block_rows, width + 1), sent.dtype).at[uids].set(sent, mode="drop", **DISTINCT)
        mean = lax.psum(block, DATA)
        return TableState(table.rows + mean[:, :width], table.accumulator + mean[:, width])
    every_uids, every_change = lax.all_gather((uids, change), DATA)

    def add(replica, table):
        uids, change = jax.tree.map(lambda x: x[replica], (every_uids, every_change))
        return TableState(
            table.rows.at[uids].add(change.rows, mode="drop", **DISTINCT),
            table.accumulator.at[uids].add(change.accumulator, mode="drop", **DISTINCT),
        )

    return lax.fori_loop(0, replicas, add, table)


def _mean_of_replicas(table: TableState, touched: Int[Array, "m"]) -> TableState:
    """Rows and accumulators that any replica touched become the mean over the replicas."""
    block_rows, width = table.rows.shape
    if touched.size * lax.axis_size(DATA) >= block_rows:
        # No more rows than ids: the whole block travels, and no ids.
        hit = jnp.zeros(block_rows, jnp.float32).at[touched].set(1, mode="drop")
        mean = lax.pmean(jnp.column_stack([table.rows, table.accumulator, hit]), DATA)
        hit = mean[:, -1] > 0
        return TableState(
            jnp.where(hit[:, None], mean[:, :width], table.rows), jnp.where(hit, mean[:, width], table.accumulator)
        )
    uids, _ = distinct(lax.all_gather(touched, DATA, tiled=True), block_rows)
    rows = table.rows.at[uids].get(mode="fill", fill_value=0, **DISTINCT)
    accumulator = table.accumulator.at[uids].get(mode="fill", fill_value=0, **DISTINCT)
    mean = lax.pmean(jnp.column_stack([rows, accumulator]), DATA)
    return TableState(
        table.rows.at[uids].set(mean[:, :width], mode="drop", **DISTINCT),
        table.accumulator.at[uids].set(mean[:, width], mode="drop", **DISTINCT),
    )
