"""The MLP of two layers without a GPU: interpret mode with race detection, lowering, which calls the kernels take."""

import contextlib
import functools

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import SlowerPathWarning, hopper, masked_by_mlp, silu_mlp
from pallas_kernels.mlp import api
from pallas_kernels.mlp.backward import backward_tiles
from pallas_kernels.mlp.forward import forward_tiles

interpreter.install()
NAMES = ("y", "x", "w1", "b1", "w2", "b2")
# Inputs, hidden, outputs of the presets' event projections and personalised networks.
SHAPES = [(192, 320, 192), (192, 320, 320), (192, 128, 192), (192, 128, 128), (256, 320, 320), (256, 128, 128)]
MASKS = [(192, 320, 192), (192, 128, 192)]


def operands(N, widths, dtype):
    """Arguments of the MLP, and a cotangent."""
    (F, H, G), rng = widths, np.random.default_rng(0)
    shapes = dict(x=(N, F), w1=(F, H), b1=(H,), w2=(H, G), b2=(G,), dy=(N, G))
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["w1"] /= F**0.5
    arrays["w2"] /= H**0.5
    return [jnp.asarray(x, dtype) for x in arrays.values()]


def value_and_gradients(f, *arrays):
    *arguments, dy = arrays
    y, pull = jax.vjp(f, *arguments)
    return y, *pull(dy)


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def masked_formula(x, *weights):
    return x * api.mlp_in_xla(x, *weights)


def check(got, arrays, dtype, masked=False):
    """Values and gradients, held to the error of XLA's in the same dtype."""
    f = masked_formula if masked else api.mlp_in_xla
    with jax.enable_x64(True):
        wide = value_and_gradients(f, *(x.astype(jnp.float64) for x in arrays))
    narrow = value_and_gradients(f, *arrays)
    for name, a, b, c in zip(NAMES, got, wide, narrow, strict=True):
        assert (a.shape, a.dtype) == (b.shape, dtype), name
        assert relative(a, b) <= max(1.2 * relative(c, b), 3e-4), name


@pytest.mark.parametrize(
    ("N", "widths", "dtype", "masked"),
    [
        (128, (64, 64, 64), jnp.bfloat16, False),
        (392, (128, 192, 64), jnp.bfloat16, False),  # a tail
        (136, (64, 128, 320), jnp.float16, False),
        (128, (256, 64, 128), jnp.bfloat16, False),  # the backward's narrow chunks
        (392, (128, 192, 128), jnp.bfloat16, True),
        (136, (64, 64, 64), jnp.float16, True),
        (128, (256, 64, 256), jnp.bfloat16, True),
    ],
)
def test_interpreted_kernels(N, widths, dtype, masked):
    arrays = operands(N, widths, dtype)
    kernel = functools.partial(api.mlp_kernel, masked=masked, sms=2, interpret=interpreter.RACES)
    check(value_and_gradients(kernel, *arrays), arrays, dtype, masked)


@pytest.mark.parametrize(
    ("kilobytes", "forward", "backward"),
    [
        (132, (64, (2, 2), 2), (64, (2, 2), 1)),
        (126, (64, (2, 2), 2), (64, (2, 1), 1)),
        (110, (64, (2, 2), 1), (64, (1, 1), 1)),
    ],
)
def test_interpreted_kernels_that_stream_weights(kilobytes, forward, backward, monkeypatch):
    monkeypatch.setattr(hopper, "SHARED_MEMORY", kilobytes * 1024)
    widths = (128, 320, 64)
    tiles = [f(jnp.bfloat16, *widths) for f in (forward_tiles, backward_tiles)]
    assert [(t.chunk, t.weight_slots, t.row_slots) for t in tiles] == [forward, backward]
    jax.clear_caches()
    arrays = operands(392, widths, jnp.bfloat16)
    kernel = functools.partial(api.mlp_kernel, sms=2, interpret=interpreter.RACES)
    check(value_and_gradients(kernel, *arrays), arrays, jnp.bfloat16)


def test_interpreted_mask_with_streamed_weights(monkeypatch):
    monkeypatch.setattr(hopper, "SHARED_MEMORY", 164 * 1024)
    jax.clear_caches()
    arrays = operands(392, (128, 320, 128), jnp.bfloat16)
    assert backward_tiles(jnp.bfloat16, 128, 320, 128).blocks == 2
    kernel = functools.partial(api.mlp_kernel, masked=True, sms=2, interpret=interpreter.RACES)
    check(value_and_gradients(kernel, *arrays), arrays, jnp.bfloat16, masked=True)


def test_the_xla_path_is_the_formula():
    arrays = operands(40, (24, 16, 8), jnp.float32)
    got = value_and_gradients(silu_mlp, *arrays)

    def formula(x, w1, b1, w2, b2):
        z = x @ w1 + b1
        return (z / (1 + jnp.exp(-z))) @ w2 + b2

    for name, a, b in zip(NAMES, got, value_and_gradients(formula, *arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("rows", [16, 7])  # folded to a multiple of 64 columns, and not
def test_the_mask_in_xla_is_the_formula(rows):
    x, *weights, dy = operands(2 * rows, (24, 16, 24), jnp.float32)
    x, dy = (a.reshape(2, rows, 24) for a in (x, dy))
    got, expected = (value_and_gradients(f, x, *weights, dy) for f in (masked_by_mlp, masked_formula))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=name)


def test_memory_that_holds_no_tiles_is_refused(monkeypatch):
    monkeypatch.setattr(hopper, "SHARED_MEMORY", 64 * 1024)
    with pytest.raises(ValueError, match="320 hidden columns takes more than 65536 bytes"):
        forward_tiles(jnp.bfloat16, 192, 320, 192)


# --- for sm_90


@pytest.fixture
def on_hopper():
    with hopper.assumed():
        yield


def shapes(N, widths, dtype=jnp.bfloat16):
    F, H, G = widths
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in ((N, F), (F, H), (H,), (H, G), (G,))]


@pytest.mark.parametrize(
    ("f", "widths"), [*((silu_mlp, widths) for widths in SHAPES), *((masked_by_mlp, widths) for widths in MASKS)]
)
def test_every_shape_is_lowered(f, widths, on_hopper):
    arrays = shapes(2_304_000, widths)
    dy = jax.ShapeDtypeStruct((2_304_000, widths[2]), jnp.bfloat16)
    text = interpreter.lower_for_hopper(lambda *x: value_and_gradients(f, *x), *arrays, dy)
    assert "mlp_forward" in text
    assert "mlp_backward" in text


@pytest.mark.parametrize("f", [silu_mlp, masked_by_mlp])
def test_both_directions_are_lowered_under_shard_map(f, on_hopper):
    """Rows are shared out, weights are not: their gradients are added up over the devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.P("data"), (jax.P(),) * 4
    sharded = jax.shard_map(
        functools.partial(value_and_gradients, f),
        mesh=mesh,
        in_specs=(split, *whole, split),
        out_specs=(split, split, *whole),
    )
    arrays = shapes(65_536, SHAPES[0])
    text = interpreter.lower_for_hopper(sharded, *arrays, arrays[0])
    for part in ("mlp_forward", "mlp_backward", "all_reduce"):
        assert part in text


def test_leading_axes_are_lowered(on_hopper):
    x, *others = shapes(32_768, SHAPES[3], jnp.float16)
    x = jax.ShapeDtypeStruct((64, 512, 192), x.dtype)
    assert "mlp_forward" in interpreter.lower_for_hopper(silu_mlp, x, *others)


@pytest.mark.parametrize(
    ("N", "widths", "dtype", "reason"),
    [
        (32_768, (192, 320, 192), jnp.float32, "x is float32"),
        (32_768, (200, 320, 200), jnp.bfloat16, "widths are 200, 320 and 200"),
        (32_768, (320, 320, 320), jnp.bfloat16, "320 inputs and 320 outputs"),
        (32_768, (128, 320, 384), jnp.bfloat16, "128 inputs and 384 outputs"),
        (32_772, (192, 320, 192), jnp.bfloat16, "x has 32772 rows"),
        (0, (192, 320, 192), jnp.bfloat16, "x has 0 rows"),
    ],
)
def test_calls_that_stay_with_xla(N, widths, dtype, reason, on_hopper, monkeypatch):
    arrays = shapes(N, widths, dtype)
    with pytest.raises(ValueError, match=f"silu_mlp: {reason}"):
        jax.eval_shape(api.mlp_kernel, *arrays)
    monkeypatch.setattr(api, "mlp_kernel", None)
    told = pytest.warns(SlowerPathWarning, match=f"silu_mlp runs in XLA, .*: {reason}")
    with told if N else contextlib.nullcontext():
        assert jax.eval_shape(silu_mlp, *arrays).shape == (N, widths[2])


def test_weights_of_another_dtype_are_refused():
    x, *others = shapes(1024, (64, 64, 64))
    with pytest.raises(ValueError, match="x is float16, weights and biases are bfloat16, bfloat16"):
        jax.eval_shape(api.mlp_kernel, jax.ShapeDtypeStruct(x.shape, jnp.float16), *others)


def test_masks_of_another_width_are_refused():
    with pytest.raises(ValueError, match="128 outputs mask 64 inputs"):
        jax.eval_shape(functools.partial(api.mlp_kernel, masked=True), *shapes(1024, (64, 64, 128)))


@pytest.mark.filterwarnings("error")
def test_few_rows_and_other_devices_stay_with_xla_unsaid(monkeypatch):
    monkeypatch.setattr(api, "mlp_kernel", None)
    for f in (silu_mlp, masked_by_mlp):
        jax.eval_shape(f, *shapes(2_304_000, SHAPES[0]))
    monkeypatch.setattr(hopper, "unsupported_device", lambda: None)
    for f in (silu_mlp, masked_by_mlp):
        jax.eval_shape(f, *shapes(8192, SHAPES[0]))
