"""The personalised feed-forward network: GDPA with keys and values generated from the set features."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from kunlun_jax.jagged import Jagged, from_padded, over_shards, to_padded
from kunlun_jax.layers.mlp import MLP, cast, in_parts, linear, mix_tokens, normal
from pallas_kernels import gdpa_block


class WeightGeneration(nnx.Module):
    """X [B, n, d] → X_sum [B, F, d_e] → K, V [B, F, H, D]; feeds only the keys and values of the GDPA-PFFN [fig].

    Compress maps the token axis n → F by a learned matrix, an MLP with one hidden layer of width d_e maps features
    d → d_e [choice], then K_h = W1_h X_sum and V_h = W2_h X_sum of all heads.
    """

    def __init__(
        self, tokens: int, width: int, generated: int, event_width: int, head_width: int, *, dtype: str, rngs: nnx.Rngs
    ):
        self.heads, self.head_width, self.dtype = event_width // head_width, head_width, dtype
        self.compress = normal(rngs, (generated, tokens), tokens**-0.5)
        self.mlp = MLP(width, [event_width], event_width, dtype=dtype, rngs=rngs)
        self.key_value = linear(event_width, 2 * event_width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B n d"]) -> tuple[Float[Array, "B F H D"], Float[Array, "B F H D"]]:
        (compress,) = cast(self.dtype, self.compress)
        x_sum = self.mlp(mix_tokens(compress, x.astype(self.dtype)))
        keys, values = in_parts(self.key_value, x_sum, 2)
        by_head = (*x_sum.shape[:2], self.heads, self.head_width)
        return keys.reshape(by_head), values.reshape(by_head)


class PersonalisedFFN(nnx.Module):
    """P = RMSNorm(Act(LN(S) Kᵀ / τ) V + LN(S)) + S, the block as Meta runs it [meta], K and V from X [fig].

    No softmax, no query or output projection. τ is the event type's maximum length [fig] or 1 [meta]. With activations
    given one per head, each head uses its own.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        generated: int,
        event_width: int,
        head_width: int,
        *,
        activation: str | tuple[str, ...],
        tau: float,
        dtype: str,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        self.activation, self.tau, self.implementation = activation, tau, implementation
        self.generate = WeightGeneration(tokens, width, generated, event_width, head_width, dtype=dtype, rngs=rngs)

    def __call__(self, sequence: Jagged, x: Float[Array, "B n d"]) -> Jagged:
        s = sequence.values
        with jax.named_scope("weight_generation"):
            keys, values = self.generate(x)
        samples, generated, heads, head_width = keys.shape
        shards, per_shard = sequence.starts.shape
        q = s.reshape(*s.shape[:2], heads, head_width)
        k, v = (y.reshape(shards, per_shard * generated, heads, head_width) for y in (keys, values))

        def block(q, k, v, starts, lengths):
            return gdpa_block(
                q,
                k,
                v,
                q_starts=starts,
                q_lengths=lengths,
                kv_starts=jnp.arange(per_shard, dtype=jnp.int32) * generated,
                kv_lengths=jnp.full(per_shard, generated, jnp.int32),
                max_q_length=sequence.max_length,
                max_kv_length=generated,
                activation=self.activation,
                scale=1.0 / self.tau,
                implementation=self.implementation,
            )

        # The barrier lets the block write its result once: XLA would repeat its end inside each of the readers.
        out = lax.optimization_barrier(over_shards(block, q, k, v, sequence.starts, sequence.lengths))
        return sequence.with_values(out.reshape(s.shape))


class NaivePFFN(nnx.Module):
    """The PFFN that GDPA replaces: P = S W(X) + S, a [d_e, d_e] matrix generated per sample, on padded sequences.

    W(X) = X_sumᵀ W with X_sum [n_sum, d_e] and W [n_sum, d_e] learned (InterFormer); the residual is [choice], as in
    the GDPA block. For the ablation only: it writes sequences out to their maximum length.
    """

    def __init__(self, tokens: int, width: int, generated: int, event_width: int, *, dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.compress = normal(rngs, (generated, tokens), tokens**-0.5)
        self.mlp = MLP(width, [event_width], event_width, dtype=dtype, rngs=rngs)
        self.weight = normal(rngs, (generated, event_width), (generated * event_width) ** -0.5)

    def __call__(self, sequence: Jagged, x: Float[Array, "B n d"]) -> Jagged:
        compress, weight = cast(self.dtype, self.compress, self.weight)
        x_sum = self.mlp(mix_tokens(compress, x.astype(self.dtype)))
        per_sample = jnp.einsum("bfi,fo->bio", x_sum, weight)
        padded, _ = to_padded(sequence)
        out = from_padded(jnp.einsum("bti,bio->bto", padded, per_sample), sequence)
        return sequence.with_values(out.values + sequence.values)
