"""Set tokens and event tokens equal their definitions: every field reaches its own token, by name and scope."""

import numpy as np
import plain
import pytest
from batches import random_embedded, small_schema
from flax import nnx

from kunlun_jax.jagged import unpack
from kunlun_jax.layers.features import EventTokens, SetTokens
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
