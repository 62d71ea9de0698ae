"""How a training step's time grows to thousands of devices, on paper, from what bench_parallel.py measured.

    python experiments/parallel_paper.py                            # seconds

step time = compute + exchange inside the group + averaging of replicas + all-reduce of dense gradients + what two
devices measured beyond that, with the assumptions that it prints. Adds the part `paper` to
experiments/results/bench_parallel.json and draws the plot beside it.
"""

import dataclasses
import math
import pathlib
from typing import Any

import tyro
from bench_parallel import NAME, RESULTS, Saver, read_results


@dataclasses.dataclass(frozen=True)
class Paper:
    """Step time on up to `devices` devices."""

    devices: int = 4096
    group: int = 8  # devices of a host, which share rows in 2D
    rows: int = 10**9  # of all tables together
    width: int = 64
    inside: float = 300e9  # bytes/s per device within a host (NVLink, achieved)
    across: float = 40e9  # bytes/s per device between hosts (400 Gb/s network, achieved)
    latency: float = 10e-6  # seconds per collective and doubling of the devices
    sync_every: tuple[int, ...] = (1, 100)
    out: pathlib.Path = RESULTS


@dataclasses.dataclass(frozen=True)
class Known:
    """What was measured: seconds of a step on one device, ids per device, dense parameters, what remains of two."""

    compute: float
    ids: int
    dense: int
    beyond: float = 0.0


def step_time(paper: Paper, devices: int, group: int, sync_every: int, known: Known) -> dict[str, float]:
    """Seconds of each part of a step on `devices` devices, of which `group` share the rows of the tables."""
    group = min(devices, group)
    replicas = devices // group
    row = 4 * paper.width

    def wire(count: int) -> float:
        return paper.inside if count <= paper.group else paper.across

    def wait(count: int) -> float:
        return paper.latency * max(math.log2(count), 0)

    # Ids out, rows back, gradients home: all-gather, reduce-scatter, all-gather, of which (G - 1) / G is others'.
    exchange = (group - 1) * known.ids * (4 + 2 * row) / wire(group) + 3 * wait(group)
    averaging = 0.0
    if replicas > 1:
        # All-reduce of the whole block, or, if that is less, of what was touched since the last time: at every step an
        # all-gather of ids and changes.
        twice = 2 * (replicas - 1) / replicas
        touched = sync_every * devices * known.ids * ((row + 4) * twice + 4)
        if sync_every == 1:
            touched = (replicas - 1) * group * known.ids * (row + 8)
        sent = min(touched, twice * paper.rows / group * (row + 4))
        averaging = (sent / wire(devices) + 2 * wait(replicas)) / sync_every
    return {
        "compute": known.compute,
        "exchange": exchange,
        "averaging": averaging,
        "dense": 2 * (devices - 1) / devices * 4 * known.dense / wire(devices) + 2 * wait(devices),
        "beyond": known.beyond if devices > 1 else 0.0,
    }


def known_from(paper: Paper, measured: dict[str, Any]) -> tuple[Known, dict[str, Any]]:
    """What step_time needs, and the row of one device, at the batch that the part `model` describes."""
    facts = measured["model"]["values"]
    samples = facts["samples_per_device"]
    rows = [row for row in measured["weak_scaling"]["values"] if row["samples"] == row["devices"] * samples]
    one = next(row for row in rows if row["devices"] == 1)
    ids = facts["ids_per_device"]["item"] + facts["ids_per_device"]["user"]
    known = Known(one["ms"] / 1e3, ids, facts["dense_parameters"])
    beyond = [
        row["ms"] / 1e3 - sum(step_time(paper, row["devices"], 1, 1, known).values())
        for row in rows
        if row["setting"].startswith("2D")
    ]
    return dataclasses.replace(known, beyond=max([0.0, *beyond])), one


def main() -> None:
    paper = tyro.cli(Paper, description=__doc__)
    measured = read_results(paper.out)["measure"]
    known, one = known_from(paper, measured)
    assumptions = [
        f"one device computes {one['samples']} samples in {one['ms']:.1f} ms (measured: "
        f"{measured['weak_scaling']['about']['device']})",
        f"each device sends {known.ids:,} ids per step, padding included; rows are {paper.width} float32 wide",
        "the exchange is the implemented one: all-gather of ids, reduce-scatter of rows, all-gather of gradients",
        f"1D shards rows over all devices, 2D over the {paper.group} of a host (neighbours = group)",
        f"{paper.rows:,} rows; replicas exchange a change per id, or average the whole block if that is less",
        f"bytes per second and device: {paper.inside / 1e9:.0f} GB/s inside a host, {paper.across / 1e9:.0f} GB/s "
        f"between hosts; {paper.latency * 1e6:.0f} µs per collective and doubling of the devices",
        f"two devices (2D) measured {1e3 * known.beyond:.1f} ms per step beyond this model; it stays as it is",
        "nothing overlaps, devices are equally loaded, reading data costs nothing",
    ]
    print("assumptions:", *assumptions, sep="\n  ")
    modes = {"1D": (paper.devices, 1)}
    for every in paper.sync_every:
        modes[f"2D, averaged every {every} step{'s' if every > 1 else ''}"] = (paper.group, every)
    rows = []
    for mode, (group, every) in modes.items():
        for devices in [2**i for i in range(paper.devices.bit_length())]:
            parts = step_time(paper, devices, group, every, known)
            seconds = sum(parts.values())
            rows.append(
                {
                    "mode": mode, "devices": devices, "ms": 1e3 * seconds, "efficiency": known.compute / seconds,
                    "parts_ms": {name: 1e3 * value for name, value in parts.items()},
                }
            )  # fmt: skip
            shown = ", ".join(f"{name} {value:.2f}" for name, value in rows[-1]["parts_ms"].items())
            print(f"{mode}: {devices:5d} devices {1e3 * seconds:9.2f} ms ({shown}), {rows[-1]['efficiency']:.0%}")
    Saver(paper.out, "paper", paper)("step_time", rows, assumptions=assumptions)
    plot(paper.out, measured, rows)


def plot(out: pathlib.Path, measured: dict[str, Any], paper: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    scaling = measured["weak_scaling"]["values"]
    short = [f"{row['setting'].split(':')[0]}, {row['samples'] // row['devices']}" for row in scaling]
    axes[0].barh(range(len(scaling)), [row["samples_per_second"] / 1e3 for row in scaling])
    axes[0].set_yticks(range(len(scaling)), short)
    for place, row in enumerate(scaling):
        axes[0].text(0, place, f"  {row['speedup']:.2f} ×", va="center", color="white")
    axes[0].set(title="Weak scaling (setting, samples per device)", xlabel="thousand samples/s")
    axes[0].invert_yaxis()
    for axis, part, title in (
        (axes[1], "rows_on_one_device", "One table's step against its rows"),
        (axes[2], "rows_in_a_step", "A whole step against its tables' rows"),
    ):
        timed = sorted((row for row in measured[part]["values"] if "ms" in row), key=lambda row: row["rows"])
        axis.semilogx([row["rows"] for row in timed], [row["ms"] for row in timed], "o-")
        axis.set(title=title, xlabel="rows", ylabel="ms", ylim=(0, 1.2 * max(row["ms"] for row in timed)))
    for mode in dict.fromkeys(row["mode"] for row in paper):
        points = [row for row in paper if row["mode"] == mode]
        axes[3].loglog([row["devices"] for row in points], [row["ms"] for row in points], "o-", label=mode)
    axes[3].set(title="Step time on paper", xlabel="devices", ylabel="ms")
    axes[3].legend()
    figure.savefig(out / f"{NAME}.png", dpi=110)


if __name__ == "__main__":
    main()
