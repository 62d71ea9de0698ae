"""Train a preset with several seeds and record mean and spread of the test results.

    python experiments/repeat.py movielens --seeds 0 1 2        # two CPU cores: about 12 minutes

Writes experiments/results/<preset>.json with device, versions, command and the training's settings; the runs
themselves stay in runs/<preset>-seed<n>.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import tyro
from train import PRESETS, train

from kunlun_jax.config import to_dict
from kunlun_jax.run import mean_and_spread, versions, write_json

RESULTS = Path(__file__).parent / "results"


def repeat(preset: str, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Train `preset` once per seed; skip what is finished.

    Args:
      preset: movielens or synthetic.
      seeds: of parameters and order.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; there are {sorted(PRESETS)}")
    config, runs = PRESETS[preset](), []
    for seed in seeds:
        out, started = Path("runs") / f"{preset}-seed{seed}", time.time()
        resumed = out.exists()
        if code := train(dataclasses.replace(config, seed=seed), out, resume=True):
            sys.exit(code)
        summary = json.loads((out / "summary.json").read_text())
        seconds = None if resumed else round(time.time() - started, 1)
        runs.append({"seed": seed, "seconds": seconds, "validation": summary["validation"], "test": summary["test"]})
    write_json(
        RESULTS / f"{preset}.json",
        {
            "command": f"python experiments/repeat.py {preset} --seeds {' '.join(map(str, seeds))}",
            "versions": versions(),
            "settings": to_dict(config),
            "means": {part: mean_and_spread([run[part] for run in runs]) for part in ("validation", "test")},
            "runs": runs,
        },
    )


if __name__ == "__main__":
    try:
        tyro.cli(repeat, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
