"""The GDPA kernels as compiled for Hopper: values and gradients, isolation of samples, zeros outside, repeatability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gdpa, gdpa_block

pytestmark = pytest.mark.gpu
NAMES = ("q", "k", "v")


def batch(seed, *, samples, lq, lkv, heads, kv_heads, width, dtype):
    """Jagged operands with gaps and shuffled samples; every row outside the samples is NaN, in the cotangent too."""
    rng = np.random.default_rng(seed)
    shuffle = rng.permutation(samples)

    def spans(longest):
        lengths = rng.integers(0, longest + 1, samples)
        lengths[:3] = (0, 1, longest)
        gaps = rng.integers(0, 4, samples)
        starts = np.cumsum(lengths + gaps) - lengths
        return starts, lengths, int(starts[-1] + lengths[-1]) + 200

    (q_starts, q_lengths, q_rows), (kv_starts, kv_lengths, kv_rows) = spans(lq), spans(lkv)

    def rows_inside(starts, lengths, rows):
        inside = np.zeros(rows, bool)
        for start, length in zip(starts, lengths, strict=True):
            inside[start : start + length] = True
        return inside

    def normal(inside, h):
        x = rng.standard_normal((len(inside), h, width), np.float32)
        x[~inside] = np.nan
        return jnp.asarray(x, dtype)

    q_inside, kv_inside = rows_inside(q_starts, q_lengths, q_rows), rows_inside(kv_starts, kv_lengths, kv_rows)
    q, do = normal(q_inside, heads), normal(q_inside, heads)
    k, v = normal(kv_inside, kv_heads), normal(kv_inside, kv_heads)
    named = dict(q_starts=q_starts, q_lengths=q_lengths, kv_starts=kv_starts, kv_lengths=kv_lengths)
    return (q, k, v, do), {n: jnp.asarray(x[shuffle], jnp.int32) for n, x in named.items()}, (q_inside, kv_inside)


def value_and_gradients(implementation, operands, spans, runs=1, operator=gdpa, **static):
    @jax.jit
    def run(q, k, v, do, spans):
        out, pull = jax.vjp(lambda *x: operator(*x, **spans, **static, implementation=implementation), q, k, v)
        return out, *pull(do)

    results = [run(*operands, spans) for _ in range(runs)]
    return results if runs > 1 else results[0]


def worst_error(got, wanted, starts, lengths):
    """Largest relative error of any (sample, head): a norm over everything would hide a wrong short sample."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    worst = 0.0
    for start, length in zip(np.asarray(starts), np.asarray(lengths), strict=True):
        rows = slice(start, start + length)
        size = np.linalg.norm(wanted[rows], axis=(0, 2))
        error = np.linalg.norm(got[rows] - wanted[rows], axis=(0, 2))
        error = np.where(size > 0, error / np.maximum(size, 1e-30), error)
        worst = np.maximum(worst, np.max(error, initial=0))  # not max, which loses a NaN
    return worst


CASES = {
    "resident-d128": dict(samples=60, lq=700, lkv=256, heads=4, kv_heads=4, width=128, dtype="bfloat16"),
    "streamed-d128-grouped": dict(samples=40, lq=700, lkv=900, heads=4, kv_heads=2, width=128, dtype="bfloat16"),
    "short-keys-d128": dict(samples=60, lq=300, lkv=100, heads=4, kv_heads=4, width=128, dtype="bfloat16"),
    "resident-d64-float16": dict(samples=60, lq=700, lkv=300, heads=8, kv_heads=8, width=64, dtype="float16"),
    "few-keys-d64": dict(samples=60, lq=200, lkv=40, heads=4, kv_heads=1, width=64, dtype="bfloat16"),
    "five-heads-d128": dict(samples=40, lq=300, lkv=200, heads=5, kv_heads=1, width=128, dtype="bfloat16"),
    "six-heads-d128": dict(samples=60, lq=300, lkv=200, heads=6, kv_heads=6, width=128, dtype="bfloat16"),
    "wide-d128-grouped": dict(samples=40, lq=300, lkv=500, heads=8, kv_heads=4, width=128, dtype="bfloat16"),
}
PLAIN = (
    "resident-d128",
    "streamed-d128-grouped",
    "short-keys-d128",
    "resident-d64-float16",
    "few-keys-d64",
    "wide-d128-grouped",
)
BLOCKS = ("resident-d128", "few-keys-d64", "six-heads-d128", "wide-d128-grouped", "resident-d64-float16")


@pytest.mark.parametrize(
    ("name", "operator"),
    [*((name, gdpa) for name in PLAIN), *((name, gdpa_block) for name in BLOCKS)],
)
def test_values_and_gradients(name, operator):
    shape = CASES[name]
    operands, spans, inside = batch(0, **shape)
    static = dict(
        operator=operator,
        max_q_length=shape["lq"],
        max_kv_length=shape["lkv"],
        scale=0.2,
        post_scale=0.7,
        activation="gelu_tanh" if "d128" in name else ("gelu", "hardswish") * (shape["heads"] // 2),
    )
    got, again = value_and_gradients("mosaic_gpu", operands, spans, runs=2, **static)
    with jax.default_matmul_precision("highest"):
        wide = tuple(x.astype(jnp.float32) for x in operands)
        wanted = value_and_gradients("reference", wide, spans, **static)
    narrow = value_and_gradients("reference", operands, spans, **static)
    queries, keys = (spans["q_starts"], spans["q_lengths"]), (spans["kv_starts"], spans["kv_lengths"])
    for what, a, b, c, d, where, rows in zip(
        ("out", *NAMES), got, again, wanted, narrow, (queries, queries, keys, keys), (0, 0, 1, 1), strict=True
    ):
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), f"{what}: two runs differ"
        assert not np.any(np.asarray(a, np.float32)[~inside[rows]]), f"{what}: not zero outside the samples"
        error, allowed = worst_error(a, c, *where), worst_error(d, c, *where)
        # A sample of one query and one key has one weight, s (1 + tanh) / 2 of a score near −2 in one case, where the
        # hardware's tanh, right to 2⁻¹¹, counts fifteenfold: up to 7.4e-3 of dv.
        assert error <= max(1.5 * allowed, 5e-3 if what == "v" else 3.5e-3), (
            f"{what}: {error:.2e}, the reference in {shape['dtype']} makes {allowed:.2e}"
        )


@pytest.mark.parametrize("name", ["streamed-d128-grouped", "resident-d64-float16", "few-keys-d64", "five-heads-d128"])
def test_block_without_gradients(name):
    """It is another kernel than with gradients."""
    shape = CASES[name]
    (q, k, v, _), spans, (inside, _) = batch(3, **shape)
    static = dict(max_q_length=shape["lq"], max_kv_length=shape["lkv"], scale=0.2, activation="gelu_tanh")

    def value(implementation, dtype):
        call = functools.partial(gdpa_block, **spans, **static, implementation=implementation)
        return np.asarray(jax.jit(call)(*(x.astype(dtype) for x in (q, k, v))), np.float32)

    got, again = (value("mosaic_gpu", q.dtype) for _ in range(2))
    assert np.array_equal(got, again)
    assert not np.any(got[~inside])
    with jax.default_matmul_precision("highest"):
        wanted = value("reference", jnp.float32)
    error, allowed = (
        worst_error(x, wanted, spans["q_starts"], spans["q_lengths"]) for x in (got, value("reference", q.dtype))
    )
    assert error <= 1.5 * allowed


def test_samples_that_share_keys_add_their_gradients_up():
    operands, spans, _ = batch(1, samples=12, lq=200, lkv=100, heads=2, kv_heads=2, width=64, dtype="bfloat16")
    longest = int(jnp.argmax(spans["kv_lengths"]))
    spans |= {n: jnp.broadcast_to(spans[n][longest], (12,)) for n in ("kv_starts", "kv_lengths")}
    static = dict(max_q_length=200, max_kv_length=100, activation="silu", shared_keys=True)
    got, wanted = (value_and_gradients(i, operands, spans, **static) for i in ("mosaic_gpu", "reference"))
    for name, a, b in zip(("out", *NAMES), got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 6e-3 * np.linalg.norm(b), name


@pytest.mark.parametrize("lkv", [256, 512])
def test_neither_direction_takes_memory_beyond_its_results(lkv):
    shape = dict(samples=256, lq=512, lkv=lkv, heads=4, kv_heads=4, width=128, dtype="bfloat16")
    operands, spans, _ = batch(2, **shape)
    call = functools.partial(gdpa, max_q_length=512, max_kv_length=lkv, implementation="mosaic_gpu")

    def backward(q, k, v, do, spans):
        return jax.vjp(lambda *x: call(*x, **spans), q, k, v)[1](do)

    for f in (lambda q, k, v, do, spans: call(q, k, v, **spans), backward):
        assert_little_memory(f, *operands, spans)


def assert_little_memory(f, *operands):
    memory = jax.jit(f).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.01 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)


def test_the_block_takes_no_memory_beyond_its_results():
    """Those that it saves for the gradients included; rows as wide as a cluster's shared memory."""
    shape = dict(samples=256, lq=512, lkv=100, heads=8, kv_heads=8, width=128, dtype="bfloat16")
    (q, k, v, _), spans, _ = batch(2, **shape)

    def f(q, k, v, spans):
        call = functools.partial(gdpa_block, **spans, max_q_length=512, max_kv_length=100, implementation="mosaic_gpu")
        out, pull = jax.vjp(call, q, k, v)
        return out, jax.tree.leaves(pull)

    assert_little_memory(f, q, k, v, spans)
