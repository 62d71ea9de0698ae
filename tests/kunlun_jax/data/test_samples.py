"""Batches against the raw columns read sample by sample; every check of the store tripped once."""

import dataclasses
import time

import chex
import numpy as np
import pytest

from kunlun_jax.batch import check_batch
from kunlun_jax.data.samples import FILLER, Events, Samples
from kunlun_jax.jagged import capacities
from kunlun_jax.schema import PADDING_ID, DenseField, EventType, FeatureSchema, SparseField, Table, bind_ids

USERS, PER_USER, MAX_LENGTH = 5, 20, 9
START = 1_700_000_000  # float32 is 128 s coarse here


def make_schema(max_length=MAX_LENGTH):
    return FeatureSchema(
        tables=(Table("user", 11, 8), Table("item", 13, 8), Table("tag", 5, 4)),
        dense=(DenseField("number"), DenseField("price", "candidate")),
        sparse=(
            SparseField("user", "user", out_of_range="hash"),
            SparseField("item", "item", "candidate", out_of_range="out_of_vocabulary"),
            SparseField("tags", "tag", "candidate", max_ids=3),
        ),
        events=(
            EventType(
                "click",
                max_length,
                (SparseField("item", "item"), SparseField("tags", "tag", max_ids=2)),
                (DenseField("seconds"),),
            ),
            EventType("view", max_length, (SparseField("item", "item", out_of_range="out_of_vocabulary"),)),
        ),
        tasks=("click", "buy"),
        group="user",
    )


def raw_columns(rng, samples=23):
    """Users' histories are stored once; a sample spans some of its user's events. Prices number the samples."""
    owner = rng.integers(0, USERS, samples)
    events, latest = {}, np.full(samples, START)
    for name in ("click", "view"):
        stamps = np.sort(START + rng.integers(0, 500, (USERS, PER_USER)), axis=1).reshape(-1)
        start = owner * PER_USER + rng.integers(0, 3, samples)
        stop = start + rng.integers(0, PER_USER - 3, samples)
        latest = np.where(stop > start, np.maximum(latest, stamps[stop - 1]), latest)
        columns = {"item": rng.integers(0, 13 if name == "click" else 30, len(stamps))}
        if name == "click":
            columns["tags"] = rng.integers(-1, 5, (len(stamps), 2))
            columns["seconds"] = rng.normal(size=len(stamps))
        events[name] = Events(columns, stamps, start, stop)
    return {
        "dense": {"number": rng.normal(size=samples), "price": np.arange(samples)},
        "sparse": {
            "user": rng.integers(0, 40, samples),
            "item": rng.integers(0, 30, samples),
            "tags": rng.integers(-1, 5, (samples, 3)),
        },
        "events": events,
        "request_time": latest + rng.integers(1, 100, samples),
        "labels": rng.integers(0, 2, (samples, 2)),
        "label_mask": rng.integers(0, 2, (samples, 2)),
        "weight": rng.random(samples) + 0.5,
    }


def rows_of(schema, field, ids):
    return bind_ids(field, schema.table(field.table), np.asarray(ids, np.int64).reshape(-1))[0]


def naive_sequence(schema, event, raw, sample):
    """The tokens of one sample of one event type, one at a time, as a dict of lists."""
    events = raw["events"][event.name]
    first, last = int(events.start[sample]), int(events.stop[sample])
    kept = list(range(first, last))[-event.max_length :]
    tokens = {name: [] for name in (*(f.name for f in event.sparse + event.dense), "gap", "age")}
    for place, i in enumerate(kept):
        for field in event.sparse:
            tokens[field.name].append(rows_of(schema, field, events.columns[field.name][i]))
        for field in event.dense:
            tokens[field.name].append(np.float32(events.columns[field.name][i]))
        tokens["gap"].append(np.float32(0 if place == 0 else int(events.time[i]) - int(events.time[kept[place - 1]])))
        tokens["age"].append(np.float32(int(raw["request_time"][sample]) - int(events.time[i])))
    return tokens


@pytest.mark.parametrize("shards", [1, 4])
def test_batches_equal_the_raw_columns_read_sample_by_sample(shards):
    rng = np.random.default_rng(shards)
    schema, raw = make_schema(), raw_columns(rng)
    samples = Samples.bind(schema, **raw)
    wanted = np.concatenate([rng.permutation(23)[:14], [FILLER, FILLER]])
    batch = check_batch(samples.batch(wanted, shards=shards), schema)

    chex.assert_shape(batch.labels, (16, 2))
    real = batch.weight > 0
    identity = np.where(real, batch.dense["price"].astype(int), FILLER)
    assert sorted(identity) == sorted(wanted)
    if shards == 1:
        np.testing.assert_array_equal(identity, wanted)
    for row, sample in enumerate(identity):
        shard, place = divmod(row, 16 // shards)
        for event in schema.events:
            sequence = batch.events[event.name]
            start, length = sequence.starts[shard, place], sequence.lengths[shard, place]
            if sample == FILLER:
                assert length == 0
                continue
            expected = naive_sequence(schema, event, raw, sample)
            assert length == len(expected["age"])
            for name, tokens in expected.items():
                got = sequence.values[name][shard, start : start + length]
                np.testing.assert_array_equal(
                    got, np.asarray(tokens).reshape(got.shape), err_msg=f"{event.name}.{name}"
                )
        if sample == FILLER:
            assert not batch.label_mask[row].any()
            assert all((batch.sparse[f.name][row] == PADDING_ID).all() for f in schema.sparse)
            continue
        for field in schema.sparse:
            expected = rows_of(schema, field, raw["sparse"][field.name][sample])
            np.testing.assert_array_equal(batch.sparse[field.name][row], expected)
        assert batch.dense["number"][row] == np.float32(raw["dense"]["number"][sample])
        assert batch.weight[row] == np.float32(raw["weight"][sample])
        np.testing.assert_array_equal(batch.label_mask[row], raw["label_mask"][sample])
        np.testing.assert_array_equal(batch.labels[row], raw["labels"][sample] * raw["label_mask"][sample])


def test_batch_uses_the_smallest_joint_bucket_and_marks_unused_tokens():
    samples = Samples.bind(make_schema(64), **raw_columns(np.random.default_rng(0)))
    batch = samples.batch(np.arange(20), shards=2)
    fullest = max(int(s.lengths.sum(axis=1).max()) for s in batch.events.values())
    expected = next(size for size in capacities(10, 64) if size >= fullest)
    for sequence in batch.events.values():
        assert sequence.values["gap"].shape == (2, expected)
        assert sequence.max_length == 64
        tail = sequence.values["item"][0, sequence.lengths[0].sum() :]
        assert len(tail)
        assert (tail == PADDING_ID).all()


def test_all_histories_may_be_empty():
    raw = raw_columns(np.random.default_rng(0), samples=4)
    none = np.zeros(4, np.int64)
    for name, events in raw["events"].items():
        columns = {field: column[:0] for field, column in events.columns.items()}
        raw["events"][name] = Events(columns, events.time[:0], none, none)
    schema = make_schema()
    batch = check_batch(Samples.bind(schema, **raw | {"label_mask": np.ones((4, 2))}).batch(np.arange(4)), schema)
    assert not any(s.lengths.any() for s in batch.events.values())


def test_base_rates_are_weighted_and_know_unknown_labels():
    raw = raw_columns(np.random.default_rng(0), samples=4)
    raw |= {
        "labels": np.array([[1, 0], [0, 1], [1, 1], [0, 0]]),
        "label_mask": np.array([[1, 1], [1, 1], [0, 1], [1, 0]]),
        "weight": np.array([1.0, 2.0, 4.0, 8.0]),
    }
    assert Samples.bind(make_schema(), **raw).base_rates() == {"click": 1 / 11, "buy": 6 / 7}
    unknown = Samples.bind(make_schema(), **raw | {"label_mask": np.array([[1, 0]] * 4)})
    with pytest.raises(ValueError, match="task 'buy' has no known label"):
        unknown.base_rates()


def test_unknown_labels_may_hold_anything_finite():
    raw = raw_columns(np.random.default_rng(0), samples=2)
    labels, mask = np.array([[-1, 0], [1, 7]]), np.array([[0, 1], [1, 0]])
    samples = Samples.bind(make_schema(), **raw | {"labels": labels, "label_mask": mask})
    np.testing.assert_array_equal(samples.labels, [[0, 0], [1, 0]])


def test_out_of_range_rates_count_replaced_ids_and_no_padding():
    raw = raw_columns(np.random.default_rng(0), samples=4)
    raw["sparse"] |= {"user": np.array([0, 10, 11, 5]), "item": np.array([11, 12, 13, 99]), "tags": np.full((4, 3), -1)}
    samples = Samples.bind(make_schema(), **raw)
    rates = samples.out_of_range_rates()
    # The item table's last of 13 rows is reserved, so id 12 is out of vocabulary too.
    assert (rates["user"], rates["item"], rates["tags"], rates["click.item"]) == (0.25, 0.75, 0.0, 0.0)
    viewed = raw["events"]["view"].columns["item"]
    assert rates["view.item"] == pytest.approx((viewed >= 12).mean())
    np.testing.assert_array_equal(samples.sparse["item"][:, 0], [11, 12, 12, 12])


def test_gaps_and_ages_are_exact_where_float32_times_are_not():
    raw = raw_columns(np.random.default_rng(0), samples=1)
    stamps = START + np.array([0, 1, 3])
    columns = {"item": np.zeros(3, int), "tags": np.zeros((3, 2), int), "seconds": np.zeros(3)}
    raw["events"]["click"] = Events(columns, stamps, np.array([0]), np.array([3]))
    raw["request_time"] = np.array([START + 1000])
    values = Samples.bind(make_schema(), **raw).batch(np.array([0])).events["click"].values
    assert values["gap"][0, :3].tolist() == [0, 1, 2]
    assert values["age"][0, :3].tolist() == [1000, 999, 997]


def replaced(raw, *, event="click", **changes):
    events = {**raw["events"], event: dataclasses.replace(raw["events"][event], **changes)}
    return raw | {"events": events}


def with_column(raw, kind, name, column):
    return raw | {kind: {**raw[kind], name: column}}


def with_entry(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


def with_event(raw, sample, place, moved):
    """Move the time of an event of one sample: `place` counts in its span, `moved` is added."""
    events = raw["events"]["view"]
    index = int((events.start[sample], events.stop[sample])[place < 0]) + place
    stamps = events.time.copy()
    stamps[index] += moved
    return replaced(raw, event="view", time=stamps)


def long_sample(raw):
    events = raw["events"]["view"]
    return int(np.argmax(events.stop - events.start))


BAD = {
    "missing dense": (lambda r: r | {"dense": {}}, ValueError, r"dense: missing columns \['number', 'price'\]"),
    "unknown sparse": (
        lambda r: with_column(r, "sparse", "shop", r["sparse"]["user"]),
        ValueError,
        r"sparse: .*unknown columns \['shop'\]",
    ),
    "missing event type": (lambda r: r | {"events": {}}, ValueError, r"events: missing columns \['click', 'view'\]"),
    "missing event field": (lambda r: replaced(r, columns={}), ValueError, r"click: missing columns \['item'"),
    "no samples": (lambda r: r | {"request_time": np.zeros(0, int)}, ValueError, "at least one sample"),
    "dense type": (
        lambda r: with_column(r, "dense", "number", np.array(["a"] * 23)),
        TypeError,
        "number: expected numbers, got <U1",
    ),
    "dense shape": (
        lambda r: with_column(r, "dense", "number", np.zeros(7)),
        ValueError,
        r"number: .*\[23\], got \[7\]",
    ),
    "dense not finite": (
        lambda r: with_column(r, "dense", "number", with_entry(np.zeros(23), 6, np.nan)),
        ValueError,
        "number: row 6 holds nan",
    ),
    "dense beyond float32": (
        lambda r: with_column(r, "dense", "number", with_entry(np.zeros(23), 6, 1e300)),
        ValueError,
        "number: row 6 holds inf",
    ),
    "id type": (
        lambda r: with_column(r, "sparse", "user", np.zeros(23)),
        TypeError,
        "user: .*integers, got float64",
    ),
    "id shape": (
        lambda r: with_column(r, "sparse", "tags", np.zeros((23, 2), int)),
        ValueError,
        r"tags: expected ids \[23, 3\], got \[23, 2\]",
    ),
    "id out of range": (
        lambda r: with_column(r, "sparse", "tags", with_entry(np.zeros((23, 3), int), (4, 1), 5)),
        ValueError,
        "tags, row 4: .*id 5 is beyond table 'tag' of 5 rows",
    ),
    "id negative": (
        lambda r: with_column(r, "sparse", "user", with_entry(np.full(23, 100), 8, -2)),
        ValueError,
        "user, row 8: .*id -2 is negative",
    ),
    "event id out of range": (
        lambda r: replaced(r, columns=r["events"]["click"].columns | {"item": with_entry(np.zeros(100, int), 9, 13)}),
        ValueError,
        r"click\.item, row 9: .*id 13 is beyond",
    ),
    "event dense not finite": (
        lambda r: replaced(r, columns=r["events"]["click"].columns | {"seconds": with_entry(np.zeros(100), 9, np.inf)}),
        ValueError,
        r"click\.seconds: row 9 holds inf",
    ),
    "event column shape": (
        lambda r: replaced(r, columns=r["events"]["click"].columns | {"seconds": np.zeros(7)}),
        ValueError,
        r"click\.seconds: expected shape \[100\], got \[7\]",
    ),
    "request time type": (
        lambda r: r | {"request_time": r["request_time"].astype(float)},
        TypeError,
        "request_time: expected integers",
    ),
    "request time shape": (
        lambda r: r | {"request_time": r["request_time"][:, None]},
        ValueError,
        r"request_time: expected one dimension, got \[23, 1\]",
    ),
    "event time type": (
        lambda r: replaced(r, time=r["events"]["click"].time.astype(np.float32)),
        TypeError,
        r"click\.time: expected integers",
    ),
    "unsorted": (
        lambda r: with_event(r, long_sample(r), -3, -5000),
        ValueError,
        r"view\.time: the events of sample \d+ are unsorted",
    ),
    "same second as the request": (
        lambda r: r | {"request_time": np.full(23, r["events"]["view"].time.min())},
        ValueError,
        "events must be strictly earlier",
    ),
    "event after the request": (
        lambda r: with_event(r, long_sample(r), -1, 5000),
        ValueError,
        r"view\.time: sample \d+ has an event at \d+, its request is at \d+",
    ),
    "span beyond the store": (
        lambda r: replaced(r, stop=with_entry(r["events"]["click"].stop, 5, 101)),
        ValueError,
        r"click: sample 5 spans events \[\d+, 101\) of a store of 100 events",
    ),
    "negative span": (
        lambda r: replaced(r, start=with_entry(r["events"]["click"].start, 5, -1)),
        ValueError,
        r"click: sample 5 spans events \[-1, ",
    ),
    "span shape": (
        lambda r: replaced(r, start=r["events"]["click"].start[:-1]),
        ValueError,
        r"click\.start: expected one entry for each of 23 samples, got \[22\]",
    ),
    "label": (
        lambda r: r | {"labels": with_entry(np.zeros((23, 2)), (3, 1), 0.5), "label_mask": None},
        ValueError,
        "labels: sample 3, task 1 is 0.5, not 0 or 1",
    ),
    "label shape": (
        lambda r: r | {"labels": np.zeros(23)},
        ValueError,
        r"labels: expected shape \[23, 2\], got \[23, 1\]",
    ),
    "label mask": (
        lambda r: r | {"label_mask": with_entry(np.ones((23, 2)), (3, 1), 2)},
        ValueError,
        "label_mask: sample 3, task 1 is 2.0",
    ),
    "weight": (
        lambda r: r | {"weight": with_entry(np.ones(23), 2, -1)},
        ValueError,
        "weight: sample 2 has weight -1.0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_columns_are_refused_by_name(case):
    change, error, message = BAD[case]
    raw = raw_columns(np.random.default_rng(1))
    Samples.bind(make_schema(), **raw)
    with pytest.raises(error, match=message):
        Samples.bind(make_schema(), **change(raw))


def test_only_events_within_a_span_need_order():
    """A step back in time between two samples' spans is no fault; nor is one among events beyond max_length."""
    raw = raw_columns(np.random.default_rng(0), samples=2)
    columns = {"item": np.zeros(14, int)}
    stamps = START + np.array([50, 60, 70, 5, 40, 10, 11, 12, 13, 14, 15, 16, 17, 18])
    raw["events"]["view"] = Events(columns, stamps, np.array([0, 3]), np.array([3, 14]))
    raw["request_time"] = np.full(2, START + 1000)
    samples = Samples.bind(make_schema(9), **raw)
    assert samples.batch(np.array([1])).events["view"].values["gap"][0, :9].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="sample 1 are unsorted: event 4"):
        Samples.bind(make_schema(10), **raw)


@pytest.mark.parametrize(
    ("indices", "shards", "message"),
    [
        ([0, 23], 1, r"within \[-1, 23\)"),
        ([0, -2], 1, r"values in \[-2, 0\]"),
        ([], 1, "non-empty"),
        ([[0]], 1, r"shape \[1, 1\]"),
        ([0, 1, 2], 2, "3 samples don't divide over 2"),
    ],
)
def test_bad_indices_are_refused(indices, shards, message):
    samples = Samples.bind(make_schema(), **raw_columns(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=message):
        samples.batch(np.array(indices, int), shards=shards)


def test_a_large_batch_takes_milliseconds():
    """1024 samples with 100,000 events: 2 ms were measured; the bound leaves room for a busy CPU."""
    rng = np.random.default_rng(0)
    samples, length = 2048, 50
    raw = raw_columns(rng, samples)
    start = np.arange(samples) * length
    for name, columns in (("click", 3), ("view", 1)):
        total = samples * length
        stamps = START + np.tile(np.arange(length), samples)
        all_columns = {
            "item": rng.integers(0, 12, total),
            "tags": rng.integers(-1, 5, (total, 2)),
            "seconds": np.ones(total),
        }
        kept = dict(list(all_columns.items())[:columns])
        raw["events"][name] = Events(kept, stamps, start, start + length)
    raw["request_time"] = np.full(samples, START + 1000)
    store = Samples.bind(make_schema(200), **raw)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        batch = store.batch(rng.permutation(samples)[:1024])
        times.append(time.perf_counter() - begin)
    assert sum(int(s.lengths.sum()) for s in batch.events.values()) == 2 * 1024 * length
    assert min(times) < 0.03
