"""The kernel of the whole PFFN block without a GPU: interpret mode with race detection, lowering for sm_90."""

import functools

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gdpa_mosaic import batch

from pallas_kernels import hopper
from pallas_kernels.gdpa import block
from pallas_kernels.gdpa.mosaic_block import BlockTiles, block_forward, block_scratch, block_tiles


@pytest.fixture(autouse=True)
def _patched_interpreter():
    interpreter.install()


def worst(x, wanted, spans):
    """The largest error of a sample and head."""
    errors = [0.0]
    for start, length in zip(*map(np.asarray, spans[:2]), strict=True):
        a, b = (np.asarray(y[start : start + length], np.float32) for y in (x, wanted))
        norm = np.linalg.norm(b, axis=(0, 2))
        if length:
            errors.append((np.linalg.norm(a - b, axis=(0, 2)) / np.where(norm, norm, 1)).max())
    return max(errors)


# width, heads of q and k, dtype, what the queries are multiplied by and moved by, lengths, SMs
CASES = {
    "no-keys": (64, 2, 1, jnp.bfloat16, 1.0, 0.0, [131, 0, 5], [130, 50, 0], 2),
    "far-from-zero": (128, 2, 2, jnp.bfloat16, 0.5, 5.0, [70], [66], 1),
    "float16": (64, 2, 2, jnp.float16, 2.0, -1.0, [65], [5], 1),
}


def operands_of(width, heads, kv_heads, dtype, spread, mean, q_lengths, kv_lengths):
    (q, k, v, do), spans = batch(q_lengths, kv_lengths, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    q = q * jnp.asarray(spread, q.dtype) + jnp.asarray(mean, q.dtype)
    static = dict(activation=("gelu_tanh", "relu2"), scale=0.3, post_scale=0.7, eps=1e-5)
    return (q, k, v, do), spans, static | dict(max_q_length=max(q_lengths), max_kv_length=max(kv_lengths))


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel(name):
    *case, sms = CASES[name]
    (*qkv, _), spans, static = operands_of(*case)
    out = block.mosaic_gpu(*qkv, *spans, **static, sms=sms, interpret=interpreter.RACES)
    wanted, narrow = (block.xla(*(x.astype(d) for x in qkv), *spans, **static) for d in (jnp.float32, qkv[0].dtype))
    outside = np.isnan(np.asarray(qkv[0], np.float32)).any((1, 2))
    assert not np.any(np.asarray(out, np.float32)[outside])
    assert worst(out, wanted, spans) <= 1.5 * worst(narrow, wanted, spans)


# --- tiles, and lowering for sm_90


@pytest.mark.parametrize(
    ("width", "heads", "slots"),
    [(128, 1, 4), (128, 2, 4), (128, 4, 3), (128, 5, None), (64, 2, 4), (64, 8, 3), (64, 10, None)],
)
def test_tiles_fit_or_are_refused(width, heads, slots):
    tiles = block_tiles(heads=heads, width=width)
    if slots is None:
        assert tiles is None
        return
    assert tiles == BlockTiles(8192 // width, slots)
    assert hopper.shared_bytes(block_scratch(jnp.bfloat16, heads, width // 64, tiles, interpret=None)) <= 227 * 1024


@pytest.mark.parametrize(
    ("width", "heads", "dtype"), [(128, 4, jnp.bfloat16), (64, 8, jnp.float16), (128, 1, jnp.bfloat16)]
)
def test_every_choice_is_lowered(width, heads, dtype):
    q, k = (jax.ShapeDtypeStruct((n, h, width), dtype) for n, h in ((2048, heads), (512, max(heads // 2, 1))))
    activation = ("gelu", "relu2") * (heads // 2) or ("gelu_tanh",)
    static = dict(activation=activation, scale=1.0, post_scale=1.0, eps=1e-5, max_q_length=1024, sms=132)
    f = functools.partial(block_forward, **static, tiles=block_tiles(heads=heads, width=width))
    spans = [jax.ShapeDtypeStruct((2,), jnp.int32)] * 4
    assert "mosaic_gpu" in interpreter.lower_for_hopper(f, q, k, k, *spans)


def test_tiles_beyond_shared_memory_are_refused():
    x, spans = jnp.ones((128, 4, 128), jnp.bfloat16), [jnp.zeros(1, jnp.int32)] * 4
    static = dict(activation=("relu",) * 4, scale=1.0, post_scale=1.0, eps=1e-5, max_q_length=128, sms=1)
    with pytest.raises(ValueError, match=r"takes \d+ bytes of shared memory, sm_90 has 232448"):
        block_forward(x, x, x, *spans, **static, tiles=BlockTiles(kv_block=64, slots=4))


# --- which calls take it


@pytest.mark.parametrize(("heads", "taken"), [(4, True), (5, False)])
def test_calls_without_gradients_take_it_where_it_fits(heads, taken, monkeypatch):
    q, k = (jax.ShapeDtypeStruct((n, heads, 128), jnp.bfloat16) for n in (128, 1024))
    spans = [jax.ShapeDtypeStruct((1,), jnp.int32)] * 4
    calls = []

    def one_kernel(static, eps, q, *_):
        calls.append("one kernel")
        return q

    def gdpa(q, *_, **__):
        calls.append("gdpa")
        return q

    monkeypatch.setattr(block, "_in_one_kernel", one_kernel)
    monkeypatch.setattr(block.mosaic_module, "mosaic_gpu", gdpa)
    static = dict(activation=("relu",) * heads, scale=1.0, post_scale=1.0, max_q_length=128, max_kv_length=1024)
    call = functools.partial(block.mosaic_gpu, **static, eps=1e-5, sms=132)
    jax.eval_shape(call, q, k, k, *spans)
    assert calls == ["one kernel" if taken else "gdpa"]
    calls.clear()
    jax.eval_shape(lambda q, *rest: jax.vjp(lambda q: call(q, *rest), q)[0], q, k, k, *spans)
    assert "gdpa" in calls
