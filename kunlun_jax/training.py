"""The training step, the prediction step, and the loop around them."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from kunlun_jax.batch import Batch, PackedBatch, unpacked
from kunlun_jax.data.pipeline import Placed
from kunlun_jax.embedding import TableState, embed, init_tables, look_up, update
from kunlun_jax.embedding.dropout import drop_fields
from kunlun_jax.metrics import Evaluation
from kunlun_jax.optimizer import FlatParameters, OptimizerConfig, dense_optimizer, schedule
from kunlun_jax.processes import gather
from kunlun_jax.schema import FeatureSchema
from kunlun_jax.sharding import own_rows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "healthy", "params", "optimizer", "tables", "touched"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class TrainState:
    """Everything that a step changes; what a checkpoint holds.

    `healthy` turns False at the first loss or gradient that is not finite, and from then on steps change nothing: the
    host, which looks one step late, finds the last good state and can ask it what went wrong. `params` are raveled by
    `FlatParameters`, so that the optimiser copies none of them; in a checkpoint they are a tree. `touched` belongs to a
    mesh whose table replicas are not averaged at every step, and is empty otherwise.
    """

    step: Int[Array, ""]
    healthy: Bool[Array, ""]
    params: PyTree
    optimizer: optax.OptState
    tables: dict[str, TableState]
    touched: dict[str, Array] = field(default_factory=dict)


class StepReport(NamedTuple):
    """What a step tells the host. Predictions are made before the update, so they are progressive validation."""

    loss: Float[Array, ""]
    logits: Float[Array, "B tasks"]
    healthy: Bool[Array, ""]


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite; the message names the step and the first bad tensor."""


def log_loss(logits: Float[Array, "B tasks"], batch: Batch, total: Float[Array, ""] | None = None) -> Float[Array, ""]:
    """Mean binary cross-entropy over samples and tasks, weighted by sample weight and label mask.

    `total` is the weight to divide by where `batch` is a part of what the mean is over.
    """
    weight = label_weights(batch)
    losses = jnp.sum(weight * optax.sigmoid_binary_cross_entropy(logits, batch.labels))
    return losses / (jnp.sum(weight) if total is None else total)


def label_weights(batch: Batch) -> Float[Array, "B tasks"]:
    return jnp.asarray(batch.weight)[:, None] * batch.label_mask


# For GPUs. Products would read float32 weights where they lie in the flat parameters; cuBLAS fails where that address
# is not aligned. And XLA computes again what exceeds its limit of memory, 76 % of the device's: 5 of 277 ms in a step
# of 180 GFLOPs. Here the limit is 80 % · 1.07 = 86 %, which is what `memory.USABLE` leaves of a pool of 95 %. Products
# are cuBLAS's, tuned on the device: to tune Triton's and its fusions, too, took over 400 s on an H100.
COMPILER_OPTIONS = {
    "xla_gpu_enable_dynamic_slice_fusion": False,
    "xla_gpu_memory_limit_slop_factor": 107,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}


class Gradients(NamedTuple):
    """What a step computes before it changes anything; the gradients of the dense parameters raveled."""

    loss: Float[Array, ""]
    logits: Float[Array, "B tasks"]
    flat: dict[str, Array]
    of_rows: dict[str, Array]
    rows: dict[str, Array]
    requests: dict[str, Any]


class Learner:
    """A model, its tables and their optimisers as two compiled functions, on one device.

    Args:
      model: maps an EmbeddedBatch to logits; only its structure is kept, its parameters go into `init()`. An abstract
        one, of shapes alone, serves for `abstract()` and for compiling.
      steps: length of the training, which the learning-rate schedules need.
      dropout: rate at which embedding fields are dropped in training, drawn anew from `seed` in each step.
    """

    mesh: Mesh | None = None
    shards = 1  # of a batch
    own: list[int] | None = None  # those that this process feeds, if not all

    def __init__(
        self,
        model: nnx.Module,
        schema: FeatureSchema,
        config: OptimizerConfig,
        *,
        steps: int,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        self.schema, self.config, self.steps, self.dropout, self.seed = schema, config, steps, dropout, seed
        self.graphdef, self._params = nnx.split(model)
        self.parameters = sum(x.size for x in jax.tree.leaves(self._params))
        self.flat = FlatParameters(self._params)
        self.optimizer = dense_optimizer(config, steps, self.flat)
        self.table_rate = schedule(config, config.table_learning_rate, steps)
        self.train_step = jax.jit(self._train_step, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
        self.predict = jax.jit(self._predict, compiler_options=COMPILER_OPTIONS)
        self._evaluated: set = set()  # shapes that `predict` has been compiled for
        self._diagnose = jax.jit(self._find_non_finite, compiler_options=COMPILER_OPTIONS)
        self._ravel, self._unravel = jax.jit(self.flat.ravel), jax.jit(self.flat.unravel)

    def init(self, seed: int) -> TrainState:
        return self.state_of(self._params, jax.random.key(seed))

    def state_of(self, params: PyTree, key: PRNGKeyArray) -> TrainState:
        """The state before the first step with these dense parameters and tables drawn from `key`; traceable."""
        flat = self._ravel(params)
        optimizer = self.optimizer.init(flat)
        return TrainState(jnp.zeros((), jnp.int32), jnp.array(True), flat, optimizer, self._init_tables(key))

    def _init_tables(self, key: PRNGKeyArray) -> dict[str, TableState]:
        return init_tables(
            self.schema,
            key=key,
            scale=self.config.table_scale,
            initial_accumulator=self.config.table_initial_accumulator,
        )

    # What a mesh does differently.

    def place(self, batch: Batch) -> PackedBatch:
        """A host batch where the steps expect it."""
        return jax.device_put(PackedBatch.of(batch))

    def abstract_state(self) -> TrainState:
        """Shapes, and places, of the state that steps take."""
        return jax.eval_shape(self.state_of, self._params, jax.random.key(0))

    def abstract(self) -> TrainState:
        """Shapes, and places, of what `portable` returns: the target to restore a checkpoint to."""
        return replace(self.abstract_state(), params=jax.eval_shape(lambda: self._params))

    def portable(self, state: TrainState) -> TrainState:
        """The state as every mesh understands it, parameters as a tree; a checkpoint holds this."""
        return replace(state, params=self._unravel(state.params))

    def adopt(self, state: TrainState) -> TrainState:
        """The inverse of `portable`, on this learner's devices."""
        return replace(state, params=self._ravel(state.params))

    def in_sync(self, step: int) -> bool:
        """Whether all table replicas agree after `step`, so that a checkpoint may be written."""
        return True

    def _tree(self, params: PyTree) -> PyTree:
        """Raveled parameters as the model has them; on a mesh, for a device's own experts."""
        return self.flat.unravel(params)

    def _look_up(self, tables, batch: Batch):
        rows, plans = look_up(self.schema, tables, batch)
        return rows, plans, plans

    def _total_weight(self, batch: Batch) -> Float[Array, ""]:
        return jnp.sum(label_weights(batch))

    def _combine(self, gradients: Gradients) -> tuple[Gradients, Bool[Array, ""]]:
        """Gradients of the whole batch, and whether all are finite."""
        finite = jnp.isfinite(gradients.loss) & jnp.isfinite(optax.tree.norm((gradients.flat, gradients.of_rows)))
        return gradients, finite

    def _update_tables(self, state: TrainState, gradients: Gradients, healthy):
        tables = update(
            state.tables,
            gradients.requests,
            gradients.of_rows,
            learning_rate=self.table_rate(state.step),
            epsilon=self.config.table_epsilon,
            ok=healthy,
        )
        return tables, state.touched

    def _draws(self, step) -> PRNGKeyArray:
        """The key of a step's random draws."""
        return jax.random.fold_in(jax.random.key(self.seed), step)

    def _run(self, state: TrainState, batch: Batch | PackedBatch):
        return self._device_step(state, batch)

    # The step. Batches are as `place` returns them; unpacked ones work too.

    def _predict(self, params, tables, batch: Batch | PackedBatch) -> Float[Array, "B tasks"]:
        batch = unpacked(batch)
        rows, plans, _ = self._look_up(tables, batch)
        return nnx.merge(self.graphdef, self._tree(params))(embed(self.schema, batch, rows, plans))

    def _gradients(self, state: TrainState, batch: Batch) -> Gradients:
        with jax.named_scope("tables"):
            rows, plans, requests = self._look_up(state.tables, batch)
        total = self._total_weight(batch)

        def loss_of(params, rows):
            with jax.named_scope("tables"):
                embedded = embed(self.schema, batch, rows, plans)
                if self.dropout:
                    embedded = drop_fields(embedded, self._draws(state.step), self.dropout)
            logits = nnx.merge(self.graphdef, params)(embedded)
            return log_loss(logits, batch, total), logits

        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, logits), (grads, row_grads) = differentiate(self._tree(state.params), rows)
        return Gradients(loss, logits, self.flat.ravel(grads), row_grads, rows, requests)

    def _device_step(self, state: TrainState, batch: Batch | PackedBatch):
        """What a device does with its batch shard: everything but the dense parameters' step."""
        gradients, finite = self._combine(self._gradients(state, unpacked(batch)))
        healthy = state.healthy & finite
        with jax.named_scope("tables"):
            tables, touched = self._update_tables(state, gradients, healthy)
        return gradients.loss, gradients.logits, gradients.flat, healthy, tables, touched

    def _train_step(self, state: TrainState, batch: Batch | PackedBatch) -> tuple[TrainState, StepReport]:
        loss, logits, grads, healthy, tables, touched = self._run(state, batch)
        # Between the barriers the optimiser is one pass over its operands, in place, behind all who read the old ones.
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)  # in front of the barrier it is the one that `healthy` comes from
            params, grads = lax.optimization_barrier((state.params, grads))
            updates, optimizer = self.optimizer.update(grads, state.optimizer, params, norm=norm)
            keep = partial(jax.tree.map, lambda new, old: jnp.where(healthy, new, old))
            kept = keep((optax.apply_updates(params, updates), optimizer), (params, state.optimizer))
            params, optimizer = lax.optimization_barrier(kept)
        new = TrainState(
            step=state.step + healthy,
            healthy=healthy,
            params=params,
            optimizer=optimizer,
            tables=tables,
            touched=touched,
        )
        return new, StepReport(loss, logits, healthy)

    def _find_non_finite(self, state: TrainState, batch: Batch | PackedBatch):
        """The loss, and whether a tensor of the step is bad; groups in the order in which a step computes them."""
        batch = unpacked(batch)
        gradients = self._gradients(state, batch)
        groups = (
            {"dense": batch.dense, **{name: events.values for name, events in batch.events.items()}},
            gradients.rows,
            self._tree(state.params),
            gradients.logits,
            gradients.loss,
            self.flat.unravel(gradients.flat),
            gradients.of_rows,
        )
        return self._anywhere(gradients.loss, jax.tree.map(lambda x: ~jnp.isfinite(x).all(), groups))

    def _anywhere(self, loss, bad):
        """The loss of the whole batch, and what is bad on any device."""
        return loss, bad

    def check_healthy(self, report: StepReport, state: TrainState, batch: Batch, step: int) -> None:
        """Raise NonFiniteLoss if the step on `batch` met a NaN or an infinity; `state` is any state since then."""
        if report.healthy:
            return
        loss, bad = self._diagnose(state, self.place(batch))
        raise NonFiniteLoss(
            f"step {step}: the loss is {float(loss)}; the first tensor that is not finite: {_first_bad(bad)}. The "
            f"last checkpoint is untouched; check the data of that step, or lower the learning rates"
        )

    def evaluate(self, state: TrainState, batches: Iterable[Batch], base_rates: dict[str, float]) -> Evaluation:
        """Predict `batches` and compare with their labels."""
        evaluation = Evaluation(tasks=self.schema.tasks, base_rates=base_rates)
        for batch in batches:
            announce_compilation(batch, self._evaluated, "evaluation")
            logits = self.predict(state.params, state.tables, self.place(batch))
            evaluation = add_predictions(evaluation, logits, batch, self.schema)
        return _of_all_processes(evaluation, Timings(0.0))[0]


GROUPS = ("input", "embeddings of table", "parameter", "logits", "loss", "gradient of", "gradient of table")


def _first_bad(bad) -> str:
    """The name of the first tensor with a NaN or infinity, in the order in which a step computes them."""
    for group, tree in zip(GROUPS, bad, strict=True):
        for path, flag in jax.tree_util.tree_leaves_with_path(tree):
            if flag:
                return f"{group} {jax.tree_util.keystr(path, simple=True, separator='.')}".strip()
    return "none on a second look; the step is not reproducible"


def add_predictions(evaluation: Evaluation, logits, batch: Batch, schema: FeatureSchema) -> Evaluation:
    """The evaluation with a batch's predictions added, grouped by the schema's group field where there is one.

    On several processes each adds the part of the batch that it feeds.
    """
    labels, mask, weight = (np.asarray(x) for x in (batch.labels, batch.label_mask, batch.weight))
    return evaluation.update(own_rows(logits), labels, mask, weight, groups_of(batch, schema))


def groups_of(batch: Batch, schema: FeatureSchema) -> np.ndarray | None:
    """The row number of the schema's group field for each sample [B], for gAUC."""
    if schema.group is None:
        return None
    ids = np.asarray(batch.sparse[schema.group])[:, 0]
    if next(f.scope for f in schema.sparse if f.name == schema.group) == "candidate":
        return ids
    shards, per_shard = batch.request_index.shape
    return np.take_along_axis(ids.reshape(shards, -1), np.asarray(batch.request_index), axis=1).reshape(-1)


@dataclass
class Timings:
    """Seconds since the last log line: all, waiting for data, and the samples that went by."""

    started: float
    waited: float = 0.0
    samples: int = 0


def fit(
    learner: Learner,
    state: TrainState,
    batches: Placed,
    *,
    base_rates: dict[str, float],
    log_every: int,
    on_log: Callable[[int, dict[str, Any]], None],
    after_step: Callable[[int, TrainState], bool],
) -> TrainState:
    """Train on `batches` until they end or `after_step(step, state)` returns False; `batches` are closed then.

    The host looks at a step's report while the next step runs, so the device never waits for it.

    Args:
      on_log: receives, every `log_every` steps, the step and the log loss, NE and AUC of the predictions made since
        the last call, samples per second and the share of the time spent waiting for data.

    Raises:
      NonFiniteLoss: at the first step with a NaN or an infinity, one step late; the state is that before it.
    """
    step, pending, shapes = int(state.step), None, set()
    evaluation, timings = Evaluation(tasks=learner.schema.tasks, base_rates=base_rates), Timings(time.perf_counter())
    with contextlib.closing(batches):
        while True:
            before = time.perf_counter()
            batch, placed = next(batches, (None, None))
            timings.waited += time.perf_counter() - before
            if batch is not None:
                announce_compilation(batch, shapes, f"step {step + 1}")
                state, report = learner.train_step(state, placed)
            if pending is not None:
                done_step, done_report, done_batch = pending
                learner.check_healthy(done_report, state, done_batch, done_step)
                evaluation = add_predictions(evaluation, done_report.logits, done_batch, learner.schema)
                timings.samples += int((done_batch.weight > 0).sum())
                if done_step % log_every == 0 or batch is None:
                    evaluation, timings = _of_all_processes(evaluation, timings)
                    on_log(done_step, {**evaluation.results(), **rates(timings)})
                    evaluation = Evaluation(tasks=learner.schema.tasks, base_rates=base_rates)
                    timings = Timings(time.perf_counter())
            if batch is None:
                return state
            step += 1
            pending = (step, report, batch)
            if not after_step(step, state):
                learner.check_healthy(report, state, batch, step)
                return state


def _of_all_processes(evaluation: Evaluation, timings: Timings) -> tuple[Evaluation, Timings]:
    """What all processes saw together."""
    (merged, samples), *others = gather((evaluation, timings.samples))
    for other, more in others:
        merged, samples = merged.merge(other), samples + more
    return merged, replace(timings, samples=samples)


def rates(timings: Timings) -> dict[str, float]:
    """Samples per second and the share of the time that the loop waited for data."""
    elapsed = time.perf_counter() - timings.started
    return {"samples_per_second": timings.samples / elapsed, "data_wait": timings.waited / elapsed}


def announce_compilation(batch: Batch, seen: set, when: str) -> None:
    """Say once per batch shape that a program is compiled for it: the user should know what a pause is."""
    shape = tuple((name, events.values["gap"].shape[1]) for name, events in batch.events.items())
    if shape not in seen:
        seen.add(shape)
        tokens = ", ".join(f"{name} {capacity}" for name, capacity in shape)
        print(
            f"{when}: compiling for batches of {batch.size} samples and event capacities {tokens or 'none'}",
            file=sys.stderr,
        )
