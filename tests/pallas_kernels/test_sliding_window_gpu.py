"""Sliding-window attention as compiled for Hopper: values, gradients, isolation of samples, zeros, repeatability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed_sliding_window_attention, sliding_window_attention

pytestmark = pytest.mark.gpu
NAMES = ("out", "q", "k", "v")


def batch(seed, *, samples, longest, heads, kv_heads, width, dtype):
    """Jagged operands with gaps and shuffled samples; every row outside the samples is NaN, in the cotangent too."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, samples)
    lengths[:5] = (0, 1, longest, 64, 191)
    starts = np.cumsum(lengths + rng.integers(0, 4, samples)) - lengths
    rows, shuffle = int(starts[-1] + lengths[-1]) + 200, rng.permutation(samples)
    rows += -rows % 64  # as models have them
    inside = np.zeros(rows, bool)
    for start, length in zip(starts, lengths, strict=True):
        inside[start : start + length] = True

    def normal(h):
        x = rng.standard_normal((rows, h, width), np.float32)
        x[~inside] = np.nan
        return jnp.asarray(x, dtype)

    operands = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    return operands, [jnp.asarray(x[shuffle], jnp.int32) for x in (starts, lengths)], inside


@functools.cache
def compiled(implementation, longest, window, turned):
    @jax.jit
    def run(q, k, v, do, starts, lengths, angles):
        def attend(*x):
            turns = dict(angles=angles) if turned else {}
            static = dict(max_length=longest, window=window)
            if implementation == "packed":
                static |= dict(starts=starts, lengths=lengths, implementation="mosaic_gpu")
                return packed_sliding_window_attention(jnp.concatenate(x, 1), **turns, **static)
            static |= dict(implementation=implementation)
            return sliding_window_attention(*x, starts=starts, lengths=lengths, **turns, **static)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    return run


def worst_error(got, wanted, starts, lengths):
    """Largest relative error of any (sample, head): a norm over everything would hide a wrong short sample.

    The floor serves what vanishes: dq and dk of a sample of one token.
    """
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    worst = 0.0
    for start, length in zip(np.asarray(starts), np.asarray(lengths), strict=True):
        rows = slice(start, start + length)
        size = np.linalg.norm(wanted[rows], axis=(0, 2)) + 0.1 * np.sqrt(length * wanted.shape[2] + 1)
        error = np.linalg.norm(got[rows] - wanted[rows], axis=(0, 2)) / size
        worst = np.maximum(worst, np.max(error, initial=0))  # not max, which loses a NaN
    return worst


def check(case, seed=0, turned=False, implementation="mosaic_gpu"):
    window, shape = case
    operands, (starts, lengths), inside = batch(seed, **shape)
    angles = np.random.default_rng(seed).uniform(0, 1000, (len(inside), shape["width"] // 2)).astype(np.float32)
    angles[~inside] = np.nan
    arguments = starts, lengths, jnp.asarray(angles)
    kernel = compiled(implementation, shape["longest"], window, turned)
    got, again = (kernel(*operands, *arguments) for _ in range(2))
    xla = compiled("xla", shape["longest"], window, turned)
    with jax.default_matmul_precision("highest"):
        wanted = xla(*(x.astype(jnp.float32) for x in operands), *arguments)
    narrow = xla(*operands, *arguments)
    for name, a, b, c, d in zip(NAMES, got, again, wanted, narrow, strict=True):
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), f"{name}: two runs differ"
        assert not np.any(np.asarray(a, np.float32)[~inside]), f"{name}: not zero outside the samples"
        error, allowed = (worst_error(x, c, starts, lengths) for x in (a, d))
        assert error <= max(1.5 * allowed, 3.5e-3), f"{name}: {error:.2e}, XLA in {shape['dtype']} makes {allowed:.2e}"


CASES = {
    "two-sided, D 128": ((100, 100), dict(heads=4, kv_heads=4, width=128, dtype="bfloat16")),
    "two-sided, D 64": ((100, 100), dict(heads=4, kv_heads=4, width=64, dtype="bfloat16")),
    "one-sided, grouped, D 64, f16": ((100, 0), dict(heads=8, kv_heads=2, width=64, dtype="float16")),
    "unbounded, grouped, D 128": ((None, None), dict(heads=2, kv_heads=1, width=128, dtype="bfloat16")),
    "only ahead, D 64": ((0, 37), dict(heads=3, kv_heads=3, width=64, dtype="bfloat16")),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    window, shape = CASES[name]
    check((window, dict(samples=60, longest=700) | shape))


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "packed"])
@pytest.mark.parametrize("width", [64, 128])
def test_rotary_angles(width, implementation):
    kv_heads = 4 if implementation == "packed" else 2
    shape = dict(samples=60, longest=700, heads=4, kv_heads=kv_heads, width=width, dtype="bfloat16")
    check(((100, 30), shape), turned=True, implementation=implementation)


def test_memory_is_that_of_the_statistics():
    shape = dict(samples=256, longest=512, heads=4, kv_heads=4, width=128, dtype="bfloat16")
    operands, spans, _ = batch(2, **shape)

    def forward(q, k, v, starts, lengths):
        static = dict(max_length=512, window=(100, 100), implementation="mosaic_gpu")
        return sliding_window_attention(q, k, v, starts=starts, lengths=lengths, **static)

    memory = jax.jit(forward).lower(*operands[:3], *spans).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.01 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
