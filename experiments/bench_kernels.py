"""Time the kernels against their XLA paths and against the roof of the card.

    python experiments/bench_kernels.py gdpa --out experiments/results

One H100: about five minutes, most of them compilation. Measured: 493–503 TFLOP/s forward, 395–404 backward at
lq1024-lkv256.

Roof = the larger of FLOPs / 728 TFLOP/s and bytes / 2.94 TB/s, both measured on an H100 80GB HBM3 (8192³ bfloat16
product, device-to-device copy); bytes count every input and output once. FLOPs count matrix products only, recomputed
scores not twice: 4·H·D·Σ lq·lkv forward, 10·H·D·Σ lq·lkv backward. Times are wall-clock medians of whole calls
under jit, schedule tables included.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro

PEAK_FLOPS, PEAK_BYTES = 728e12, 2.94e12


@dataclasses.dataclass(frozen=True)
class GdpaShape:
    """A named batch of samples; jagged: query lengths uniform in 1 … lq."""

    batch: int
    lq: int
    lkv: int
    heads: int = 4
    width: int = 128
    jagged: bool = False

    @property
    def name(self) -> str:
        kind = "-jagged" if self.jagged else ""
        return f"b{self.batch}-lq{self.lq}{kind}-lkv{self.lkv}-h{self.heads}-d{self.width}"


GDPA_SHAPES = (
    GdpaShape(1152, 1024, 256),
    GdpaShape(1152, 256, 256),
    GdpaShape(1152, 1024, 256, jagged=True),
    GdpaShape(1152, 1024, 128),
    GdpaShape(288, 1024, 1024),
    GdpaShape(1152, 1024, 256, heads=8, width=64),
    GdpaShape(576, 1024, 512),
)


@dataclasses.dataclass(frozen=True)
class Gdpa:
    """Generalised dot-product attention, forward and backward."""

    out: pathlib.Path = pathlib.Path("experiments/results")  # directory of the result files
    rounds: int = 3
    calls: int = 8
    plot: bool = True
    xla_shapes: int = 2  # the XLA path is several times slower: only the first shapes run on it


def gdpa_batch(shape: GdpaShape, seed: int = 0):
    """Random operands (q, k, v, cotangent) and spans."""
    lengths = np.full(shape.batch, shape.lq)
    if shape.jagged:
        lengths = np.random.default_rng(seed).integers(1, shape.lq + 1, shape.batch)
    rows, kv_rows = int(lengths.sum()), shape.batch * shape.lkv
    keys = jax.random.split(jax.random.key(seed), 4)

    def normal(key, rows):
        return jax.random.normal(key, (rows, shape.heads, shape.width), jnp.bfloat16)

    spans = dict(
        q_starts=np.cumsum(lengths) - lengths,
        q_lengths=lengths,
        kv_starts=np.arange(shape.batch) * shape.lkv,
        kv_lengths=np.full(shape.batch, shape.lkv),
    )
    operands = normal(keys[0], rows), normal(keys[1], kv_rows), normal(keys[2], kv_rows), normal(keys[3], rows)
    return operands, {name: jnp.asarray(x, jnp.int32) for name, x in spans.items()}


def gdpa_roof(shape: GdpaShape, rows: int) -> dict[str, tuple[float, float]]:
    """(FLOPs, seconds at the roof) of each direction."""
    products = 2.0 * shape.heads * shape.width * rows * shape.lkv
    query, key = (2.0 * shape.heads * shape.width * n for n in (rows, shape.batch * shape.lkv))
    bytes_moved = {"forward": 2 * query + 2 * key, "backward": 3 * query + 4 * key}
    return {
        way: (count * products, max(count * products / PEAK_FLOPS, bytes_moved[way] / PEAK_BYTES))
        for way, count in (("forward", 2), ("backward", 5))
    }


def seconds(f, args, rounds: int, calls: int) -> float:
    """Median over rounds of the mean time of a call."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = f(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def run_gdpa(config: Gdpa) -> list[dict]:
    """Rows of results, one per shape, implementation and direction."""
    from pallas_kernels import gdpa

    results = []
    for index, shape in enumerate(GDPA_SHAPES):
        (q, k, v, do), spans = gdpa_batch(shape)
        for implementation in ("mosaic_gpu", "xla") if index < config.xla_shapes else ("mosaic_gpu",):

            def forward(q, k, v, spans, implementation=implementation, shape=shape):
                return gdpa(
                    q, k, v, **spans, max_q_length=shape.lq, max_kv_length=shape.lkv, implementation=implementation
                )

            def backward(q, k, v, do, spans, forward=forward):
                return jax.vjp(lambda *x: forward(*x, spans), q, k, v)[1](do)

            roof = gdpa_roof(shape, q.shape[0])
            calls = config.calls if implementation == "mosaic_gpu" else 2
            for way, f, args in (("forward", forward, (q, k, v, spans)), ("backward", backward, (q, k, v, do, spans))):
                try:
                    # jit drops the forward that vjp also computes: nothing of its result is needed.
                    time_s = seconds(jax.jit(f), args, config.rounds, calls)
                except Exception as error:  # one shape that can't run must not cost the other results
                    print(f"{shape.name} {implementation} {way}: {error!r}"[:300], flush=True)
                    continue
                flops, roof_s = roof[way]
                row = dict(
                    shape=shape.name,
                    implementation=implementation,
                    direction=way,
                    ms=round(time_s * 1e3, 4),
                    tflops=round(flops / time_s / 1e12, 1),
                    roof_tflops=round(flops / roof_s / 1e12, 1),
                    share_of_roof=round(roof_s / time_s, 3),
                    flops=flops,
                    roof_ms=round(roof_s * 1e3, 4),
                )
                results.append(row)
                print(
                    f"{shape.name:36s} {implementation:10s} {way:8s} {row['ms']:8.3f} ms {row['tflops']:6.1f} "
                    f"TFLOP/s, {100 * row['share_of_roof']:5.1f} % of the roof",
                    flush=True,
                )
                write(config.out, "bench_gdpa", results)
    return results


def write(folder: pathlib.Path, name: str, results: list[dict]) -> None:
    """Write the results with what is needed to judge and repeat them."""
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(
        command="python " + " ".join(sys.argv),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        dtype="bfloat16",
        activation="gelu_tanh",
        peak_tflops=PEAK_FLOPS / 1e12,
        peak_tb_s=PEAK_BYTES / 1e12,
    )
    (folder / f"{name}.json").write_text(json.dumps(dict(about=about, results=results), indent=1) + "\n")


def plot_roofline(results: list[dict], path: pathlib.Path, device: str) -> None:
    """TFLOP/s of each shape beside its roof, one panel per direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(r["shape"] for r in results))
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.45 * len(names)), sharey=True)
    styles = {"mosaic_gpu": ("kernel", "C0", 0.6), "xla": ("XLA", "C1", 0.25)}
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        rows = [r for r in results if r["direction"] == way]
        for implementation, (label, colour, height) in styles.items():
            mine = [r for r in rows if r["implementation"] == implementation]
            if mine:
                axis.barh(
                    [names.index(r["shape"]) for r in mine],
                    [r["tflops"] for r in mine],
                    color=colour,
                    height=height,
                    label=label,
                )
        for r in rows:
            at = names.index(r["shape"])
            axis.plot(
                [r["roof_tflops"]] * 2,
                [at - 0.4, at + 0.4],
                color="black",
                lw=1.5,
                label="roof" if r is rows[0] else None,
            )
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("TFLOP/s (bfloat16)")
        axis.set_title(f"GDPA {way}")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper right", fontsize=8, ncols=3)
    figure.suptitle(device, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(config: tyro.conf.OmitArgPrefixes[Gdpa]) -> None:
    """Time GDPA; write bench_gdpa.json and bench_gdpa.png."""
    results = run_gdpa(config)
    if results and config.plot:
        plot_roofline(results, config.out / "bench_gdpa.png", jax.devices()[0].device_kind)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"gdpa": main})
