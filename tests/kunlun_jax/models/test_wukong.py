"""Wukong by hand and against float64: factorisation machines, linear compression, whole layers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import plain
import pytest
from flax import nnx

from kunlun_jax.layers.wukong import WukongExperts
from kunlun_jax.model_configs import WukongConfig
from kunlun_jax.models.wukong import FactorisationMachine, WukongLayer

D = 5
CONFIG = WukongConfig(width=D, factorised=3, compressed=2, rank=2, attentive_tokens=2, hidden=(6,))
X = np.random.default_rng(0).normal(size=(3, 4, D))


def layer(tokens=4, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return plain.build(lambda: WukongLayer(tokens, config, rngs=nnx.Rngs(0)), np.random.default_rng(1))


def machine(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return plain.build(lambda: FactorisationMachine(4, config, rngs=nnx.Rngs(0)), np.random.default_rng(1))


def test_factorisation_machines_by_hand():
    x = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    products = np.array([[[5.0, 11.0], [11.0, 25.0]]])
    config = dataclasses.replace(CONFIG, width=2, rank=1)
    plain_machine = FactorisationMachine(2, dataclasses.replace(config, machine="plain"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(plain.run(plain_machine, x), products)
    optimised = FactorisationMachine(2, config, rngs=nnx.Rngs(0))
    optimised.y[...] = jnp.array([[1.0], [-2.0]])
    np.testing.assert_allclose(plain.run(optimised, x), [[[5 - 22], [11 - 50]]])


def test_optimised_machine_is_the_plain_one_where_y_is_the_identity():
    optimised = machine(rank=4)
    optimised.y[...] = jnp.eye(4)
    np.testing.assert_allclose(plain.run(optimised, X), plain.run(machine(machine="plain"), X), rtol=1e-4, atol=1e-5)


def test_attentive_machine_makes_y_of_each_sample():
    module = machine(machine="attentive")
    out = plain.run(module, X)
    for b, x in enumerate(X):
        y = plain.mlp(module.make_y, (plain.array(module.compress) @ x).reshape(-1)).reshape(4, 2)
        np.testing.assert_allclose(out[b], x @ (x.T @ y), rtol=1e-3, atol=1e-4)


def test_linear_compression_by_hand():
    module = layer(factorised=0, residual=False)
    module.compress[...] = jnp.array([[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, -1.0, 0.0]])
    expected = np.stack([X[:, 0] + 2 * X[:, 3], X[:, 1] - X[:, 2]], axis=1)
    np.testing.assert_allclose(plain.run(module, X), plain.layer_norm(module.norm, expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["optimised", "attentive", "plain"])
@pytest.mark.parametrize("compressed", [1, 2])
def test_a_layer_is_its_formula(kind, compressed):
    """With 3 + 1 outputs of 4 inputs the residual is the identity, with 3 + 2 a learned token map."""
    module = layer(machine=kind, compressed=compressed)
    assert hasattr(module, "residual") == (compressed == 2)
    interactions = np.asarray(plain.run(module.machine, X), np.float64).reshape(3, -1)
    factorised = plain.mlp(module.mlp, plain.layer_norm(module.machine_norm, interactions)).reshape(3, 3, D)
    parts = np.concatenate([factorised, plain.array(module.compress) @ X], axis=1)
    residual = plain.array(module.residual) @ X if compressed == 2 else X
    expected = plain.layer_norm(module.norm, parts + residual)
    np.testing.assert_allclose(plain.run(module, X), expected, rtol=2e-3, atol=1e-3)


def test_kunluns_expert_is_the_same_layer():
    """One expert with the layer's parameters computes the same: the two are one formula, written twice for speed."""
    module = layer()
    expert = WukongExperts(
        4, 5, D, experts=1, expert_inputs="sliced", rank=2, hidden=6, dtype="float32", rngs=nnx.Rngs(0)
    )
    first, last = module.mlp.layers
    for name, value in {
        "factor": module.machine.y, "fm_scale": module.machine_norm.scale, "fm_bias": module.machine_norm.bias,
        "fm_in": first.kernel, "fm_in_bias": first.bias, "fm_out": last.kernel, "fm_out_bias": last.bias,
        "linear_compression": module.compress, "residual": module.residual,
        "scale": module.norm.scale, "bias": module.norm.bias,
    }.items():  # fmt: skip
        param = getattr(expert, name)
        param[...] = value[...].reshape(param.shape)
    np.testing.assert_allclose(plain.run(expert, X), plain.run(module, X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "deep"}, "^machine: 'deep' is unknown; choose from"),
        ({"factorised": 0, "compressed": 0}, "factorised 0 and compressed 0"),
        ({"factorised": -1}, "factorised -1"),
        ({"hidden": (4, 0)}, r"hidden: every width must be at least 1, got \(4, 0\)"),
        ({"rank": 0}, "^rank: must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)
