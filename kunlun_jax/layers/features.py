"""Feature preprocessing: embedded features become set tokens X and event tokens S [2nd]."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch, to_samples
from kunlun_jax.jagged import Jagged, inside_samples, later_events, sum_over_samples
from kunlun_jax.layers.mlp import MLP, MaskNet, cast, linear, normal
from kunlun_jax.schema import TIME_FIELDS, EventType, FeatureSchema, Scope


class SetTokens(nnx.Module):
    """All dense inputs → one MLP → `dense_tokens` tokens; every sparse field → one token of width d.

    Tokens of request-scope fields come first, so that `request(...)` is what the candidates of a request share. Dense
    fields of each scope have an MLP of their own [choice]. A field whose table is as wide as the model needs no
    projection; the others are projected field by field in one product per table width.

    Wukong's unequal fields: an important one may own several tokens, k times the model's width cut from its table's row
    or projected to that (`embeddings`); unimportant ones, narrow and grouped, share one (`groups`).
    """

    def __init__(
        self,
        schema: FeatureSchema,
        width: int,
        *,
        dense_tokens: int,
        embeddings: Mapping[str, int] | None = None,
        groups: Sequence[Sequence[str]] = (),
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.schema, self.width, self.dense_tokens, self.dtype = schema, width, dense_tokens, dtype
        self.joined = joined_fields(schema, embeddings or {}, groups)
        self.dense = nnx.Dict()
        self.projections = nnx.Dict()
        self.joins = nnx.Dict()
        for scope in get_args(Scope):
            dense = _of_scope(schema.dense, scope)
            if dense:
                self.dense[scope] = MLP(len(dense), [2 * width], dense_tokens * width, dtype=dtype, rngs=rngs)
            for w, fields in self._alone(scope).items():
                if w != width:
                    self.projections[f"{scope}_{w}"] = normal(rngs, (len(fields), w, width), w**-0.5)
        for join in self.joined:
            if join.inputs != join.tokens * width:
                self.joins[join.name] = linear(join.inputs, join.tokens * width, bias=False, dtype=dtype, rngs=rngs)

    def count(self, scope: Scope) -> int:
        dense = self.dense_tokens if _of_scope(self.schema.dense, scope) else 0
        joined = sum(join.tokens for join in self.joined if join.scope == scope)
        return dense + sum(map(len, self._alone(scope).values())) + joined

    def _alone(self, scope: Scope):
        """The fields of one token each, by the width of their table."""
        taken = {name for join in self.joined for name in join.fields}
        fields = (f for f in _of_scope(self.schema.sparse, scope) if f.name not in taken)
        return _by_table_width(self.schema, fields)

    def of_scope(self, batch: EmbeddedBatch, scope: Scope) -> Float[Array, "R_or_B n d"] | None:
        """The tokens of one scope, per request or per candidate; None where the schema has no such field."""
        tokens = []
        if dense := _of_scope(self.schema.dense, scope):
            x = jnp.stack([batch.dense[field.name] for field in dense], axis=-1)
            tokens.append(self.dense[scope](x).reshape(x.shape[0], self.dense_tokens, self.width))
        for w, fields in self._alone(scope).items():
            x = jnp.stack([batch.sparse[field.name] for field in fields], axis=1).astype(self.dtype)
            if w != self.width:
                (projection,) = cast(self.dtype, self.projections[f"{scope}_{w}"])
                x = jnp.einsum("bnw,nwd->bnd", x, projection)
            tokens.append(x)
        for join in self.joined:
            if join.scope == scope:
                x = jnp.concatenate([batch.sparse[name] for name in join.fields], axis=-1).astype(self.dtype)
                x = self.joins[join.name](x) if join.name in self.joins else x
                tokens.append(x.reshape(x.shape[0], join.tokens, self.width))
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
        numbers = [_numbers(self.event, events), jnp.log1p(later_events(events))[..., None] / 2 - 1]
        # Behind the barrier XLA computes them once, not again for every column that they are joined with.
        numbers = lax.optimization_barrier(jnp.concatenate(numbers, axis=-1))
        columns = [*(events.values[field.name] for field in self.event.sparse), numbers]
        # What lies outside every sample is undefined, and a NaN there would reach the gradients of the parameters.
        x = jnp.where(inside_samples(events)[..., None], jnp.concatenate(columns, axis=-1), 0)
        return events.with_values(self.join(x.astype(self.dtype)))


class PooledEvents(nnx.Module):
    """Sequences as set features: for each event type, the mean embedding of each of its sparse fields, and its numbers.

    The numbers, the means of dense fields and times and log(1 + events), pass one MLP to one token per event type
    [choice]. An empty sequence gives means of 0. This is all that a model without a sequence side sees of histories.
    """

    def __init__(self, schema: FeatureSchema, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.schema, self.width, self.dtype = schema, width, dtype
        self.numbers, self.projections = nnx.Dict(), nnx.Dict()
        for event in schema.events:
            self.numbers[event.name] = MLP(pooled_numbers(event), [2 * width], width, dtype=dtype, rngs=rngs)
            for field in event.sparse:
                if (w := schema.table(field.table).width) != width:
                    name = f"{event.name}_{field.name}"
                    self.projections[name] = linear(w, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B n d"] | None:
        """One token per event type and one per sparse field of each; None where the schema has no events."""
        tokens = [self._of_type(event, batch) for event in self.schema.events]
        return jnp.concatenate(tokens, axis=1) if tokens else None

    def _of_type(self, event: EventType, batch: EmbeddedBatch) -> Any:
        events = batch.events[event.name]
        count = events.lengths.reshape(-1, 1)
        columns = [_numbers(event, events), *(events.values[field.name] for field in event.sparse)]
        sums = sum_over_samples(events.with_values(jnp.concatenate(columns, axis=-1).astype(jnp.float32)))
        sizes = [self.schema.table(field.table).width for field in event.sparse]
        numbers, *fields = jnp.split(sums / jnp.maximum(count, 1), np.cumsum([columns[0].shape[-1], *sizes[:-1]]), -1)
        numbers = jnp.concatenate([numbers, jnp.log1p(count) / 2 - 1], axis=-1)
        tokens = [self.numbers[event.name](numbers.astype(self.dtype))]
        for field, x in zip(event.sparse, fields, strict=True):
            name, x = f"{event.name}_{field.name}", x.astype(self.dtype)
            tokens.append(self.projections[name](x) if name in self.projections else x)
        return to_samples(jnp.stack(tokens, axis=1), batch.request_index, event.scope)


def pooled_numbers(event: EventType) -> int:
    """Numbers that describe a pooled sequence besides its embeddings: dense fields, times and how many events."""
    return len(event.dense) + len(TIME_FIELDS) + 1


def pooled_tokens(schema: FeatureSchema) -> int:
    """How many tokens `PooledEvents` makes."""
    return sum(1 + len(event.sparse) for event in schema.events)


def _numbers(event: EventType, events: Jagged) -> Float[Array, "P N numbers"]:
    """Dense fields, and log(1 + seconds) of each time, about centred and scaled."""
    columns = [events.values[field.name] for field in event.dense]
    return jnp.stack([*columns, *(jnp.log1p(events.values[name]) / 6 - 1 for name in TIME_FIELDS)], axis=-1)


class JoinedFields(NamedTuple):
    """Fields of one scope that become `tokens` tokens together; `inputs` is the sum of their tables' widths."""

    name: str
    fields: tuple[str, ...]
    scope: Scope
    inputs: int
    tokens: int


def joined_fields(
    schema: FeatureSchema, embeddings: Mapping[str, int], groups: Sequence[Sequence[str]]
) -> tuple[JoinedFields, ...]:
    """What `embeddings` (field → its tokens) and `groups` (fields that share a token) ask for.

    Raises:
      ValueError: a name is no sparse set field or occurs twice, a group mixes scopes, a field owns fewer than 1 token.
    """
    fields = {f.name: f for f in schema.sparse}
    wanted = [((name,), count) for name, count in embeddings.items()] + [(tuple(group), 1) for group in groups]
    names = [name for group, _ in wanted for name in group]
    if unknown := sorted(set(names) - set(fields)):
        raise ValueError(f"field_embeddings, field_groups: no sparse set fields {unknown}; there are {sorted(fields)}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"field_embeddings, field_groups: {twice} named more than once; a field has one place")
    if few := {name: count for name, count in embeddings.items() if count < 1}:
        raise ValueError(f"field_embeddings: every field owns at least 1 token, got {few}")
    joined = []
    for group, tokens in wanted:
        scopes: set[Scope] = {fields[name].scope for name in group}
        if len(scopes) != 1:
            raise ValueError(f"field_groups: {list(group)} have scopes {sorted(scopes)}; group fields of one scope")
        inputs = sum(schema.table(fields[name].table).width for name in group)
        joined.append(JoinedFields("_".join(group), group, scopes.pop(), inputs, tokens))
    return tuple(joined)


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
