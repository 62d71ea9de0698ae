"""Kunlun's parts exchanged one at a time: what each changes in FLOPs, speed and NE, beside the paper's figures.

    python experiments/ablation.py                            # on a GPU; two CPU cores alone take hours
    python experiments/ablation.py --no-speed --turns 8       # NE alone, on a CPU with many cores
    python experiments/ablation.py --no-learn --no-speed      # FLOPs alone: seconds

NE on the synthetic stream, whose labels depend on the sequences by construction: every row is tuned alike and repeated
over seeds (jobs.py). FLOPs and samples per second at a size where arithmetic counts: two event types of up to 1000
events, half full, one training step, which is of 64 samples in bfloat16 on a GPU and of 8 in float32 on a CPU. Writes
ablation.json and ablation.png to experiments/results or --out; what a command leaves out stays there as it is, and what
was interrupted goes on with the same command.

Changes are given as the paper gives them, Kunlun against the row: "FLOPs −29 %" for a window means that Kunlun with it
costs 29 % less than the row without.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from compare import RESULTS, data_config, finish, summary
from jobs import Grid, Job, run_jobs

from kunlun_jax.config import TrainConfig, to_dict
from kunlun_jax.data.synthetic import SyntheticConfig
from kunlun_jax.flops import model_flops, total
from kunlun_jax.model_configs import Dtype, EventConfig, KunlunConfig
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


def ablated_training(row: str, config: TrainConfig) -> TrainConfig:
    """A training of Kunlun with one part exchanged."""
    assert isinstance(config.model, KunlunConfig)
    return dataclasses.replace(config, model=ablated(row, config.model))


def learning_config() -> TrainConfig:
    """100,000 samples of the synthetic stream; the viewed events' stack is half as wide as the clicked events'."""
    config = data_config("synthetic", "kunlun")
    config = dataclasses.replace(config, synthetic=dataclasses.replace(config.synthetic, train=100_000))
    assert isinstance(config.model, KunlunConfig)
    clicked = config.model.events["clicked"]
    viewed = dataclasses.replace(clicked, width=16, head_width=16, n_tokens=2)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, events={"clicked": clicked, "viewed": viewed})
    )


def speed_config(samples: int = 64, dtype: Dtype = "bfloat16", max_length: int = 1000, width: int = 256) -> TrainConfig:
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
        dtype=dtype,
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


def lines_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per row: values, Kunlun's changes against it, the paper's figures."""
    learned, measured = (result[part].get("results", {}) for part in ("learned", "measured"))
    means, flops, entries = summary(learned), result["flops_per_sample"], []
    for row, paper in ROWS.items():
        entry: dict[str, Any] = {"row": row, "paper": paper}
        if row in means and "Kunlun" in means:
            ours, theirs = (means[name]["test"]["click/ne"] for name in ("Kunlun", row))
            pairs = zip(learned["Kunlun"]["runs"], learned[row]["runs"], strict=True)
            entry["test_ne"], entry["validation_ne"] = theirs, means[row]["validation"]["click/ne"]
            entry["NE"] = change(ours["mean"], theirs["mean"])
            entry["NE_by_seed"] = [change(a["test"]["click/ne"], b["test"]["click/ne"]) for a, b in pairs]
        if row in flops:
            entry["flops_per_sample"] = flops[row]
            entry["FLOPs"] = change(flops["Kunlun"], flops[row])
        speeds = [measured.get(name, {}).get("samples_per_second") for name in ("Kunlun", row)]
        if None not in speeds:
            entry["samples_per_second"] = speeds[1]
            entry["speed"] = change(*speeds)
        entries.append(entry)
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: every row's values, and Kunlun's change against it beside the paper's."""
    rows = ["| | FLOPs | paper | samples/s | | paper | test NE, synthetic | | paper |", "|" + "---|" * 9]
    for e in entries:
        ne = e.get("test_ne")
        cells = [_signed(e, "FLOPs", 1), e["paper"].get("FLOPs", "")]
        speed = e.get("samples_per_second")
        cells += [f"{speed:,.{0 if speed >= 100 else 2}f}" if speed else "–", _signed(e, "speed", 1)]
        cells += [e["paper"].get("speed", ""), f"{ne['mean']:.4f} ± {ne['standard_deviation']:.4f}" if ne else "–"]
        cells += [_signed(e, "NE", 2), e["paper"].get("NE", "")]
        rows.append(f"| {e['row']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _signed(entry: dict[str, Any], name: str, digits: int) -> str:
    if entry["row"] == "Kunlun":
        return ""
    return f"{entry[name]:+.{digits}%}" if name in entry else "–"


PANELS = {
    "test_ne": "test NE, synthetic stream",
    "FLOPs": "FLOPs per sample, Kunlun = 1",
    "speed": "samples/s, Kunlun = 1",
}


def plot(entries: list[dict[str, Any]], title: str, path: Path) -> None:
    """NE of every row with its spread; FLOPs and speed relative to Kunlun; what is measured of them."""
    names = [name for name in PANELS if any(name in e for e in entries)]
    figure, axes = plt.subplots(1, len(names), figsize=(2 + 3.5 * len(names), 4), layout="constrained", sharey=True)
    place = np.arange(len(entries))[::-1]
    for ax, name in zip(np.atleast_1d(axes), names, strict=True):
        for y, e in zip(place, entries, strict=True):
            if name == "test_ne" and name in e:
                ne = e["test_ne"]
                ax.errorbar(ne["mean"], y, xerr=ne["standard_deviation"], fmt="s", color="C0", capsize=4)
            elif name in e:
                ax.barh(y, 1 / (1 + e[name]), color="C1" if name == "FLOPs" else "C2")
        ax.set_title(PANELS[name])
        ax.set_yticks(place, [e["row"] for e in entries])
        ax.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ablation(
    rows: tuple[str, ...] = tuple(ROWS),
    out: Path = RESULTS,
    processes: int = 8,
    turns: int = 1,
    learn: bool = True,
    speed: bool = True,
) -> None:
    """Train and measure, write and print.

    Args:
      rows: of the table; Kunlun itself must be one.
      out: directory of the result and the plot.
      processes: rows that compile at a time.
      turns: rows that train at a time. If several, a CPU's cores are dealt out among them.
      learn: whether to train for NE.
      speed: whether to measure samples per second.
    """
    if "Kunlun" not in rows:
        raise ValueError(f"rows: {list(rows)} lack 'Kunlun', which every row is compared with")
    learning, full = learning_config(), speed_config()
    timing = speed_config(samples=8, dtype="float32") if jax.default_backend() == "cpu" else full
    learned, counted, timed = ({row: ablated_training(row, c) for row in rows} for c in (learning, full, timing))
    path = out / "ablation.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    parts = {
        "learned": ([Job(row, config, GRID, measure=False) for row, config in learned.items()], "--no-speed", learn),
        "measured": ([Job(row, config, None) for row, config in timed.items()], "--no-learn", speed),
    }
    result: dict[str, Any] = {
        "flops_per_sample": {row: flops_of(config) for row, config in counted.items()},
        "grid": to_dict(GRID),
        "learning": to_dict(learning),
        "speed": to_dict(timing),
    } | {part: kept[part] if "results" in kept.get(part, {}) else {} for part in parts}
    for part, (jobs, option, wanted) in parts.items():
        if wanted:
            so_far = out / f"ablation_{part}_so_far.json"
            results = run_jobs(jobs, processes=processes, turns=turns, so_far=so_far, setting=versions())
            command = f"python experiments/ablation.py {option} --turns {turns}"
            result[part] = {"command": command, "versions": versions(), "results": results}
            write(result, out)
            finish(results, so_far)
    write(result, out)
    print(table(lines_of(result)))


def write(result: dict[str, Any], out: Path) -> None:
    """JSON and plot."""
    out.mkdir(parents=True, exist_ok=True)
    entries = lines_of(result)
    write_json(out / "ablation.json", {"rows": entries} | result)
    devices = {
        name: result[part]["versions"]["device"].split(" (")[0]
        for part, name in (("learned", "NE"), ("measured", "speed"))
        if result[part]
    }
    on = ", ".join(f"{name} on {device}" for name, device in devices.items())
    plot(entries, f"Kunlun's parts exchanged one at a time{': ' if on else ''}{on}", out / "ablation.png")


if __name__ == "__main__":
    try:
        tyro.cli(ablation, description=__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
