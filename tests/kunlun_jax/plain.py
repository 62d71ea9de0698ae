"""Layers' formulas in float64 NumPy, sample by sample: what the layers' tests compare with."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def build(make, rng, scale=0.5):
    """The module that `make()` returns, with random values in every parameter: zero biases would hide mistakes."""
    module = nnx.eval_shape(make)
    shapes = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), shapes))
    return module


def run(module, *arguments):
    """The module's compiled call; floating-point NumPy inputs become float32."""
    graphdef, params = nnx.split(module)
    arguments = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, arguments)
    return jax.jit(lambda params, *arguments: nnx.merge(graphdef, params)(*arguments))(params, *arguments)


def array(x):
    return np.asarray(x[...], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def linear(layer, x):
    y = x @ array(layer.kernel)
    return y if layer.bias is None else y + array(layer.bias)


def mlp(module, x):
    *hidden, last = module.layers
    for layer in hidden:
        x = silu(linear(layer, x))
    return linear(last, x)


def normalise(x):
    """LayerNorm over the last axis without scale and bias."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def layer_norm(module, x):
    return normalise(x) * array(module.scale) + array(module.bias)


def softmax(scores):
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def attention(q, k, v, heads, visible=True):
    """Softmax attention of [queries, d] over [keys, d] with `heads` heads; no keys give 0."""
    if not len(k):
        return np.zeros_like(q)
    outs = []
    for qh, kh, vh in zip(*(np.split(x, heads, axis=-1) for x in (q, k, v)), strict=True):
        scores = np.where(visible, qh @ kh.T / np.sqrt(qh.shape[-1]), -np.inf)
        outs.append(softmax(scores) @ vh)
    return np.concatenate(outs, axis=-1)


def rotate(x, angles, heads):
    """Turn the pairs (i, i + D/2) of each head of [tokens, d] by angles [tokens, D/2]."""
    turned = []
    for head in np.split(x, heads, axis=-1):
        z = np.exp(1j * angles) * (head[:, : angles.shape[1]] + 1j * head[:, angles.shape[1] :])
        turned += [z.real, z.imag]
    return np.concatenate(turned, axis=-1)
