"""Several trainings of one model side by side: they differ in seed and settings, not in the data or in shapes.

On a GPU a small model spends its time on launches, and a program's compilation takes longer than its training. So the
members of a population are one vmapped program there: one compilation and one pass over the batches serve all of them.
A CPU gains nothing from wider arrays and little from several cores in one operation, so there each member runs the
program of one, in a thread of its own. Each member computes what `kunlun_jax.training` would
(tests/experiments/test_compare.py).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from kunlun_jax.batch import Batch
from kunlun_jax.config import ModelConfig
from kunlun_jax.data.samples import Samples
from kunlun_jax.embedding import embed, init_tables, look_up, update
from kunlun_jax.embedding.dropout import drop_fields
from kunlun_jax.metrics import Evaluation
from kunlun_jax.models import build
from kunlun_jax.optimizer import OptimizerConfig, schedule
from kunlun_jax.training import COMPILER_OPTIONS, groups_of, log_loss

# The first state is drawn once, on the CPU; compiling it took three times as long with XLA's usual effort.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Trial(NamedTuple):
    """One member's settings: peak learning rate of the dense parameters, rate of dropped embedding fields, seed."""

    learning_rate: float
    dropout: float
    seed: int


class Member(NamedTuple):
    """What a step changes, and the seed; with a leading axis over members."""

    params: jax.Array
    mean: jax.Array
    square: jax.Array
    tables: Any
    key: jax.Array


class Controls(NamedTuple):
    """A step's settings: both learning rates as scheduled, the dropout if any; with a leading axis over members."""

    learning_rate: Any
    table_learning_rate: Any
    dropout: Any


class Population:
    """Trainings of `size` members of one model; `compile` first.

    Args:
      model: the config of all members.
      optimizer: what members share: everything but the dense learning rate's peak.
      batches: per part ("train", "validation", ...) the batches in order, from `cut`.
      threads: one member per program, in threads, rather than all of them in one program; by default on a CPU.
    """

    def __init__(
        self,
        model: ModelConfig,
        samples: dict[str, Samples],
        optimizer: OptimizerConfig,
        batches: dict[str, list[Batch]],
        *,
        size: int,
        threads: bool | None = None,
    ):
        self.schema, self.optimizer, self.batches, self.size = samples["train"].schema, optimizer, batches, size
        self.base_rates = samples["train"].base_rates()
        self._make = lambda seed: nnx.split(build(model, self.schema, rngs=nnx.Rngs(seed)))
        abstract = jax.eval_shape(lambda: self._make(0)[1])
        self.graphdef = nnx.split(nnx.eval_shape(lambda: build(model, self.schema, rngs=nnx.Rngs(0))))[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        _, self._unravel = ravel_pytree(zeros)
        self._decayed = ravel_pytree(jax.tree.map(lambda x: jnp.full(x.shape, float(len(x.shape) >= 2)), zeros))[0]
        self.parameters = self._decayed.size
        self._init = jax.jit(jax.vmap(self._init_member), compiler_options=QUICK)
        self._threads = jax.default_backend() == "cpu" if threads is None else threads
        self._per_program = 1 if self._threads else size
        self._programs, self.compile_seconds = {}, 0.0

    def compile(self) -> None:
        """The programs of all batches' shapes, in threads."""
        shapes = {_shape(batch): batch for part in self.batches.values() for batch in part}
        many = jax.jit(jax.vmap(self._step, in_axes=(0, None, None, None, 0)))
        state = jax.eval_shape(self._init, jnp.zeros(self._per_program, jnp.int32))
        controls = Controls(*[jax.ShapeDtypeStruct((self._per_program,), jnp.float32)] * 3)
        started = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            compiled = pool.map(
                lambda b: many.lower(state, self._decayed, b, jax.ShapeDtypeStruct((), jnp.int32), controls).compile(),
                shapes.values(),
            )
            self._programs = dict(zip(shapes, compiled, strict=True))
        self._start([0] * self._per_program)  # its compilation too, once and not in every thread
        self.compile_seconds = time.perf_counter() - started

    def _init_member(self, seed) -> Member:
        params = ravel_pytree(self._make(jax.random.key(seed))[1])[0]
        tables = init_tables(
            self.schema,
            key=jax.random.key(seed),
            scale=self.optimizer.table_scale,
            initial_accumulator=self.optimizer.table_initial_accumulator,
        )
        return Member(params, jnp.zeros_like(params), jnp.zeros_like(params), tables, jax.random.key(seed))

    def _step(self, member: Member, decayed, batch: Batch, step, controls: Controls):
        """One update, and the logits and the loss before it. With learning rate 0 and no dropout, a prediction."""
        config, (rows, plans) = self.optimizer, look_up(self.schema, member.tables, batch)

        def loss_of(params, rows):
            embedded = embed(self.schema, batch, rows, plans)
            if controls.dropout is not None:
                embedded = drop_fields(embedded, jax.random.fold_in(member.key, step), controls.dropout)
            logits = nnx.merge(self.graphdef, self._unravel(params))(embedded)
            return log_loss(logits, batch), logits

        (loss, logits), (grads, row_grads) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
            member.params, rows
        )
        grads = grads * jnp.minimum(1, config.clip_norm / jnp.linalg.norm(grads))
        mean = config.beta1 * member.mean + (1 - config.beta1) * grads
        square = config.beta2 * member.square + (1 - config.beta2) * grads**2
        unbiased = mean / (1 - config.beta1 ** (step + 1))
        direction = unbiased / (jnp.sqrt(square / (1 - config.beta2 ** (step + 1))) + 1e-8)
        params = member.params - controls.learning_rate * (direction + config.weight_decay * decayed * member.params)
        tables = update(
            member.tables,
            plans,
            row_grads,
            learning_rate=controls.table_learning_rate,
            epsilon=config.table_epsilon,
        )
        return Member(params, mean, square, tables, member.key), logits, loss

    def run(self, trials: Sequence[Trial], *, epochs: int) -> tuple[Member, np.ndarray]:
        """Train every trial for so many epochs, with a schedule of that length.

        Returns the trained members, and the log loss of each one's batches before their updates, [members, steps].

        Raises:
          ValueError: as many trials as the population has members are needed.
        """
        if len(trials) != self.size:
            raise ValueError(f"{len(trials)} trials for a population of {self.size} members")
        if self._per_program == self.size:
            return self._run(trials, epochs)
        programs = [trials[i : i + self._per_program] for i in range(0, self.size, self._per_program)]
        with ThreadPoolExecutor(len(programs)) as pool:
            states, losses = zip(*pool.map(lambda part: self._run(part, epochs), programs), strict=True)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *states), np.concatenate(losses)

    def _run(self, trials: Sequence[Trial], epochs: int) -> tuple[Member, np.ndarray]:
        """`run` for the members of one program."""
        peaks, dropout = (np.array(x, np.float32) for x in list(zip(*trials, strict=True))[:2])
        state = self._start([trial.seed for trial in trials])
        steps = epochs * len(self.batches["train"])
        rates = np.asarray(schedule(self.optimizer, 1.0, steps)(np.arange(steps)), np.float32)
        table_rates = np.full_like(peaks, self.optimizer.table_learning_rate)
        losses = []
        for step in range(steps):
            batch = self.batches["train"][step % len(self.batches["train"])]
            controls = Controls(rates[step] * peaks, rates[step] * table_rates, dropout)
            state, _, loss = self._programs[_shape(batch)](state, self._decayed, batch, np.int32(step), controls)
            losses.append(loss)
        return state, np.stack([np.asarray(x) for x in losses], axis=1)

    def _start(self, seeds: Sequence[int]) -> Member:
        with jax.default_device(jax.devices("cpu")[0]):  # hundreds of random draws, quickly compiled there
            state = self._init(jnp.array(seeds, jnp.int32))
        return jax.device_put(state, jax.devices()[0])

    def evaluate(self, state: Member, part: str, members: slice = slice(None)) -> list[dict[str, float]]:
        """The metrics of these members on a part."""
        wanted = range(self.size)[members]
        if not self._threads:
            return self._evaluate(state, part, wanted)
        with ThreadPoolExecutor(len(wanted)) as pool:
            one = [jax.tree.map(lambda x, i=i: x[i : i + 1], state) for i in wanted]
            return [metrics for (metrics,) in pool.map(lambda member: self._evaluate(member, part, [0]), one)]

    def _evaluate(self, state: Member, part: str, wanted: Sequence[int]) -> list[dict[str, float]]:
        """`evaluate` for some members of one program."""
        still = Controls(*[np.zeros(self._per_program, np.float32)] * 3)
        evaluations = [Evaluation(tasks=self.schema.tasks, base_rates=self.base_rates) for _ in wanted]
        for batch in self.batches[part]:
            _, logits, _ = self._programs[_shape(batch)](state, self._decayed, batch, np.int32(0), still)
            logits = np.asarray(logits)[list(wanted)]
            if not np.isfinite(logits).all():  # a diverged member must lose, not stop the others
                logits = np.nan_to_num(logits, nan=50.0, posinf=50.0, neginf=-50.0)
            labels, mask, weight = (np.asarray(x) for x in (batch.labels, batch.label_mask, batch.weight))
            groups = groups_of(batch, self.schema)
            evaluations = [e.update(x, labels, mask, weight, groups) for e, x in zip(evaluations, logits, strict=True)]
        return [evaluation.results() for evaluation in evaluations]

    def stopwatch(self) -> Callable[[], float]:
        """Compile the training of one member alone; return a function that measures its samples per second.

        At the commonest batch shape, without dropout, with the batches on the device already.
        """
        shapes = [_shape(batch) for batch in self.batches["train"]]
        commonest = max(set(shapes), key=shapes.count)
        batches = [b for b, shape in zip(self.batches["train"], shapes, strict=True) if shape == commonest]
        controls = Controls(np.float32(1e-3), np.float32(self.optimizer.table_learning_rate), None)
        state = jax.tree.map(lambda x: x[0], self._start([0]))
        program = jax.jit(self._step, donate_argnums=0)
        program = program.lower(state, self._decayed, batches[0], np.int32(0), controls).compile(COMPILER_OPTIONS)

        def measure(seconds: float = 1.0) -> float:
            def steps(state, first, count):
                for i in range(first, first + count):
                    state, _, loss = program(state, self._decayed, batches[i % len(batches)], np.int32(i), controls)
                loss.block_until_ready()
                return state

            current = steps(state, 0, 3)
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                current = steps(current, done, 5)
                done += 5
            return done * batches[0].size / (time.perf_counter() - started)

        return measure


def cut(samples: Samples, batch_size: int, capacity_fractions: Sequence[float]) -> list[Batch]:
    """The batches of a part in time order, on the device; the last one is filled up with samples of weight 0."""
    count = -(-len(samples) // batch_size)
    indices = np.pad(np.arange(len(samples)), (0, count * batch_size - len(samples)), constant_values=-1)
    return [
        jax.device_put(samples.batch(index, capacity_fractions=capacity_fractions))
        for index in indices.reshape(count, -1)
    ]


def _shape(batch: Batch) -> tuple[int, ...]:
    return tuple(events.values["gap"].shape[1] for events in batch.events.values())
