"""The training step, the prediction step, and the loop around them."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kunlun_jax.batch import Batch
from kunlun_jax.embedding import TableState, embed, init_tables, look_up, update
from kunlun_jax.metrics import Evaluation
from kunlun_jax.optimizer import OptimizerConfig, dense_optimizer, schedule
from kunlun_jax.schema import FeatureSchema


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "healthy", "params", "optimizer", "tables"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class TrainState:
    """Everything that a step changes; what a checkpoint holds.

    `healthy` turns False at the first loss or gradient that is not finite, and from then on steps change nothing: the
    host, which looks one step late, finds the last good state and can ask it what went wrong.
    """

    step: Int[Array, ""]
    healthy: Bool[Array, ""]
    params: nnx.State
    optimizer: optax.OptState
    tables: dict[str, TableState]


class StepReport(NamedTuple):
    """What a step tells the host. Predictions are made before the update, so they are progressive validation."""

    loss: Float[Array, ""]
    logits: Float[Array, "B tasks"]
    healthy: Bool[Array, ""]


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite; the message names the step and the first bad tensor."""


def log_loss(logits: Float[Array, "B tasks"], batch: Batch) -> Float[Array, ""]:
    """Mean binary cross-entropy over samples and tasks, weighted by sample weight and label mask."""
    weight = batch.weight[:, None] * batch.label_mask
    return jnp.sum(weight * optax.sigmoid_binary_cross_entropy(logits, batch.labels)) / jnp.sum(weight)


class Learner:
    """A model, its tables and their optimisers as two compiled functions.

    Args:
      model: maps an EmbeddedBatch to logits; only its structure is kept, its parameters go into `init()`.
      steps: length of the training, which the learning-rate schedules need.
    """

    def __init__(self, model: nnx.Module, schema: FeatureSchema, config: OptimizerConfig, *, steps: int):
        self.schema, self.config = schema, config
        self.graphdef, self._params = nnx.split(model)
        self.optimizer = dense_optimizer(config, steps, self._params)
        self.table_rate = schedule(config, config.table_learning_rate, steps)
        self.train_step = jax.jit(self._train_step, donate_argnums=0)
        self.predict = jax.jit(self._predict)

    def init(self, seed: int) -> TrainState:
        tables = init_tables(
            self.schema,
            key=jax.random.key(seed),
            scale=self.config.table_scale,
            initial_accumulator=self.config.table_initial_accumulator,
        )
        params = jax.tree.map(jnp.copy, self._params)  # steps donate their state; the model's own stay usable
        return TrainState(jnp.zeros((), jnp.int32), jnp.array(True), params, self.optimizer.init(params), tables)

    def _predict(self, params, tables, batch: Batch) -> Float[Array, "B tasks"]:
        rows, plans = look_up(self.schema, tables, batch)
        return nnx.merge(self.graphdef, params)(embed(self.schema, batch, rows, plans))

    def _gradients(self, params, tables, batch: Batch):
        rows, plans = look_up(self.schema, tables, batch)

        def loss_of(params, rows):
            logits = nnx.merge(self.graphdef, params)(embed(self.schema, batch, rows, plans))
            return log_loss(logits, batch), logits

        (loss, logits), grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(params, rows)
        return loss, logits, grads, rows, plans

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        loss, logits, (grads, row_grads), _, plans = self._gradients(state.params, state.tables, batch)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm((grads, row_grads)))
        healthy = state.healthy & finite
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(healthy, new, old))
        new = TrainState(
            step=state.step + healthy,
            healthy=healthy,
            params=keep(optax.apply_updates(state.params, updates), state.params),
            optimizer=keep(optimizer, state.optimizer),
            tables=update(
                state.tables,
                plans,
                row_grads,
                learning_rate=self.table_rate(state.step),
                epsilon=self.config.table_epsilon,
                ok=healthy,
            ),
        )
        return new, StepReport(loss, logits, healthy)

    def check_healthy(self, report: StepReport, state: TrainState, batch: Batch, step: int) -> None:
        """Raise NonFiniteLoss if the step on `batch` met a NaN or an infinity; `state` is any state since then."""
        if report.healthy:
            return
        loss, logits, (grads, row_grads), rows, _ = jax.jit(self._gradients)(state.params, state.tables, batch)
        groups = {
            "input": {"dense": batch.dense, **{name: events.values for name, events in batch.events.items()}},
            "embeddings of table": rows,
            "parameter": state.params,
            "logits": logits,
            "loss": loss,
            "gradient of": grads,
            "gradient of table": row_grads,
        }
        raise NonFiniteLoss(
            f"step {step}: the loss is {float(loss)}; the first tensor that is not finite: {_first_bad(groups)}. The "
            f"last checkpoint is untouched; check the data of that step, or lower the learning rates"
        )

    def evaluate(self, state: TrainState, batches: Iterable[Batch], base_rates: dict[str, float]) -> Evaluation:
        """Predict `batches` and compare with their labels."""
        evaluation = Evaluation(tasks=self.schema.tasks, base_rates=base_rates)
        for batch in batches:
            logits = self.predict(state.params, state.tables, batch)
            evaluation = add_predictions(evaluation, logits, batch, self.schema)
        return evaluation


def _first_bad(groups) -> str:
    """The name of the first tensor with a NaN or infinity, in the order in which a step computes them."""
    for group, tree in groups.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.isfinite(leaf).all():
                return f"{group} {jax.tree_util.keystr(path, simple=True, separator='.')}".strip()
    return "none on a second look; the step is not reproducible"


def add_predictions(evaluation: Evaluation, logits, batch: Batch, schema: FeatureSchema) -> Evaluation:
    """The evaluation with a batch's predictions added, grouped by the schema's group field where there is one."""
    labels, mask, weight = (np.asarray(x) for x in (batch.labels, batch.label_mask, batch.weight))
    return evaluation.update(np.asarray(logits), labels, mask, weight, groups_of(batch, schema))


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
    batches: Iterator[Batch],
    *,
    base_rates: dict[str, float],
    log_every: int,
    on_log: Callable[[int, dict[str, Any]], None],
    after_step: Callable[[int, TrainState], bool],
) -> TrainState:
    """Train on `batches` until they end or `after_step(step, state)` returns False.

    The host looks at a step's report while the next step runs, so the device never waits for it.

    Args:
      on_log: receives, every `log_every` steps, the step and the log loss, NE and AUC of the predictions made since
        the last call, samples per second and the share of the time spent waiting for data.

    Raises:
      NonFiniteLoss: at the first step with a NaN or an infinity, one step late; the state is that before it.
    """
    step, pending, shapes = int(state.step), None, set()
    evaluation, timings = Evaluation(tasks=learner.schema.tasks, base_rates=base_rates), Timings(time.perf_counter())
    while True:
        before = time.perf_counter()
        batch = next(batches, None)
        timings.waited += time.perf_counter() - before
        if batch is not None:
            announce_compilation(batch, shapes, step + 1)
            state, report = learner.train_step(state, batch)
        if pending is not None:
            done_step, done_report, done_batch = pending
            learner.check_healthy(done_report, state, done_batch, done_step)
            evaluation = add_predictions(evaluation, done_report.logits, done_batch, learner.schema)
            timings.samples += int((done_batch.weight > 0).sum())
            if done_step % log_every == 0 or batch is None:
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


def rates(timings: Timings) -> dict[str, float]:
    """Samples per second and the share of the time that the loop waited for data."""
    elapsed = time.perf_counter() - timings.started
    return {"samples_per_second": timings.samples / elapsed, "data_wait": timings.waited / elapsed}


def announce_compilation(batch: Batch, seen: set, step: int) -> None:
    """Print once per batch shape that a program is compiled for it: the user should know what a pause is."""
    shape = tuple((name, events.values["gap"].shape[1]) for name, events in batch.events.items())
    if shape not in seen:
        seen.add(shape)
        tokens = ", ".join(f"{name} {capacity}" for name, capacity in shape)
        print(
            f"step {step}: compiling for batches of {batch.size} samples and event capacities {tokens or 'none'}",
            flush=True,
        )
