"""The attention benchmark's cases: what they count, and that the backward they time is the gradient."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments"))

from bench_attention import Shape, both_directions, seed_cases, window_cases

from pallas_kernels import sliding_window_attention


@pytest.mark.parametrize("window", [(3, 3), (5, 0), (0, 40)])
def test_pairs_are_those_of_the_windows(window):
    shape = Shape(4, 20, window, jagged=True)
    wanted = 0
    for length in shape.lengths:
        ahead = np.arange(length) - np.arange(length)[:, None]
        wanted += int(np.sum((ahead >= -window[0]) & (ahead <= window[1])))
    assert shape.pairs == wanted


def test_counts_of_products_and_bytes():
    first = window_cases()[0]
    pairs, tokens = 64 * (1024 * 201 - 100 * 101), 64 * 1024 * 4 * 128 * 2
    assert first.flops == 4 * 4 * 128 * pairs
    assert first.bytes == 4 * tokens
    seeds = seed_cases()[0]
    lengths = Shape(1152, 1024, seeds=256, jagged=True).lengths
    assert seeds.flops == 4 * 4 * 128 * 256 * lengths.sum()


def test_the_backward_alone_is_the_gradient():
    shape = Shape(2, 12, (2, 1), heads=2, width=8)

    def call(q, k, v, starts, lengths):
        return sliding_window_attention(q, k, v, starts=starts, lengths=lengths, window=(2, 1), implementation="xla")

    forward, backward = both_directions(shape, "xla", call)
    assert backward.flops == 2.5 * forward.flops
    q, k, v, do, starts, lengths = forward.operands()
    wanted = jax.vjp(lambda *x: call(*x, starts, lengths), q, k, v)[1](do)
    jax.eval_shape(backward.operands)  # as the harness does first: it traces the function once
    got = jax.jit(backward.function)(*backward.operands())
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2)
        assert jnp.any(a != 0)
