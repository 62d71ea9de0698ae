"""Jagged sequences: samples of different lengths packed one after the other, so that padding does not exist.

Only the operators that look across tokens (GDPA, attention, seed pooling, rotary positions) know about samples;
projections, MLPs and norms run over all tokens alike. What lies outside every sample is undefined.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray  # the same class holds NumPy arrays on the host

# Shares of the full B·T_max for which a program may be compiled, unless told otherwise. Fine, because unused capacity
# costs time in all but the four operators; a caller whose compilations cost more takes fewer. The last is 1, so that
# no event is ever dropped.
CAPACITY_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)
CAPACITY_MULTIPLE = 64  # tokens; keeps every capacity a whole number of tiles


@partial(jax.tree_util.register_dataclass, data_fields=["values", "starts", "lengths"], meta_fields=["max_length"])
@dataclass(frozen=True, eq=False)
class Jagged:
    """Sequences of B samples on P batch shards.

    Attributes:
      values: an array [P, N, ...] or a tree of them; N is the capacity of a shard.
      starts: int32 [P, B/P], the first token of each sample, counted from the shard's own first token.
      lengths: int32 [P, B/P], the number of tokens of each sample; 0 is allowed.
      max_length: no length exceeds it. From the schema, never a batch's own maximum: it is a compile-time constant.
    """

    values: Any
    starts: Int[Array, "P b"]
    lengths: Int[Array, "P b"]
    max_length: int

    def with_values(self, values: Any) -> "Jagged":
        return replace(self, values=values)

    def check(self) -> "Jagged":
        """Check shapes, and values where they are concrete; return self.

        A method and not `__post_init__`, which JAX also runs on tracers and placeholders.

        Raises:
          ValueError: shapes don't agree, a length is negative, above `max_length` or beyond the capacity.
        """
        if self.starts.ndim != 2 or self.starts.shape != self.lengths.shape:
            raise ValueError(
                f"Jagged: starts {self.starts.shape} and lengths {self.lengths.shape} must both be [P, B/P]"
            )
        shards = self.starts.shape[0]
        capacities = {x.shape[:2] for x in jax.tree.leaves(self.values)}
        if len(capacities) != 1 or next(iter(capacities))[0] != shards:
            raise ValueError(f"Jagged: values must all start with [{shards}, N], got {sorted(capacities)}")
        capacity = next(iter(capacities))[1]
        if isinstance(self.lengths, Tracer):
            return self
        starts, lengths = np.asarray(self.starts), np.asarray(self.lengths)
        if lengths.size and (lengths.min() < 0 or lengths.max() > self.max_length):
            raise ValueError(
                f"Jagged: lengths lie in [{lengths.min()}, {lengths.max()}], allowed are [0, {self.max_length}]"
            )
        if starts.size and (starts.min() < 0 or (starts + lengths).max() > capacity):
            raise ValueError(
                f"Jagged: samples span tokens [{starts.min()}, {(starts + lengths).max()}) of a capacity of {capacity}"
            )
        return self


def token_samples(starts: Int[Array, "b"], lengths: Int[Array, "b"], capacity: int) -> Int[Array, "N"]:
    """The sample that each token of one shard belongs to, b for tokens of no sample.

    Marks each sample's first token and the one after its last and sums them up: right for any order of samples, gaps
    and empty samples, where a search over `starts` is not. Sample spans must not overlap.
    """
    b = starts.shape[0]
    mark = jnp.where(lengths > 0, b - jnp.arange(b, dtype=jnp.int32), 0)
    edges = jnp.zeros(capacity + 1, jnp.int32).at[starts].add(mark).at[starts + lengths].add(-mark)
    return b - jnp.cumsum(edges)[:capacity]


def inside_samples(sequence: Jagged) -> Bool[Array, "P N"]:
    """Which tokens belong to a sample; what the others hold is undefined."""
    capacity = jax.tree.leaves(sequence.values)[0].shape[1]

    def of_shard(starts, lengths):
        return token_samples(starts, lengths, capacity) < starts.shape[0]

    return jax.vmap(of_shard)(sequence.starts, sequence.lengths)


def positions(sequence: Jagged) -> Int[Array, "P N"]:
    """Each token's place in its own sample, 0 for the oldest; 0 for tokens of no sample."""
    return _places(sequence)[0]


def later_events(sequence: Jagged) -> Int[Array, "P N"]:
    """How many tokens of its own sample follow each token, 0 for the newest; 0 for tokens of no sample."""
    place, length = _places(sequence)
    return jnp.maximum(length - 1 - place, 0)


def _places(sequence: Jagged) -> tuple[Int[Array, "P N"], Int[Array, "P N"]]:
    """Each token's place in its own sample and the sample's length; 0 and 0 for tokens of no sample."""
    capacity = jax.tree.leaves(sequence.values)[0].shape[1]

    def of_shard(starts, lengths):
        sample = token_samples(starts, lengths, capacity)
        start = starts.at[sample].get(mode="fill", fill_value=0)
        length = lengths.at[sample].get(mode="fill", fill_value=0)
        place = jnp.arange(capacity, dtype=jnp.int32) - start
        return jnp.where(sample < starts.shape[0], place, 0), length

    return jax.vmap(of_shard)(sequence.starts, sequence.lengths)


def spread(values: Float[Array, "S *rest"], sequence: Jagged) -> Float[Array, "P N *rest"]:
    """For each token the row of `values` that belongs to its sample, S = P·b; 0 for tokens of no sample."""
    shards, capacity = jax.tree.leaves(sequence.values)[0].shape[:2]
    values = values.reshape(shards, -1, *values.shape[1:])

    def of_shard(values, starts, lengths):
        return values.at[token_samples(starts, lengths, capacity)].get(mode="fill", fill_value=0)

    return jax.vmap(of_shard)(values, sequence.starts, sequence.lengths)


def sum_over_samples(sequence: Jagged) -> Float[Array, "S *rest"]:
    """The sum of each sample's tokens, S = P·b, of array values; 0 for empty samples."""

    def of_shard(values, starts, lengths):
        sample = token_samples(starts, lengths, values.shape[0])
        return jax.ops.segment_sum(values, sample, num_segments=starts.shape[0] + 1)[:-1]

    sums = jax.vmap(of_shard)(sequence.values, sequence.starts, sequence.lengths)
    return sums.reshape(-1, *sums.shape[2:])


def take_places(sequence: Jagged, places: Int[Array, "P b k"]) -> Float[Array, "S k *rest"]:
    """Each sample's tokens at these places, counted from its oldest, of array values; 0 outside [0, length)."""

    def of_shard(values, starts, lengths, places):
        inside = (places >= 0) & (places < lengths[:, None])
        return values.at[jnp.where(inside, starts[:, None] + places, values.shape[0])].get(mode="fill", fill_value=0)

    taken = jax.vmap(of_shard)(sequence.values, sequence.starts, sequence.lengths, places)
    return taken.reshape(-1, *taken.shape[2:])


def prepend(tokens: Float[Array, "S n *rest"], sequence: Jagged) -> Jagged:
    """The sequences of array values with n tokens before each sample's own: capacity N + b·n, empty samples included.

    Repacked from the first sample to the last, whatever order and gaps there were; tokens of no sample become 0.
    """
    n, shards, per_shard = tokens.shape[1], *sequence.starts.shape
    capacity = sequence.values.shape[1] + per_shard * n
    tokens = tokens.reshape(shards, per_shard * n, *tokens.shape[2:]).astype(sequence.values.dtype)
    lengths = sequence.lengths + n
    starts = jnp.cumsum(lengths, axis=1) - lengths

    def of_shard(values, tokens, old, starts, lengths):
        sample = token_samples(starts, lengths, capacity)
        place = jnp.arange(capacity) - starts.at[sample].get(mode="fill", fill_value=0)
        kept = tokens.shape[0] + old.at[sample].get(mode="fill", fill_value=0) + place - n
        both = jnp.concatenate([tokens, values])
        row = jnp.where(place < n, sample * n + place, kept)
        return both.at[jnp.where(sample < per_shard, row, both.shape[0])].get(mode="fill", fill_value=0)

    values = jax.vmap(of_shard)(sequence.values, tokens, sequence.starts, starts, lengths)
    return Jagged(values, starts, lengths, sequence.max_length + n)


def over_shards(function: Callable, *args: Any) -> Any:
    """Apply a per-shard function to arrays with a leading shard axis P.

    The one place that knows how shards are run: alone without a batching rule, several by vmap. On a mesh every device
    sees its own shard alone, since the whole model runs inside `shard_map`.
    """
    if jax.tree.leaves(args)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], args)))
    return jax.vmap(function)(*args)


def to_padded(sequence: Jagged) -> tuple[Float[Array, "B T *rest"], Int[Array, "B T"]]:
    """The padded form [B, T_max, ...] of array values, zero where padded, and the 0/1 mask of real tokens.

    For references and ablations only: it is what this module exists to avoid.
    """

    def of_shard(values, starts, lengths):
        place = jnp.arange(sequence.max_length)
        real = place < lengths[:, None]
        index = jnp.where(real, starts[:, None] + place, values.shape[0])
        return values.at[index].get(mode="fill", fill_value=0), real.astype(jnp.int32)

    padded, real = jax.vmap(of_shard)(sequence.values, sequence.starts, sequence.lengths)
    return padded.reshape(-1, *padded.shape[2:]), real.reshape(-1, real.shape[-1])


def from_padded(padded: Float[Array, "B T *rest"], like: Jagged) -> Jagged:
    """Pack a padded array back into the layout of `like`; tokens of no sample become 0."""
    shards, capacity = jax.tree.leaves(like.values)[0].shape[:2]
    padded = padded.reshape(shards, -1, *padded.shape[1:])

    def of_shard(padded, starts, lengths):
        sample = token_samples(starts, lengths, capacity)
        place = jnp.arange(capacity) - starts.at[sample].get(mode="fill", fill_value=0)
        return padded.at[sample, place].get(mode="fill", fill_value=0)

    return like.with_values(jax.vmap(of_shard)(padded, like.starts, like.lengths))


# --- on the host: packing a batch ----------------------------------------------------------------------------------


def span_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The row numbers of the spans [start, start + length) of a flat store, one span after the other (int64)."""
    total = int(lengths.sum())
    packed = np.cumsum(lengths) - lengths
    return np.repeat(starts - packed, lengths) + np.arange(total)


def capacities(batch_size: int, max_length: int, fractions: Sequence[float] = CAPACITY_FRACTIONS) -> list[int]:
    """The capacities, in tokens of a shard, for a shard of `batch_size` samples; one per fraction.

    Raises:
      ValueError: the fractions don't rise from above 0 to 1.
    """
    if not fractions or fractions[0] <= 0 or fractions[-1] != 1 or list(fractions) != sorted(set(fractions)):
        raise ValueError(f"capacity fractions must rise from above 0 and end with 1, got {tuple(fractions)}")
    full = batch_size * max_length
    return [-(-int(np.ceil(f * full)) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE for f in fractions]


def choose_bucket(
    tokens: Mapping[str, int],
    batch_size: int,
    max_lengths: Mapping[str, int],
    fractions: Sequence[float] = CAPACITY_FRACTIONS,
) -> int:
    """One joint bucket for all event types: the smallest index whose capacities hold every type's fullest shard.

    Joint, because each combination of capacities is a compilation; on several processes all must agree on it before
    the step, or their programs differ and hang.

    Args:
      tokens: per event type, the tokens of the fullest shard.
      batch_size: samples per shard.
      max_lengths: per event type, the schema's maximum.
      fractions: the shares of the full size to choose from.
    """
    needed = 0
    for name, count in tokens.items():
        sizes = capacities(batch_size, max_lengths[name], fractions)
        if count > sizes[-1]:
            raise ValueError(f"event type {name!r}: {count} tokens exceed {batch_size} samples of {max_lengths[name]}")
        needed = max(needed, int(np.searchsorted(sizes, count)))
    return needed


def deal_to_shards(lengths: np.ndarray, shards: int) -> np.ndarray:
    """An order of the samples such that `shards` equal consecutive parts hold nearly equal numbers of tokens.

    Longest first, dealt forwards and backwards in turn (a snake).

    Raises:
      ValueError: the samples don't divide into `shards` parts.
    """
    if len(lengths) % shards:
        raise ValueError(f"{len(lengths)} samples don't divide over {shards} batch shards")
    if shards == 1:
        return np.arange(len(lengths))
    dealt = np.argsort(-lengths, kind="stable").reshape(-1, shards)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T.reshape(-1)


def pack(
    values: Mapping[str, np.ndarray],
    lengths: np.ndarray,
    *,
    capacity: int,
    shards: int,
    max_length: int,
    fill: Mapping[str, Any],
) -> Jagged:
    """Lay out samples, given one after the other, on `shards` shards of `capacity` tokens each.

    Args:
      values: per name, [tokens, ...]: the samples' tokens in order, without gaps.
      lengths: [B] tokens per sample, in the same order.
      fill: per name, what the unused tail of a shard holds.

    Raises:
      ValueError: the samples don't divide over the shards, a shard's tokens exceed `capacity`, or the lengths don't
        add up to the tokens given.
    """
    if len(lengths) % shards:
        raise ValueError(f"pack: {len(lengths)} samples don't divide over {shards} shards")
    lengths = np.asarray(lengths, np.int32).reshape(shards, -1)
    starts = (np.cumsum(lengths, axis=1) - lengths).astype(np.int32)
    tokens = lengths.sum(axis=1)
    if tokens.max(initial=0) > capacity:
        raise ValueError(f"pack: a shard holds {tokens.max()} tokens, its capacity is {capacity}")
    packed = {}
    for name, rows in values.items():
        if len(rows) != tokens.sum():
            raise ValueError(f"pack: {name!r} has {len(rows)} tokens, the lengths add up to {tokens.sum()}")
        out = np.full((shards, capacity, *rows.shape[1:]), fill[name], rows.dtype)
        for shard, part in enumerate(np.split(rows, np.cumsum(tokens)[:-1])):
            out[shard, : len(part)] = part
        packed[name] = out
    return Jagged(packed, starts, lengths, max_length)


def unpack(sequence: Jagged) -> Sequence[np.ndarray]:
    """The samples of array values as a list of [length, ...] arrays, in batch order: the inverse of packing."""
    values, starts, lengths = (np.asarray(x) for x in (sequence.values, sequence.starts, sequence.lengths))
    return [
        values[p, start : start + length]
        for p in range(values.shape[0])
        for start, length in zip(starts[p], lengths[p], strict=True)
    ]
