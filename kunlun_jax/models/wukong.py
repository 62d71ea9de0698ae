"""Wukong (arXiv 2403.02545): stacked factorisation machines on set features.

    X_{i+1} = LN( concat(FMB_i(X_i), LCB_i(X_i)) + Res(X_i) )      [B, n_F + n_L, d]
    LCB(X)  = W_L X
    FMB(X)  = reshape( MLP( LN( flatten( FM(X) ) ) ), [n_F, d] )

Layer l sees interactions of up to 2^l inputs. Behaviour sequences enter as pooled set features, as in the paper.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.batch import EmbeddedBatch
from kunlun_jax.layers.features import PooledEvents, SetTokens
from kunlun_jax.layers.mlp import MLP, cast, mix_tokens, normal
from kunlun_jax.layers.norm import layer_norm
from kunlun_jax.layers.wukong import factorisation_machine, gram
from kunlun_jax.model_configs import WukongConfig
from kunlun_jax.schema import FeatureSchema


class FactorisationMachine(nnx.Module):
    """Pairwise interactions of n tokens: X Xᵀ [B, n, n] when plain, else X (Xᵀ Y) [B, n, k] with Xᵀ Y first.

    Y [n, k] is learned when "optimised"; when "attentive", Y = MLP(C X) is made per sample from tokens compressed by
    C [c, n], one hidden layer of width c·d [choice]. With Y = I the optimised machine is the plain one.
    """

    def __init__(self, tokens: int, config: WukongConfig, *, rngs: nnx.Rngs):
        self.kind, self.rank, self.dtype = config.machine, config.rank, config.dtype
        if self.kind == "optimised":
            self.y = normal(rngs, (tokens, self.rank), tokens**-0.5)
        if self.kind == "attentive":
            flat = config.attentive_tokens * config.width
            self.compress = normal(rngs, (config.attentive_tokens, tokens), tokens**-0.5)
            self.make_y = MLP(flat, [flat], tokens * self.rank, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B n k"]:
        if self.kind == "plain":
            return gram(x)
        if self.kind == "optimised":
            (y,) = cast(self.dtype, self.y)
            return factorisation_machine(x, y)
        (compress,) = cast(self.dtype, self.compress)
        compressed = mix_tokens(compress, x).reshape(x.shape[0], -1)
        y = self.make_y(compressed).reshape(*x.shape[:2], self.rank)
        return jnp.einsum("bnd,bdk->bnk", x, jnp.einsum("bnd,bnk->bdk", x, y))


class WukongLayer(nnx.Module):
    """[B, n, d] → [B, n_F + n_L, d]; the residual is the identity, or a learned token map where the counts differ."""

    def __init__(self, tokens: int, config: WukongConfig, *, rngs: nnx.Rngs):
        self.dtype, self.factorised, self.width = config.dtype, config.factorised, config.width
        if config.factorised:
            interactions = tokens * (tokens if config.machine == "plain" else config.rank)
            self.machine = FactorisationMachine(tokens, config, rngs=rngs)
            self.machine_norm = layer_norm(interactions, dtype=config.dtype, rngs=rngs)
            self.mlp = MLP(interactions, config.hidden, config.factorised * config.width, dtype=config.dtype, rngs=rngs)
        if config.compressed:
            self.compress = normal(rngs, (config.compressed, tokens), tokens**-0.5)
        if config.residual and tokens != config.factorised + config.compressed:
            self.residual = normal(rngs, (config.factorised + config.compressed, tokens), tokens**-0.5)
        self.passes = config.residual
        self.norm = layer_norm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> Float[Array, "B m d"]:
        parts = []
        if hasattr(self, "machine"):
            flat = self.machine_norm(self.machine(x).reshape(x.shape[0], -1))
            parts.append(self.mlp(flat).reshape(-1, self.factorised, self.width))
        if hasattr(self, "compress"):
            parts.append(self._map(self.compress, x))
        out = jnp.concatenate(parts, axis=1)
        if self.passes:
            out = out + (self._map(self.residual, x) if hasattr(self, "residual") else x)
        return self.norm(out)

    def _map(self, weights: nnx.Param, x: Float[Array, "B n d"]) -> Float[Array, "B m d"]:
        (mixing,) = cast(self.dtype, weights)
        return mix_tokens(mixing, x)


class Wukong(nnx.Module):
    """EmbeddedBatch → logits [B, tasks], float32.

    Raises:
      ValueError: the config doesn't fit the schema.
    """

    def __init__(self, config: WukongConfig, schema: FeatureSchema, *, rngs: nnx.Rngs):
        config.check(schema)
        self.config = config
        common = {"dtype": config.dtype, "rngs": rngs}
        self.set_tokens = SetTokens(
            schema,
            config.width,
            dense_tokens=config.dense_tokens,
            embeddings=config.field_embeddings,
            groups=config.groups,
            **common,
        )
        self.pooled = PooledEvents(schema, config.width, **common)
        tokens = [config.tokens(schema)] + [config.factorised + config.compressed] * config.depth
        self.layers = nnx.List([WukongLayer(n, config, rngs=rngs) for n in tokens[:-1]])
        self.head = MLP(tokens[-1] * config.width, config.head_hidden, len(schema.tasks), **common)

    def __call__(self, batch: EmbeddedBatch) -> Float[Array, "B tasks"]:
        with jax.named_scope("set_tokens"):
            x, pooled = self.set_tokens(batch), self.pooled(batch)
            x = (x if pooled is None else jnp.concatenate([x, pooled], axis=1)).astype(self.config.dtype)
        with jax.named_scope("interaction"):
            for layer in self.layers:
                x = layer(x)
        with jax.named_scope("head"):
            return self.head(x.reshape(x.shape[0], -1)).astype(jnp.float32)
