"""ROTE: angles by the formula, only differences of positions count, and what each time source takes."""

import numpy as np
import plain
import pytest
from batches import random_sequence
from flax import nnx

from kunlun_jax.jagged import Jagged
from kunlun_jax.layers.attention import WindowAttention
from kunlun_jax.layers.rotary import rotary_angles

D, DAY = 6, 86_400.0


def random_events(rng):
    """Two shards of two samples each; samples begin anywhere."""
    times = {name: rng.exponential(DAY, (2, 11)).astype(np.float32) for name in ("gap", "age")}
    starts, lengths = np.array([[6, 1], [0, 4]], np.int32), np.array([[4, 3], [4, 0]], np.int32)
    return Jagged(times, starts, lengths, 5)


@pytest.mark.parametrize("time", ["gap", "age", "none"])
def test_angles_combine_position_and_log_time(time):
    events = random_events(np.random.default_rng(0))
    angles = np.asarray(rotary_angles(events, D, time))
    assert angles.dtype == np.float32
    assert angles.shape == (2, 11, D // 2)
    for shard in range(2):
        for start, length in zip(events.starts[shard], events.lengths[shard], strict=True):
            for t in range(length):
                tau = 0 if time == "none" else np.log(1 + float(events.values[time][shard, start + t]) / DAY)
                expected = [(t + tau) * 10_000 ** (-2 * i / D) for i in range(D // 2)]
                np.testing.assert_allclose(angles[shard, start + t], expected, rtol=1e-5)


def test_attention_sees_differences_of_positions_only():
    rng = np.random.default_rng(1)
    module = plain.build(
        lambda: WindowAttention(D, D, 3, dtype="float32", implementation=None, rngs=nnx.Rngs(0)), rng, scale=1.0
    )
    sequence = random_sequence(rng, [8], D, spare=0)
    theta = 10_000.0 ** (-np.arange(D // 2, dtype=np.float32) / (D // 2))
    place = np.arange(8, dtype=np.float32)

    def attend(positions):
        return np.asarray(plain.run(module, sequence, positions[None, :, None] * theta).values)

    np.testing.assert_allclose(attend(place + 13), attend(place), atol=1e-5)
    assert np.abs(attend(2 * place) - attend(place)).max() > 1e-2
