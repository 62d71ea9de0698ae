"""Hierarchical seed pooling: a jagged sequence becomes a fixed number of tokens."""

from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.jagged import Jagged, over_shards
from kunlun_jax.layers.mlp import beside_parts, cast, linear, mix_tokens, normal
from kunlun_jax.layers.norm import layer_norm
from pallas_kernels import packed_seed_attention

Compression = Literal["sum_kron", "dense"]


class SumKronLinear(nnx.Module):
    """Y_b = Σ_i Z_iᵀ X_b W_i: [B, S, d] → [B, T', d] with k(S·T' + d²) parameters instead of S·d·T'·d [2nd].

    Z is multiplied first: the token axis shrinks, so it is the cheaper order. The sum over i is part of the second
    product.
    """

    def __init__(self, seeds: int, tokens: int, width: int, rank: int, *, dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.z = normal(rngs, (rank, seeds, tokens), seeds**-0.5)
        self.w = normal(rngs, (rank, width, width), (rank * width) ** -0.5)

    def __call__(self, x: Float[Array, "B S d"]) -> Float[Array, "B n d"]:
        z, w = cast(self.dtype, self.z, self.w)
        rank, seeds, tokens = z.shape
        mixed = mix_tokens(z.transpose(2, 0, 1).reshape(tokens * rank, seeds), x)
        return mixed.reshape(x.shape[0], tokens, -1) @ w.reshape(-1, w.shape[2])


class DenseCompression(nnx.Module):
    """Every output feature from every input feature: what SumKronLinear replaces. For the ablation only."""

    def __init__(self, seeds: int, tokens: int, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.tokens = tokens
        self.linear = linear(seeds * width, tokens * width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S d"]) -> Float[Array, "B n d"]:
        return self.linear(x.reshape(x.shape[0], -1)).reshape(x.shape[0], self.tokens, x.shape[-1])


class SeedAttention(nnx.Module):
    """MHA(Norm(E), P, P) with learnable queries E [S, d] shared by all samples → [B, S, d], and P for who reads on.

    LayerNorm on E, projections for query, key, value and output without bias, E ~ N(0, 1) [choice]. An empty
    sequence gives 0. With S = the number of output tokens this alone is PMA, pooling by multi-head attention.
    """

    def __init__(
        self, seeds: int, width: int, head_width: int, *, dtype: str, implementation: str | None, rngs: nnx.Rngs
    ):
        self.heads, self.dtype, self.implementation = width // head_width, dtype, implementation
        self.seeds = normal(rngs, (seeds, width), 1.0)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.query = linear(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.key_value = linear(width, 2 * width, bias=False, dtype=dtype, rngs=rngs)
        self.output = linear(width, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, sequence: Jagged) -> tuple[Float[Array, "B S d"], Jagged]:
        q = self.query(self.norm(self.seeds[...])).reshape(self.seeds.shape[0], self.heads, -1)
        s, (keys_values,) = beside_parts(self.key_value, sequence.values, 1)

        def attend(kv, starts, lengths):
            return packed_seed_attention(
                q,
                kv.reshape(kv.shape[0], 2 * self.heads, -1),
                starts=starts,
                lengths=lengths,
                max_length=sequence.max_length,
                implementation=self.implementation,
            )

        pooled = over_shards(attend, keys_values, sequence.starts, sequence.lengths)
        pooled = self.output(pooled.reshape(-1, self.seeds.shape[0], s.shape[-1]))
        return pooled, sequence.with_values(s)


class HierarchicalSeedPooling(nnx.Module):
    """H = Norm(W_d SumKronLinear(MHA(Norm(E), P, P))): P, Jagged [P, N, d_e] → H [B, n_tokens, d] and P [fig, 2nd].

    Over-complete seeds look at the sequence, then are compressed. The map from d_e to the model's d, bias-free, and
    the LayerNorm that puts the summary on the scale of the set tokens are [choice].
    """

    def __init__(
        self,
        seeds: int,
        tokens: int,
        event_width: int,
        head_width: int,
        width: int,
        *,
        rank: int,
        compression: Compression,
        dtype: str,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        self.attention = SeedAttention(
            seeds, event_width, head_width, dtype=dtype, implementation=implementation, rngs=rngs
        )
        if compression == "sum_kron":
            self.compress = SumKronLinear(seeds, tokens, event_width, rank, dtype=dtype, rngs=rngs)
        else:
            self.compress = DenseCompression(seeds, tokens, event_width, dtype=dtype, rngs=rngs)
        self.project = linear(event_width, width, bias=False, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(self, sequence: Jagged) -> tuple[Float[Array, "B n d"], Jagged]:
        pooled, sequence = self.attention(sequence)
        return self.norm(self.project(self.compress(pooled))), sequence


class PooledMultiheadAttention(nnx.Module):
    """PMA: as many seeds as output tokens, no compression. What HSP replaces; for the ablation only."""

    def __init__(
        self,
        tokens: int,
        event_width: int,
        head_width: int,
        width: int,
        *,
        dtype: str,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        self.attention = SeedAttention(
            tokens, event_width, head_width, dtype=dtype, implementation=implementation, rngs=rngs
        )
        self.project = linear(event_width, width, bias=False, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(self, sequence: Jagged) -> tuple[Float[Array, "B n d"], Jagged]:
        pooled, sequence = self.attention(sequence)
        return self.norm(self.project(pooled)), sequence
