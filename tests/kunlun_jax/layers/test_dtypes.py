"""bfloat16 layers: as near to float32 as inputs and parameters rounded to bfloat16 allow; parameters stay float32."""

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from batches import random_sequence
from flax import nnx

from kunlun_jax.layers.attention import WindowAttention
from kunlun_jax.layers.gdpa import NaivePFFN, PersonalisedFFN
from kunlun_jax.layers.mlp import MLP, MaskNet
from kunlun_jax.layers.seed_pooling import HierarchicalSeedPooling, PooledMultiheadAttention
from kunlun_jax.layers.wukong import WukongExperts

RNG = np.random.default_rng(0)
LENGTHS, WIDTH, HEAD = [6, 0, 9], 16, 8
SEQUENCE = random_sequence(RNG, LENGTHS, WIDTH, spare=0)
TOKENS = RNG.normal(size=(len(LENGTHS), 6, WIDTH)).astype(np.float32)
ANGLES = RNG.normal(size=(1, sum(LENGTHS), HEAD // 2)).astype(np.float32)
DEFAULT = {"implementation": None}
WUKONG = {"experts": 2, "expert_inputs": "sliced", "rank": 4, "hidden": 16}

LAYERS = {
    "MLP": (lambda **k: MLP(WIDTH, [16], 8, **k), TOKENS),
    "MaskNet": (lambda **k: MaskNet(WIDTH, 8, **k), TOKENS),
    "PersonalisedFFN": (
        lambda **k: PersonalisedFFN(6, WIDTH, 8, WIDTH, HEAD, activation="gelu_tanh", tau=9.0, **DEFAULT, **k),
        SEQUENCE,
        TOKENS,
    ),
    "NaivePFFN": (lambda **k: NaivePFFN(6, WIDTH, 8, WIDTH, **k), SEQUENCE, TOKENS),
    "WindowAttention": (lambda **k: WindowAttention(WIDTH, HEAD, 3, **DEFAULT, **k), SEQUENCE, ANGLES),
    "HSP": (
        lambda **k: HierarchicalSeedPooling(8, 4, WIDTH, HEAD, 8, rank=2, compression="sum_kron", **DEFAULT, **k),
        SEQUENCE,
    ),
    "PMA": (lambda **k: PooledMultiheadAttention(4, WIDTH, HEAD, 8, **DEFAULT, **k), SEQUENCE),
    "Wukong": (lambda **k: WukongExperts(6, 4, WIDTH, **WUKONG, **k), TOKENS),
}


def rounded(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) if x.dtype == np.float32 else x, tree)


def half(tree):
    """Activations in bfloat16; angles and parameters stay float32."""
    return jax.tree.map(lambda x: x if x is ANGLES or x.dtype != np.float32 else x.astype(jnp.bfloat16), tree)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_near_float32(name):
    make, *arguments = LAYERS[name]
    rng = np.random.default_rng(1)
    exact = plain.build(lambda: make(dtype="float32", rngs=nnx.Rngs(0)), rng, scale=0.3)
    graphdef, params = nnx.split(exact)
    low = nnx.merge(nnx.split(nnx.eval_shape(lambda: make(dtype="bfloat16", rngs=nnx.Rngs(0))))[0], params)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))

    def values(out):
        out = out[0] if isinstance(out, tuple) and not hasattr(out, "values") else out  # of pooling, the summary
        return getattr(out, "values", out)

    got = values(plain.run(low, *half(arguments)))
    assert got.dtype == jnp.bfloat16
    want = values(plain.run(exact, *arguments))
    # What rounding only the operands costs; rounding between the products may cost a few times as much.
    yardstick = values(plain.run(nnx.merge(graphdef, rounded(params)), *rounded(arguments)))
    unit = float(jnp.linalg.norm(rounded(yardstick) - want))
    assert float(jnp.linalg.norm(got.astype(jnp.float32) - want)) < 4 * unit
