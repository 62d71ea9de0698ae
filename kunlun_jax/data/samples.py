"""The in-memory store of samples that every data set of this package produces, and the batches cut from it.

Columns, never rows: set features are one array per field; events of a type are one flat array per field, in which
each sample owns a span. Spans of different samples may overlap, so the histories of a user's successive samples are
prefixes of one another and are stored once. Cutting a batch is a handful of NumPy gathers; no Python runs per sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from kunlun_jax.batch import Batch
from kunlun_jax.jagged import CAPACITY_FRACTIONS, Jagged, capacities, choose_bucket, deal_to_shards, pack, span_index
from kunlun_jax.schema import HOST_PADDING_ID, PADDING_ID, TIME_FIELDS, EventType, FeatureSchema, SparseField, bind_ids

FILLER = -1  # stands in a list of sample indices for a sample of weight 0


@dataclass(frozen=True, eq=False)
class Events:
    """All events of one type; sample i owns those in [start[i], stop[i]), oldest first.

    Attributes:
      columns: per field of the event type. As given to `Samples.bind`: ids [E] or [E, max_ids], -1 as padding, and
        numbers [E]. Once bound: int32 row numbers [E, max_ids] and float32 [E].
      time: [E] whole seconds.
      start: [n] the first event of each sample.
      stop: [n] the event after its last.
    """

    columns: Mapping[str, np.ndarray]
    time: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples, bound to a schema. Make one with `bind`, which checks everything.

    Attributes:
      dense: per dense field float32 [n].
      sparse: per sparse field int32 row numbers [n, max_ids], PADDING_ID where there is no id.
      events: per event type its events, with spans cut to the latest `max_length`.
      request_time: int64 [n] seconds; every event of a sample is earlier.
      labels: float32 [n, tasks], 0 or 1.
      label_mask: float32 [n, tasks], 0 where a label is unknown.
      weight: float32 [n].
      out_of_range: per sparse field, `type.field` for an event's, how many of its ids had no row of their own and how
        many there are. Events are counted once, however many samples share them.
    """

    schema: FeatureSchema
    dense: dict[str, Float[np.ndarray, "n"]]
    sparse: dict[str, Int[np.ndarray, "n k"]]
    events: dict[str, Events]
    request_time: Int[np.ndarray, "n"]
    labels: Float[np.ndarray, "n tasks"]
    label_mask: Float[np.ndarray, "n tasks"]
    weight: Float[np.ndarray, "n"]
    out_of_range: dict[str, tuple[int, int]]

    @classmethod
    def bind(
        cls,
        schema: FeatureSchema,
        *,
        dense: Mapping[str, np.ndarray],
        sparse: Mapping[str, np.ndarray],
        events: Mapping[str, Events],
        request_time: np.ndarray,
        labels: np.ndarray,
        label_mask: np.ndarray | None = None,
        weight: np.ndarray | None = None,
    ) -> "Samples":
        """Check raw columns against the schema and turn ids into row numbers.

        Args:
          dense: per dense field, numbers [n].
          sparse: per sparse field, ids [n] or [n, max_ids], -1 as padding.
          events: per event type its raw events; spans longer than `max_length` lose their oldest events.
          request_time: [n] whole seconds.
          labels: [n] or [n, tasks], 0 or 1 (anything finite where `label_mask` is 0).
          label_mask: like labels; default all known.
          weight: [n]; default 1.

        Raises:
          ValueError: names the field and the first offending row: a column is missing, unknown or of the wrong shape;
            an id is out of range; a number is not finite; a label is not 0 or 1; a span leaves the store; a sample's
            events are unsorted, or not strictly earlier than its request.
          TypeError: ids or times are not integers, or numbers not numeric.
        """
        request_time = _times("request_time", request_time)
        n = len(request_time)
        if n == 0:
            raise ValueError("samples: request_time is empty; there must be at least one sample")
        _check_columns("dense", dense, [f.name for f in schema.dense])
        _check_columns("sparse", sparse, [f.name for f in schema.sparse])
        _check_columns("events", events, [e.name for e in schema.events])

        counts: dict[str, tuple[int, int]] = {}
        bound_dense = {f.name: _numbers(f.name, dense[f.name], (n,)) for f in schema.dense}
        bound_sparse = {f.name: _bind(schema, f, f.name, sparse[f.name], n, counts) for f in schema.sparse}
        bound_events = {e.name: _bind_events(schema, e, events[e.name], request_time, counts) for e in schema.events}

        shape = (n, len(schema.tasks))
        mask = np.ones(shape, np.float32) if label_mask is None else _zero_one("label_mask", label_mask, shape)
        labels = np.where(mask > 0, _numbers("labels", _as_tasks(labels), shape), 0).astype(np.float32)
        labels = _zero_one("labels", labels, shape)
        weight = np.ones(n, np.float32) if weight is None else _numbers("weight", weight, (n,))
        if (weight < 0).any():
            row = int(np.argmax(weight < 0))
            raise ValueError(f"weight: sample {row} has weight {weight[row]}; weights must not be negative")
        return cls(schema, bound_dense, bound_sparse, bound_events, request_time, labels, mask, weight, counts)

    def __len__(self) -> int:
        return len(self.request_time)

    def out_of_range_rates(self) -> dict[str, float]:
        """Per sparse field, the share of its ids that were hashed or sent to the out-of-vocabulary row."""
        return {name: replaced / max(total, 1) for name, (replaced, total) in self.out_of_range.items()}

    def base_rates(self) -> dict[str, float]:
        """Per task, the weighted share of positive labels among the known ones.

        Raises:
          ValueError: a task has no label of positive weight.
        """
        known = (self.weight[:, None] * self.label_mask).astype(np.float64)
        totals, positives = known.sum(axis=0), (known * self.labels).sum(axis=0)
        if not totals.all():
            task = self.schema.tasks[int(np.argmin(totals))]
            raise ValueError(f"base_rates: task {task!r} has no known label of positive weight in {len(self)} samples")
        return {task: float(p / t) for task, p, t in zip(self.schema.tasks, positives, totals, strict=True)}

    def batch(
        self,
        indices: np.ndarray,
        *,
        shards: int = 1,
        own: Sequence[int] | None = None,
        capacity_fractions: Sequence[float] = CAPACITY_FRACTIONS,
    ) -> Batch:
        """The batch of the samples `indices` [B], FILLER standing for an empty sample of weight 0.

        With several shards the samples change their order, so that every shard holds nearly the same number of events.
        Every sample is its own request (R = B).

        Args:
          own: cut only these of the shards, in this order; None cuts all. How samples are dealt and which capacity
            they take depends on the whole batch, so that several processes agree on both without a word.

        Raises:
          ValueError: an index is outside [-1, n), or the indices don't divide over the shards.
        """
        indices = np.asarray(indices, np.int64)
        if indices.ndim != 1 or not len(indices) or indices.min() < FILLER or indices.max() >= len(self):
            raise ValueError(
                f"batch: indices must be a non-empty list within [{FILLER}, {len(self)}), got shape "
                f"{list(indices.shape)}, values in [{indices.min(initial=0)}, {indices.max(initial=0)}]"
            )
        real = indices != FILLER
        lengths = {name: np.where(real, e.stop[indices] - e.start[indices], 0) for name, e in self.events.items()}
        order = deal_to_shards(sum(lengths.values(), np.zeros(len(indices), np.int64)), shards)
        indices, real = indices[order], real[order]
        lengths = {name: length[order] for name, length in lengths.items()}

        per_shard = len(indices) // shards
        limits = {event.name: event.max_length for event in self.schema.events}
        fullest = {name: int(length.reshape(shards, -1).sum(axis=1).max()) for name, length in lengths.items()}
        bucket = choose_bucket(fullest, per_shard, limits, capacity_fractions)
        if own is not None:
            indices, real = (x.reshape(shards, -1)[list(own)].reshape(-1) for x in (indices, real))
            lengths = {name: length.reshape(shards, -1)[list(own)].reshape(-1) for name, length in lengths.items()}
            shards = len(own)

        def capacity(event):
            return capacities(per_shard, event.max_length, capacity_fractions)[bucket]

        def gather(column, filler):
            return np.where(real.reshape(-1, *[1] * (column.ndim - 1)), column[indices], column.dtype.type(filler))

        return Batch(
            dense={name: gather(column, 0) for name, column in self.dense.items()},
            sparse={name: gather(column, PADDING_ID) for name, column in self.sparse.items()},
            events={
                event.name: self._sequence(event, indices, lengths[event.name], shards, capacity(event))
                for event in self.schema.events
            },
            request_index=np.tile(np.arange(per_shard, dtype=np.int32), (shards, 1)),
            labels=gather(self.labels, 0),
            label_mask=gather(self.label_mask, 0),
            weight=gather(self.weight, 0),
        )

    def _sequence(self, event: EventType, indices, lengths, shards: int, capacity: int) -> Jagged:
        store = self.events[event.name]
        start = store.start[indices]
        if len(indices) and np.array_equal(start[1:], (start + lengths)[:-1]):
            index = slice(start[0], start[-1] + lengths[-1])  # a stream in order needs no gathering
        else:
            index = span_index(start, lengths)
        time = store.time[index]
        gap = np.diff(time, prepend=time[:1])
        gap[(np.cumsum(lengths) - lengths)[lengths > 0]] = 0
        # Differences are taken in int64: float32 cannot tell today's seconds apart.
        age = np.repeat(self.request_time[indices], lengths) - time
        values = {name: column[index] for name, column in store.columns.items()}
        values |= dict(zip(TIME_FIELDS, (gap.astype(np.float32), age.astype(np.float32)), strict=True))
        fill = dict.fromkeys(values, 0) | {field.name: PADDING_ID for field in event.sparse}
        return pack(values, lengths, capacity=capacity, shards=shards, max_length=event.max_length, fill=fill)


def _bind_events(schema: FeatureSchema, event: EventType, raw: Events, request_time, counts) -> Events:
    name, samples = event.name, len(request_time)
    time = _times(f"{name}.time", raw.time)
    fields = [f.name for f in event.sparse + event.dense]
    _check_columns(name, raw.columns, fields)
    columns = {
        f.name: _bind(schema, f, f"{name}.{f.name}", raw.columns[f.name], len(time), counts) for f in event.sparse
    } | {f.name: _numbers(f"{name}.{f.name}", raw.columns[f.name], (len(time),)) for f in event.dense}

    start, stop = _times(f"{name}.start", raw.start), _times(f"{name}.stop", raw.stop)
    for what, span in (("start", start), ("stop", stop)):
        if span.shape != (samples,):
            raise ValueError(f"{name}.{what}: expected one entry for each of {samples} samples, got {list(span.shape)}")
    if (bad := (start < 0) | (stop < start) | (stop > len(time))).any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name}: sample {row} spans events [{start[row]}, {stop[row]}) of a store of {len(time)} events"
        )
    start = np.maximum(start, stop - event.max_length)

    occupied = stop > start
    last = np.maximum(stop - 1, 0)
    if len(time):
        # Running count of places where time steps back: a span holds one iff the count rises after its first event.
        backwards = np.cumsum(np.diff(time, prepend=time[:1]) < 0)
        first = np.minimum(start, len(time) - 1)
        if (bad := occupied & (backwards[last] > backwards[first])).any():
            row = int(np.argmax(bad))
            place = int(start[row] + np.argmax(np.diff(time[start[row] : stop[row]]) < 0))
            raise ValueError(
                f"{name}.time: the events of sample {row} are unsorted: event {place} is at {time[place]}, the next at "
                f"{time[place + 1]}; sort each sample's events, oldest first"
            )
        if (bad := occupied & (time[last] >= request_time)).any():
            row = int(np.argmax(bad))
            raise ValueError(
                f"{name}.time: sample {row} has an event at {time[last[row]]}, its request is at {request_time[row]}; "
                f"events must be strictly earlier"
            )
    return Events(columns, time, start, stop)


def _bind(schema: FeatureSchema, field: SparseField, name: str, ids, rows: int, counts) -> np.ndarray:
    ids = np.asarray(ids)
    if field.max_ids == 1 and ids.ndim == 1:
        ids = ids[:, None]
    if ids.shape != (rows, field.max_ids):
        raise ValueError(f"{name}: expected ids [{rows}, {field.max_ids}], got {list(ids.shape)}")
    table = schema.table(field.table)
    try:
        bound, replaced = bind_ids(field, table, ids)
    except ValueError as error:
        bad = ids < HOST_PADDING_ID if (ids < HOST_PADDING_ID).any() else ids >= table.rows
        row = int(np.argmax(bad.any(axis=1)))
        raise ValueError(f"{name}, row {row}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    counts[name] = replaced, int((bound != PADDING_ID).sum())
    return bound


def _check_columns(what: str, given: Mapping, wanted: list[str]) -> None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unknown:
        raise ValueError(f"{what}: missing columns {missing}, unknown columns {unknown}; the schema has {wanted}")


def _numbers(name: str, values, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected numbers, got {values.dtype}")
    if values.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise ValueError(f"{name}: row {row} holds {values[row]}, which is not a finite float32")
    return values


def _zero_one(name: str, values, shape: tuple[int, ...]) -> np.ndarray:
    values = _numbers(name, _as_tasks(values), shape)
    if (bad := ~np.isin(values, (0, 1))).any():
        row, task = np.argwhere(bad)[0]
        raise ValueError(f"{name}: sample {row}, task {task} is {values[row, task]}, not 0 or 1")
    return values


def _as_tasks(values) -> np.ndarray:
    values = np.asarray(values)
    return values[:, None] if values.ndim == 1 else values


def _times(name: str, values) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind not in "iu" or values.dtype == np.uint64:
        raise TypeError(f"{name}: expected integers that fit int64, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got {list(values.shape)}")
    return values.astype(np.int64)
