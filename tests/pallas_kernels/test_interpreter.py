"""What the other kernel tests rely on: that the interpreter's findings fail a test."""

import interpreter
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax


@pytest.mark.parametrize("waits", [True, False])
def test_a_race_is_an_error(waits):
    """One warpgroup reads what the other writes, behind a barrier and without it."""
    tile = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def kernel(out_gmem, smem, written):
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            smem[...] = jnp.ones(tile.shape, tile.dtype)
            plgpu.barrier_arrive(written)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _():
            if waits:
                plgpu.barrier_wait(written)
            out_gmem[...] = smem[...]
            if not waits:
                plgpu.barrier_wait(written)

    run = plgpu.kernel(
        kernel,
        out_type=tile,
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM(tile.shape, tile.dtype), plgpu.Barrier()],
        interpret=interpreter.RACES,
    )
    if waits:
        np.testing.assert_array_equal(run(), 1)
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="a race between threads of the kernel"):
            run()
