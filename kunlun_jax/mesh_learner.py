"""The training step on a mesh of devices: the same model code, with every exchange between devices written out.

    batch shard → ids to the owners of their rows, rows back → model (tokens to their experts and back) → loss
    → one all-reduce of the dense gradients → row gradients home → row-wise AdaGrad → mean of the table replicas

Gradients are taken inside `shard_map` of each device's part of the global mean loss; the sums over devices stand in
`_combine`. Experts' gradients need a sum over `data` only: the exchange of tokens, transposed, has brought them the
cotangents of the whole group. The dense optimiser runs outside, under `jit`, on arrays sharded as their parameters.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from kunlun_jax.batch import Batch, PackedBatch
from kunlun_jax.config import TrainConfig
from kunlun_jax.embedding.placement import TablePlan, plan_tables
from kunlun_jax.embedding.sharded import ShardedTables
from kunlun_jax.embedding.tables import fresh_table
from kunlun_jax.jagged import capacities
from kunlun_jax.optimizer import FLAT_MULTIPLE, OptimizerConfig
from kunlun_jax.schema import FeatureSchema
from kunlun_jax.sharding import (
    AXES,
    BATCH,
    DATA,
    EXPERT,
    EXPERTS,
    REPLICATED,
    bytes_of,
    check_divides,
    make_mesh,
    on_mesh,
    own_shards,
    param_specs,
    place_batch,
)
from kunlun_jax.training import COMPILER_OPTIONS, Gradients, Learner, TrainState, label_weights


class MeshLearner(Learner):
    """A learner whose state lies on a mesh.

    Args:
      mesh: from `sharding.make_mesh`.
      tables: from `plan_tables`, for the same mesh.
      batch_size: samples per global batch.

    Raises:
      ValueError: the mesh doesn't divide the batch, the experts or, fully sharded, the parameters.
    """

    mesh: Mesh

    def __init__(
        self,
        model: nnx.Module,
        schema: FeatureSchema,
        config: OptimizerConfig,
        *,
        steps: int,
        mesh: Mesh,
        tables: TablePlan,
        batch_size: int,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(model, schema, config, steps=steps, dropout=dropout, seed=seed)
        self.mesh, self.shards, self.parallel = mesh, mesh.size, tables.config
        own = own_shards(mesh)
        self.own = own if len(own) < mesh.size else None
        check_divides(self.parallel, batch_size=batch_size, params=self._params)
        if self.parallel.fully_sharded and FLAT_MULTIPLE % mesh.size:
            raise ValueError(
                f"parallel.fully_sharded: {mesh.size} devices must divide {FLAT_MULTIPLE}, the multiple that "
                f"parameters are padded to; use a power of two"
            )
        self.tables = ShardedTables(schema, tables, steps)
        self._most_ids = most_ids(schema, batch_size // mesh.size)
        specs: dict[str, Any] = {
            "step": REPLICATED,
            "healthy": REPLICATED,
            "params": self._flat_specs(),
            "optimizer": self._optimizer_specs(),
            "tables": tables.specs,
            "touched": dict.fromkeys(self.tables.touched_sizes(self._most_ids), BATCH),
        }
        self._specs = TrainState(**specs)
        shardings = on_mesh(mesh, self._specs)
        self._init = jax.jit(self._fresh, out_shardings=shardings)
        self._clear = jax.jit(self._untouched, out_shardings=shardings.touched)
        self._ravel = jax.jit(self.flat.ravel, out_shardings=on_mesh(mesh, self._flat_specs()))
        self._unravel = jax.jit(self.flat.unravel, out_shardings=on_mesh(mesh, param_specs(self._params)))
        compiled = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
        predict_in, find_in = (self._specs.params, self._specs.tables, BATCH), (self._specs, BATCH)
        self.train_step = compiled(self._train_step, donate_argnums=0, out_shardings=(shardings, None))
        self.predict = compiled(self._over_mesh(self._predict, predict_in, BATCH))
        self._diagnose = compiled(self._over_mesh(self._find_non_finite, find_in, REPLICATED))

    def _over_mesh(self, function, in_specs, out_specs):
        # check_vma: Pallas calls don't say over which axes their results vary.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    # --- where things lie ---------------------------------------------------------------------------------------------

    def _flat_specs(self) -> dict[str, PartitionSpec]:
        """Of raveled parameters and of everything shaped like them."""
        if self.parallel.fully_sharded:
            return {
                group: PartitionSpec(AXES) if group == "shared" else PartitionSpec(EXPERT, DATA)
                for group in self.flat.decayed
            }
        return {group: REPLICATED if group == "shared" else EXPERTS for group in self.flat.decayed}

    def _optimizer_specs(self) -> PyTree:
        specs = self._flat_specs()
        state = jax.eval_shape(lambda: self.optimizer.init(self.flat.ravel(self._params)))

        def spec(path, _):
            return next((specs[k.key] for k in path if isinstance(k, jax.tree_util.DictKey)), REPLICATED)

        return jax.tree_util.tree_map_with_path(spec, state)

    def init(self, seed: int) -> TrainState:
        return self._init(jax.tree.map(np.asarray, self._params), jax.random.key(seed))

    def _fresh(self, params: PyTree, key: PRNGKeyArray) -> TrainState:
        flat = self.flat.ravel(params)
        settings = {"scale": self.config.table_scale, "initial_accumulator": self.config.table_initial_accumulator}
        placements = self.tables.plan.placements
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            healthy=jnp.array(True),
            params=flat,
            optimizer=self.optimizer.init(flat),
            tables={
                table.name: fresh_table(table, placements[table.name].padded_rows, key=key, **settings)
                for table in self.schema.tables
            },
            touched=self._untouched(),
        )

    def _untouched(self) -> dict[str, jax.Array]:
        sizes = self.tables.touched_sizes(self._most_ids)
        return {name: jnp.full((self.mesh.size * k, m), rows, jnp.int32) for name, (k, m, rows) in sizes.items()}

    def place(self, batch: Batch) -> PackedBatch:
        return place_batch(self.mesh, PackedBatch.of(batch))

    def abstract_state(self) -> TrainState:
        return self._placed(jax.eval_shape(self._fresh, self._params, jax.random.key(0)), self._specs)

    def abstract(self) -> TrainState:
        shapes = replace(self.abstract_state(), params=jax.eval_shape(lambda: self._params), touched={})
        return self._placed(shapes, replace(self._specs, params=param_specs(self._params), touched={}))

    def _placed(self, shapes: TrainState, specs: TrainState) -> TrainState:
        shardings = on_mesh(self.mesh, specs)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def portable(self, state: TrainState) -> TrainState:
        return replace(super().portable(state), touched={})

    def adopt(self, state: TrainState) -> TrainState:
        return replace(super().adopt(state), touched=self._clear())

    def in_sync(self, step: int) -> bool:
        return self.parallel.replicas == 1 or step % self.parallel.sync_every == 0 or step == self.steps

    # --- the step -----------------------------------------------------------------------------------------------------

    def _draws(self, step) -> PRNGKeyArray:
        return jax.random.fold_in(super()._draws(step), lax.axis_index(AXES))  # each device draws for its own samples

    def _run(self, state: TrainState, batch: Batch | PackedBatch):
        specs = self._specs
        out = (REPLICATED, BATCH, self._flat_specs(), REPLICATED, specs.tables, specs.touched)
        return self._over_mesh(self._device_step, (specs, BATCH), out)(state, batch)

    def _tree(self, params: PyTree) -> PyTree:
        if self.parallel.fully_sharded:
            axes = {group: AXES if group == "shared" else DATA for group in params}
            params = {g: lax.all_gather(x, axes[g], axis=x.ndim - 1, tiled=True) for g, x in params.items()}
        return super()._tree(params)

    def _look_up(self, tables, batch: Batch):
        rows, requests = self.tables.look_up(tables, batch)
        return rows, {name: request.plan for name, request in requests.items()}, requests

    def _total_weight(self, batch: Batch):
        return lax.psum(jnp.sum(label_weights(batch)), AXES)

    def _combine(self, gradients: Gradients):
        finite = jnp.isfinite(gradients.loss) & jnp.isfinite(optax.tree.norm((gradients.flat, gradients.of_rows)))
        flat, of_rows = dict(gradients.flat), dict(gradients.of_rows)
        whole = sorted(name for name, request in gradients.requests.items() if request.owned is None)
        # One all-reduce for all that every device needs the sum of.
        parts = [gradients.loss[None], 1.0 - finite[None], *(of_rows[name].reshape(-1) for name in whole)]
        if not self.parallel.fully_sharded:
            parts.append(flat["shared"])
        sums = lax.psum(jnp.concatenate(parts), AXES)
        start = 2
        for name in whole:
            size = of_rows[name].size
            of_rows[name] = sums[start : start + size].reshape(of_rows[name].shape)
            start += size
        for group, grad in flat.items():
            if self.parallel.fully_sharded:
                axes = AXES if group == "shared" else DATA
                flat[group] = lax.psum_scatter(grad, axes, scatter_dimension=grad.ndim - 1, tiled=True)
            else:
                flat[group] = sums[start:] if group == "shared" else _sum_over_data(grad, self.parallel.data)
        return gradients._replace(loss=sums[0], flat=flat, of_rows=of_rows), sums[1] == 0

    def _update_tables(self, state: TrainState, gradients: Gradients, healthy):
        return self.tables.update(
            state.tables,
            gradients.requests,
            gradients.of_rows,
            state.touched,
            step=state.step,
            learning_rate=self.table_rate(state.step),
            epsilon=self.config.table_epsilon,
            ok=healthy,
        )

    def _anywhere(self, loss, bad):
        leaves, structure = jax.tree.flatten(bad)
        sums = lax.psum(jnp.stack([loss, *(leaf.astype(jnp.float32) for leaf in leaves)]), AXES)
        return sums[0], jax.tree.unflatten(structure, list(sums[1:] > 0))


def _sum_over_data(x, data: int):
    return lax.psum(x, DATA) if data > 1 else x


def make_learner(
    model: nnx.Module, schema: FeatureSchema, config: TrainConfig, *, steps: int, say: Callable[[str], None]
) -> Learner:
    """The learner for a configuration: on one device, or on a mesh, whose table plan is then said.

    Raises:
      ValueError: there are not enough devices, the mesh doesn't divide batch or experts, or the tables don't fit.
    """
    dense = bytes_of(nnx.state(model))
    plan = plan_tables(schema, config.parallel, dense_bytes=dense)
    noise: dict[str, Any] = {"dropout": config.embedding_dropout, "seed": config.seed}
    if config.parallel.devices == 1 and jax.process_count() == 1:
        plan.check()
        return Learner(model, schema, config.optimizer, steps=steps, **noise)
    mesh = make_mesh(config.parallel)
    say(str(plan))
    return MeshLearner(
        model, schema, config.optimizer, steps=steps, mesh=mesh, tables=plan.check(),
        batch_size=config.batch_size, **noise,
    )  # fmt: skip


def most_ids(schema: FeatureSchema, samples: int) -> Mapping[str, int]:
    """Per table, the most ids that a batch shard of `samples` samples can hold."""
    counts: dict[str, int] = {}
    for field in schema.sparse:
        counts[field.table] = counts.get(field.table, 0) + samples * field.max_ids
    for event in schema.events:
        full = capacities(samples, event.max_length, (1.0,))[-1]
        for field in event.sparse:
            counts[field.table] = counts.get(field.table, 0) + full * field.max_ids
    return counts
