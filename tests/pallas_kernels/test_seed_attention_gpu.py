"""Seed attention as compiled for Hopper: values, gradients, isolation of samples, zeros, repeatability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed_seed_attention, seed_attention

pytestmark = pytest.mark.gpu


def batch(seed, *, samples, longest, seeds, heads, kv_heads, width, dtype):
    """Jagged keys and values with gaps and shuffled samples; every row outside the samples is NaN."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, samples)
    lengths[:4] = (0, 1, longest, 64)
    starts = np.cumsum(lengths + rng.integers(0, 4, samples)) - lengths
    rows, shuffle = int(starts[-1] + lengths[-1]) + 200, rng.permutation(samples)
    inside = np.zeros(rows, bool)
    for start, length in zip(starts, lengths, strict=True):
        inside[start : start + length] = True

    def normal(*shape):
        return rng.standard_normal((*shape, width), np.float32)

    k, v = (np.where(inside[:, None, None], normal(rows, kv_heads), np.nan) for _ in range(2))
    operands = [jnp.asarray(x, dtype) for x in (normal(seeds, heads), k, v, normal(samples, seeds, heads))]
    return operands, [jnp.asarray(x[shuffle], jnp.int32) for x in (starts, lengths)], inside


@functools.cache
def compiled(implementation, longest):
    @jax.jit
    def run(q, k, v, do, starts, lengths):
        def attend(q, k, v):
            static = dict(starts=starts, lengths=lengths, max_length=longest)
            if implementation == "packed":
                return packed_seed_attention(q, jnp.concatenate([k, v], 1), implementation="mosaic_gpu", **static)
            return seed_attention(q, k, v, implementation=implementation, **static)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    return run


def worst_error(got, wanted, groups):
    """Largest relative error of any (group of rows, head); the floor serves what vanishes."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    worst = 0.0
    for group in groups:
        g, w = got[group].reshape(-1, *got.shape[-2:]), wanted[group].reshape(-1, *got.shape[-2:])
        size = np.linalg.norm(w, axis=(0, 2)) + 0.1 * np.sqrt(w.shape[0] * w.shape[2] + 1) / 10
        error = np.linalg.norm(g - w, axis=(0, 2)) / size
        worst = np.maximum(worst, np.max(error, initial=0))  # not max, which loses a NaN
    return worst


CASES = {
    "256 seeds, D 128": dict(seeds=256, heads=4, kv_heads=4, width=128, dtype="bfloat16"),
    "100 seeds, grouped, D 64, f16": dict(seeds=100, heads=4, kv_heads=2, width=64, dtype="float16"),
}


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    shape = dict(samples=60, longest=700) | CASES[name]
    operands, (starts, lengths), inside = batch(0, **shape)
    kernel, xla = (compiled(i, shape["longest"]) for i in (implementation, "xla"))
    got, again = (kernel(*operands, starts, lengths) for _ in range(2))
    with jax.default_matmul_precision("highest"):
        wanted = xla(*(x.astype(jnp.float32) for x in operands), starts, lengths)
    narrow = xla(*operands, starts, lengths)
    samples = [slice(s, s + n) for s, n in zip(np.asarray(starts), np.asarray(lengths), strict=True)]
    groups = dict(out=range(shape["samples"]), seeds=[slice(None)], k=samples, v=samples)
    for (name, group), a, b, c, d in zip(groups.items(), got, again, wanted, narrow, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        assert np.array_equal(a, b), f"{name}: two runs differ"
        if name in "kv":
            assert not np.any(a[~inside]), f"{name}: not zero outside the samples"
        error, allowed = (worst_error(x, c, group) for x in (a, d))
        assert error <= max(1.5 * allowed, 3.5e-3), f"{name}: {error:.2e}, XLA in {shape['dtype']} makes {allowed:.2e}"
    assert not np.any(np.asarray(got[0], np.float32)[np.asarray(lengths) == 0])
