"""InterFormer (arXiv 2411.09852): set features and sequences learn side by side and exchange summaries.

Each layer, on set tokens X [B, n, d] and one sequence S per event type:

    Cross         X_sum = Gating(MLP_token(X));  S_sum = Gating([S_CLS || S_PMA || S_recent])
    Interaction   X' = MLP(DHEN([X || S_sum])), an ensemble of dot products and a cross network
    Sequence      S' = MHA(PFFN(X_sum, S)) with rotary positions

The two sides of a layer run on the same summaries. X_sum of the first layer is prepended to the sequences, once, as CLS
tokens. Gating(X) = X ⊙ σ(MLP(X)), the usual reading of the printed σ(X ⊙ MLP(X)) [choice].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch, to_samples
from kunlun_jax.jagged import Jagged, over_shards, prepend, take_places
from kunlun_jax.layers.attention import WindowAttention
from kunlun_jax.layers.cross import CrossNetwork, pair_products
from kunlun_jax.layers.features import EventTokens, SetTokens
from kunlun_jax.layers.mlp import MLP, cast, linear, mix_tokens, normal
from kunlun_jax.layers.norm import layer_norm
from kunlun_jax.layers.rotary import rotary_angles
from kunlun_jax.layers.seed_pooling import SeedAttention
from kunlun_jax.model_configs import InterFormerConfig
from kunlun_jax.schema import EventType, FeatureSchema
from pallas_kernels import gdpa


class Gating(nnx.Module):
    """X ⊙ σ(MLP(X)) over the features of each token, one hidden layer of width d [choice]."""

    def __init__(self, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.mlp = MLP(width, [width], width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n d"]:
        return x * nnx.sigmoid(self.mlp(x))


class SetSummary(nnx.Module):
    """X_sum = Gating(MLP_token(X)): [B, n, d] → [B, n_sum, d]; the MLP mixes tokens through n hidden ones [choice]."""

    def __init__(self, config: InterFormerConfig, tokens: int, *, rngs: nnx.Rngs):
        self.mix = MLP(tokens, [tokens], config.n_sum, dtype=config.dtype, rngs=rngs)
        if config.gating:
            self.gate = Gating(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n_sum d"]:
        summary = self.mix(x.transpose(0, 2, 1)).transpose(0, 2, 1)
        return self.gate(summary) if hasattr(self, "gate") else summary


class SequenceSummary(nnx.Module):
    """S_sum = Gating([S_CLS || S_PMA || S_recent]) of one event type, [B, tokens, d].

    CLS: the sequence's first n_sum tokens. PMA: learned queries' attention. Recent: the latest events, 0 where a sample
    has fewer; CLS tokens are none.
    """

    def __init__(self, config: InterFormerConfig, *, rngs: nnx.Rngs):
        self.cls, self.recent = config.cls_tokens, config.recent
        common: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        if config.pma:
            self.pma = SeedAttention(
                config.pma, config.width, config.head_width, implementation=config.implementation, **common
            )
        if config.gating:
            self.gate = Gating(config.width, **common)

    def __call__(self, sequence: Jagged) -> Float[Array, "B n d"]:
        parts, lengths = [], sequence.lengths[..., None]
        if self.cls:
            parts.append(take_places(sequence, jnp.broadcast_to(jnp.arange(self.cls), (*lengths.shape[:2], self.cls))))
        if hasattr(self, "pma"):
            parts.append(self.pma(sequence)[0])
        if self.recent:
            places = lengths - self.recent + jnp.arange(self.recent)
            parts.append(take_places(sequence, jnp.where(places < self.cls, -1, places)))
        summary = jnp.concatenate(parts, axis=1)
        return self.gate(summary) if hasattr(self, "gate") else summary


class Interaction(nnx.Module):
    """X' = MLP(Norm(Σ_i Interaction_i(Z) + Z)) with Z = [X || S_sum]: [B, m, d] → [B, n, d].

    The DHEN layer keeps Z's shape, so that its shortcut is the identity; then a token map m → n and an MLP over
    features lead back to the shape of X [choice]. Ensemble: "dot", an MLP of all pairs' dot products, and "cross", the
    low-rank cross network of DCNv2 on the flattened Z.
    """

    def __init__(self, config: InterFormerConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.dtype = config.dtype
        flat, common = inputs * config.width, {"dtype": config.dtype, "rngs": rngs}
        if "dot" in config.interactions:
            self.dot = MLP(inputs * (inputs - 1) // 2, [config.hidden], flat, **common)
        if "cross" in config.interactions:
            self.cross = CrossNetwork(flat, config.cross_depth, rank=config.cross_rank, **common)
        self.norm = layer_norm(config.width, **common)
        self.tokens = normal(rngs, (outputs, inputs), inputs**-0.5)
        self.mlp = MLP(config.width, [config.hidden], config.width, **common)

    def __call__(self, z: Float[Array, "B m d"]) -> Float[Array, "B n d"]:
        ensemble = z
        if hasattr(self, "dot"):
            ensemble = ensemble + self.dot(pair_products(z)).reshape(z.shape)
        if hasattr(self, "cross"):
            ensemble = ensemble + self.cross(z.reshape(z.shape[0], -1)).reshape(z.shape)
        (tokens,) = cast(self.dtype, self.tokens)
        return self.mlp(mix_tokens(tokens, self.norm(ensemble)))


class GeneratedFFN(nnx.Module):
    """S + PFFN(X_sum, LN(S)) with PFFN(X_sum, S) = S W_PFFN and W_PFFN = X_sumᵀ W of each sample.

    Computed as (S X_sumᵀ) W, which is GDPA with keys X_sum, values W and no activation: the same product on jagged
    sequences, cheaper by the order, since W_PFFN [d, d] has rank n_sum only. For that rank the residual and the norm
    are needed [choice].
    """

    def __init__(self, config: InterFormerConfig, *, rngs: nnx.Rngs):
        self.dtype, self.implementation = config.dtype, config.implementation
        self.norm = layer_norm(config.width, dtype=config.dtype, rngs=rngs)
        self.weight = normal(rngs, (config.n_sum, config.width), (config.n_sum * config.width) ** -0.5)

    def __call__(self, sequence: Jagged, x_sum: Float[Array, "B n_sum d"]) -> Jagged:
        s = sequence.values
        samples, n_sum, width = x_sum.shape
        shards, per_shard = sequence.starts.shape
        keys = x_sum.astype(self.dtype).reshape(shards, per_shard * n_sum, 1, width)
        values = jnp.broadcast_to(cast(self.dtype, self.weight)[0], (samples, n_sum, width)).reshape(keys.shape)

        def product(q, k, v, starts, lengths):
            return gdpa(
                q[:, None],
                k,
                v,
                q_starts=starts,
                q_lengths=lengths,
                kv_starts=jnp.arange(per_shard, dtype=jnp.int32) * n_sum,
                kv_lengths=jnp.full(per_shard, n_sum, jnp.int32),
                max_q_length=sequence.max_length,
                max_kv_length=n_sum,
                activation="identity",
                implementation=self.implementation,
            )[:, 0]

        return sequence.with_values(
            s + over_shards(product, self.norm(s), keys, values, sequence.starts, sequence.lengths)
        )


class SharedFFN(nnx.Module):
    """S + LN(S) W with one W [d, d] for all samples: where the set features don't inform the sequences."""

    def __init__(self, config: InterFormerConfig, *, rngs: nnx.Rngs):
        self.norm = layer_norm(config.width, dtype=config.dtype, rngs=rngs)
        self.linear = linear(config.width, config.width, bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, sequence: Jagged, x_sum: None) -> Jagged:
        return sequence.with_values(sequence.values + self.linear(self.norm(sequence.values)))


class InterFormerLayer(nnx.Module):
    """Cross, then interaction and sequences side by side; only what the flow of information asks for is built."""

    def __init__(self, config: InterFormerConfig, schema: FeatureSchema, layer: int, *, rngs: nnx.Rngs):
        n = config.set_tokens(schema)
        if config.generates or (config.tells_sequences and config.cls and layer == 0):
            self.set_summary = SetSummary(config, n, rngs=rngs)
        self.summaries, self.ffns, self.attend = nnx.Dict(), nnx.Dict(), nnx.Dict()
        for event in schema.events if config.flow != "sole" else ():
            if config.tells_set:
                self.summaries[event.name] = SequenceSummary(config, rngs=rngs)
            self.ffns[event.name] = (GeneratedFFN if config.generates else SharedFFN)(config, rngs=rngs)
            self.attend[event.name] = WindowAttention(
                config.width,
                config.head_width,
                None,
                dtype=config.dtype,
                implementation=config.implementation,
                rngs=rngs,
            )
        told = config.summary_tokens * len(schema.events) if config.tells_set else 0
        self.interaction = Interaction(config, n + told, n, rngs=rngs)


class InterFormer(nnx.Module):
    """EmbeddedBatch → logits [B, tasks], float32; the head is MLP([X_sum || S_sum]) after the last layer.

    The head has summaries of its own: those inside the last layer are older than what that layer makes [choice]. Each
    event type has a sequence of its own, all d wide, as their lengths and times differ [choice]; the fields of an event
    are joined by MaskNet.

    Raises:
      ValueError: the config doesn't fit the schema; the schema has no events while `flow` wants sequences; the set side
        informs the sequences while candidates share stored ones.
    """

    def __init__(self, config: InterFormerConfig, schema: FeatureSchema, *, rngs: nnx.Rngs):
        config.check(schema)
        self.config = config
        self.events = schema.events if config.flow != "sole" else ()
        common: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        self.set_tokens = SetTokens(schema, config.width, dense_tokens=config.dense_tokens, **common)
        self.event_tokens, self.cls, self.summaries = nnx.Dict(), nnx.Dict(), nnx.Dict()
        for event in self.events:
            self.event_tokens[event.name] = EventTokens(schema, event, config.width, **common)
            self.summaries[event.name] = SequenceSummary(config, rngs=rngs)
            if config.cls and not config.tells_sequences:
                self.cls[event.name] = normal(rngs, (config.n_sum, config.width), 1.0)
        self.layers = nnx.List([InterFormerLayer(config, schema, layer, rngs=rngs) for layer in range(config.depth)])
        self.set_summary = SetSummary(config, config.set_tokens(schema), rngs=rngs)
        inputs = (config.n_sum + config.summary_tokens * len(self.events)) * config.width
        self.head = MLP(inputs, config.head_hidden, len(schema.tasks), **common)

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B tasks"]:
        with jax.named_scope("set_tokens"):
            x = self.set_tokens(batch).astype(self.config.dtype)
        sequences = {}
        for event in self.events:
            with jax.named_scope(f"{event.name}.event_tokens"):
                sequences[event.name] = self.event_tokens[event.name](batch.events[event.name])
        angles: dict[str, Any] = {}
        for number, layer in enumerate(self.layers):
            with jax.named_scope("interaction"):
                x_sum = layer.set_summary(x) if hasattr(layer, "set_summary") else None
            if number == 0:
                sequences = {e.name: self.begin(e, sequences[e.name], x_sum, x.shape[0]) for e in self.events}
                angles = {name: rotary_angles(s, self.config.head_width, "none") for name, s in sequences.items()}
            told = [self.told(e, layer.summaries[e.name], sequences, batch) for e in self.events if layer.summaries]
            with jax.named_scope("interaction"):
                x = layer.interaction(jnp.concatenate([x, *told], axis=1))
            for name in sequences:
                with jax.named_scope(f"{name}.pffn"):
                    mixed = layer.ffns[name](sequences[name], x_sum)
                with jax.named_scope(f"{name}.attention"):
                    sequences[name] = layer.attend[name](mixed, angles[name])
        told = [self.told(e, self.summaries[e.name], sequences, batch) for e in self.events]
        with jax.named_scope("head"):
            summary = jnp.concatenate([self.set_summary(x), *told], axis=1)
            return self.head(summary.reshape(x.shape[0], -1)).astype(jnp.float32)

    def begin(self, event: EventType, sequence: Jagged, x_sum: Any, samples: int) -> Jagged:
        """The sequence with its CLS tokens in front: X_sum, or learned ones where the set side stays silent."""
        stored = sequence.starts.size
        if x_sum is not None and stored != samples:
            raise ValueError(
                f"events {event.name!r}: {stored} sequences for {samples} samples; in flow {self.config.flow!r} every "
                f'sample has a sequence side of its own. Use flow "s2n" or "sep", or store one sequence per sample'
            )
        if not self.config.cls:
            return sequence
        if x_sum is None:
            x_sum = jnp.broadcast_to(self.cls[event.name][...], (stored, self.config.n_sum, self.config.width))
        return prepend(x_sum, sequence)

    def told(self, event: EventType, summary: SequenceSummary, sequences, batch) -> Any:
        """A sequence's summary for every sample, [B, n, d]."""
        with jax.named_scope(f"{event.name}.seed_pooling"):
            return to_samples(summary(sequences[event.name]), batch.request_index, event.scope)
