"""Passes over rows as compiled for Hopper, with values per row on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("N", "F", "dtype"), [(47104, 1024, jnp.bfloat16), (11264, 384, jnp.bfloat16), (8, 192, jnp.float16)]
)
def test_a_norm_and_its_gradient(N, F, dtype):
    rng = np.random.default_rng(0)
    x, d = (jnp.asarray(rng.standard_normal((N, F)), dtype) for _ in range(2))

    @jax.jit
    def run(x, d):
        kernel = x.dtype == dtype
        one_pass = rows.row_pass if kernel else rows.row_pass_in_xla
        name = {"name": "norm"} if kernel else {}
        normed, factor = one_pass(lambda x: rows.normalise(x, 1e-5), x, and_value=True, **name)
        back = one_pass(rows.normalise_back, d, normed, values=(factor,), **name)
        return normed, factor, back

    assert rows.kernel_takes(x, and_value=True)
    got, wanted = run(x, d), run(*(y.astype(jnp.float32) for y in (x, d)))
    for name, a, b in zip(("normed", "factor", "gradient"), got, wanted, strict=True):
        a, b = (np.asarray(y, np.float32) for y in (a, b))
        assert np.linalg.norm(a - b) <= 3e-3 * np.linalg.norm(b), name
    np.testing.assert_array_equal(*(np.asarray(run(x, d)[2], np.float32) for _ in range(2)))
