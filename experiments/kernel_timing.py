"""Time compiled calls against the roof of the card; result files and roofline plots of the kernel benchmarks.

Roof = the larger of FLOPs / 728 TFLOP/s and bytes / 2.94 TB/s, both measured on an H100 80GB HBM3 (8192³ bfloat16
product, device-to-device copy); bytes count every input and output once. FLOPs count the products of the formula only,
recomputed ones not twice.

Times are of whole calls under jit, schedule tables included: bursts of calls with pauses between them, the time of a
burst of one call taken off, medians. Ahead of each burst the GPU counts for some milliseconds on one of its
multiprocessors, so that all calls of the burst wait in its queue: the host takes about as long to start a call of
0.1 ms as the GPU to run it, and a training step, one program, doesn't start its operators one by one either. A GPU
under lasting load lowers its clock: expect up to a tenth more there.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

PEAK_FLOPS, PEAK_BYTES = 728e12, 2.94e12
BURST, PAUSE_S, WARM_UP_S = 8, 0.02, 0.3
COUNT = 400_000  # dependent steps of the count ahead of a burst: some milliseconds


@dataclasses.dataclass(frozen=True)
class Case:
    """One call to time.

    operands: builds the arguments, pytrees of arrays.
    flops, bytes: what the operator must compute and move; they set the roof.
    """

    shape: str
    implementation: str
    direction: str
    function: Callable[..., Any]
    operands: Callable[[], tuple]
    flops: float
    bytes: float


def time_all(
    cases: list[Case],
    path: pathlib.Path,
    *,
    only: str,
    rounds: int,
    about: dict,
    others: Callable[[], list[dict]] = list,
) -> list[dict]:
    """Compile and time the cases whose printed name contains `only`, one after another.

    Each result goes to `path` at once, in place of an earlier one of the same case. Returns all rows of the file.

    Args:
      others: times what is no JAX function by itself; its rows go to the file at the end.

    Raises:
      ValueError: the file holds results from another device, JAX or way of timing.
    """
    about = _about() | about
    rows = _kept(path, about)
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep(measured: dict) -> None:
        rows[_identity(measured)] = measured
        path.write_text(json.dumps(dict(about=about, results=list(rows.values())), indent=1) + "\n")

    for case in cases:
        name = f"{case.shape:36s} {case.implementation:12s} {case.direction:8s}"
        if only not in name:
            continue
        try:
            measured = row(case, _seconds(jax.jit(case.function), case.operands(), rounds))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            # A case that doesn't fit, or that a rival refuses, must not cost the others; its earlier result goes.
            print(f"{name} {error!r}"[:400], flush=True)
            rows.pop((case.shape, case.implementation, case.direction), None)
            continue
        share = f"{measured['tflops']:6.1f} TFLOP/s, {100 * measured['share_of_roof']:5.1f} % of the roof"
        print(f"{name} {measured['ms']:8.4f} ms {share}", flush=True)
        keep(measured)
    for measured in others():
        keep(measured)
    return list(rows.values())


def _identity(row: dict) -> tuple:
    return row["shape"], row["implementation"], row["direction"]


def _kept(path: pathlib.Path, about: dict) -> dict[tuple, dict]:
    """Earlier rows, measured under the same circumstances."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if differing := [k for k in about if k != "command" and earlier["about"].get(k) != about[k]]:
        raise ValueError(f"{path} holds results that differ in {', '.join(differing)}; choose another --out")
    return {_identity(row): row for row in earlier["results"]}


@functools.cache
def _head_start():
    """Occupies one multiprocessor for `COUNT` dependent steps and leaves memory and power to what follows."""

    def count(out):
        def step(i, x):
            return x * 0.999 + 1.0

        zeros = plgpu.layout_cast(jnp.zeros(128, jnp.float32), plgpu.Layout.WG_STRIDED((128,), 1))
        out[...] = lax.fori_loop(0, COUNT, step, zeros)

    vector = jax.ShapeDtypeStruct((128,), jnp.float32)
    kernel = plgpu.kernel(count, out_type=vector, grid=(1,), grid_names=("one",))
    return jax.jit(kernel).lower().compile()


def _seconds(f, operands, rounds: int) -> float:
    head_start = _head_start()

    def burst(calls: int) -> float:
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        head_start()
        for _ in range(calls):
            result = f(*operands)
        jax.block_until_ready(result)
        return time.perf_counter() - start

    burst(2)
    warm = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm:
        burst(BURST)
    return float(np.median([(burst(BURST) - burst(1)) / (BURST - 1) for _ in range(rounds)]))


def row(case: Case, time_s: float) -> dict:
    """What the result file says of a case that took so many seconds per call."""
    roof_s = max(case.flops / PEAK_FLOPS, case.bytes / PEAK_BYTES)
    return dict(
        shape=case.shape,
        implementation=case.implementation,
        direction=case.direction,
        ms=round(time_s * 1e3, 4),
        tflops=round(case.flops / time_s / 1e12, 1),
        roof_tflops=round(case.flops / roof_s / 1e12, 1),
        share_of_roof=round(roof_s / time_s, 3),
        flops=case.flops,
        roof_ms=round(roof_s * 1e3, 4),
    )


def _about() -> dict:
    return dict(
        command="python " + " ".join(sys.argv),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        peak_tflops=PEAK_FLOPS / 1e12,
        peak_tb_s=PEAK_BYTES / 1e12,
        timing=f"medians of (burst of {BURST} calls - one call) / {BURST - 1}, all queued, pauses of {PAUSE_S} s",
    )


def plot_roofline(rows: list[dict], path: pathlib.Path, title: str) -> None:
    """TFLOP/s of every implementation beside the roof of each shape, one panel per direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    implementations = list(dict.fromkeys(r["implementation"] for r in rows))
    height = 0.8 / len(implementations)
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.4 * len(shapes)), sharey=True)
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        of_way = [r for r in rows if r["direction"] == way]
        for i, implementation in enumerate(implementations):
            mine = [r for r in of_way if r["implementation"] == implementation]
            places = [shapes.index(r["shape"]) - 0.4 + (i + 0.5) * height for r in mine]
            axis.barh(places, [r["tflops"] for r in mine], color=f"C{i}", height=height, label=implementation)
        for i, shape in enumerate(shapes):
            roof = next((r["roof_tflops"] for r in of_way if r["shape"] == shape), None)
            if roof:
                axis.plot([roof] * 2, [i - 0.45, i + 0.45], color="black", lw=1.5, label="roof" if i == 0 else None)
        axis.set_yticks(range(len(shapes)), shapes, fontsize=8)
        axis.set_xlabel("TFLOP/s")
        axis.set_title(way)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", fontsize=8, ncols=len(implementations) + 1)
    figure.suptitle(title, fontsize=9, x=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
