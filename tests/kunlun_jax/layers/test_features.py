"""Set tokens and event tokens equal their definitions: every field reaches its own token, by name and scope."""

import numpy as np
import plain
import pytest
from batches import random_embedded, small_schema
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.layers.features import EventTokens, PooledEvents, SetTokens, joined_fields, pooled_tokens
from kunlun_jax.layers.mlp import MaskNet
from kunlun_jax.schema import TIME_FIELDS

SCHEMA = small_schema(scope="candidate")
SAMPLES, REQUESTS, SHARDS, DENSE_TOKENS = 8, 4, 2, 2


@pytest.mark.parametrize("width", [8, 6])
def test_set_tokens_are_the_fields_of_the_request_then_of_the_candidate(width):
    """Width 8 is that of two tables, whose fields then pass unprojected."""
    rng = np.random.default_rng(0)
    module = plain.build(
        lambda: SetTokens(SCHEMA, width, dense_tokens=DENSE_TOKENS, dtype="float32", rngs=nnx.Rngs(0)), rng
    )
    batch = random_embedded(SCHEMA, rng, samples=SAMPLES, requests=REQUESTS, shards=SHARDS)
    out = np.asarray(plain.run(module, batch))
    # samples take the requests of their shard in turn
    request_of = np.concatenate([np.arange(4) % 2, 2 + np.arange(4) % 2])

    def dense(scope, x):
        return plain.mlp(module.dense[scope], np.array([x])).reshape(DENSE_TOKENS, width)

    def sparse(scope, *embeddings):
        table_width = embeddings[0].shape[-1]
        if table_width == width:
            return list(embeddings)
        projections = plain.array(module.projections[f"{scope}_{table_width}"])
        return [e @ w for e, w in zip(embeddings, projections, strict=True)]

    for b, r in enumerate(request_of):
        of = {name: x[r if name == "user" else b] for name, x in batch.sparse.items()}
        expected = [
            *dense("request", batch.dense["age"][r]),
            *sparse("request", of["user"]),
            *dense("candidate", batch.dense["price"][b]),
            *sparse("candidate", of["item"], of["seller"]),
            *sparse("candidate", of["tags"]),
        ]
        np.testing.assert_allclose(out[b], expected, rtol=1e-4, atol=1e-4)
    assert [module.count(scope) for scope in ("request", "candidate")] == [3, 5]


def test_a_scope_without_fields_has_no_tokens():
    schema = small_schema(scope="request")
    module = SetTokens(schema, 8, dense_tokens=1, dtype="float32", rngs=nnx.Rngs(0))
    batch = random_embedded(schema, np.random.default_rng(1))
    assert module.of_scope(batch, "candidate") is None
    assert module.count("candidate") == 0


@pytest.mark.parametrize("event", SCHEMA.events, ids=lambda event: event.name)
def test_event_tokens_join_fields_and_times_of_each_event(event):
    rng = np.random.default_rng(2)
    module = plain.build(lambda: EventTokens(SCHEMA, event, 6, dtype="float32", rngs=nnx.Rngs(0)), rng, scale=0.3)
    events = random_embedded(SCHEMA, rng, shards=2).events[event.name]
    columns = [events.values[f.name] for f in event.sparse]
    columns += [events.values[f.name][..., None] for f in event.dense]
    columns += [np.log(1 + events.values[name][..., None]) / 6 - 1 for name in TIME_FIELDS]
    joined = events.with_values(np.concatenate(columns, axis=-1))
    for got, x in zip(unpack(plain.run(module, events)), unpack(joined), strict=True):
        rank = np.log(1 + np.arange(len(x))[::-1, None]) / 2 - 1
        x = np.concatenate([x, rank], axis=-1)
        expected = plain.mlp(module.join.compress, x * plain.mlp(module.join.mask, x))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert isinstance(module.join, MaskNet)


@pytest.mark.parametrize("width", [4, 6])
def test_important_fields_own_several_tokens_and_groups_share_one(width):
    """At width 4 the item's row of 8 is cut into its two tokens; at width 6 it is projected to them."""
    rng = np.random.default_rng(3)
    embeddings, groups = {"item": 2}, (("tags", "seller"),)
    module = plain.build(
        lambda: SetTokens(
            SCHEMA, width, dense_tokens=1, embeddings=embeddings, groups=groups, dtype="float32", rngs=nnx.Rngs(0)
        ),
        rng,
    )
    batch = random_embedded(SCHEMA, rng)
    out = np.asarray(plain.run(module, batch))
    assert [module.count(scope) for scope in ("request", "candidate")] == [2, 4]
    item = batch.sparse["item"] if width == 4 else batch.sparse["item"] @ plain.array(module.joins["item"].kernel)
    grouped = np.concatenate([batch.sparse["tags"], batch.sparse["seller"]], axis=-1)
    np.testing.assert_allclose(out[:, 3:5], item.reshape(4, 2, width), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        out[:, 5], grouped @ plain.array(module.joins["tags_seller"].kernel), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("embeddings", "groups", "message"),
    [
        ({"shop": 2}, (), r"no sparse set fields \['shop'\]; there are \['item', 'seller', 'tags', 'user'\]"),
        ({"item": 2}, (("item", "tags"),), r"\['item'\] named more than once"),
        ({"item": 0}, (), "owns at least 1 token, got {'item': 0}"),
        ({}, (("user", "item"),), r"\['user', 'item'\] have scopes \['candidate', 'request'\]"),
    ],
)
def test_fields_that_cant_be_joined_are_refused(embeddings, groups, message):
    with pytest.raises(ValueError, match=message):
        joined_fields(SCHEMA, embeddings, groups)


def test_pooled_events_are_means_and_counts():
    rng = np.random.default_rng(4)
    module = plain.build(lambda: PooledEvents(SCHEMA, 8, dtype="float32", rngs=nnx.Rngs(0)), rng)
    batch = random_embedded(SCHEMA, rng, lengths=[3, 0, 9, 1], shards=2)
    out = np.asarray(plain.run(module, batch))
    assert out.shape == (4, pooled_tokens(SCHEMA), 8) == (4, 5, 8)
    at = 0
    for event in SCHEMA.events:
        events = batch.events[event.name]
        columns = {name: unpack(events.with_values(x)) for name, x in events.values.items()}
        for b in range(4):

            def mean(x):
                return x.mean(axis=0) if len(x) else np.zeros(x.shape[1:])

            numbers = [mean(columns[field.name][b]) for field in event.dense]
            numbers += [mean(np.log(1 + columns[name][b].astype(np.float64)) / 6 - 1) for name in TIME_FIELDS]
            numbers.append(np.log(1 + len(columns["gap"][b])) / 2 - 1)
            expected = [plain.mlp(module.numbers[event.name], np.array(numbers))]
            for field in event.sparse:
                x, name = mean(columns[field.name][b]), f"{event.name}_{field.name}"
                expected.append(plain.linear(module.projections[name], x) if name in module.projections else x)
            np.testing.assert_allclose(out[b, at : at + len(expected)], expected, rtol=1e-3, atol=1e-3)
        at += 1 + len(event.sparse)
