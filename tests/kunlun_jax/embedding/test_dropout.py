"""Dropped embedding fields: whole rows, the right share, the same mean, numbers untouched."""

import jax
import numpy as np
import pytest
from batches import random_embedded, small_schema

from kunlun_jax.embedding.dropout import drop_fields

SCHEMA = small_schema(max_length=40)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_whole_fields_are_dropped_and_the_rest_grows(rate):
    batch = random_embedded(SCHEMA, np.random.default_rng(0), samples=400)
    dropped = jax.jit(drop_fields)(batch, jax.random.key(0), rate)
    pairs = [(batch.sparse[f.name], dropped.sparse[f.name]) for f in SCHEMA.sparse]
    for event in SCHEMA.events:
        before, after = batch.events[event.name].values, dropped.events[event.name].values
        pairs += [(before[f.name], after[f.name]) for f in event.sparse]
        for name in {*before} - {f.name for f in event.sparse}:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    masks = []
    for before, after in pairs:
        kept = np.any(np.asarray(after) != 0, axis=-1)
        np.testing.assert_allclose(after, np.where(kept[..., None], before / (1 - rate), 0), rtol=1e-6)
        assert (1 - kept).mean() == pytest.approx(rate, abs=0.09 * (rate > 0))
        masks.append(kept)
    for name in batch.dense:
        np.testing.assert_array_equal(dropped.dense[name], batch.dense[name])
    if rate:  # fields fall apart from one another
        assert len({mask.tobytes() for mask in masks[: len(SCHEMA.sparse)]}) == len(SCHEMA.sparse)


def test_the_key_decides():
    batch = random_embedded(SCHEMA, np.random.default_rng(1))
    one, same, other = (drop_fields(batch, jax.random.key(k), 0.5).sparse["item"] for k in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(np.asarray(one) != np.asarray(other))
