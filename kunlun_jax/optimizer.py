"""The dense parameters' optimiser and the learning-rate schedules, with optax."""

from dataclasses import dataclass

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for the dense parameters, row-wise AdaGrad for the tables.

    Attributes:
      learning_rate: peak of the dense parameters.
      weight_decay: decoupled; of matrices only, not of biases, norms and scales.
      warmup: share of the steps over which both learning rates rise from 0.
      final: share of the peak that both learning rates fall to along a cosine; 1 keeps them constant.
      clip_norm: largest global norm of the dense gradients.
      beta1, beta2: AdamW's.
      table_learning_rate, table_epsilon, table_initial_accumulator: row-wise AdaGrad's.
      table_scale: standard deviation of fresh table rows.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.1
    final: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    table_learning_rate: float = 0.02
    table_epsilon: float = 1e-8
    table_initial_accumulator: float = 0.0
    table_scale: float = 0.05

    def __post_init__(self):
        for name in ("learning_rate", "clip_norm", "table_learning_rate", "table_epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "table_initial_accumulator", "table_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "final", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in [0, 1], got {getattr(self, name)}")


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to `final · peak` at step `steps`."""
    warmup = min(round(config.warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1), peak_value=peak, warmup_steps=warmup, decay_steps=steps,
        end_value=config.final * peak,
    )  # fmt: skip


def dense_optimizer(config: OptimizerConfig, steps: int, params) -> optax.GradientTransformation:
    """AdamW with a clipped global gradient norm, for a training of `steps` steps on parameters like `params`.

    The parameters are updated as one vector: a step of hundreds of small arrays otherwise takes longer to compile than
    the model itself.
    """
    matrices = jax.tree.map(lambda p: jnp.full(p.shape, float(p.ndim >= 2)), params)
    decayed = jax.flatten_util.ravel_pytree(matrices)[0]
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
            optax.add_decayed_weights(config.weight_decay * decayed),
            optax.scale_by_learning_rate(schedule(config, config.learning_rate, steps)),
        )
    )
