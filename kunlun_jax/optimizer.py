"""The dense parameters' optimiser and the learning-rate schedules, with optax."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from kunlun_jax.sharding import experts_of, variables

FLAT_MULTIPLE = 1024  # raveled parameters are padded to it, so that any number of devices dividing it may share them


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


class FlatParameters:
    """Dense parameters as few arrays, since a step of hundreds of small ones takes longer to compile than the model.

    `ravel` turns a tree like `params` into {"shared": [n], "experts_M": [M, k]}: what belongs to M experts keeps its
    leading axis, by which a mesh splits it. Matrices come first, so that weight decay needs no mask as large as the
    parameters. Ends are padded with zeros to a multiple of `FLAT_MULTIPLE`; the layout is the same on every mesh.

    Attributes:
      decayed: per group, how many leading entries (of each expert) belong to matrices.
    """

    def __init__(self, params: PyTree):
        self._structure = jax.tree.structure(params)
        leaves = variables(params)
        self._shapes = [leaf.shape for leaf in leaves]
        self._groups: dict[str, list[int]] = {}
        self.decayed: dict[str, int] = {}
        for i, leaf in sorted(enumerate(leaves), key=lambda entry: len(entry[1].shape) < 2):
            group = f"experts_{m}" if (m := experts_of(leaf)) > 1 else "shared"
            self._groups.setdefault(group, []).append(i)
            self.decayed[group] = self.decayed.get(group, 0) + (len(leaf.shape) >= 2) * math.prod(leaf.shape) // m

    def ravel(self, tree: PyTree) -> dict[str, Float[Array, "*M n"]]:
        """Works on one device's share of the experts, too."""
        leaves, flat = jax.tree.leaves(tree), {}
        for group, members in self._groups.items():
            rows = leaves[members[0]].shape[:1] if group != "shared" else ()
            vectors = [leaves[i].reshape(*rows, -1) for i in members]
            vectors.append(jnp.zeros((*rows, -sum(v.shape[-1] for v in vectors) % FLAT_MULTIPLE), vectors[0].dtype))
            flat[group] = jnp.concatenate(vectors, axis=-1)
        return flat

    def unravel(self, flat: dict[str, Float[Array, "*M n"]]) -> PyTree:
        """The inverse of `ravel`."""
        leaves: list[Any] = [None] * len(self._shapes)
        for group, members in self._groups.items():
            rows, start = flat[group].shape[:-1], 0
            for i in members:
                shape = self._shapes[i][len(rows) :]
                size = math.prod(shape)
                leaves[i] = flat[group][..., start : start + size].reshape(*rows, *shape)
                start += size
        return jax.tree.unflatten(self._structure, leaves)


def dense_optimizer(config: OptimizerConfig, steps: int, flat: FlatParameters) -> optax.GradientTransformationExtraArgs:
    """AdamW with a clipped global gradient norm on raveled parameters, for a training of `steps` steps.

    `update` takes the gradients' `norm`, since who asks whether they are finite has it already.
    """

    def clip(updates, state, params=None, **given):
        factor = config.clip_norm / jnp.maximum(given["norm"], config.clip_norm)
        return jax.tree.map(lambda g: g * factor, updates), state

    def decay(updates, params):
        def of_group(group):
            matrix = jnp.arange(params[group].shape[-1]) < flat.decayed[group]
            return updates[group] + config.weight_decay * jnp.where(matrix, params[group], 0)

        return {group: of_group(group) for group in updates}

    return optax.chain(
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        optax.stateless(decay),
        optax.scale_by_learning_rate(schedule(config, config.learning_rate, steps)),
    )
