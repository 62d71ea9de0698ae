"""ROTE, the rotary temporal embedding: angles that combine an event's position with its log-scaled time [2nd]."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kunlun_jax.jagged import Jagged, positions

TimeSource = Literal["gap", "age", "none"]
TIME_SCALE = 86_400.0  # τ_scale, seconds [2nd]


def rotary_angles(events: Jagged, head_width: int, time: TimeSource) -> Float[Array, "P N half"]:
    """angle_{t,i} = t·θ_i + τ_t·φ_i for D/2 feature pairs, θ_i = 10000^(−2i/D).

    t counts from the sample's oldest event; τ_t = log(1 + Δt / TIME_SCALE), where Δt is the gap to the previous event
    or the age at the request; "none" leaves time out. Position and time turn the same pair, and φ runs over the same
    ladder as θ [choice]. Fixed, not learned [choice]: the attention operators give angles no gradient.
    """
    half = head_width // 2
    theta = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    turns = jnp.asarray(positions(events), jnp.float32)
    if time != "none":
        turns = turns + jnp.log1p(events.values[time] / TIME_SCALE)
    return turns[..., None] * theta
