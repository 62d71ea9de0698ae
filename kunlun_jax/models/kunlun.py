"""Kunlun (arXiv 2602.10016): a two-stream model of set features and behaviour sequences.

Every layer lets the two streams inform each other:

    set → sequence    K, V = WeightGeneration(X) are the keys and values of the GDPA-PFFN:  P = PFFN(S; K, V)
    sequence → set    H = HSP(P), taken after the PFFN and before the self-attention, joins the set tokens
    sequence          S' = MHA(P) within a sliding window
    set               X' = MixtureOfWukongExperts([X || H]); the raw X bypasses weight generation and pooling  [fig]

Computation skip runs the first half of the sequence side in even layers and the attention in odd ones, which reuse the
summary H of the layer before. Each event type has a stack of its own size; the stacks meet in the interaction.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch, to_samples
from kunlun_jax.jagged import Jagged
from kunlun_jax.layers.attention import WindowAttention
from kunlun_jax.layers.features import EventTokens, SetTokens
from kunlun_jax.layers.gdpa import NaivePFFN, PersonalisedFFN
from kunlun_jax.layers.mlp import MLP
from kunlun_jax.layers.rotary import rotary_angles
from kunlun_jax.layers.seed_pooling import HierarchicalSeedPooling, PooledMultiheadAttention
from kunlun_jax.layers.wukong import WukongExperts
from kunlun_jax.model_configs import EventConfig, KunlunConfig
from kunlun_jax.schema import EventType, FeatureSchema


class SequenceLayer(nnx.Module):
    """One layer of one event type: PFFN and seed pooling, self-attention, or both.

    Scopes named EVENT_TYPE.MODULE tell a profile which module an operation belongs to.
    """

    def __init__(
        self,
        config: KunlunConfig,
        event: EventConfig,
        event_type: EventType,
        layer: int,
        *,
        tokens: int,
        rngs: nnx.Rngs,
    ):
        self.name = event_type.name
        common: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        operator: dict[str, Any] = {"implementation": config.implementation, **common}
        if config.runs_pffn(layer):
            sizes = (tokens, config.width, config.generated, event.width)
            if config.pffn == "gdpa":
                tau = event_type.max_length if config.tau == "maxlen" else 1.0
                self.pffn = PersonalisedFFN(*sizes, event.head_width, activation=config.activation, tau=tau, **operator)
            else:
                self.pffn = NaivePFFN(*sizes, **common)
            if config.pooling == "hsp":
                self.pool = HierarchicalSeedPooling(
                    event.n_seeds,
                    event.n_tokens,
                    event.width,
                    event.head_width,
                    config.width,
                    rank=config.kron_rank,
                    compression=config.compression,
                    **operator,
                )
            else:
                self.pool = PooledMultiheadAttention(
                    event.n_tokens, event.width, event.head_width, config.width, **operator
                )
        if config.runs_attention(layer, event):
            self.attend = WindowAttention(event.width, event.head_width, event.window, **operator)

    def __call__(self, sequence: Jagged, summary, tokens: Float[Array, "b n d"], angles):
        if hasattr(self, "pffn"):
            with jax.named_scope(f"{self.name}.pffn"):
                sequence = self.pffn(sequence, tokens)
            with jax.named_scope(f"{self.name}.seed_pooling"):
                summary, sequence = self.pool(sequence)
        if hasattr(self, "attend"):
            with jax.named_scope(f"{self.name}.attention"):
                sequence = self.attend(sequence, angles)
        return sequence, summary


class KunlunLayer(nnx.Module):
    """One layer: the sequence layers of all event types that are still active, then the global interaction."""

    def __init__(self, config: KunlunConfig, schema: FeatureSchema, layer: int, *, rngs: nnx.Rngs):
        n = config.set_tokens(schema)
        generating = config.set_tokens(schema, "request") if config.weight_inputs == "request" else n
        self.sequences = nnx.Dict(
            {
                event.name: SequenceLayer(config, config.events[event.name], event, layer, tokens=generating, rngs=rngs)
                for event in schema.events
                if layer < config.events[event.name].depth
            }
        )
        self.interaction = WukongExperts(
            n + config.summary_tokens,
            n,
            config.width,
            experts=config.experts,
            expert_inputs=config.expert_inputs,
            rank=config.interaction_rank,
            hidden=config.interaction_hidden,
            dtype=config.dtype,
            rngs=rngs,
        )


class Kunlun(nnx.Module):
    """EmbeddedBatch → logits [B, tasks], float32.

    Raises:
      ValueError: the config doesn't fit the schema, or the sequence side depends on the candidate
        (`weight_inputs="all"`) while candidates share stored sequences.
    """

    def __init__(self, config: KunlunConfig, schema: FeatureSchema, *, rngs: nnx.Rngs):
        config.check(schema)
        for name in config.dead_layers():
            warnings.warn(
                f"events {name!r}: with CompSkip and depth {config.events[name].depth} the stack's last layer "
                f"has nothing to compute and is left out; an odd depth uses every layer",
                stacklevel=2,
            )
        self.config, self.schema = config, schema
        self.set_tokens = SetTokens(
            schema, config.width, dense_tokens=config.dense_tokens, dtype=config.dtype, rngs=rngs
        )
        self.event_tokens = nnx.Dict(
            {
                event.name: EventTokens(schema, event, config.events[event.name].width, dtype=config.dtype, rngs=rngs)
                for event in schema.events
            }
        )
        self.layers = nnx.List([KunlunLayer(config, schema, layer, rngs=rngs) for layer in range(config.depth)])
        self.head = MLP(
            config.set_tokens(schema) * config.width,
            config.head_hidden,
            len(schema.tasks),
            dtype=config.dtype,
            rngs=rngs,
        )

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B tasks"]:
        with jax.named_scope("set_tokens"):
            x = self.set_tokens(batch)
        shared = self.set_tokens.of_scope(batch, "request") if self.config.weight_inputs == "request" else None
        angles = {event.name: self.angles(event, batch) for event in self.schema.events}
        sequences = {}
        for event in self.schema.events:
            with jax.named_scope(f"{event.name}.event_tokens"):
                sequences[event.name] = self.event_tokens[event.name](batch.events[event.name])
        summaries: dict[str, Any] = dict.fromkeys(sequences)
        for layer in self.layers:
            for event in self.schema.events:
                name = event.name
                if name in layer.sequences:
                    tokens = self.generating_tokens(event, x, shared, batch)
                    sequences[name], summaries[name] = layer.sequences[name](
                        sequences[name], summaries[name], tokens, angles[name]
                    )
            with jax.named_scope("interaction"):
                h = [to_samples(summaries[e.name], batch.request_index, e.scope) for e in self.schema.events]
                x = layer.interaction(jnp.concatenate([x, *h], axis=1))
        with jax.named_scope("head"):
            return self.head(x.reshape(x.shape[0], -1)).astype(jnp.float32)

    def angles(self, event: EventType, batch: EmbeddedBatch) -> Float[Array, "P N half"] | None:
        """Rotary angles, where any layer of this event type attends."""
        config = self.config.events[event.name]
        if not any(self.config.runs_attention(layer, config) for layer in range(config.depth)):
            return None
        return rotary_angles(batch.events[event.name], config.head_width, self.config.rotary_time)

    def generating_tokens(self, event, x, shared, batch) -> Any:
        """The set tokens that generate the weights of one event type, [R or B, n, d]: a row per stored sequence.

        With "request" they are the request's own tokens as they entered the model [choice]: deeper ones have met the
        candidate.
        """
        if shared is not None:
            return to_samples(shared, batch.request_index, "request") if event.scope == "candidate" else shared
        stored = batch.events[event.name].starts.size
        if stored != x.shape[0]:
            raise ValueError(
                f'events {event.name!r}: {stored} sequences for {x.shape[0]} samples; weight_inputs="all" gives every '
                f'candidate a sequence side of its own. Use weight_inputs="request" or store one sequence per sample'
            )
        return x
