"""What the past statistics give without histories and ids: a two-layer MLP on MovieLens' dense features.

    python experiments/statistics_mlp.py            # two CPU cores: under a minute

The yardstick beside Kunlun's result, which sees the same statistics. AdamW with the preset's optimiser settings, batch
size and time order; mean of the seeds per number of epochs into experiments/results/movielens_mlp.json. Expected:
test NE about 0.822 after two epochs and 0.819 after four.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import tyro
from flax import nnx

from kunlun_jax.batch import EmbeddedBatch, to_samples
from kunlun_jax.config import TrainConfig
from kunlun_jax.data.pipeline import Placed, loader
from kunlun_jax.layers.mlp import MLP
from kunlun_jax.run import load_samples, mean_and_spread, versions, write_json
from kunlun_jax.training import Learner, fit

RESULT = Path(__file__).parent / "results" / "movielens_mlp.json"


class StatisticsMLP(nnx.Module):
    """Dense features of both scopes → hidden layers of 128 and 64 → one logit per task."""

    def __init__(self, schema, *, rngs: nnx.Rngs):
        self.schema = schema
        self.mlp = MLP(len(schema.dense), (128, 64), len(schema.tasks), dtype="float32", rngs=rngs)

    def __call__(self, batch: EmbeddedBatch):
        columns = [to_samples(batch.dense[f.name], batch.request_index, f.scope) for f in self.schema.dense]
        return self.mlp(jnp.stack(columns, axis=1))


def train(samples, config: TrainConfig) -> dict[str, dict[str, float]]:
    """Train once; return the results on the validation and test parts."""
    schema, base_rates = samples["train"].schema, samples["train"].base_rates()

    def batches(part: str, epochs: int = 1):
        return loader(samples[part], batch_size=config.batch_size, epochs=epochs, shuffle=False)

    steps = config.epochs * -(-len(samples["train"]) // config.batch_size)
    learner = Learner(StatisticsMLP(schema, rngs=nnx.Rngs(config.seed)), schema, config.optimizer, steps=steps)
    state = fit(
        learner, learner.init(config.seed), Placed(batches("train", config.epochs), learner.place),
        base_rates=base_rates, log_every=steps, on_log=lambda *_: None, after_step=lambda *_: True,
    )  # fmt: skip
    return {part: learner.evaluate(state, batches(part), base_rates).results() for part in ("validation", "test")}


def main(seeds: tuple[int, ...] = (0, 1, 2), epochs: tuple[int, ...] = (2, 4)) -> None:
    """Train one MLP per seed and number of epochs.

    Args:
      seeds: of the initial parameters.
      epochs: passes over the training part.
    """
    config = TrainConfig.movielens()
    samples, _ = load_samples(config)
    # Without sequences and ids: nothing of them is computed.
    samples = {
        part: dataclasses.replace(
            s, schema=dataclasses.replace(s.schema, events=(), sparse=(), group=None), events={}, sparse={}
        )
        for part, s in samples.items()
    }
    results = {}
    for count in epochs:
        runs = [train(samples, dataclasses.replace(config, seed=seed, epochs=count)) for seed in seeds]
        results[f"{count} epochs"] = {
            part: mean_and_spread([run[part] for run in runs]) for part in ("validation", "test")
        }
        test = results[f"{count} epochs"]["test"]
        print(f"{count} epochs: test NE {test['like/ne']['mean']:.4f}, AUC {test['like/auc']['mean']:.4f}")
    words = ["--seeds", *map(str, seeds), "--epochs", *map(str, epochs)]
    command = f"python experiments/statistics_mlp.py {' '.join(words)}"
    write_json(RESULT, {"command": command, "versions": versions(), "results": results})


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
