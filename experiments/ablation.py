"""Kunlun's parts exchanged one at a time: what each changes in FLOPs, speed and NE, beside the paper's figures.

    python experiments/ablation.py                            # on a GPU; two CPU cores alone take hours
    python experiments/ablation.py --no-learn --no-speed      # FLOPs alone: seconds

NE on the synthetic stream, whose labels depend on the sequences by construction: every row is tuned alike and repeated
over seeds (jobs.py). FLOPs and samples per second at a size where arithmetic counts: two event types of up to 1000
events, half full, bfloat16, one training step. Writes ablation.json and ablation.png to experiments/results or --out.

Changes are given as the paper gives them, Kunlun against the row: "FLOPs −29 %" for a window means that Kunlun with it
costs 29 % less than the row without.
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
from compare import RESULTS, data_config, summary
from jobs import Grid, Job, run_jobs

from kunlun_jax.config import TrainConfig, to_dict
from kunlun_jax.data.synthetic import SyntheticConfig
from kunlun_jax.flops import model_flops, total
from kunlun_jax.model_configs import EventConfig, KunlunConfig
from kunlun_jax.run import load_samples, versions, write_json

# Row → the paper's figures for the part that it takes away, as spec tables of its claims give them.
ROWS = {
    "Kunlun": {},
    "naive PFFN": {"NE": "−0.04 %", "speed": "module MFU up to 6×, model MFU +3 points"},
    "PMA instead of HSP": {"NE": "−0.08 %"},
    "dense compression": {"NE": "−0.03 %"},
    "full attention": {"FLOPs": "−29.5 %", "speed": "QPS +31.1 %", "NE": "neutral"},
    "no CompSkip": {"FLOPs": "−43.1 %", "speed": "QPS +35 %", "NE": "neutral"},
    "one expert": {"speed": "QPS +4 % (by expert parallelism, on several devices)"},
    "uniform event types": {"FLOPs": "−11 %", "speed": "QPS +13 %"},
}


# The learning rate that the comparison on this stream chose for Kunlun.
GRID = Grid((3e-3,), (0.0,), (1,), (0, 1, 2), (0.57, 1.0))


def ablated(row: str, config: KunlunConfig) -> KunlunConfig:
    """The config with one part exchanged.

    Raises:
      ValueError: an unknown row.
    """
    changes: dict[str, Any] = {
        "Kunlun": {},
        "naive PFFN": {"pffn": "naive"},
        "PMA instead of HSP": {"pooling": "pma"},
        "dense compression": {"compression": "dense"},
        "full attention": {"events": {name: dataclasses.replace(e, window=None) for name, e in config.events.items()}},
        "no CompSkip": {"comp_skip": False},
        "one expert": {"experts": 1},
        "uniform event types": {"events": config.uniform_events().events},
    }
    if row not in changes:
        raise ValueError(f"row {row!r} is unknown; there are {sorted(changes)}")
    return dataclasses.replace(config, **changes[row])


def learning_config() -> TrainConfig:
    """The synthetic stream, with the viewed events' stack at half the width of the clicked events'."""
    config = data_config("synthetic", "kunlun")
    assert isinstance(config.model, KunlunConfig)
    clicked = config.model.events["clicked"]
    viewed = dataclasses.replace(clicked, width=16, head_width=16, n_tokens=2)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, events={"clicked": clicked, "viewed": viewed})
    )


def speed_config(samples: int = 64, max_length: int = 1000, width: int = 256) -> TrainConfig:
    """Sequences of `max_length`, half full, in a model of `width` with the viewed events at half of it."""
    synthetic = SyntheticConfig(train=4 * samples, validation=1, test=1, max_length=max_length, width=32)
    clicked = EventConfig(width=width, head_width=width // 4, depth=5, n_seeds=64, n_tokens=16, window=100)
    viewed = EventConfig(width=width // 2, head_width=width // 4, depth=3, n_seeds=32, n_tokens=8, window=50)
    model = KunlunConfig(
        events={"clicked": clicked, "viewed": viewed},
        width=width,
        depth=5,
        generated=width // 2,
        tau="one",
        interaction_rank=16,
        interaction_hidden=512,
        head_hidden=(256,),
        dtype="bfloat16",
    )
    base = data_config("synthetic", "kunlun")
    return dataclasses.replace(
        base, model=model, synthetic=synthetic, batch_size=samples, capacity_fractions=(0.625, 1.0)
    )


def flops_of(config: TrainConfig) -> float:
    """Forward FLOPs per sample at the lengths of the config's data."""
    samples, _ = load_samples(config)
    lengths = {name: e.stop - e.start for name, e in samples["train"].events.items()}
    return total(model_flops(config.model, samples["train"].schema, lengths))


def change(base: float, row: float) -> float:
    """By how much Kunlun's value differs from the row's, as a share of the row's."""
    return base / row - 1


def lines_of(learned: dict[str, Any], measured: dict[str, Any], means: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per row: values, Kunlun's changes against it, the paper's figures."""
    entries = []
    for row, paper in ROWS.items():
        entry: dict[str, Any] = {"row": row, "paper": paper}
        if row in means:
            entry["test_ne"] = means[row]["test"]["click/ne"]
            entry["validation_ne"] = means[row]["validation"]["click/ne"]
            entry["NE"] = change(means["Kunlun"]["test"]["click/ne"]["mean"], entry["test_ne"]["mean"])
        for name, key in (("FLOPs", "flops_per_sample"), ("speed", "samples_per_second")):
            if key in measured.get(row, {}) and key in measured.get("Kunlun", {}):
                entry[key] = measured[row][key]
                entry[name] = change(measured["Kunlun"][key], measured[row][key])
        entries.append(entry)
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: Kunlun's change against each row, ours and the paper's."""
    rows = ["| Kunlun against | FLOPs | paper | samples/s | paper | NE, synthetic | paper |", "|" + "---|" * 7]
    for e in entries[1:]:
        cells = []
        for name in ("FLOPs", "speed", "NE"):
            cells += [f"{e[name]:+.2%}" if name in e else "–", e["paper"].get(name, "–")]
        rows.append(f"| {e['row']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(entries: list[dict[str, Any]], title: str, path: Path) -> None:
    """NE of every row with its spread; FLOPs and speed relative to Kunlun."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    place = np.arange(len(entries))[::-1]
    for y, e in zip(place, entries, strict=True):
        if "test_ne" in e:
            axes[0].errorbar(
                e["test_ne"]["mean"], y, xerr=e["test_ne"]["standard_deviation"], fmt="s", color="C0", capsize=4
            )
        for ax, name in ((axes[1], "FLOPs"), (axes[2], "speed")):
            if name in e:
                ax.barh(y, 1 / (1 + e[name]), color="C1" if name == "FLOPs" else "C2")
    for ax, name in zip(
        axes, ("test NE, synthetic stream", "FLOPs per sample, Kunlun = 1", "samples/s, Kunlun = 1"), strict=True
    ):
        ax.set_title(name)
        ax.set_visible(bool(ax.lines or ax.patches))  # not everything is measured everywhere
        ax.grid(alpha=0.3, axis="x")
    shown = next(ax for ax in axes if ax.get_visible())
    shown.tick_params(labelleft=True)
    shown.set_yticks(place, [e["row"] for e in entries])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ablation(
    rows: tuple[str, ...] = tuple(ROWS), out: Path = RESULTS, processes: int = 8, learn: bool = True, speed: bool = True
) -> None:
    """Train and measure, write and print.

    Args:
      rows: of the table; Kunlun itself must be one.
      out: directory of the result and the plot.
      processes: rows that compile at a time; one of them at a time trains.
      learn: whether to train for NE.
      speed: whether to measure samples per second.
    """
    if "Kunlun" not in rows:
        raise ValueError(f"rows: {list(rows)} lack 'Kunlun', which every row is compared with")
    learning, timing = learning_config(), speed_config()
    assert isinstance(learning.model, KunlunConfig)
    assert isinstance(timing.model, KunlunConfig)
    jobs, flops = [], {}
    for row in rows:
        learned = dataclasses.replace(learning, model=ablated(row, learning.model))
        measured = dataclasses.replace(timing, model=ablated(row, timing.model))
        flops[row] = flops_of(measured)
        jobs += [Job(row, learned, GRID, measure=False)] * learn + [Job(f"{row}, speed", measured, None)] * speed
    so_far = out / "ablation_so_far.json"
    results = run_jobs(jobs, processes=processes, turns=1, so_far=so_far)
    for row, count in flops.items():
        results[f"{row}, speed"] = {"flops_per_sample": count} | results.get(f"{row}, speed", {})
    options = [f"--{'' if on else 'no-'}{name}" for name, on in (("learn", learn), ("speed", speed))]
    write(results, f"python experiments/ablation.py {' '.join(options)}", learning, timing, out)
    so_far.unlink(missing_ok=True)  # FLOPs alone need no job


def write(results: dict[str, Any], command: str, learning: TrainConfig, timing: TrainConfig, out: Path) -> None:
    """JSON, table and plot."""
    out.mkdir(parents=True, exist_ok=True)
    learned = {row: results[row] for row in ROWS if row in results}
    measured = {row: results[f"{row}, speed"] for row in ROWS if f"{row}, speed" in results}
    entries = lines_of(learned, measured, summary(learned))
    write_json(
        out / "ablation.json",
        {
            "command": command,
            "versions": versions(),
            "grid": to_dict(GRID),
            "learning": to_dict(learning),
            "speed": to_dict(timing),
            "rows": entries,
            "learned": learned,
            "measured": measured,
        },
    )
    device = versions()["device"].split(" (")[0]
    plot(entries, f"Kunlun's parts exchanged one at a time, {device}", out / "ablation.png")
    print(table(entries))


if __name__ == "__main__":
    try:
        tyro.cli(ablation, description=__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
