"""The kernel of the whole PFFN block without a GPU: interpret mode with race detection, gradients, lowering."""

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
from pallas_kernels.rows import row_kernel


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
    return np.max(errors)  # not max, which loses a NaN


# width, heads of q and k, dtype, what the queries are multiplied and moved by, lengths; heads of a block, SMs
CASES = {
    "no-keys": (64, 2, 1, jnp.bfloat16, 1.0, 0.0, [131, 0, 5], [130, 50, 0], 2, 2),
    "far-from-zero": (128, 2, 2, jnp.bfloat16, 0.5, 5.0, [70], [66], 2, 1),
    "float16": (64, 2, 2, jnp.float16, 2.0, -1.0, [65], [5], 2, 1),
    "two-unequal-blocks": (64, 3, 3, jnp.bfloat16, 0.5, 5.0, [70, 1, 0, 2], [66, 0, 5, 3], 2, 4),
}


def operands_of(width, heads, kv_heads, dtype, spread, mean, q_lengths, kv_lengths):
    (q, k, v, do), spans = batch(q_lengths, kv_lengths, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    means = mean * (1 + jnp.arange(heads)[:, None] / 4)  # blocks that share a row have other means than the row
    q = q * jnp.asarray(spread, q.dtype) + means.astype(q.dtype)
    static = dict(activation=("gelu_tanh", "relu2", "silu")[:heads], scale=0.3, post_scale=0.7, eps=1e-5)
    return (q, k, v, do), spans, static | dict(max_q_length=max(q_lengths), max_kv_length=max(kv_lengths))


def take_tiles(monkeypatch, of_block: int) -> None:
    """Let so many heads share a block of the grid, and forget what was traced with others."""
    monkeypatch.setattr(block, "block_tiles", lambda heads, width: BlockTiles(of_block, 8192 // width, slots=3))
    for traced in (block._fused, block._fused_backward):
        traced.clear_cache()


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel(name, monkeypatch):
    *case, of_block, sms = CASES[name]
    take_tiles(monkeypatch, of_block)
    (*qkv, _), spans, static = operands_of(*case)
    out = block.mosaic_gpu(*qkv, *spans, **static, sms=sms, interpret=interpreter.RACES)
    wanted, narrow = (block.xla(*(x.astype(d) for x in qkv), *spans, **static) for d in (jnp.float32, qkv[0].dtype))
    outside = np.isnan(np.asarray(qkv[0], np.float32)).any((1, 2))
    assert not np.any(np.asarray(out, np.float32)[outside])
    assert worst(out, wanted, spans) <= 1.5 * worst(narrow, wanted, spans)


# --- tiles, and lowering for sm_90


@pytest.mark.parametrize(
    ("width", "heads", "of_block", "slots"),
    [(128, 1, 1, 4), (128, 4, 4, 3), (128, 5, 3, 4), (128, 6, 3, 4), (128, 8, 4, 3), (64, 2, 2, 4), (64, 8, 8, 3)],
)
def test_tiles_fit(width, heads, of_block, slots):
    tiles = block_tiles(heads=heads, width=width)
    assert tiles == BlockTiles(of_block, 8192 // width, slots)
    scratch = block_scratch(jnp.bfloat16, width // 64, tiles, shared=heads > of_block, interpret=None)
    assert hopper.shared_bytes(scratch) <= hopper.SHARED_MEMORY


@pytest.mark.parametrize("of_block", [2, 1])
def test_gradients_of_the_interpreted_kernels(of_block, monkeypatch):
    """Behind the forward kernel with all heads in one block, and in two; the pass over the rows is XLA's and own."""
    monkeypatch.setattr(hopper, "SLICE", 128)  # as in its own test
    take_tiles(monkeypatch, of_block)
    if of_block == 1:
        monkeypatch.setattr(block, "row_pass", functools.partial(row_kernel, interpret=interpreter.RACES))
    (*qkv, do), spans, static = operands_of(64, 2, 1, jnp.bfloat16, 2.0, 1.0, [40, 83], [33, 0])

    def run(f, dtype, **more):
        out, pull = jax.vjp(lambda *x: f(*x, *spans, **static, **more), *(x.astype(dtype) for x in qkv))
        return out, *pull(do.astype(dtype))

    got = run(block.mosaic_gpu, jnp.bfloat16, sms=1, interpret=interpreter.RACES)
    wanted, narrow = (jax.jit(functools.partial(run, block.xla, dtype))() for dtype in (jnp.float32, jnp.bfloat16))
    for i, name in enumerate(("out", "q", "k", "v")):
        where = spans if i < 2 else spans[2:]
        assert worst(got[i], wanted[i], where) <= 1.5 * worst(narrow[i], wanted[i], where), name


@pytest.mark.parametrize(
    ("width", "heads", "dtype", "save"),
    [(128, 4, jnp.bfloat16, True), (64, 8, jnp.float16, False), (128, 1, jnp.bfloat16, False)],
)
def test_every_choice_is_lowered(width, heads, dtype, save):
    q, k = (jax.ShapeDtypeStruct((n, h, width), dtype) for n, h in ((2048, heads), (512, max(heads // 2, 1))))
    activation = ("gelu", "relu2") * (heads // 2) or ("gelu_tanh",)
    static = dict(activation=activation, scale=1.0, post_scale=1.0, eps=1e-5, max_q_length=1024, sms=132, save=save)
    f = functools.partial(block_forward, **static, tiles=block_tiles(heads=heads, width=width))
    spans = [jax.ShapeDtypeStruct((2,), jnp.int32)] * 4
    assert "mosaic_gpu" in interpreter.lower_for_hopper(f, q, k, k, *spans)


def test_both_directions_are_lowered_under_shard_map(monkeypatch):
    """Wide rows, so that a cluster shares them in the forward pass too, with unequal blocks."""
    monkeypatch.setattr(hopper, "unsupported_device", lambda: None)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k = (jax.ShapeDtypeStruct((n, 5, 128), jnp.bfloat16) for n in (512, 256))
    spans = [jax.ShapeDtypeStruct((4,), jnp.int32)] * 4
    static = dict(activation=("gelu_tanh",) * 5, scale=1.0, post_scale=1.0, max_q_length=128, max_kv_length=128)

    def f(q, k, v, do, *spans):
        return jax.vjp(lambda *x: block.mosaic_gpu(*x, *spans, **static, eps=1e-5, sms=132), q, k, v)[1](do)

    f = jax.shard_map(f, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    text = interpreter.lower_for_hopper(f, q, k, k, q, *spans)
    for kernel in ("gdpa_block_forward", "gdpa_block_norm_backward", "gdpa_dkv", "gdpa_dq_behind_norm"):
        assert kernel in text


def test_tiles_beyond_shared_memory_are_refused():
    x, spans = jnp.ones((128, 4, 128), jnp.bfloat16), [jnp.zeros(1, jnp.int32)] * 4
    static = dict(activation=("relu",) * 4, scale=1.0, post_scale=1.0, eps=1e-5, max_q_length=128, sms=1, save=False)
    with pytest.raises(ValueError, match=r"takes \d+ bytes of shared memory, sm_90 has 232448"):
        block_forward(x, x, x, *spans, **static, tiles=BlockTiles(heads=4, kv_block=64, slots=4))


# --- which calls take it


@pytest.mark.parametrize(
    ("heads", "changes", "taken"),
    [(8, {}, True), (9, {}, False), (4, dict(shared_keys=True), False), (4, dict(max_kv_length=0), False)],
)
def test_calls_that_the_kernels_can_finish_take_them(heads, changes, taken, monkeypatch):
    q, k = (jnp.zeros((n, heads, 128), jnp.bfloat16) for n in (128, 1024))
    spans = [jnp.zeros(1, jnp.int32)] * 4
    monkeypatch.setattr(block, "fused", lambda *_: "fused")
    monkeypatch.setattr(block, "compose", lambda *_, **__: "composed")
    static = dict(activation=("relu",) * heads, scale=1.0, post_scale=1.0, max_q_length=128, max_kv_length=1024)
    got = block.mosaic_gpu(q, k, k, *spans, **(static | changes), eps=1e-5, sms=132)
    assert got == ("fused" if taken else "composed")
