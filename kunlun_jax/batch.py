"""What flows from the data to the tables (`Batch`) and from the tables to a model (`EmbeddedBatch`).

Both are keyed by the names of a `FeatureSchema`. R requests hold B samples: the candidates of one request share the
request's fields and stored sequences, which a model then needs to process once. Without such sharing R = B, and
sample i is of request i.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from kunlun_jax.jagged import Jagged
from kunlun_jax.schema import PADDING_ID, TIME_FIELDS, FeatureSchema, Scope

Array = jax.Array | np.ndarray  # the same classes hold NumPy arrays on the host


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=[],
    data_fields=["dense", "sparse", "events", "request_index", "labels", "label_mask", "weight"],
)
@dataclass(frozen=True, eq=False)
class Batch:
    """B samples of R requests, on P batch shards.

    Attributes:
      dense: per dense field, float32 [R] or [B], by the field's scope.
      sparse: per sparse field, int32 row numbers [R or B, max_ids], PADDING_ID where there is no id.
      events: per event type a Jagged whose values are a dict: sparse fields int32 [P, N, max_ids], dense fields
        float32 [P, N], and the TIME_FIELDS float32 [P, N] in seconds. One sequence per request or per candidate.
      request_index: int32 [P, B/P], each sample's request, counted from the shard's own first request; 0, 1, … where
        R = B.
      labels: float32 [B, tasks], 0 or 1.
      label_mask: float32 [B, tasks], 0 where a label is unknown.
      weight: float32 [B], sample weights; 0 for the samples that fill up the last batch.
    """

    dense: Mapping[str, Float[Array, "R_or_B"]]
    sparse: Mapping[str, Int[Array, "R_or_B k"]]
    events: Mapping[str, Jagged]
    request_index: Int[Array, "P b"]
    labels: Float[Array, "B tasks"]
    label_mask: Float[Array, "B tasks"]
    weight: Float[Array, "B"]

    @property
    def size(self) -> int:
        return self.labels.shape[0]


@partial(jax.tree_util.register_dataclass, meta_fields=[], data_fields=["dense", "sparse", "events", "request_index"])
@dataclass(frozen=True, eq=False)
class EmbeddedBatch:
    """A batch whose ids have become embeddings; all that a model sees.

    Attributes:
      dense: as in `Batch`.
      sparse: per sparse field [R or B, width], the mean over the field's ids, 0 where there is none.
      events: per event type a Jagged whose values are a dict: sparse fields [P, N, width], dense and TIME_FIELDS
        [P, N].
      request_index: as in `Batch`.
    """

    dense: Mapping[str, Float[Array, "R_or_B"]]
    sparse: Mapping[str, Float[Array, "R_or_B width"]]
    events: Mapping[str, Jagged]
    request_index: Int[Array, "P b"]


class Layout(NamedTuple):
    """Where the arrays of a batch lie in a packed one: shapes of a shard's part, dtypes, and the tree they form."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    tree: Any

    @property
    def words(self) -> int:
        """Words of four bytes that a shard takes."""
        return sum(math.prod(shape) for shape in self.shapes)


def layout_of(batch: Batch) -> Layout:
    """The layout of a batch, or of a batch of shapes alone."""
    shards = batch.request_index.shape[0]
    leaves, tree = jax.tree.flatten(batch)
    shapes = tuple((x.shape[0] // shards, *x.shape[1:]) for x in leaves)
    return Layout(shapes, tuple(np.dtype(x.dtype) for x in leaves), tree)


@partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["layout"])
@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch as one array, which is what steps take.

    A batch has hundreds of small arrays, and a GPU waited for their transfers: 7 of 50 ms in a step of 168 arrays on an
    H100, nothing with one (docs/performance.md).

    Attributes:
      words: int32 [P, n], for each batch shard the bits of its part of every array.
    """

    words: Int[Array, "P n"]
    layout: Layout

    @classmethod
    def of(cls, batch: Batch) -> "PackedBatch":
        """Pack a host batch; every array in it has four bytes per element."""
        shards = batch.request_index.shape[0]
        parts = [np.ascontiguousarray(x).reshape(shards, -1).view(np.int32) for x in jax.tree.leaves(batch)]
        return cls(np.concatenate(parts, axis=1), layout_of(batch))

    def unpack(self) -> Batch:
        """The batch again; traceable, and on each device for its own shards."""
        shards, arrays, at = self.words.shape[0], [], 0
        for (rows, *rest), dtype in zip(self.layout.shapes, self.layout.dtypes, strict=True):
            size = math.prod((rows, *rest))
            part = lax.slice_in_dim(self.words, at, at + size, axis=1).reshape(shards * rows, *rest)
            arrays.append(lax.bitcast_convert_type(part, dtype))
            at += size
        return jax.tree.unflatten(self.layout.tree, arrays)


def unpacked(batch: Batch | PackedBatch) -> Batch:
    return batch.unpack() if isinstance(batch, PackedBatch) else batch


def to_samples(values: Float[Array, "R_or_B *rest"], request_index: Int[Array, "P b"], scope: Scope):
    """Values of requests (or already of candidates) as values of samples [B, ...]."""
    if scope == "candidate" or values.shape[0] == request_index.size:
        return values
    shards = request_index.shape[0]
    local = values.reshape(shards, -1, *values.shape[1:])
    samples = jax.vmap(lambda v, index: v[index])(local, request_index)
    return samples.reshape(-1, *values.shape[1:])


def check_batch(batch: Batch, schema: FeatureSchema, *, whole: bool = True) -> Batch:
    """Check a batch on the host against its schema; return it.

    One process's part of a batch (`whole` false) may hold nothing but samples of weight 0.

    Raises:
      ValueError: names the field that is missing, unknown, or of the wrong shape; an id beyond its table; a label
        outside {0, 1}; a negative or non-finite number where none belongs; a batch whose samples all have weight 0.
    """
    if batch.request_index.ndim != 2 or batch.request_index.dtype != np.int32:
        raise ValueError(
            f"request_index: expected int32 [P, B/P], got {batch.request_index.dtype} {list(batch.request_index.shape)}"
        )
    shards, per_shard = batch.request_index.shape
    size = shards * per_shard
    _check_names("dense", batch.dense, schema.dense)
    _check_names("sparse", batch.sparse, schema.sparse)
    _check_names("events", batch.events, schema.events)
    for name, array, shape in (
        ("labels", batch.labels, (size, len(schema.tasks))),
        ("label_mask", batch.label_mask, (size, len(schema.tasks))),
        ("weight", batch.weight, (size,)),
    ):
        _check_array(name, array, np.float32, shape)
    if not np.isin(batch.labels, (0, 1)).all():
        bad = np.argwhere(~np.isin(batch.labels, (0, 1)))[0]
        raise ValueError(
            f"labels: sample {bad[0]}, task {schema.tasks[bad[1]]!r} is {batch.labels[tuple(bad)]}, not 0 or 1"
        )
    if not np.isin(batch.label_mask, (0, 1)).all():
        raise ValueError("label_mask: values outside {0, 1}")
    if not np.isfinite(batch.weight).all() or (batch.weight < 0).any():
        raise ValueError("weight: negative or non-finite values")
    if whole and not (batch.weight[:, None] * batch.label_mask).any():
        raise ValueError("weight: every sample of the batch has weight 0 or no label; there is nothing to learn from")

    requests = _requests(batch, schema)
    if requests % shards:
        raise ValueError(f"request_index: {requests} requests don't divide over its {shards} batch shards")
    if batch.request_index.size and not (
        0 <= batch.request_index.min() and batch.request_index.max() < requests // shards
    ):
        raise ValueError(
            f"request_index: values lie in [{batch.request_index.min()}, {batch.request_index.max()}], "
            f"each shard holds {requests // shards} requests"
        )
    if requests == size and (batch.request_index != np.arange(per_shard)).any():
        raise ValueError(
            f"request_index: with as many requests as samples ({size}) sample i is of request i, so every row must be "
            f"0, 1, …; leave out the requests that no sample is of"
        )
    rows_of = {"request": requests, "candidate": size}
    for field in schema.dense:
        _check_array(field.name, batch.dense[field.name], np.float32, (rows_of[field.scope],))
        _check_finite(field.name, batch.dense[field.name])
    for field in schema.sparse:
        ids = batch.sparse[field.name]
        _check_array(field.name, ids, np.int32, (rows_of[field.scope], field.max_ids))
        _check_ids(field.name, ids, schema.table(field.table).rows)
    for event in schema.events:
        sequence = batch.events[event.name].check()
        if sequence.max_length != event.max_length:
            raise ValueError(f"{event.name}: max_length is {sequence.max_length}, the schema says {event.max_length}")
        for name, array in (("starts", sequence.starts), ("lengths", sequence.lengths)):
            _check_array(f"{event.name}.{name}", array, np.int32, (shards, rows_of[event.scope] // shards))
        columns = [*(f.name for f in event.sparse), *(f.name for f in event.dense), *TIME_FIELDS]
        _check_names(event.name, sequence.values, columns)
        tokens = sequence.values[TIME_FIELDS[0]].shape
        for field in event.sparse:
            name, ids = f"{event.name}.{field.name}", sequence.values[field.name]
            _check_array(name, ids, np.int32, (*tokens, field.max_ids))
            _check_ids(name, ids, schema.table(field.table).rows)
        for column in (*(f.name for f in event.dense), *TIME_FIELDS):
            name = f"{event.name}.{column}"
            _check_array(name, sequence.values[column], np.float32, tokens)
            _check_finite(name, sequence.values[column])
        if (sequence.values["gap"] < 0).any() or (sequence.values["age"] < 0).any():
            raise ValueError(
                f"{event.name}: negative gap or age; events must be sorted by time and precede the request"
            )
    return batch


def _requests(batch: Batch, schema: FeatureSchema) -> int:
    """R, from the first request-scope entry; B where there is none."""
    for field in schema.dense:
        if field.scope == "request":
            return batch.dense[field.name].shape[0]
    for field in schema.sparse:
        if field.scope == "request":
            return batch.sparse[field.name].shape[0]
    for event in schema.events:
        if event.scope == "request":
            return batch.events[event.name].starts.size
    return batch.request_index.size


def _check_names(what, given, wanted) -> None:
    wanted = [getattr(entry, "name", entry) for entry in wanted]
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        raise ValueError(f"{what}: missing {missing}, unknown {unknown}; the schema has {sorted(wanted)}")


def _check_array(name, array, dtype, shape) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {list(shape)}, got {array.dtype} {list(array.shape)}")


def _check_finite(name, array) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {np.size(array) - np.isfinite(array).sum()} values are not finite")


def _check_ids(name, ids, rows) -> None:
    beyond = (ids != PADDING_ID) & ((ids < 0) | (ids >= rows))
    if beyond.any():
        raise ValueError(
            f"{name}: id {ids[beyond][0]} is outside its table of {rows} rows; bind ids with schema.bind_ids"
        )
