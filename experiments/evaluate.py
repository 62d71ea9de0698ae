"""Evaluate a run's checkpoint: log loss, NE, AUC, gAUC, calibration on one part of its data.

python experiments/evaluate.py runs/movielens
python experiments/evaluate.py runs/movielens --part validation --step 80
"""

import json
import sys
from pathlib import Path
from typing import Literal

import absl.logging
import tyro
from flax import nnx

from kunlun_jax.checkpoint import CheckpointError, Checkpoints
from kunlun_jax.data.pipeline import loader
from kunlun_jax.models import build
from kunlun_jax.run import CHECKPOINTS, load_config, load_samples
from kunlun_jax.training import Learner


def evaluate(run: Path, part: Literal["train", "validation", "test"] = "test", step: int | None = None) -> dict:
    """Print and return the metrics of a run.

    Args:
      run: the run's directory.
      part: of the data.
      step: which checkpoint; the newest if not given.
    """
    config = load_config(run)
    samples, _ = load_samples(config)
    schema, base_rates = samples["train"].schema, samples["train"].base_rates()
    learner = Learner(build(config.model, schema, rngs=nnx.Rngs(0)), schema, config.optimizer, steps=1)
    with Checkpoints(run / CHECKPOINTS, schema=schema) as checkpoints:
        restored = checkpoints.restore(learner.abstract(), step)
    batches = loader(
        samples[part], batch_size=config.batch_size, shuffle=False, capacity_fractions=config.capacity_fractions
    )
    results = learner.evaluate(learner.adopt(restored.state), batches, base_rates).results()
    print(json.dumps({"step": restored.step, "part": part, **results}, indent=1))
    return results


def main() -> int:
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        tyro.cli(evaluate, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
