"""Cases of the softmax attention operators for bench_kernels.py: sliding windows and seed pooling, with cuDNN
and tokamax.

Both take dense batches. cuDNN, without a causal mask, takes no window to the right: it stands beside the one-sided
window. tokamax is timed where it is installed, with the block sizes that it picks by itself, untuned.
"""

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_timing import Case


@dataclasses.dataclass(frozen=True)
class Shape:
    """A named batch of samples of length T, or uniform in 1 … T; with a window, or with seeds."""

    batch: int
    length: int
    window: tuple[int, int] | None = None
    seeds: int | None = None
    heads: int = 4
    width: int = 128
    jagged: bool = False

    @property
    def name(self) -> str:
        what = f"window {self.window}" if self.seeds is None else f"{self.seeds} seeds"
        return f"B {self.batch}, T {'1…' if self.jagged else ''}{self.length}, {what}, H {self.heads}, D {self.width}"

    @property
    def lengths(self) -> np.ndarray:
        if self.jagged:
            return np.random.default_rng(0).integers(1, self.length + 1, self.batch)
        return np.full(self.batch, self.length)

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key, of one head."""
        if self.seeds is not None:
            return float(self.seeds * self.lengths.sum())
        left, right = self.window
        counts = 0
        for length in self.lengths:
            i = np.arange(length)
            counts += np.sum(np.minimum(i + right, length - 1) - np.maximum(i - left, 0) + 1)
        return float(counts)


WINDOW_SHAPES = (
    Shape(64, 1024, (100, 100)),
    Shape(64, 2048, (100, 100)),
    Shape(64, 1024, (100, 0)),
    Shape(64, 1024, (100, 100), heads=8, width=64),
    Shape(1152, 1024, (100, 100), jagged=True),
)
SEED_SHAPES = (
    Shape(1152, 1024, seeds=256, jagged=True),
    Shape(576, 1024, seeds=256),
    Shape(1152, 1024, seeds=256, jagged=True, heads=8, width=64),
)


@functools.cache
def _operands(shape: Shape):
    """Builds (q or seeds, k, v, cotangent, starts, lengths)."""
    lengths = shape.lengths
    rows = int(lengths.sum())
    query = rows if shape.seeds is None else shape.seeds
    out = (rows,) if shape.seeds is None else (shape.batch, shape.seeds)

    def build():
        keys = jax.random.split(jax.random.key(0), 4)
        sizes = ((query,), (rows,), (rows,), out)
        arrays = [
            jax.random.normal(key, (*n, shape.heads, shape.width), jnp.bfloat16)
            for key, n in zip(keys, sizes, strict=True)
        ]
        return *arrays, *(jnp.asarray(x, jnp.int32) for x in (np.cumsum(lengths) - lengths, lengths))

    return build


class Pullback:
    """The backward alone: its operands are the residuals that the forward leaves."""

    def __init__(self, call, operands):
        self.call, self.forward_operands, self.structure = call, operands, None

    def operands(self):
        q, k, v, do, *spans = self.forward_operands()

        @jax.jit
        def forward(q, k, v, *spans):
            return jax.vjp(lambda *x: self.call(*x, *spans), q, k, v)[1]

        leaves, self.structure = jax.tree.flatten(forward(q, k, v, *spans))
        return leaves, do

    def run(self, leaves, do):
        return jax.tree.unflatten(self.structure, leaves)(do)


def both_directions(shape: Shape, implementation: str, call) -> list[Case]:
    """Cases of `call(q, k, v, starts, lengths)`; FLOPs 4·H·D·pairs forward, 10·H·D·pairs backward.

    Bytes: q, k, v, out; backward q, k, v and dout, and the gradients (a kernel may also read out).
    """
    products = 2.0 * shape.heads * shape.width * shape.pairs
    row = 2.0 * shape.heads * shape.width
    tokens = row * float(shape.lengths.sum())
    query = tokens if shape.seeds is None else row * shape.seeds
    out = tokens if shape.seeds is None else row * shape.seeds * shape.batch

    def forward(q, k, v, do, starts, lengths):
        return call(q, k, v, starts, lengths)

    operands = _operands(shape)
    pullback = Pullback(call, operands)
    bytes_moved = query + 2 * tokens + out, 2 * query + 4 * tokens + out
    return [
        Case(shape.name, implementation, "forward", forward, operands, 2 * products, bytes_moved[0]),
        Case(shape.name, implementation, "backward", pullback.run, pullback.operands, 5 * products, bytes_moved[1]),
    ]


def window_cases() -> list[Case]:
    from pallas_kernels import sliding_window_attention

    cases = []
    for shape in WINDOW_SHAPES:
        for implementation in ("mosaic_gpu", "xla") if shape is WINDOW_SHAPES[0] else ("mosaic_gpu",):

            def call(q, k, v, starts, lengths, shape=shape, implementation=implementation):
                static: dict[str, Any] = dict(
                    max_length=shape.length, window=shape.window, implementation=implementation
                )
                return sliding_window_attention(q, k, v, starts=starts, lengths=lengths, **static)

            cases += both_directions(shape, implementation, call)
        if shape.window and shape.window[1] == 0:
            cases += both_directions(shape, "cudnn", functools.partial(_cudnn, shape))
        if shape is WINDOW_SHAPES[0] and importlib.util.find_spec("tokamax"):
            cases += both_directions(shape, "tokamax", functools.partial(_tokamax, shape))
    return cases


def _cudnn(shape: Shape, q, k, v, starts, lengths):
    q, k, v = (x.reshape(shape.batch, shape.length, *x.shape[1:]) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=shape.window, implementation="cudnn")
    return out.reshape(-1, *out.shape[2:])


def _tokamax(shape: Shape, q, k, v, starts, lengths):
    import tokamax  # pyright: ignore[reportMissingImports]

    q, k, v = (x.reshape(shape.batch, shape.length, *x.shape[1:]) for x in (q, k, v))
    out = tokamax.dot_product_attention(q, k, v, local_window_size=shape.window, implementation="mosaic")
    return out.reshape(-1, *out.shape[2:])


def seed_cases() -> list[Case]:
    from pallas_kernels import seed_attention

    cases = []
    for shape in SEED_SHAPES:
        for implementation in ("mosaic_gpu", "xla") if shape is SEED_SHAPES[0] else ("mosaic_gpu",):

            def call(seeds, k, v, starts, lengths, shape=shape, implementation=implementation):
                static: dict[str, Any] = dict(max_length=shape.length, implementation=implementation)
                return seed_attention(seeds, k, v, starts=starts, lengths=lengths, **static)

            cases += both_directions(shape, implementation, call)
    return cases
