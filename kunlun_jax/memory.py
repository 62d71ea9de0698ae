"""Bytes that a training step needs on its device, known before anything is compiled or allocated."""

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from kunlun_jax.batch import Batch
from kunlun_jax.embedding import embed, look_up
from kunlun_jax.jagged import Jagged, capacities
from kunlun_jax.schema import TIME_FIELDS, FeatureSchema
from kunlun_jax.training import Learner, log_loss


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on one device.

    Attributes:
      state: parameters, the optimiser's moments and the tables; steps keep them in place.
      gradients: of dense parameters, as the model has them and raveled, and of looked-up rows.
      batch: two batches, since the next one arrives while a step runs.
      residuals: what the forward pass keeps for the backward pass.
    """

    state: int
    gradients: int
    batch: int
    residuals: int

    @property
    def total(self) -> int:
        """All of it at a time."""
        return self.state + self.gradients + self.batch + self.residuals

    def __str__(self) -> str:
        parts = ("state", "gradients", "batch", "residuals")
        return ", ".join(f"{name} {getattr(self, name) / 1e9:.2f} GB" for name in parts)


# Of what `step_memory` counts, XLA keeps this share on a GPU: 0.84 to 0.89 in programs for sm_90.
KEPT = 0.89

# Operations that XLA does again in the backward pass rather than keep their result.
CHEAP = {
    "abs", "add", "and", "broadcast_in_dim", "convert_element_type", "copy", "div", "eq", "erf", "exp", "exp2",
    "expand_dims", "ge", "gt", "integer_pow", "iota", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul",
    "ne", "neg", "not", "or", "pow", "reshape", "rsqrt", "select_n", "sign", "sqrt", "square", "squeeze", "sub",
    "tanh",
}  # fmt: skip

# A step may take this share of the device's memory: on an H100 a step of 64 GB, 60 of them one block of temporaries,
# ran in a pool of 81 GB, but not in one of 75, where what lay scattered about left no place for the block.
USABLE = 0.9


def step_memory(learner: Learner, batch_size: int, *, fraction: float = 1.0) -> StepMemory:
    """The estimate for batches of `batch_size` samples with capacities of that fraction of the maximum lengths.

    From shapes alone. Residuals are what differentiation keeps and what depends on the batch, without what XLA computes
    again: results of cheap operations on what is kept, unless something else than such operations reads them, and
    float32 arrays that are kept in a narrower type too.
    """
    state = learner.abstract_state()
    batch = abstract_batch(learner.schema, batch_size, fraction=fraction)
    traced = _keep.trace(learner, state.params, state.tables, batch)
    kept, rows = traced.out_info
    program = traced.jaxpr.jaxpr
    of_batch = _dependent(program, program.invars[-len(jax.tree.leaves(batch)) :])
    kept = dict.fromkeys(x for x in program.outvars[: len(jax.tree.leaves(kept))] if x in of_batch)
    arrays = [x.aval for x in _without_repeatable(program, kept)]
    narrow = {x.shape for x in arrays if x.dtype == jnp.bfloat16}
    return StepMemory(
        state=_bytes(state),
        gradients=2 * _bytes(state.params) + _bytes(rows),
        batch=2 * _bytes(batch),
        residuals=int(KEPT * _bytes([x for x in arrays if x.dtype != jnp.float32 or x.shape not in narrow])),
    )


def _dependent(program, inputs: list[Any]) -> set[Any]:
    """The variables of a program that depend on some of its inputs."""
    found = set(inputs)
    for step in program.eqns:
        if any(x in found for x in step.invars if not isinstance(x, Literal)):
            found.update(step.outvars)
    return found


def _without_repeatable(program, kept: dict[Any, None]) -> list[Any]:
    """The kept variables less those that XLA computes again from others."""
    made_by = {x: step for step in program.eqns for x in step.outvars}
    stored = {x for step in program.eqns if not _is_cheap(step) for x in step.invars if not isinstance(x, Literal)}

    def repeatable(x) -> bool:
        step = made_by.get(x)
        if step is None or x in stored or not _is_cheap(step):
            return False
        large = (y for y in step.invars if not isinstance(y, Literal) and 8 * y.aval.size >= x.aval.size)
        return all(y in kept for y in large)

    return [x for x in kept if not repeatable(x)]


def _is_cheap(step) -> bool:
    if step.primitive.name == "jit":
        return all(map(_is_cheap, step.params["jaxpr"].jaxpr.eqns))
    return step.primitive.name in CHEAP


@functools.partial(jax.jit, static_argnums=0)  # never run: jit knows the shapes of a batch that it has traced before
def _keep(learner, params, tables, batch):
    rows, plans = look_up(learner.schema, tables, batch)

    def loss_of(params, rows):
        logits = nnx.merge(learner.graphdef, params)(embed(learner.schema, batch, rows, plans))
        return log_loss(logits, batch)

    return jax.vjp(loss_of, learner.flat.unravel(params), rows)[1], rows


def largest_batch(learner: Learner, memory: int, *, fraction: float = 1.0, multiple: int = 8) -> int:
    """The largest batch, a multiple of `multiple`, whose step is estimated to fit into `memory` bytes; 0 for none."""
    sizes = (16 * multiple, 32 * multiple)
    few, many = (step_memory(learner, size, fraction=fraction).total for size in sizes)
    per_sample = (many - few) / (sizes[1] - sizes[0])
    return max(0, multiple * math.floor((sizes[0] + (USABLE * memory - few) / per_sample) / multiple))


def check_fits(learner: Learner, batch_size: int, memory: int, *, fraction: float = 1.0) -> StepMemory:
    """The estimate for this batch.

    Raises:
      ValueError: it exceeds `USABLE` of `memory` bytes; the message says by how much and which batch would fit.
    """
    needed = step_memory(learner, batch_size, fraction=fraction)
    if needed.total > USABLE * memory:
        fits = largest_batch(learner, memory, fraction=fraction)
        advice = f"a batch of {fits} would fit" if fits else "no batch fits; choose a smaller model or smaller tables"
        raise ValueError(
            f"batch_size {batch_size}: a training step needs about {needed.total:,} bytes ({needed}), of the device's "
            f"{memory:,} bytes it may take {USABLE:.0%}; {advice}"
        )
    return needed


def allocate_in_pieces() -> None:
    """Let JAX take nearly all of a GPU's memory through CUDA's own pool; to be called before JAX meets the GPU.

    XLA asks for a step's temporaries as one block of contiguous addresses. JAX's default allocator loses their place as
    soon as a batch that arrived meanwhile lies in it: 47 GB could not be found again in 81 GB on an H100. CUDA's pool
    maps free pages wherever they are. Settings of the user stand.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def device_memory() -> int | None:
    """Bytes that JAX may use on the default device; None where it doesn't say, as on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def abstract_batch(schema: FeatureSchema, batch_size: int, *, fraction: float = 1.0) -> Batch:
    """Shapes of a batch on one device whose sequences take `fraction` of their maximum."""

    def ids(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def numbers(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    events = {}
    for event in schema.events:
        n = capacities(batch_size, event.max_length, tuple(sorted({fraction, 1.0})))[0]
        values: dict[str, Any] = {f.name: ids(1, n, f.max_ids) for f in event.sparse}
        values |= {name: numbers(1, n) for name in (*(f.name for f in event.dense), *TIME_FIELDS)}
        events[event.name] = Jagged(values, ids(1, batch_size), ids(1, batch_size), event.max_length)
    labels = numbers(batch_size, len(schema.tasks))
    return Batch(
        dense={f.name: numbers(batch_size) for f in schema.dense},
        sparse={f.name: ids(batch_size, f.max_ids) for f in schema.sparse},
        events=events,
        request_index=ids(1, batch_size),
        labels=labels,
        label_mask=labels,
        weight=numbers(batch_size),
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
