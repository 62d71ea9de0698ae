"""Feature preprocessing: embedded features become set tokens X and event tokens S [2nd]."""

from typing import get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch, to_samples
from kunlun_jax.jagged import Jagged, inside_samples, later_events
from kunlun_jax.layers.mlp import MLP, MaskNet, cast, normal
from kunlun_jax.schema import TIME_FIELDS, EventType, FeatureSchema, Scope


class SetTokens(nnx.Module):
    """All dense inputs → one MLP → `dense_tokens` tokens; every sparse field → one token of width d.

    Tokens of request-scope fields come first, so that `request(...)` is what the candidates of a request share. Dense
    fields of each scope have an MLP of their own [choice]. A field whose table is as wide as the model needs no
    projection; the others are projected field by field in one product per table width.
    """

    def __init__(self, schema: FeatureSchema, width: int, *, dense_tokens: int, dtype: str, rngs: nnx.Rngs):
        self.schema, self.width, self.dense_tokens, self.dtype = schema, width, dense_tokens, dtype
        self.dense = nnx.Dict()
        self.projections = nnx.Dict()
        for scope in get_args(Scope):
            dense, sparse = _of_scope(schema.dense, scope), _of_scope(schema.sparse, scope)
            if dense:
                self.dense[scope] = MLP(len(dense), [2 * width], dense_tokens * width, dtype=dtype, rngs=rngs)
            for w, fields in _by_table_width(schema, sparse).items():
                if w != width:
                    self.projections[f"{scope}_{w}"] = normal(rngs, (len(fields), w, width), w**-0.5)

    def count(self, scope: Scope) -> int:
        dense = self.dense_tokens if _of_scope(self.schema.dense, scope) else 0
        return dense + len(_of_scope(self.schema.sparse, scope))

    def of_scope(self, batch: EmbeddedBatch, scope: Scope) -> Float[Array, "R_or_B n d"] | None:
        """The tokens of one scope, per request or per candidate; None where the schema has no such field."""
        tokens = []
        if dense := _of_scope(self.schema.dense, scope):
            x = jnp.stack([batch.dense[field.name] for field in dense], axis=-1)
            tokens.append(self.dense[scope](x).reshape(x.shape[0], self.dense_tokens, self.width))
        for w, fields in _by_table_width(self.schema, _of_scope(self.schema.sparse, scope)).items():
            x = jnp.stack([batch.sparse[field.name] for field in fields], axis=1).astype(self.dtype)
            if w != self.width:
                (projection,) = cast(self.dtype, self.projections[f"{scope}_{w}"])
                x = jnp.einsum("bnw,nwd->bnd", x, projection)
            tokens.append(x)
        return jnp.concatenate(tokens, axis=1) if tokens else None

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B n d"]:
        tokens = [(self.of_scope(batch, scope), scope) for scope in get_args(Scope)]
        return jnp.concatenate([to_samples(x, batch.request_index, s) for x, s in tokens if x is not None], axis=1)


class EventTokens(nnx.Module):
    """Per event, its fields' embeddings, its dense fields and its times → MaskNet → d_e.

    Recency is a field like the others [choice], since the rotary encoding only reaches the self-attention, while the
    GDPA-PFFN and the seed pooling should be able to tell old events from new ones too: log(1 + seconds) of gap and age,
    and log(1 + later events of the sample), each centred and scaled to about unit size. Seconds, not days: what a user
    did within the same visit would otherwise all be 0.
    """

    def __init__(self, schema: FeatureSchema, event: EventType, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.event, self.dtype = event, dtype
        self.join = MaskNet(event_inputs(schema, event), width, dtype=dtype, rngs=rngs)

    def __call__(self, events: Jagged) -> Jagged:
        values = events.values
        columns = [values[field.name] for field in self.event.sparse]
        columns += [values[field.name][..., None] for field in self.event.dense]
        columns += [jnp.log1p(values[name])[..., None] / 6 - 1 for name in TIME_FIELDS]
        columns += [jnp.log1p(later_events(events))[..., None] / 2 - 1]
        # What lies outside every sample is undefined, and a NaN there would reach the gradients of the parameters.
        x = jnp.where(inside_samples(events)[..., None], jnp.concatenate(columns, axis=-1), 0)
        return events.with_values(self.join(x.astype(self.dtype)))


def event_inputs(schema: FeatureSchema, event: EventType) -> int:
    """Numbers that describe one event before they are joined: embeddings, dense fields, times and its recency rank."""
    return sum(schema.table(f.table).width for f in event.sparse) + len(event.dense) + len(TIME_FIELDS) + 1


def _of_scope(fields, scope):
    return tuple(field for field in fields if field.scope == scope)


def _by_table_width(schema, fields):
    """Fields grouped by the width of their table, in schema order within a group."""
    groups = {}
    for field in fields:
        groups.setdefault(schema.table(field.table).width, []).append(field)
    return groups
