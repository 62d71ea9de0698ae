"""What a PyTorch user would take instead, timed on the same card: the rivals of bench_kernels.py.

FlexAttention for the sliding window; for GDPA the three operations that torch.compile makes of it. Both take dense
batches. Timed by CUDA events over bursts of calls, which count the GPU's time alone: kinder than the wall time of ours.
"""

import dataclasses
import time
from typing import Any

import numpy as np
from bench_attention import Shape
from kernel_timing import BURST, PAUSE_S, Case, row

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch: Any = None

ABOUT = "CUDA events around bursts, medians"


def flex_rows(shape: Shape, cases: list[Case], rounds: int) -> list[dict]:
    """FlexAttention, compiled, on a dense shape; [] without torch."""
    if torch is None:
        return []
    from torch.nn.attention import flex_attention as flex  # pyright: ignore[reportMissingImports]

    left, right = shape.window
    q, k, v, do = _normal(4, (shape.batch, shape.heads, shape.length, shape.width))

    def near(b, h, i, j):
        return (j >= i - left) & (j <= i + right)

    mask = flex.create_block_mask(near, None, None, shape.length, shape.length, device="cuda")
    attend = torch.compile(flex.flex_attention)
    return _rows("torch flex", cases, lambda q, k, v: attend(q, k, v, block_mask=mask), (q, k, v), do, rounds)


def gdpa_rows(batch: int, lq: int, lkv: int, heads: int, width: int, *, cases: list[Case], rounds: int) -> list[dict]:
    """Two batched products with the activation between them, compiled, on a dense shape; [] without torch."""
    if torch is None:
        return []
    q, do = _normal(2, (batch, heads, lq, width))
    k, v = _normal(2, (batch, heads, lkv, width))

    @torch.compile
    def attend(q, k, v):
        return torch.nn.functional.gelu(q @ k.transpose(2, 3), approximate="tanh") @ v

    return _rows("torch.compile", cases, attend, (q, k, v), do, rounds)


def _normal(count: int, size) -> list:
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def _rows(name: str, cases: list[Case], attend, operands, do, rounds: int) -> list[dict]:
    """One row for each of the cases, which say what to count, of the forward and of the backward alone."""
    with torch.no_grad():
        times = {"forward": _seconds(lambda: attend(*operands), rounds)}
    for x in operands:
        x.requires_grad_()
    out = attend(*operands)
    times["backward"] = _seconds(lambda: torch.autograd.grad(out, operands, do, retain_graph=True), rounds)
    rows = []
    for case in cases:
        case = dataclasses.replace(case, implementation=name)
        rows.append(row(case, times[case.direction]) | dict(timing=f"torch {torch.__version__}: {ABOUT}"))
        print(f"{case.shape:36s} {name:12s} {case.direction:8s} {rows[-1]['ms']:8.4f} ms", flush=True)
    return rows


def _seconds(f, rounds: int) -> float:
    f()  # compiles
    times = []
    for _ in range(rounds):
        time.sleep(PAUSE_S)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(BURST):
            f()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / BURST / 1e3)
    return float(np.median(times))
