"""What bfloat16 products cost in NE: the same trainings with float32 and bfloat16, seed by seed.

    python experiments/precision.py --seeds 0 1 2 --train 60000    # two CPU cores: about 8 minutes

Same seed, same initial parameters, same order of the same synthetic samples; only the dtype of the products differs.
Writes experiments/results/precision.json: NE of each run, the paired differences, and the spread between seeds beside
which they mean something.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import tyro
from flax import nnx

from kunlun_jax.config import TrainConfig, to_dict
from kunlun_jax.data.pipeline import Placed, loader
from kunlun_jax.data.synthetic import SyntheticConfig
from kunlun_jax.mesh_learner import make_learner
from kunlun_jax.models import build
from kunlun_jax.run import load_samples, versions, write_json
from kunlun_jax.training import fit

RESULTS = Path(__file__).parent / "results" / "precision.json"
DTYPES = ("float32", "bfloat16")


def ne_of(config: TrainConfig, samples) -> dict[str, float]:
    """Progressive NE of the last half of the training, and NE on the test part."""
    seen: list[float] = []

    def batches(part: str, epochs: int):
        return loader(
            samples[part], batch_size=config.batch_size, epochs=epochs, shuffle=config.shuffle, seed=config.seed,
            capacity_fractions=config.capacity_fractions,
        )  # fmt: skip

    steps = config.epochs * -(-len(samples["train"]) // config.batch_size)
    model = build(config.model, samples["train"].schema, rngs=nnx.Rngs(config.seed))
    learner = make_learner(model, samples["train"].schema, config, steps=steps, say=lambda _: None)
    rates = samples["train"].base_rates()
    state = fit(
        learner, learner.init(config.seed), Placed(batches("train", config.epochs), learner.place), base_rates=rates,
        log_every=max(1, steps // 10), on_log=lambda _, values: seen.append(values["click/ne"]),
        after_step=lambda *_: True,
    )  # fmt: skip
    test = learner.evaluate(state, batches("test", 1), rates).results()["click/ne"]
    return {"progressive_ne": statistics.mean(seen[len(seen) // 2 :]), "test_ne": test}


def compare(runs: list[dict]) -> dict:
    """Per metric: mean paired difference bfloat16 − float32, its spread over seeds, and the spread between seeds."""
    found = {}
    for metric in ("progressive_ne", "test_ne"):
        by_dtype = {d: [r[metric] for r in sorted(runs, key=lambda r: r["seed"]) if r["dtype"] == d] for d in DTYPES}
        differences = [b - a for a, b in zip(*by_dtype.values(), strict=True)]
        found[metric] = {
            "mean_difference": statistics.mean(differences),
            "spread_of_differences": statistics.stdev(differences),
            "spread_between_seeds": statistics.stdev(by_dtype["float32"]),
        }
    return found


def main(seeds: tuple[int, ...] = (0, 1, 2), train: int = 20_000, out: Path = RESULTS) -> None:
    """See the head of the file.

    Args:
      seeds: at least two, each trained with both dtypes.
      train: samples of one pass.
    """
    if len(seeds) < 2:
        raise ValueError(f"seeds: {len(seeds)} given; a spread needs at least two")
    base = TrainConfig.synthetic_stream()
    synthetic = SyntheticConfig(train=train, validation=100, test=max(100, train // 5))
    base = dataclasses.replace(base, synthetic=synthetic, epochs=1)
    samples, facts = load_samples(base)
    runs = []
    for seed in seeds:
        for dtype in DTYPES:
            started = time.time()
            model = dataclasses.replace(base.model, dtype=dtype)
            result = ne_of(dataclasses.replace(base, model=model, seed=seed), samples)
            runs.append({"seed": seed, "dtype": dtype, **result, "seconds": round(time.time() - started, 1)})
            print(runs[-1], flush=True)
    write_json(out, {
        "command": "python " + " ".join(sys.argv), "versions": versions(), "settings": to_dict(base),
        "best_ne": facts["best_ne"], "paired": compare(runs), "runs": runs,
    })  # fmt: skip


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
