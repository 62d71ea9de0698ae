"""Self-attention of a sequence within a window."""

from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.jagged import Jagged, over_shards
from kunlun_jax.layers.mlp import linear
from kunlun_jax.layers.norm import split_norm
from pallas_kernels import packed_sliding_window_attention


class WindowAttention(nnx.Module):
    """S + W_o MHA(Norm(S)): softmax(q_t K_{[t−w, t+w]}ᵀ / √D) V with rotary q and k; pre-norm and residual [choice].

    The norm has no scale and no bias: W_qkv can express the scale [choice]. `window` None: no bound.
    """

    def __init__(
        self, width: int, head_width: int, window: int | None, *, dtype: str, implementation: str | None, rngs: nnx.Rngs
    ):
        self.heads, self.window, self.implementation = width // head_width, window, implementation
        self.query_key_value = linear(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.output = linear(width, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, sequence: Jagged, angles: Float[Array, "P N half"]) -> Jagged:
        s, normed = split_norm(sequence.values)
        projected = self.query_key_value(normed)

        def attend(qkv, angles, starts, lengths):
            return packed_sliding_window_attention(
                qkv.reshape(qkv.shape[0], 3 * self.heads, -1),
                angles=angles,
                starts=starts,
                lengths=lengths,
                max_length=sequence.max_length,
                window=(self.window, self.window),
                implementation=self.implementation,
            )

        o = over_shards(attend, projected, angles, sequence.starts, sequence.lengths)
        return sequence.with_values(s + self.output(o.reshape(s.shape)))
