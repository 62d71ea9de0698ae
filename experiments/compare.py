"""Compare models on one data set: equal FLOPs per sample, equal batches, equal tuning, several seeds.

    python experiments/compare.py movielens
    python experiments/compare.py synthetic

One command each, on one GPU or on a CPU; one that was interrupted goes on with the same command. Measured in parts: on
an H100 with 15 cores beside it all models compiled in 7 minutes and trained in 2 minutes (movielens) and 50 s
(synthetic). On two CPU cores movielens takes an hour and a half, calculated from the speeds in its result; where a CPU
has many cores, --turns 5 trains the models side by side on a share of the cores each.

Every model is scaled along its declared recipe to the FLOPs per sample of the first one named, at the data set's mean
lengths. Each tries the same settings with the same seeds and keeps the setting of the best mean validation NE; the test
part is looked at once, with that. Writes compare_<preset>.json with device, versions and command, and
compare_<preset>.png, to experiments/results or --out.

The seeds of a model train side by side in one program (population.py). Samples per second are those of one model alone
at the data set's commonest batch shape, which for models as small as these is the time of launching operations rather
than of arithmetic.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import tyro
from jobs import Grid, Job, chosen, run_jobs
from train import PRESETS

from kunlun_jax.config import TrainConfig, to_dict
from kunlun_jax.flops import model_flops, scale_to, total
from kunlun_jax.models import named
from kunlun_jax.run import load_samples, mean_and_spread, versions, write_json

RESULTS = Path(__file__).parent / "results"
GRIDS = {
    # The capacities hold 36, 75, 94 and 100 % of MovieLens' batches; a synthetic one is always about half full.
    "movielens": Grid((1e-3,), (0.3, 0.6), (4,), (0, 1, 2), (0.22, 0.32, 0.5, 0.85, 1.0)),
    "synthetic": Grid((1e-3, 3e-3, 1e-2), (0.0,), (1,), (0, 1, 2), (0.57, 1.0)),
}
METRICS = ("ne", "auc", "gauc")


def data_config(preset: str, model: str) -> TrainConfig:
    """The preset's training; the synthetic stream is longer here, as one pass over fresh samples shows the learning.

    Raises:
      ValueError: an unknown preset or model.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; there are {sorted(PRESETS)}")
    config = PRESETS[preset](model)
    if preset == "synthetic":
        config = dataclasses.replace(config, synthetic=dataclasses.replace(config.synthetic, train=200_000))
    return config


def equal_flops(configs: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The trainings with every model scaled to the FLOPs per sample of the first.

    Raises:
      ValueError: a model's recipe has no size near the target.
    """
    first = next(iter(configs.values()))
    samples, _ = load_samples(first)
    schema = samples["train"].schema
    lengths = {name: e.stop - e.start for name, e in samples["train"].events.items()}
    target = total(model_flops(first.model, schema, lengths))
    scaled = {name: scale_to(c.model, schema, lengths, target) for name, c in list(configs.items())[1:]}
    return {name: dataclasses.replace(c, model=scaled.get(name, c.model)) for name, c in configs.items()}


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds of each job that has trained; what is undefined for a seed is left out."""

    def of_part(runs):
        defined = [name for name in runs[0] if all(np.isfinite(run[name]) for run in runs)]
        return mean_and_spread([{name: run[name] for name in defined} for run in runs])

    return {
        label: {part: of_part([run[part] for run in result["runs"]]) for part in ("validation", "test")}
        for label, result in results.items()
        if "runs" in result
    }


def table(results: dict[str, dict[str, Any]], means: dict[str, Any]) -> str:
    """Markdown: one row per model."""
    lines = ["| model | test NE | AUC | gAUC | validation NE | trained NE | MFLOP | parameters | samples/s | chosen |"]
    lines.append("|" + "---|" * 10)
    for label, result in results.items():
        if "runs" not in result:
            lines.append(f"| {label} | {result.get('error', 'not trained')} |")
            continue
        task, trained = result["task"], [run["trained_ne"] for run in result["runs"] if "trained_ne" in run]
        cells = [_pm(means[label]["test"][f"{task}/{m}"]) for m in METRICS if f"{task}/{m}" in means[label]["test"]]
        cells += [_pm(means[label]["validation"][f"{task}/ne"])]
        cells += [f"{np.mean(trained):.4f}" if trained else "–"]
        cells += [f"{result['flops_per_sample'] / 1e6:.2f}", f"{result['parameters']:,}"]
        cells += [f"{result['samples_per_second']:,.0f}" if "samples_per_second" in result else "–"]
        cells += [chosen(result["best"])]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pm(x: dict[str, float]) -> str:
    return f"{x['mean']:.4f} ± {x['standard_deviation']:.4f}"


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Test metrics with their seeds, and FLOPs, parameters and speed, one panel each."""
    done = {label: r for label, r in results.items() if "runs" in r}
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
    place = np.arange(len(done))
    for ax, metric, name in zip(axes[0], METRICS, ("test NE (lower is better)", "test AUC", "test gAUC"), strict=True):
        for i, result in enumerate(done.values()):
            values = [run["test"].get(f"{result['task']}/{metric}", np.nan) for run in result["runs"]]
            ax.plot(np.full(len(values), i), values, "o", color="0.7", markersize=4)
            spread = np.std(values, ddof=1) if len(values) > 1 else None
            ax.errorbar(i, np.mean(values), spread, fmt="s", color=f"C{i}", capsize=4)
        ax.set_title(name)
    columns = ("flops_per_sample", "parameters", "samples_per_second")
    on = next((r["speed_device"].split(" (")[0] for r in done.values() if "speed_device" in r), "")
    names = ("forward FLOPs per sample", "dense parameters", f"samples/s, one alone\n{on}".strip())
    for ax, column, name in zip(axes[1], columns, names, strict=True):
        values = [result.get(column, 0) for result in done.values()]
        ax.set_visible(any(values))  # not everything is measured everywhere
        ax.bar(place, values, color=[f"C{i}" for i in place])
        ax.set_title(name)
    for ax in axes.flat:
        ax.set_xticks(place, list(done), rotation=20, ha="right")
        ax.grid(alpha=0.3, axis="y")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(results: dict[str, dict[str, Any]], best_ne: float | None, title: str, path: Path) -> None:
    """Progressive NE, predicted before trained on, over samples seen; mean and range over seeds."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, result in results.items():
        if "runs" not in result:
            continue
        curves = np.array([run["progressive_ne"] for run in result["runs"]])
        seen = (np.arange(curves.shape[1]) + 0.5) * result["window"]
        (line,) = ax.plot(seen, curves.mean(axis=0), label=label)
        ax.fill_between(seen, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.2)
    if best_ne is not None:
        ax.axhline(best_ne, color="0.4", linestyle="--", label="best possible")
    ax.set(xlabel="samples seen", ylabel="progressive NE", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(
    preset: str,
    models: tuple[str, ...] = ("kunlun", "interformer", "wukong", "din", "dcnv2"),
    out: Path = RESULTS,
    processes: int = 5,
    turns: int = 1,
    limit: int | None = None,
) -> None:
    """Train, write and print.

    Args:
      preset: movielens or synthetic.
      models: the first one sets the FLOPs.
      out: directory of the result and the plots.
      processes: models that compile at a time.
      turns: models that train at a time. If several, a CPU's cores are dealt out among them.
      limit: only so many training samples of the synthetic stream, to try the command out.
    """
    configs = {name: data_config(preset, name) for name in models}
    if limit is not None:
        small = {"train": limit, "validation": limit, "test": limit}
        configs = {
            name: dataclasses.replace(c, synthetic=dataclasses.replace(c.synthetic, **small))
            for name, c in configs.items()
        }
    configs = equal_flops(configs)
    jobs = [Job(named(n).title, c, GRIDS[preset]) for n, c in configs.items()]
    so_far = out / f"compare_{preset}_so_far.json"
    results = run_jobs(jobs, processes=processes, turns=turns, so_far=so_far, setting=versions())
    command = f"python experiments/compare.py {preset} --models {' '.join(models)} --turns {turns}"
    write(preset, results, configs, out, command)
    finish(results, so_far)


def finish(results: dict[str, dict[str, Any]], so_far: Path) -> None:
    """Remove the file of what was done so far.

    Raises:
      ValueError: a job failed; the file stays, for another try.
    """
    if failed := {label: r["error"] for label, r in results.items() if "error" in r}:
        raise ValueError(f"{failed} failed; the same command tries them again and keeps the others")
    so_far.unlink()


def write(
    preset: str, results: dict[str, dict[str, Any]], configs: dict[str, TrainConfig], out: Path, command: str
) -> None:
    """JSON, table and plots of a comparison."""
    out.mkdir(parents=True, exist_ok=True)
    means, first = summary(results), next(iter(configs.values()))
    write_json(
        out / f"compare_{preset}.json",
        {
            "command": command,
            "versions": versions(),
            "data": {"preset": preset, "synthetic": to_dict(first.synthetic), "batch_size": first.batch_size},
            "optimizer": to_dict(first.optimizer),
            "grid": to_dict(GRIDS[preset]),
            "means": means,
            "results": results,
        },
    )
    device = next((r["device"].split(" (")[0] for r in results.values() if "device" in r), "")
    plot(results, f"{preset}, equal FLOPs, {device}", out / f"compare_{preset}.png")
    best = next((r["best_ne"] for r in results.values() if r.get("best_ne")), None)
    if best:
        path = out / f"compare_{preset}_curves.png"
        plot_curves(results, best["train"], f"{preset}: learning, equal FLOPs, {device}", path)
    print(table(results, means))


if __name__ == "__main__":
    try:
        tyro.cli(compare, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
