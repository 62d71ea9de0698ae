"""Small random schemas and batches that the tests share."""

import dataclasses

import numpy as np

from kunlun_jax.batch import Batch, EmbeddedBatch, check_batch
from kunlun_jax.jagged import Jagged, pack
from kunlun_jax.schema import PADDING_ID, DenseField, EventType, FeatureSchema, SparseField, Table


def small_schema(*, scope="request", tasks=("click",), max_length=9) -> FeatureSchema:
    """Two dense and four sparse set features (one multi-hot), two event types; `scope` is that of the item's side."""
    return FeatureSchema(
        tables=(Table("user", 11, 8), Table("item", 13, 8), Table("tag", 5, 4)),
        dense=(DenseField("age"), DenseField("price", scope)),
        sparse=(
            SparseField("user", "user"),
            SparseField("item", "item", scope),
            SparseField("tags", "tag", scope, max_ids=3),
            SparseField("seller", "user", scope),
        ),
        events=(
            EventType("click", max_length, (SparseField("item", "item"), SparseField("tags", "tag", max_ids=2))),
            EventType("view", max_length, (SparseField("item", "item"),), (DenseField("seconds"),)),
        ),
        tasks=tasks,
        group="user",
    )


def random_batch(schema, rng, *, samples=4, requests=None, shards=1, lengths=None, spare=5) -> Batch:
    """A checked batch; samples take the requests in turn. `spare` tokens of each shard lie outside every sample."""
    requests = samples if requests is None else requests
    size = {"request": requests, "candidate": samples}

    def ids(field, *shape):
        rows = schema.table(field.table).rows
        drawn = rng.integers(0, rows, (*shape, field.max_ids))
        drawn[..., 1:][rng.random(drawn[..., 1:].shape) < 0.4] = PADDING_ID
        return drawn.astype(np.int32)

    def number(*shape):
        return rng.normal(size=shape).astype(np.float32)

    events = {}
    for event in schema.events:
        count = size[event.scope]
        of_type = rng.integers(0, event.max_length + 1, count) if lengths is None else np.asarray(lengths)
        tokens = int(of_type.sum())
        values = {f.name: ids(f, tokens) for f in event.sparse} | {f.name: number(tokens) for f in event.dense}
        values |= {name: rng.exponential(86_400, tokens).astype(np.float32) for name in ("gap", "age")}
        fill = {name: PADDING_ID if x.dtype == np.int32 else 0 for name, x in values.items()}
        capacity = int(of_type.reshape(shards, -1).sum(1).max()) + spare
        events[event.name] = pack(
            values, of_type, capacity=capacity, shards=shards, max_length=event.max_length, fill=fill
        )
    tasks = len(schema.tasks)
    batch = Batch(
        dense={f.name: number(size[f.scope]) for f in schema.dense},
        sparse={f.name: ids(f, size[f.scope]) for f in schema.sparse},
        events=events,
        request_index=(np.arange(samples // shards) % (requests // shards) + np.zeros((shards, 1))).astype(np.int32),
        labels=rng.integers(0, 2, (samples, tasks)).astype(np.float32),
        label_mask=np.ones((samples, tasks), np.float32),
        weight=np.ones(samples, np.float32),
    )
    return check_batch(batch, schema)


def random_embedded(schema, rng, **kwargs) -> EmbeddedBatch:
    """A random batch whose ids are replaced by independent random embeddings."""
    batch = random_batch(schema, rng, **kwargs)

    def embedding(field, ids):
        return rng.normal(size=(*ids.shape[:-1], schema.table(field.table).width)).astype(np.float32)

    events = {
        e.name: batch.events[e.name].with_values(
            batch.events[e.name].values | {f.name: embedding(f, batch.events[e.name].values[f.name]) for f in e.sparse}
        )
        for e in schema.events
    }
    sparse = {f.name: embedding(f, batch.sparse[f.name]) for f in schema.sparse}
    return EmbeddedBatch(batch.dense, sparse, events, batch.request_index)


def random_sequence(rng, lengths, width, *, shards=1, max_length=None, spare=3) -> Jagged:
    """Samples of these lengths and features; `spare` tokens of each shard lie outside every sample and hold NaN."""
    lengths = np.asarray(lengths)
    values = {"x": rng.normal(size=(int(lengths.sum()), width)).astype(np.float32)}
    packed = pack(
        values,
        lengths,
        capacity=int(lengths.reshape(shards, -1).sum(1).max()) + spare,
        shards=shards,
        max_length=int(lengths.max()) if max_length is None else max_length,
        fill={"x": np.nan},
    )
    return packed.with_values(packed.values["x"])


def spoil(batch) -> EmbeddedBatch:
    """The batch with NaN in every token that lies outside all samples."""

    def of_type(sequence):
        outside = np.ones(next(iter(sequence.values.values())).shape[:2], bool)
        for shard, spans in enumerate(zip(sequence.starts, sequence.lengths, strict=True)):
            for start, length in zip(*spans, strict=True):
                outside[shard, start : start + length] = False
        assert outside.any()
        nan = {n: np.where(outside.reshape(*outside.shape, *[1] * (x.ndim - 2)), np.nan, x).astype(np.float32)
               for n, x in sequence.values.items()}  # fmt: skip
        return sequence.with_values(nan)

    return dataclasses.replace(batch, events={name: of_type(sequence) for name, sequence in batch.events.items()})
