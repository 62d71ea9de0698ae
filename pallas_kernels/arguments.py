"""Checks of the arguments that all jagged operators share.

A jagged batch is a token-major array [N, ...] and, per sample, the first row and the number of rows. Shapes, dtypes and
static arguments are checked always, the values of starts and lengths where they are concrete, outside jit. A message
names the operator, the argument and the numbers that don't fit.
"""

import math
import operator as operators

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int32

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_rank(operator: str, name: str, x: Array, dimensions: str) -> None:
    """Raise ValueError unless `x` has one axis per word of `dimensions`, e.g. "N H D"."""
    if x.ndim != len(dimensions.split()):
        axes = ", ".join(dimensions.split())
        raise ValueError(f"{operator}: {name} must have the axes [{axes}], got shape {x.shape}")


def check_float(operator: str, **arrays: Array) -> None:
    """Raise ValueError unless all arrays share one floating dtype."""
    dtypes = {name: jnp.dtype(x.dtype).name for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1 or not set(dtypes.values()) <= set(FLOAT_DTYPES):
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{operator}: operands must share one dtype of {', '.join(FLOAT_DTYPES)}; got {found}")


def check_heads(
    operator: str, query: str, q: Float[Array, "_ H D"], k: Float[Array, "Nkv Hkv D"], v: Float[Array, "Nkv Hkv D"]
) -> None:
    """Raise ValueError unless q, k, v have rank 3, k and v agree, and H is a multiple of Hkv (grouped queries)."""
    check_rank(operator, query, q, "rows H D")
    check_rank(operator, "k", k, "N Hkv D")
    if k.shape != v.shape:
        raise ValueError(f"{operator}: k and v must have the same shape, got {k.shape} and {v.shape}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{operator}: {query} has head width {q.shape[2]}, k and v have {k.shape[2]}")
    if q.shape[2] == 0 or k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{operator}: {query} has {q.shape[1]} heads, which is not a positive multiple of the "
            f"{k.shape[1]} heads of k and v (head width {q.shape[2]})"
        )


def check_parts(operator: str, name: str, x: Float[Array, "N heads D"], parts: int) -> None:
    """Raise ValueError unless x has rank 3 and `parts` times as many heads as each of its parts, at least one."""
    check_rank(operator, name, x, "N heads D")
    if x.shape[1] == 0 or x.shape[1] % parts or x.shape[2] == 0:
        raise ValueError(
            f"{operator}: {name} has {x.shape[1]} heads of width {x.shape[2]}; it holds {parts} parts of equal size"
        )


def check_scale(operator: str, name: str, scale: float) -> float:
    """A static, positive, finite factor as a Python float; ValueError for anything else."""
    if isinstance(scale, Tracer):
        raise ValueError(f"{operator}: {name} must be a static number, got a traced value")
    scale = float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{operator}: {name} must be a positive finite number, got {scale}")
    return scale


def check_count(operator: str, name: str, value: int) -> int:
    """A static int >= 0; ValueError for anything else."""
    try:
        count = operators.index(value)
    except TypeError as e:
        raise ValueError(f"{operator}: {name} must be a static int, got {value!r}") from e
    if count < 0 or isinstance(value, bool):
        raise ValueError(f"{operator}: {name} must be an int >= 0, got {value!r}")
    return count


def check_spans(
    operator: str,
    starts: Int32[Array, "B"],
    lengths: Int32[Array, "B"],
    *,
    rows: int,
    max_length: int | None,
    prefix: str = "",
    may_coincide: bool = False,
) -> tuple[Int32[Array, "B"], Int32[Array, "B"], int]:
    """Check where the samples lie in an array of `rows` rows.

    Args:
      starts, lengths: first row and number of rows of each sample; any order, gaps and empty samples allowed.
      max_length: static bound on the lengths; None means `rows`.
      prefix: of the argument names in messages: "" for starts, "q_" for q_starts.
      may_coincide: samples may share rows (keys shared by the candidates of one request).

    Returns:
      starts and lengths as jax arrays, and max_length, at most `rows`.

    Raises:
      ValueError: wrong shape or dtype; and where the values are concrete: a negative start or length, a span that ends
        beyond the array, a length above max_length, samples that overlap though they may not.
    """
    names = f"{prefix}starts", f"{prefix}lengths"
    values = _concrete(starts), _concrete(lengths)
    starts, lengths = jnp.asarray(starts), jnp.asarray(lengths)
    for name, x in zip(names, (starts, lengths), strict=True):
        check_rank(operator, name, x, "B")
        if x.dtype != jnp.int32:
            raise ValueError(f"{operator}: {name} must be int32, got {x.dtype}")
    if starts.shape != lengths.shape or starts.shape[0] == 0:
        raise ValueError(
            f"{operator}: {names[0]} and {names[1]} must name the same samples, at least one; got "
            f"{starts.shape[0]} and {lengths.shape[0]}"
        )
    max_length = rows if max_length is None else check_count(operator, f"max_{prefix}length", max_length)
    if values[0] is not None and values[1] is not None:
        _check_values(operator, names, values[0], values[1], rows, max_length, prefix, may_coincide)
    return starts, lengths, min(max_length, rows)


def _concrete(x) -> np.ndarray | None:
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def _check_values(operator, names, starts, lengths, rows, max_length, prefix, may_coincide):
    starts, lengths = starts.astype(np.int64), lengths.astype(np.int64)
    ends = starts + lengths

    def refuse(bad, say):
        if bad.any():
            raise ValueError(f"{operator}: {say(int(np.argmax(bad)))}")

    refuse(starts < 0, lambda b: f"{names[0]}[{b}] is {starts[b]}, must be >= 0")
    refuse(lengths < 0, lambda b: f"{names[1]}[{b}] is {lengths[b]}, must be >= 0")
    refuse(lengths > max_length, lambda b: f"{names[1]}[{b}] is {lengths[b]}, above max_{prefix}length {max_length}")
    refuse(
        ends > rows,
        lambda b: (
            f"{names[0]}[{b}] {starts[b]} + {names[1]}[{b}] {lengths[b]} = {ends[b]} is beyond the array's {rows} rows"
        ),
    )
    if not may_coincide and (pair := _overlapping(starts, lengths)):
        a, b = pair
        raise ValueError(
            f"{operator}: samples {a} and {b} overlap: rows [{starts[a]}, {ends[a]}) and [{starts[b]}, {ends[b]}); "
            f"every row may belong to one sample"
        )


def _overlapping(starts, lengths) -> tuple[int, int] | None:
    """Two samples that share rows, if any do."""
    order = np.argsort(starts, kind="stable")
    order = order[lengths[order] > 0]
    a, b = order[:-1], order[1:]
    meet = starts[a] + lengths[a] > starts[b]
    return (a[np.argmax(meet)], b[np.argmax(meet)]) if meet.any() else None


def known_to_overlap(starts, lengths) -> bool:
    """Are the spans concrete, and do samples share rows?"""
    starts, lengths = _concrete(starts), _concrete(lengths)
    return starts is not None and lengths is not None and _overlapping(starts, lengths) is not None
