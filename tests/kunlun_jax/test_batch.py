"""Batches: every check trips and names its field; samples of requests; what survives jit."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kunlun_jax.batch import PackedBatch, check_batch, layout_of, to_samples, unpacked
from kunlun_jax.jagged import Jagged
from kunlun_jax.schema import PADDING_ID
from tests.kunlun_jax.batches import random_batch, small_schema

SCHEMA = small_schema(scope="candidate")


@pytest.fixture
def batch():
    return random_batch(SCHEMA, np.random.default_rng(), samples=8, requests=4, shards=2)


def with_event(batch, name, **changes):
    return replace(batch, events={**batch.events, name: replace(batch.events[name], **changes)})


def with_column(batch, name, column, value):
    return with_event(batch, name, values={**batch.events[name].values, column: value})


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


def changed(array, value, at=0):
    array = array.copy()
    array.flat[at] = value
    return array


BROKEN = {
    "request_index_flat": (
        lambda b: replace(b, request_index=b.request_index.ravel()),
        r"request_index: expected int32 \[P, B/P\], got int32 \[8\]",
    ),
    "request_index_type": (
        lambda b: replace(b, request_index=b.request_index.astype(np.int64)),
        r"request_index: expected int32.*got int64 \[2, 4\]",
    ),
    "request_index_high": (
        lambda b: replace(b, request_index=changed(b.request_index, 2)),
        r"request_index: values lie in \[0, 2\], each shard holds 2 requests",
    ),
    "request_index_low": (
        lambda b: replace(b, request_index=changed(b.request_index, -1)),
        r"request_index: values lie in \[-1, 1\]",
    ),
    "request_index_not_own": (
        lambda b: replace(
            random_batch(SCHEMA, np.random.default_rng(), samples=8, shards=2),
            request_index=np.array([[0, 1, 2, 2]] * 2, np.int32),
        ),
        r"request_index: with as many requests as samples \(8\) sample i is of request i",
    ),
    "requests_not_divisible": (
        lambda b: replace(b, dense={**b.dense, "age": np.zeros(5, np.float32)}),
        r"request_index: 5 requests don't divide over its 2 batch shards",
    ),
    "dense_missing": (
        lambda b: replace(b, dense=without(b.dense, "age")),
        r"dense: missing \['age'\], unknown \[\]; the schema has \['age', 'price'\]",
    ),
    "sparse_unknown": (
        lambda b: replace(b, sparse={**b.sparse, "shop": b.sparse["item"]}),
        r"sparse: missing \[\], unknown \['shop'\]",
    ),
    "event_missing": (lambda b: replace(b, events=without(b.events, "view")), r"events: missing \['view'\]"),
    "labels_shape": (
        lambda b: replace(b, labels=b.labels[:, 0]),
        r"labels: expected float32 \[8, 1\], got float32 \[8\]",
    ),
    "label_mask_type": (
        lambda b: replace(b, label_mask=b.label_mask.astype(bool)),
        r"label_mask: expected float32 \[8, 1\], got bool",
    ),
    "weight_shape": (lambda b: replace(b, weight=b.weight[:4]), r"weight: expected float32 \[8\], got float32 \[4\]"),
    "label_value": (
        lambda b: replace(b, labels=changed(b.labels, 0.5, at=3)),
        r"labels: sample 3, task 'click' is 0\.5, not 0 or 1",
    ),
    "label_nan": (lambda b: replace(b, labels=changed(b.labels, np.nan)), r"labels: sample 0, task 'click' is nan"),
    "mask_value": (lambda b: replace(b, label_mask=changed(b.label_mask, 2)), r"label_mask: values outside \{0, 1\}"),
    "weight_negative": (lambda b: replace(b, weight=changed(b.weight, -1)), "weight: negative or non-finite"),
    "weight_nan": (lambda b: replace(b, weight=changed(b.weight, np.nan)), "weight: negative or non-finite"),
    "all_padding": (lambda b: replace(b, weight=np.zeros(8, np.float32)), "weight: every sample of the batch"),
    "no_label": (lambda b: replace(b, label_mask=np.zeros((8, 1), np.float32)), "weight: every sample of the batch"),
    "dense_shape": (
        lambda b: replace(b, dense={**b.dense, "price": b.dense["age"]}),
        r"price: expected float32 \[8\], got float32 \[4\]",
    ),
    "dense_type": (
        lambda b: replace(b, dense={**b.dense, "price": b.dense["price"].astype(np.float64)}),
        r"price: expected float32 \[8\], got float64",
    ),
    "dense_infinite": (
        lambda b: replace(b, dense={**b.dense, "price": changed(b.dense["price"], np.inf)}),
        "price: 1 values are not finite",
    ),
    "ids_shape": (
        lambda b: replace(b, sparse={**b.sparse, "tags": b.sparse["tags"][:, :2]}),
        r"tags: expected int32 \[8, 3\], got int32 \[8, 2\]",
    ),
    "ids_type": (
        lambda b: replace(b, sparse={**b.sparse, "tags": b.sparse["tags"].astype(np.int64)}),
        r"tags: expected int32 \[8, 3\], got int64",
    ),
    "id_beyond": (
        lambda b: replace(b, sparse={**b.sparse, "item": changed(b.sparse["item"], 13)}),
        "item: id 13 is outside its table of 13 rows; bind ids",
    ),
    "id_negative": (
        lambda b: replace(b, sparse={**b.sparse, "item": changed(b.sparse["item"], -1)}),
        "item: id -1 is outside its table",
    ),
    "max_length": (lambda b: with_event(b, "view", max_length=10), r"view: max_length is 10, the schema says 9"),
    "length": (
        lambda b: with_event(b, "view", lengths=changed(b.events["view"].lengths, 10)),
        r"Jagged: lengths lie in .*10\], allowed are \[0, 9\]",
    ),
    "sequences": (
        lambda b: with_event(b, "view", starts=b.events["view"].starts[:, :1], lengths=b.events["view"].lengths[:, :1]),
        r"view\.starts: expected int32 \[2, 2\], got int32 \[2, 1\]",
    ),
    "lengths_type": (
        lambda b: with_event(b, "view", lengths=b.events["view"].lengths.astype(np.float32)),
        r"view\.lengths: expected int32 \[2, 2\], got float32",
    ),
    "column_missing": (
        lambda b: with_event(b, "view", values=without(b.events["view"].values, "age")),
        r"view: missing \['age'\]",
    ),
    "column_unknown": (
        lambda b: with_column(b, "view", "tags", b.events["view"].values["item"]),
        r"view: missing \[\], unknown \['tags'\]",
    ),
    "event_ids_shape": (
        lambda b: with_column(b, "click", "tags", b.events["click"].values["tags"][..., :1]),
        r"click\.tags: expected int32 \[2, \d+, 2\], got int32 \[2, \d+, 1\]",
    ),
    "event_id_beyond": (
        lambda b: with_column(b, "click", "item", changed(b.events["click"].values["item"], 99)),
        r"click\.item: id 99 is outside its table of 13 rows",
    ),
    "event_dense_type": (
        lambda b: with_column(b, "view", "seconds", b.events["view"].values["seconds"].astype(np.int32)),
        r"view\.seconds: expected float32 .*got int32",
    ),
    "event_dense_nan": (
        lambda b: with_column(b, "view", "seconds", changed(b.events["view"].values["seconds"], np.nan)),
        r"view\.seconds: 1 values are not finite",
    ),
    "gap_negative": (
        lambda b: with_column(b, "view", "gap", changed(b.events["view"].values["gap"], -1)),
        "view: negative gap or age; events must be sorted by time",
    ),
    "age_negative": (
        lambda b: with_column(b, "click", "age", changed(b.events["click"].values["age"], -1)),
        "click: negative gap or age",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_check_trips(batch, case):
    assert check_batch(batch, SCHEMA) is batch
    break_it, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        check_batch(break_it(batch), SCHEMA)


def test_padding_ids_and_empty_sequences_are_fine(batch):
    nothing = {name: np.full_like(ids, PADDING_ID) for name, ids in batch.sparse.items()}
    empty = {name: replace(s, lengths=np.zeros_like(s.lengths)) for name, s in batch.events.items()}
    check_batch(replace(batch, sparse=nothing, events=empty), SCHEMA)


def test_each_sample_sees_its_own_request(batch):
    rng = np.random.default_rng()
    values = rng.normal(size=(4, 3)).astype(np.float32)
    index = rng.integers(0, 2, (2, 4)).astype(np.int32)
    expected = [values[2 * shard + index[shard, b]] for shard in range(2) for b in range(4)]
    np.testing.assert_array_equal(to_samples(jnp.asarray(values), index, "request"), np.stack(expected))
    candidates = rng.normal(size=(8, 3))
    assert to_samples(candidates, index, "candidate") is candidates


def test_gradients_of_a_requests_samples_add_up():
    index = np.array([[0, 1, 1], [1, 1, 1]], np.int32)
    grads = jax.grad(lambda v: to_samples(v, index, "request").sum())(jnp.zeros((4, 2)))
    np.testing.assert_array_equal(grads[:, 0], [1, 2, 0, 3])


def test_batches_pass_through_jit_and_keep_their_static_part(batch):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(1)
    def double(batch):
        return jax.tree.map(lambda x: x + x, batch)

    doubled = double(batch)
    double(replace(batch, weight=2 * batch.weight))
    assert isinstance(doubled.events["view"], Jagged)
    assert doubled.events["view"].max_length == 9
    assert doubled.size == 8
    chex.assert_trees_all_equal(doubled.weight, 2 * batch.weight)


@pytest.mark.parametrize("kept", [2, 1])
def test_a_packed_batch_has_the_same_bits(batch, kept):
    """On the device too, whose part is its own shards."""
    packed = PackedBatch.of(batch)
    chex.assert_shape(packed.words, (2, layout_of(batch).words))
    chex.assert_type(packed.words, jnp.int32)
    part = jax.tree.map(lambda x: x[: x.shape[0] // 2 * kept], batch)
    again = jax.jit(PackedBatch.unpack)(replace(packed, words=packed.words[:kept]))
    assert jax.tree.structure(again) == jax.tree.structure(batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(again, part)
    chex.assert_trees_all_equal(again, part)
    assert unpacked(batch) is batch
