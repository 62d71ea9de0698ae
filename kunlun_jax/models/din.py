"""DIN (arXiv 1706.06978): target attention from the candidate to the history. A classic for orientation."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch, to_samples
from kunlun_jax.jagged import Jagged, inside_samples, spread, sum_over_samples
from kunlun_jax.layers.features import EventTokens, SetTokens
from kunlun_jax.layers.mlp import MLP
from kunlun_jax.model_configs import DINConfig, matched_fields
from kunlun_jax.schema import EventType, FeatureSchema


class TargetAttention(nnx.Module):
    """Σ_t a(e_t, v) s_t / √T over the events of a sample [P, N, ...] → [B, d]; no softmax, as in the paper.

    e are the embeddings of the event's fields that the candidate has too, v the candidate's from the same tables, and
    s all of the event. a = MLP([e, v, e − v, e ⊙ v, s]); s tells it the event's time and rating [choice]. T is the
    event type's maximum length; the paper's bare sum would start out too large for long histories [choice].
    """

    def __init__(self, config: DINConfig, schema: FeatureSchema, event: EventType, *, rngs: nnx.Rngs):
        self.event, self.dtype = event, config.dtype
        self.pairs = matched_fields(schema, event)
        self.tokens = EventTokens(schema, event, config.width, dtype=config.dtype, rngs=rngs)
        matched = config.matched_width(schema, event)
        self.score = MLP(4 * matched + config.width, config.attention_hidden, 1, dtype=config.dtype, rngs=rngs)

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B d"]:
        events, kinds = batch.events[self.event.name], [(own.name, theirs) for own, theirs in self.pairs]
        target = jnp.concatenate(
            [to_samples(batch.sparse[f.name], batch.request_index, f.scope) for _, f in kinds], axis=-1
        )
        stored = events.starts.size
        if stored != target.shape[0]:
            raise ValueError(
                f"events {self.event.name!r}: {stored} sequences for {target.shape[0]} samples; target attention looks "
                f"at a history once per candidate. Store one sequence per sample"
            )
        inside = inside_samples(events)[..., None]
        e = jnp.where(inside, jnp.concatenate([events.values[name] for name, _ in kinds], axis=-1), 0)
        s = self.tokens(events).values
        v = spread(target, events)
        score = self.score(jnp.concatenate([e, v, e - v, e * v, s], axis=-1).astype(self.dtype))
        weighted = Jagged(score * s, events.starts, events.lengths, events.max_length)
        return sum_over_samples(weighted) / self.event.max_length**0.5


class DIN(nnx.Module):
    """EmbeddedBatch → logits [B, tasks], float32: MLP of the flattened set tokens and each event type's attention.

    SiLU where the paper has Dice [choice].

    Raises:
      ValueError: the schema has no events, or an event type shares no table with the set features.
    """

    def __init__(self, config: DINConfig, schema: FeatureSchema, *, rngs: nnx.Rngs):
        config.check(schema)
        self.config, self.schema = config, schema
        self.set_tokens = SetTokens(
            schema, config.width, dense_tokens=config.dense_tokens, dtype=config.dtype, rngs=rngs
        )
        self.attend = nnx.Dict({e.name: TargetAttention(config, schema, e, rngs=rngs) for e in schema.events})
        inputs = (config.set_tokens(schema) + len(schema.events)) * config.width
        self.head = MLP(inputs, config.hidden, len(schema.tasks), dtype=config.dtype, rngs=rngs)

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B tasks"]:
        x = self.set_tokens(batch)
        interests = [self.attend[event.name](batch) for event in self.schema.events]
        return self.head(jnp.concatenate([x.reshape(x.shape[0], -1), *interests], axis=-1)).astype(jnp.float32)
