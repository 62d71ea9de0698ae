"""Wukong experts: the global interaction of set tokens and sequence summaries."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from kunlun_jax.layers.mlp import cast, mix_tokens
from kunlun_jax.layers.norm import norm_of_groups
from kunlun_jax.sharding import ExpertParam, from_experts, to_experts

ExpertInputs = Literal["sliced", "all"]

FEW_TOKENS = 128  # up to here XXᵀ is bound by memory on an H100


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
        kept = self.residual[...]
        if hasattr(self, "linear_compression"):  # both are linear in the tokens: one product with the sum of the maps
            kept = kept.at[:, self.n_f :].add(self.linear_compression[...])
        made = jnp.pad(self._factorisation(tokens), ((0, 0), (0, 0), (0, kept.shape[1] - self.n_f), (0, 0)))
        out = _layer_norm(made + mix_tokens(kept.astype(self.dtype), tokens), self.scale, self.bias, self.dtype)
        return from_experts(out, self.experts).reshape(x.shape[0], -1, self.width)

    def _deal(self, x: Float[Array, "B n_in d"]) -> Float[Array, "B M n d"]:
        if self.expert_inputs == "all":
            return jnp.broadcast_to(x[:, None], (x.shape[0], self.experts, *x.shape[1:]))
        return x.reshape(x.shape[0], -1, self.experts, self.width).swapaxes(1, 2)

    def _factorisation(self, x: Float[Array, "B M n d"]) -> Float[Array, "B M n_f d"]:
        """FMB of tokens X."""
        y, w_in, w_out = cast(self.dtype, self.factor, self.fm_in, self.fm_out)
        fm = factorisation_machine(x, y)
        fm = _layer_norm(fm.reshape(*fm.shape[:2], -1), self.fm_scale, self.fm_bias, self.dtype)
        b_in, b_out = (b[:, 0] for b in cast(self.dtype, self.fm_in_bias, self.fm_out_bias))
        hidden = nnx.silu(_of_experts(fm, w_in) + b_in)
        out = _of_experts(hidden, w_out) + b_out
        return out.reshape(*out.shape[:2], self.n_f, self.width)


def factorisation_machine(x: Float[Array, "B *M n d"], y: Float[Array, "*M n k"]) -> Float[Array, "B *M n k"]:
    """X Xᵀ Y of every sample, and of every expert where there are any.

    Of few tokens XXᵀ comes first: it has more FLOPs than X (XᵀY), but reads X once instead of twice, and its gradient
    writes that of X once.
    """
    if x.shape[-2] <= FEW_TOKENS:
        return gram(x) @ jnp.broadcast_to(y, (x.shape[0], *y.shape))
    return jnp.einsum("...nd,...kd->...nk", x, mix_tokens(y.mT, x))


@jax.custom_vjp
def gram(x: Float[Array, "*rest n d"]) -> Float[Array, "*rest n n"]:
    """X Xᵀ. Its gradient is one product with the sum of both factors' gradients, since they are the same X."""
    return jnp.einsum("...id,...jd->...ij", x, x)


gram.defvjp(lambda x: (gram(x), x), lambda x, d: ((d + d.mT) @ x,))


def _of_experts(x: Float[Array, "B M i"], weights: Float[Array, "M i o"]) -> Float[Array, "B M o"]:
    """Each expert's product. jnp.einsum makes it [M, o, B], which costs a transposition."""
    return lax.dot_general(x, weights, (((2,), (1,)), ((1,), (0,)))).swapaxes(0, 1)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> ExpertParam:
    return ExpertParam(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def _layer_norm(x, scale, bias, dtype):
    """LayerNorm over the last axis, eps 1e-5, a scale and a bias per expert, the second axis."""
    scale, bias = (y[...].reshape(y.shape[0], -1) for y in (scale, bias))
    return norm_of_groups(x, scale, bias).astype(dtype)


def _pass_first(experts, m, n, expert_inputs):
    """[M, m, n]: each output token starts as one input token, in the order in which the experts hold them."""
    shift = jnp.arange(experts) * m if expert_inputs == "all" else jnp.zeros(experts, jnp.int32)
    return jax.nn.one_hot(shift[:, None] + jnp.arange(m), n)
