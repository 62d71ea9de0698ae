"""Wukong experts: the global interaction of set tokens and sequence summaries."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kunlun_jax.layers.mlp import cast, mix_tokens
from kunlun_jax.layers.norm import norm_of_groups
from kunlun_jax.sharding import ExpertParam, from_experts, to_experts

ExpertInputs = Literal["sliced", "all"]


class WukongExperts(nnx.Module):
    """M Wukong blocks side by side: [B, n_in, d] → [B, n_out, d], n_out split evenly over the experts.

    Each expert computes LN(concat(FMB(X), LCB(X)) + Res(X)) on its own tokens (arXiv 2403.02545):
      LCB(X) = W_L X; FMB(X) = MLP(LN(flatten(X (Xᵀ Y)))) with the optimised factorisation machine, Y [n, k]; half of
      the outputs, rounded up, come from FMB [choice].
    Res is a learned projection of the token axis, started as "the first n_out tokens pass through", which in the
    first layer are the set tokens [choice].

    "sliced" deals the tokens round-robin over the experts; since outputs are joined expert by expert, the next layer's
    deal mixes them, and after two layers every output sees every input [choice]. "all" gives every expert all tokens.
    Experts are the leading axis of every parameter: they run as batched products and are the unit of expert
    parallelism. On a mesh a device holds some of them and the tokens of its group travel to them and back.

    Raises:
      ValueError: inputs or outputs don't divide over the experts, or there are too few outputs per expert to mix.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        experts: int,
        expert_inputs: ExpertInputs,
        rank: int,
        hidden: int,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        if outputs % experts or (expert_inputs == "sliced" and inputs % experts):
            raise ValueError(
                f"Wukong experts: {inputs} input and {outputs} output tokens must divide over {experts} experts; "
                f"change experts, dense_tokens or the event types' n_tokens"
            )
        if expert_inputs == "sliced" and 1 < experts and outputs // experts < experts:
            raise ValueError(
                f"Wukong experts: {outputs // experts} outputs per expert can't reach all {experts} experts of the "
                f'next layer; use at most {int(outputs**0.5)} experts or expert_inputs="all"'
            )
        self.experts, self.expert_inputs, self.dtype, self.width = experts, expert_inputs, dtype, width
        n = inputs // experts if expert_inputs == "sliced" else inputs
        m = outputs // experts
        n_f = (m + 1) // 2
        n_l = m - n_f
        self.n_f = n_f
        if n_l:
            self.linear_compression = _normal(rngs, (experts, n_l, n), n**-0.5)
        self.factor = _normal(rngs, (experts, n, rank), n**-0.5)
        self.fm_scale = ExpertParam(jnp.ones((experts, 1, n * rank)))
        self.fm_bias = ExpertParam(jnp.zeros((experts, 1, n * rank)))
        self.fm_in = _normal(rngs, (experts, n * rank, hidden), (n * rank) ** -0.5)
        self.fm_in_bias = ExpertParam(jnp.zeros((experts, 1, hidden)))
        self.fm_out = _normal(rngs, (experts, hidden, n_f * width), hidden**-0.5)
        self.fm_out_bias = ExpertParam(jnp.zeros((experts, 1, n_f * width)))
        self.residual = ExpertParam(
            _pass_first(experts, m, n, expert_inputs) + 0.01 * jax.random.normal(rngs.params(), (experts, m, n))
        )
        self.scale = ExpertParam(jnp.ones((experts, 1, 1, width)))
        self.bias = ExpertParam(jnp.zeros((experts, 1, 1, width)))

    def __call__(self, x: Float[Array, "B n_in d"]) -> Float[Array, "B n_out d"]:
        tokens = to_experts(self._deal(x.astype(self.dtype)), self.factor.shape[0])
        maps = cast(self.dtype, self.factor, self.residual)
        maps[0] = maps[0].mT
        if hasattr(self, "linear_compression"):
            maps += cast(self.dtype, self.linear_compression)
        # All maps of the token axis are one product.
        sizes = np.cumsum([m.shape[1] for m in maps])
        factors, residual, *linear = jnp.split(mix_tokens(jnp.concatenate(maps, axis=1), tokens), sizes[:-1], axis=2)
        parts = [self._factorisation(tokens, factors), *linear]
        out = _layer_norm(jnp.concatenate(parts, axis=2) + residual, self.scale, self.bias, self.dtype)
        out = from_experts(out, self.experts)
        return out.transpose(1, 0, 2, 3).reshape(x.shape[0], -1, self.width)

    def _deal(self, x: Float[Array, "B n_in d"]) -> Float[Array, "M B n d"]:
        if self.expert_inputs == "all":
            return jnp.broadcast_to(x, (self.experts, *x.shape))
        return x.reshape(x.shape[0], -1, self.experts, self.width).transpose(2, 0, 1, 3)

    def _factorisation(self, x: Float[Array, "M B n d"], factors: Float[Array, "M B k d"]) -> Float[Array, "M B n_f d"]:
        """FMB of tokens X, given Yᵀ X."""
        w_in, b_in, w_out, b_out = cast(self.dtype, self.fm_in, self.fm_in_bias, self.fm_out, self.fm_out_bias)
        fm = jnp.einsum("mbnd,mbkd->mbnk", x, factors)
        fm = _layer_norm(fm.reshape(*fm.shape[:2], -1), self.fm_scale, self.fm_bias, self.dtype)
        hidden = nnx.silu(jnp.einsum("mbi,mih->mbh", fm, w_in) + b_in)
        out = jnp.einsum("mbh,mho->mbo", hidden, w_out) + b_out
        return out.reshape(*out.shape[:2], self.n_f, self.width)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> ExpertParam:
    return ExpertParam(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def _layer_norm(x, scale, bias, dtype):
    """LayerNorm over the last axis, eps 1e-5, a scale and a bias per expert, the leading axis."""
    scale, bias = (y[...].reshape(y.shape[0], -1) for y in (scale, bias))
    return norm_of_groups(x, scale, bias).astype(dtype)


def _pass_first(experts, m, n, expert_inputs):
    """[M, m, n]: each output token starts as one input token, in the order in which the experts hold them."""
    shift = jnp.arange(experts) * m if expert_inputs == "all" else jnp.zeros(experts, jnp.int32)
    return jax.nn.one_hot(shift[:, None] + jnp.arange(m), n)
