"""Element-wise activations of GDPA: values, closed-form derivatives, and the cheap forms that the kernels compute.

All map 0 to 0, so that a zeroed key contributes exactly nothing.

A kernel computes `weight(s)` from the raw score s = q·k and multiplies the accumulated output once by `post`, so that
act(scale·s)·post_scale = weight(s)·post; likewise for the derivative. GELU and SiLU are written with one tanh, which is
one instruction on Hopper, where a logistic would be an exponential and a division.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

_TANH_0 = math.sqrt(2 / math.pi)  # gelu_tanh(x) = x/2 (1 + tanh(c0 x + c1 x³))
_TANH_1 = 0.044715 * _TANH_0
_LEAK = 0.01


def _identity(x):
    return x, jnp.ones_like(x)


def _relu(x):
    return jnp.maximum(x, 0), jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)


def _relu2(x):
    r = jnp.maximum(x, 0)
    return r * r, 2 * r


def _leaky_relu(x):
    slope = jnp.where(x > 0, 1.0, _LEAK).astype(x.dtype)
    return x * slope, slope


def _gelu(x):
    below = 0.5 + 0.5 * lax.erf(x * math.sqrt(0.5))
    return x * below, below + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x):
    t = jnp.tanh(x * (_TANH_0 + _TANH_1 * x * x))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_TANH_0 + 3 * _TANH_1 * x * x)


def _silu(x):
    g = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    return x * g, g + x * g * (1 - g)


def _hardswish(x):
    g = jnp.clip(x * (1 / 6) + 0.5, 0, 1)
    inside = (x > -3) & (x < 3)
    return x * g, g + jnp.where(inside, x * (1 / 6), 0.0).astype(x.dtype)


# x -> (act(x), act'(x)). At a kink the derivative is the one from the left: relu'(0) = 0.
ACTIVATIONS: dict[str, Callable] = {
    "identity": _identity,
    "relu": _relu,
    "relu2": _relu2,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "hardswish": _hardswish,
}


def per_head(operator: str, activation: str | tuple[str, ...], heads: int) -> tuple[str, ...]:
    """One activation name per head.

    Raises:
      ValueError: an unknown name, or a tuple whose length is not the number of heads.
    """
    names = (activation,) * heads if isinstance(activation, str) else tuple(activation)
    for name in names:
        if name not in ACTIVATIONS:
            raise ValueError(f"{operator}: activation {name!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    if len(names) != heads:
        raise ValueError(f"{operator}: activation names {len(names)} heads, but q has {heads}")
    return names


@dataclass(frozen=True)
class KernelActivation:
    """act(scale·s)·post_scale in the form a kernel computes, for raw float32 scores s.

    weight(s)·post is the activation. slope(s)·slope_post is its derivative with respect to s, scale and post_scale
    included; `weight_and_slope` gives both, sharing their work.
    """

    weight: Callable[[jax.Array], jax.Array]
    post: float
    weight_and_slope: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    slope_post: float


def kernel_activation(name: str, scale: float, post_scale: float, *, folded: bool) -> KernelActivation:
    """The kernel form of an activation.

    folded: scale and post_scale leave the inner loop for one multiplication per output element. bfloat16 has float32's
    range, so its rounding does not see the difference. float16 does: weights of raw scores overflow or lose bits, so
    there both are applied before the weights are rounded.
    """
    if folded:
        return _folded(name, scale, post_scale)
    plain = _folded(name, 1.0, 1.0)

    def weight(s):
        return plain.weight(_times(s, scale)) * (plain.post * post_scale)

    def weight_and_slope(s):
        w, d = plain.weight_and_slope(_times(s, scale))
        return w * (plain.post * post_scale), d * (plain.slope_post * scale * post_scale)

    return KernelActivation(weight, 1.0, weight_and_slope, 1.0)


def _times(s, factor: float):
    return s if factor == 1 else s * factor


def _folded(name: str, scale: float, post_scale: float) -> KernelActivation:
    if name == "gelu_tanh":
        a, b = _TANH_0 * scale, _TANH_1 * scale**3

        def weight(s):
            return _gated(s, jnp.tanh(s * (s * s * b + a)))

        def both(s):
            square = s * s
            t = jnp.tanh(s * (square * b + a))
            return _gated(s, t), (t + 1.0) + (s * (1.0 - t * t)) * (square * (3 * b) + a)

        return KernelActivation(weight, 0.5 * scale * post_scale, both, 0.5 * scale * post_scale)
    if name == "silu":

        def weight(s):
            return _gated(s, jnp.tanh(s * (0.5 * scale)))

        def both(s):
            half = s * (0.5 * scale)
            t = jnp.tanh(half)
            return _gated(s, t), (t + 1.0) + half * (1.0 - t * t)

        return KernelActivation(weight, 0.5 * scale * post_scale, both, 0.5 * scale * post_scale)
    if name == "gelu":
        root = scale * math.sqrt(0.5)

        def weight(s):
            return _gated(s, _erf(s * root)[0])

        def both(s):
            x = s * root
            t, decay = _erf(x)
            return _gated(s, t), (t + 1.0) + x * decay * (2 / math.sqrt(math.pi))

        return KernelActivation(weight, 0.5 * scale * post_scale, both, 0.5 * scale * post_scale)
    if name == "relu2":

        def weight(s):
            r = jnp.maximum(s, 0.0)
            return r * r

        def both(s):
            r = jnp.maximum(s, 0.0)
            return r * r, r

        return KernelActivation(weight, scale**2 * post_scale, both, 2 * scale**2 * post_scale)
    if name == "hardswish":

        def both(s):
            g = jnp.minimum(jnp.maximum(s * (scale / 6) + 0.5, 0.0), 1.0)
            slope = jnp.where(jnp.abs(s) < 3 / scale, g + s * (scale / 6), g)
            return s * g, slope

        return KernelActivation(lambda s: both(s)[0], scale * post_scale, both, scale * post_scale)
    # Homogeneous in s: the scale is only a factor.
    both = {"identity": _identity, "relu": _relu, "leaky_relu": _leaky_relu}[name]
    return KernelActivation(lambda s: both(s)[0], scale * post_scale, both, scale * post_scale)


def _gated(s, t):
    """s·(1 + t) as one fused multiply-add."""
    return s * t + s


def _erf(x):
    """(erf(x), exp(-x²)) to 5·10⁻⁷ in float32 [Abramowitz and Stegun 7.1.26]: Mosaic GPU lowers no erf of an array."""
    size = jnp.maximum(x, -x)
    t = 1.0 / (size * 0.3275911 + 1.0)
    decay = jnp.exp(-(x * x))
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    magnitude = 1.0 - series * decay
    return jnp.where(x < 0, -magnitude, magnitude), decay
