"""Dropping whole fields of embeddings while training: a model then can't lean on the rows that it has seen most."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from kunlun_jax.batch import EmbeddedBatch


def drop_fields(batch: EmbeddedBatch, key: PRNGKeyArray, rate: ArrayLike) -> EmbeddedBatch:
    """Each sparse field of each sample and of each event becomes 0 with probability `rate`, else grows by 1/(1 − rate).

    Numbers and times stay. Rate 0 changes nothing; it may be traced. A field's draw depends on the key and its name.
    """

    def drop(name: str, x: Any) -> Float[Array, "*rest width"]:
        kept = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), (*x.shape[:-1], 1)) >= rate
        return jnp.where(kept, x / (1 - rate), 0)

    events = {}
    for event, sequence in batch.events.items():
        embeddings = {f"{event}.{n}": x for n, x in sequence.values.items() if x.ndim > 2}
        dropped = {name.partition(".")[2]: drop(name, x) for name, x in embeddings.items()}
        events[event] = sequence.with_values({**sequence.values, **dropped})
    return dataclasses.replace(batch, sparse={n: drop(n, x) for n, x in batch.sparse.items()}, events=events)
