"""Wukong experts equal their formula expert by expert; how tokens are dealt; what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from flax import nnx

from kunlun_jax.layers import wukong as layer
from kunlun_jax.layers.wukong import WukongExperts, factorisation_machine

WIDTH, RANK, HIDDEN, M = 5, 3, 7, 2


def build(inputs=8, outputs=6, *, experts=M, expert_inputs="sliced"):
    return WukongExperts(
        inputs,
        outputs,
        WIDTH,
        experts=experts,
        expert_inputs=expert_inputs,
        rank=RANK,
        hidden=HIDDEN,
        dtype="float32",
        rngs=nnx.Rngs(0),
    )


def expected_expert(module, e, x):
    """Expert e of one sample on its own tokens [n, d]: LN(concat(FMB, LCB) + Res)."""
    of = {name: plain.array(getattr(module, name))[e] for name in ("factor", "fm_in", "fm_out", "residual")}
    y = of["factor"]
    machine = (x @ x.T @ y).reshape(-1)
    normed = plain.normalise(machine) * plain.array(module.fm_scale)[e, 0] + plain.array(module.fm_bias)[e, 0]
    hidden = plain.silu(normed @ of["fm_in"] + plain.array(module.fm_in_bias)[e, 0])
    out = (hidden @ of["fm_out"] + plain.array(module.fm_out_bias)[e, 0]).reshape(-1, WIDTH)
    if hasattr(module, "linear_compression"):
        out = np.concatenate([out, plain.array(module.linear_compression)[e] @ x])
    total = out + of["residual"] @ x
    return plain.normalise(total) * plain.array(module.scale)[e, 0] + plain.array(module.bias)[e, 0]


@pytest.mark.parametrize("expert_inputs", ["sliced", "all"])
@pytest.mark.parametrize(("outputs", "experts"), [(6, 2), (4, 2), (1, 1)])
def test_experts_are_wukong_blocks_on_the_tokens_dealt_to_them(outputs, experts, expert_inputs):
    rng = np.random.default_rng(0)
    module = plain.build(lambda: build(8, outputs, experts=experts, expert_inputs=expert_inputs), rng)
    x = rng.normal(size=(3, 8, WIDTH))
    out = np.asarray(plain.run(module, x))
    for b in range(3):
        dealt = [x[b] if expert_inputs == "all" else x[b, e::experts] for e in range(experts)]
        expected = np.concatenate([expected_expert(module, e, tokens) for e, tokens in enumerate(dealt)])
        np.testing.assert_allclose(out[b], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("few", [3, 4])
def test_the_factorisation_machine_is_its_formula_in_both_orders(few, monkeypatch):
    monkeypatch.setattr(layer, "FEW_TOKENS", few)
    x, y, weights = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(3, 2, 4, 5), (2, 4, 3), (3, 2, 4, 3)])
    )

    def formula(x, y):
        return jnp.einsum("bmid,bmjd,mjk->bmik", x, x, y)

    def gradients(function):
        return jax.grad(lambda *operands: jnp.sum(weights * function(*operands)), argnums=(0, 1))(x, y)

    assert ("[3,2,4,4]" in str(jax.make_jaxpr(lambda x, y: factorisation_machine(x, y))(x, y))) == (few == 4)
    np.testing.assert_allclose(factorisation_machine(x, y), formula(x, y), rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(gradients(factorisation_machine), gradients(formula), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expert_inputs", ["sliced", "all"])
def test_residuals_start_by_letting_the_first_tokens_through(expert_inputs):
    module = nnx.jit(lambda: build(expert_inputs=expert_inputs))()
    inputs = np.tile(np.arange(8), (M, 1)) if expert_inputs == "all" else np.arange(8).reshape(-1, M).T
    passed = np.take_along_axis(inputs, np.asarray(module.residual[...]).argmax(-1), axis=1)
    assert sorted(passed.reshape(-1)) == list(range(6))


@pytest.mark.parametrize(
    ("inputs", "outputs", "experts", "expert_inputs", "message"),
    [
        (8, 6, 4, "sliced", "8 input and 6 output tokens must divide over 4 experts"),
        (7, 6, 2, "sliced", "7 input and 6 output"),
        (8, 5, 2, "all", "8 input and 5 output"),
        (8, 4, 4, "sliced", "1 outputs per expert can't reach all 4 experts.*at most 2 experts"),
    ],
)
def test_tokens_that_dont_divide_or_mix_are_refused(inputs, outputs, experts, expert_inputs, message):
    with pytest.raises(ValueError, match=message):
        build(inputs, outputs, experts=experts, expert_inputs=expert_inputs)
