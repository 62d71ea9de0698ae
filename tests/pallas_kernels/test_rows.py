"""Passes over rows without a GPU: interpret mode with race detection, lowering, which calls the kernel takes."""

import functools

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, rows

EPS = 1e-5


def back(x, d_residual, d):
    """The gradient of a norm and of the residual beside it: every sum there is."""
    return rows.normalise_back(d, *rows.normalise(x, EPS)) + d_residual


def arrays(count, N, F, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((N, F)) + i, dtype) for i in range(count)]


def relative(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("N", "F", "dtype", "masked"),
    [(12, 384, jnp.bfloat16, True), (8, 128, jnp.float16, False), (4, 512, jnp.bfloat16, True)],
)
def test_interpreted_kernel(N, F, dtype, masked):
    operands = arrays(3, N, F, dtype)
    inside = jnp.arange(N) % 3 > 0 if masked else None
    if masked:
        operands = [jnp.where(inside[:, None], x, jnp.nan) for x in operands]
    got = rows.row_kernel(back, *operands, name="rows", inside=inside, interpret=interpreter.RACES)
    assert got.dtype == dtype
    wide = rows.row_pass(back, *(x.astype(jnp.float32) for x in operands), name="rows", inside=inside)
    if masked:
        assert not np.any(np.asarray(got, np.float32)[~np.asarray(inside)])
    assert relative(got, wide) <= 1.2 * relative(wide.astype(dtype), wide)


def test_values_of_rows_beside_them():
    operands, inside = arrays(2, 8, 256, jnp.bfloat16), jnp.arange(8) > 2

    def body(x, y):
        return x + y, rows.mean(x * y)

    run = functools.partial(rows.row_kernel, name="rows", interpret=interpreter.RACES)
    kernel = run(body, *operands, inside=inside, and_value=True)
    xla = rows.row_pass(body, *operands, name="rows", inside=inside, and_value=True)
    np.testing.assert_array_equal(*(np.asarray(x[0], np.float32) for x in (kernel, xla)))
    assert kernel[1].dtype == jnp.float32
    np.testing.assert_allclose(kernel[1], xla[1], rtol=1e-5)


def test_values_are_given_to_the_pass_row_by_row():
    operands, value, inside = arrays(2, 8, 256, jnp.bfloat16), jnp.arange(8, dtype=jnp.float32), jnp.arange(8) < 6

    def body(x, y, value):
        return x + rows.along(value, y) * y

    kernel = rows.row_kernel(body, *operands, name="rows", values=(value,), inside=inside, interpret=interpreter.RACES)
    xla = rows.row_pass(body, *operands, name="rows", values=(value,), inside=inside)
    wide = operands[0].astype(jnp.float32) + value[:, None] * operands[1].astype(jnp.float32)
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (kernel, xla)))
    np.testing.assert_array_equal(np.asarray(xla), np.where(inside[:, None], wide, 0).astype(jnp.bfloat16))


def test_the_pass_is_automatic_differentiation_of_its_definition():
    x, d_residual, d = arrays(3, 5, 12, jnp.float32)

    def definition(x):
        return x, (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + EPS)

    (wanted,) = jax.vjp(definition, x)[1]((d_residual, d))
    np.testing.assert_allclose(rows.row_pass(back, x, d_residual, d, name="rows"), wanted, atol=1e-5)
    np.testing.assert_allclose(rows.normalise(x, EPS)[0], definition(x)[1], atol=1e-5)


@pytest.mark.parametrize(("N", "F"), [(1002, 512), (1004, 192), (1000, 544), (1000, 64)])
def test_odd_shapes_are_refused(N, F):
    with pytest.raises(ValueError, match=rf"rows \[{N}, {F}\]: the kernel takes multiples of [48] rows"):
        rows.row_kernel(back, *(jnp.zeros((N, F), jnp.bfloat16),) * 3, name="rows")


# --- for sm_90


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "unsupported_device", lambda: None)


@pytest.mark.parametrize(
    ("N", "F", "dtype", "taken"),
    [
        (1000, 128, jnp.bfloat16, True),
        (1004, 256, jnp.bfloat16, True),
        (1000, 2048, jnp.float16, True),
        (1002, 512, jnp.bfloat16, False),
        (0, 512, jnp.bfloat16, False),
        (1000, 544, jnp.bfloat16, False),
        (1004, 192, jnp.bfloat16, False),
        (1000, 64, jnp.bfloat16, False),
        (1000, 2112, jnp.bfloat16, False),
        (1000, 512, jnp.float32, False),
    ],
)
def test_calls_that_gain_take_the_kernel(N, F, dtype, taken, on_hopper, monkeypatch):
    x = jnp.zeros((N, F), dtype)
    monkeypatch.setattr(rows, "row_kernel", lambda *_, **__: "kernel")
    got = rows.row_pass(back, x, x, x, name="rows")
    assert isinstance(got, str) == taken
    assert not isinstance(rows.row_pass(lambda x: x, x, name="rows"), str)  # a single operand is XLA's
    with_value = rows.row_pass(lambda x: (x, rows.mean(x)), x, name="rows", and_value=True)
    assert isinstance(with_value, str) == taken


def test_other_devices_keep_xla():
    assert not rows.kernel_takes(jnp.zeros((1000, 512), jnp.bfloat16))


@pytest.mark.parametrize(
    ("F", "dtype", "masked"), [(192, jnp.bfloat16, True), (576, jnp.bfloat16, False), (2048, jnp.float16, True)]
)
def test_every_choice_is_lowered(F, dtype, masked):
    x = jax.ShapeDtypeStruct((1000, F), dtype)
    inside = [jax.ShapeDtypeStruct((1000,), jnp.bool_)] * masked

    def f(*x):
        return rows.row_kernel(back, *x[:3], name="rows", inside=x[3] if masked else None)

    assert "mosaic_gpu" in interpreter.lower_for_hopper(f, x, x, x, *inside)


def test_values_beside_rows_are_lowered(on_hopper):
    x = jax.ShapeDtypeStruct((1000, 1024), jnp.bfloat16)

    def f(*x):
        return rows.row_pass(lambda a, b: (a + b, rows.mean(a * b)), *x, name="rows", and_value=True)

    assert "mosaic_gpu" in interpreter.lower_for_hopper(f, x, x)


def test_values_given_to_rows_are_lowered(on_hopper):
    x, value = jax.ShapeDtypeStruct((1000, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1000,), jnp.float32)

    def f(a, b, value):
        return rows.row_pass(lambda a, b, v: a + rows.along(v, b) * b, a, b, name="rows", values=(value,))

    assert "mosaic_gpu" in interpreter.lower_for_hopper(f, x, x, value)


def test_several_shards_are_lowered(on_hopper):
    x, inside = (jax.ShapeDtypeStruct((2, 1000, *f), t) for f, t in (((512,), jnp.bfloat16), ((), jnp.bool_)))

    def f(x, inside):
        return rows.row_pass(back, x, x, x, name="rows", inside=inside)

    assert "mosaic_gpu" in interpreter.lower_for_hopper(jax.vmap(f), x, inside)
