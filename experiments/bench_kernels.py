"""Time the kernels against their XLA paths and against the roof of the card; see kernel_timing.py for how.

python experiments/bench_kernels.py gdpa
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_attention import WINDOW_SHAPES, Pullback, seed_cases, window_cases
from kernel_timing import Case, plot_roofline, time_all
from torch_rivals import flex_rows, gdpa_rows

from pallas_kernels.mlp.api import masked_in_xla, mlp_in_xla, mlp_kernel
from pallas_kernels.rows import along, mean, normalise, normalise_back, row_kernel, row_pass_in_xla

RESULTS = pathlib.Path("experiments/results")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the results go, and how often to measure."""

    out: pathlib.Path = RESULTS
    rounds: int = 15
    only: str = ""  # part of the names of the cases to time; the other results stay


@dataclasses.dataclass(frozen=True)
class GdpaShape:
    """A named batch of samples; jagged: query lengths uniform in 1 … lq, a fill of 0.5."""

    batch: int
    lq: int
    lkv: int
    heads: int = 4
    width: int = 128
    jagged: bool = False

    @property
    def name(self) -> str:
        kind = "1…" if self.jagged else ""
        return f"B {self.batch}, {kind}{self.lq} × {self.lkv}, H {self.heads}, D {self.width}"

    @property
    def lengths(self) -> np.ndarray:
        if self.jagged:
            return np.random.default_rng(0).integers(1, self.lq + 1, self.batch)
        return np.full(self.batch, self.lq)


FULL = (
    GdpaShape(1152, 1024, 256),
    GdpaShape(1152, 256, 256),
    GdpaShape(1152, 1024, 128),
    GdpaShape(576, 1024, 512),
    GdpaShape(288, 1024, 1024),
    GdpaShape(1152, 1024, 256, heads=8, width=64),
    GdpaShape(576, 1024, 512, heads=8, width=64),
)
GDPA_SHAPES = (
    *FULL,
    *(dataclasses.replace(s, jagged=True) for s in FULL if s.lq == 1024 and (s.width == 128 or s.lkv == 256)),
)
BLOCK_SHAPES = (FULL[0], GdpaShape(416, 1000, 256, heads=6), GdpaShape(208, 1000, 512, heads=8))
ON_XLA = FULL[:1]  # several times slower, and slow to compile: one shape for comparison


def gdpa_operands(shape: GdpaShape):
    """Random (q, k, v, cotangent) and spans."""
    lengths = shape.lengths
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(key, rows):
        return jax.random.normal(key, (rows, shape.heads, shape.width), jnp.bfloat16)

    spans = dict(
        q_starts=np.cumsum(lengths) - lengths,
        q_lengths=lengths,
        kv_starts=np.arange(shape.batch) * shape.lkv,
        kv_lengths=np.full(shape.batch, shape.lkv),
    )
    rows, kv_rows = int(lengths.sum()), shape.batch * shape.lkv
    operands = [normal(key, n) for key, n in zip(keys, (rows, kv_rows, kv_rows, rows), strict=True)]
    return *operands, {name: jnp.asarray(x, jnp.int32) for name, x in spans.items()}


def both_directions(shape: GdpaShape, implementation: str, f) -> list[Case]:
    """Cases of `f(q, k, v, spans)`; FLOPs 4·H·D·Σ lq·lkv forward, 10·H·D·Σ lq·lkv backward."""

    def forward(q, k, v, do, spans):
        return f(q, k, v, spans)

    def backward(q, k, v, do, spans):
        # jit drops the forward that vjp also computes where nothing of its result is needed.
        return jax.vjp(lambda *x: f(*x, spans), q, k, v)[1](do)

    rows, width = int(shape.lengths.sum()), shape.heads * shape.width
    products = 2.0 * width * rows * shape.lkv
    query, key = (2.0 * width * n for n in (rows, shape.batch * shape.lkv))
    operands = functools.partial(gdpa_operands, shape)
    return [
        Case(shape.name, implementation, "forward", forward, operands, 2 * products, 2 * query + 2 * key),
        Case(shape.name, implementation, "backward", backward, operands, 5 * products, 3 * query + 4 * key),
    ]


def gdpa(config: Bench) -> None:
    """Generalised dot-product attention: bench_gdpa.json and bench_gdpa.png."""
    from pallas_kernels import gdpa

    def call(shape, implementation, q, k, v, spans):
        bounds = dict(max_q_length=shape.lq, max_kv_length=shape.lkv)
        return gdpa(q, k, v, **spans, **bounds, implementation=implementation)

    cases = []
    for implementation, shapes in (("mosaic_gpu", GDPA_SHAPES), ("xla", ON_XLA)):
        for shape in shapes:
            cases += both_directions(shape, implementation, functools.partial(call, shape, implementation))
    about = dict(dtype="bfloat16", activation="gelu_tanh")
    path = config.out / "bench_gdpa.json"
    first = FULL[0]

    def others():
        sizes = first.batch, first.lq, first.lkv, first.heads, first.width
        return gdpa_rows(*sizes, cases=cases[:2], rounds=config.rounds) if config.only in f"{first.name} torch" else []

    rows = time_all(cases, path, only=config.only, rounds=config.rounds, about=about, others=others)
    plot_roofline(rows, path.with_suffix(".png"), f"GDPA on one {jax.devices()[0].device_kind}, bfloat16")


def gdpa_block(config: Bench) -> None:
    """The PFFN block as it runs, its norms and residuals as XLA's operations around GDPA, and GDPA alone:
    bench_gdpa_block.json and .png."""
    from pallas_kernels.gdpa import block, mosaic

    implementations = {
        "mosaic_gpu": functools.partial(block.mosaic_gpu, eps=1e-5),
        "four operations": functools.partial(block.compose, mosaic.mosaic_gpu, eps=1e-5),
        "without norms": mosaic.mosaic_gpu,
    }

    def call(f, shape, q, k, v, spans):
        static = dict(max_q_length=shape.lq, max_kv_length=shape.lkv, activation=("gelu_tanh",) * shape.heads)
        where = (spans[name] for name in ("q_starts", "q_lengths", "kv_starts", "kv_lengths"))
        return f(q, k, v, *where, **static, scale=1.0, post_scale=1.0)

    cases = []
    for shape in BLOCK_SHAPES:
        for name, f in implementations.items():
            run = functools.partial(call, f, shape)
            forward, backward = both_directions(shape, name, run)
            alone = Pullback(run, backward.operands)  # its forward saves what jit could not drop from the backward
            cases += [forward, dataclasses.replace(backward, function=alone.run, operands=alone.operands)]
    about = dict(dtype="bfloat16", activation="gelu_tanh", flops="of the products alone")
    about |= dict(backward="from what the forward saves for it")
    path = config.out / "bench_gdpa_block.json"
    rows = time_all(cases, path, only=config.only, rounds=config.rounds, about=about)
    plot_roofline(rows, path.with_suffix(".png"), f"PFFN block on one {jax.devices()[0].device_kind}, bfloat16")


def sliding_window(config: Bench) -> None:
    """Sliding-window attention: bench_sliding_window.json and .png."""
    path = config.out / "bench_sliding_window.json"
    cases = window_cases()
    first = WINDOW_SHAPES[0]

    def others():
        return flex_rows(first, cases[:2], config.rounds) if config.only in f"{first.name} torch" else []

    about = dict(dtype="bfloat16")
    rows = time_all(cases, path, only=config.only, rounds=config.rounds, about=about, others=others)
    plot_roofline(rows, path.with_suffix(".png"), f"Sliding window on one {jax.devices()[0].device_kind}, bfloat16")


def seed_pooling(config: Bench) -> None:
    """Attention of shared seeds: bench_seed_pooling.json and .png."""
    path = config.out / "bench_seed_pooling.json"
    rows = time_all(seed_cases(), path, only=config.only, rounds=config.rounds, about=dict(dtype="bfloat16"))
    plot_roofline(rows, path.with_suffix(".png"), f"Seed attention on one {jax.devices()[0].device_kind}, bfloat16")


def mlp(config: Bench) -> None:
    """MLPs of two layers over many rows: bench_mlp.json and .png."""
    about = dict(dtype="bfloat16", backward="from what the forward saves for it")
    path = config.out / "bench_mlp.json"
    rows = time_all(mlp_cases(), path, only=config.only, rounds=config.rounds, about=about)
    plot_roofline(rows, path.with_suffix(".png"), f"MLP on one {jax.devices()[0].device_kind}, bfloat16")


def mlp_cases() -> list[Case]:
    """Rows, inputs, hidden width and outputs as in the 6 GFLOPs preset, one of whose MLPs masks its input."""
    cases = []
    for N, F, H, G, masked in (
        (2_304_000, 192, 320, 192, False),
        (2_304_000, 192, 320, 192, True),
        (2_304_000, 192, 320, 320, False),
        (2_304_000, 192, 128, 192, False),
        (589_824, 256, 320, 320, False),
    ):
        name, operands = f"{N} rows, {F}, {H}, {G}" + ", masks" * masked, functools.partial(_mlp_operands, N, F, H, G)
        kernel, xla = functools.partial(mlp_kernel, masked=masked), masked_in_xla if masked else mlp_in_xla
        products, rows = 2.0 * N * H * (F + G), 2.0 * N * np.array([F + G, 2 * F + G])
        for implementation, f in (("mosaic_gpu", kernel), ("xla", xla)):
            call = functools.partial(_mlp, f)
            alone = Pullback(call, operands)
            cases += [
                Case(name, implementation, "forward", lambda *x, f=call: f(*x[:3]), operands, products, rows[0]),
                Case(name, implementation, "backward", alone.run, alone.operands, 2 * products, rows[1]),
            ]
    return cases


def _mlp_operands(N: int, F: int, H: int, G: int):
    """Random (x, weights, biases, cotangent)."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    return normal(N, F), (normal(F, H) / F**0.5, normal(H, G) / H**0.5), (normal(H), normal(G)), normal(N, G)


def _mlp(f, x, weights, biases):
    return f(x, weights[0], biases[0], weights[1], biases[1])


def row_passes(config: Bench) -> None:
    """Passes over rows, the block's end and the gradient of a norm beside a residual: bench_row_passes.json."""
    about = dict(dtype="bfloat16", what="share_of_roof is that of the copy's bandwidth")
    time_all(row_cases(), config.out / "bench_row_passes.json", only=config.only, rounds=config.rounds, about=about)


def row_cases() -> list[Case]:
    """Rows of the presets' widths, 0.2 to 0.6 GB per array."""
    return [
        Case(
            f"[{N}, {F}], {arrays} arrays to one",
            implementation,
            direction,
            functools.partial(run, body),
            functools.partial(_rows, arrays, N, F),
            flops=0.0,
            bytes=2.0 * (arrays + 1) * N * F,
        )
        for N, F in ((800_000, 128), (800_000, 256), (416_000, 512), (416_000, 768), (256_000, 1024))
        for direction, arrays, body in (("forward", 2, _block_end), ("backward", 3, _norm_gradient))
        for implementation, run in (
            ("xla", row_pass_in_xla),
            ("mosaic_gpu", functools.partial(row_kernel, name="rows")),
        )
    ]


def _rows(arrays: int, N: int, F: int) -> tuple[jax.Array, ...]:
    pool = np.random.default_rng(0).standard_normal(1_000_003, np.float32).astype(jnp.bfloat16)
    return tuple(jnp.asarray(np.resize(pool[i:], (N, F))) for i in range(arrays))


def _block_end(x, attended):
    mixed = normalise(x, 1e-5)[0] + attended
    return mixed * along(jax.lax.rsqrt(mean(mixed * mixed) + 1e-5), mixed) + x


def _norm_gradient(x, d_residual, d):
    return normalise_back(d, *normalise(x, 1e-5)) + d_residual


if __name__ == "__main__":
    configured = {f.__name__: f for f in (gdpa, gdpa_block, sliding_window, seed_pooling, mlp, row_passes)}
    tyro.extras.subcommand_cli_from_dict(configured, config=(tyro.conf.OmitArgPrefixes,))
