"""The MLP of two layers as compiled for Hopper: values, gradients, repeatability, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mlp import MASKS, NAMES, SHAPES, masked_formula, operands, relative, value_and_gradients

from pallas_kernels.mlp import api

pytestmark = pytest.mark.gpu


@functools.cache
def compiled(f):
    return jax.jit(functools.partial(value_and_gradients, f))


masked_kernel = functools.partial(api.mlp_kernel, masked=True)
BOTH = pytest.mark.parametrize(
    ("kernel", "formula"), [(api.mlp_kernel, api.mlp_in_xla), (masked_kernel, masked_formula)], ids=["mlp", "masked"]
)


def check_values_and_gradients(kernel, formula, N, widths, dtype):
    arrays = operands(N, widths, dtype)
    got, again = (compiled(kernel)(*arrays) for _ in range(2))
    narrow = compiled(formula)(*arrays)
    with jax.default_matmul_precision("highest"):
        wide = compiled(formula)(*(x.astype(jnp.float32) for x in arrays))
    for name, a, b, c, d in zip(NAMES, got, again, narrow, wide, strict=True):
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32)), f"{name}: two runs differ"
        error, allowed = relative(a, d), relative(c, d)
        assert error <= max(1.2 * allowed, 3.5e-3), f"{name}: {error:.2e}, XLA in {dtype.__name__} makes {allowed:.2e}"


@pytest.mark.parametrize(
    ("N", "widths", "dtype"),
    [
        *((100_104, widths, jnp.bfloat16) for widths in SHAPES),  # the last tile has 8 rows
        (100_168, (192, 320, 320), jnp.float16),  # 72
        (65_536, (256, 320, 320), jnp.bfloat16),
    ],
)
def test_values_and_gradients(N, widths, dtype):
    check_values_and_gradients(api.mlp_kernel, api.mlp_in_xla, N, widths, dtype)


@BOTH
@pytest.mark.parametrize(
    ("N", "widths", "dtype"),
    [
        (100_104, MASKS[1], jnp.bfloat16),
        (100_168, MASKS[0], jnp.float16),
        (65_536, (256, 320, 256), jnp.bfloat16),
        (1_000, (64, 64, 64), jnp.bfloat16),  # fewer tiles than SMs
        (30_000, (192, 1024, 192), jnp.bfloat16),
        (2_304_000, MASKS[0], jnp.bfloat16),
    ],
)
def test_values_and_gradients_where_a_mask_fits(kernel, formula, N, widths, dtype):
    check_values_and_gradients(kernel, formula, N, widths, dtype)


@BOTH
def test_rows_beyond_the_end_are_not_touched(kernel, formula):
    """Rows that a tile has too many count as zeros."""
    x, *others, dy = operands(1_000, (192, 128, 192), jnp.bfloat16)
    whole = compiled(kernel)(jnp.pad(x, ((0, 24), (0, 0))), *others, jnp.pad(dy, ((0, 24), (0, 0))))
    part = compiled(kernel)(x, *others, dy)
    for name, a, b in zip(NAMES, whole, part, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        if name in ("w1", "w2"):  # XLA's products
            assert relative(a, b) <= 3e-3, name
        else:
            np.testing.assert_array_equal(a[:1_000] if name in ("y", "x") else a, b, name)


def test_the_forward_pass_needs_no_memory_for_the_hidden_layer():
    *arguments, _ = operands(100_104, (192, 320, 192), jnp.bfloat16)
    memory = jax.jit(api.mlp_kernel).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 0.01 * (memory.argument_size_in_bytes + memory.output_size_in_bytes)
