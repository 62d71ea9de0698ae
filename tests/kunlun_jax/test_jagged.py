"""Jagged sequences: packing and segments in any layout (empty samples, gaps, any order), buckets, checks."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kunlun_jax.jagged import (
    CAPACITY_FRACTIONS,
    CAPACITY_MULTIPLE,
    Jagged,
    capacities,
    choose_bucket,
    deal_to_shards,
    from_padded,
    later_events,
    over_shards,
    pack,
    positions,
    prepend,
    span_index,
    spread,
    sum_over_samples,
    take_places,
    to_padded,
    token_samples,
    unpack,
)

B, T, N = 5, 4, 26  # constant, so that each function is compiled once


@st.composite
def layouts(draw):
    """Spans of one shard in any order, with empty samples and with gaps before, between and after them."""
    lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    order = draw(st.permutations(range(B)))
    gaps = draw(st.lists(st.integers(0, 1), min_size=B, max_size=B))
    starts, at = [0] * B, 0
    for b, gap in zip(order, gaps, strict=True):
        starts[b] = at + gap
        at += gap + lengths[b]
    return np.array([starts], np.int32), np.array([lengths], np.int32)


# Where a search over `starts` fails: shuffled; an empty sample listed after the one with its start; a gap first.
HARD = [
    ([[8, 0, 4, 12, 16]], [[4, 4, 4, 4, 4]]),
    ([[0, 0, 0, 4, 4]], [[0, 4, 0, 4, 0]]),
    ([[3, 7, 7, 11, 26]], [[4, 0, 4, 1, 0]]),
    ([[0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0]]),
]


def in_any_layout(test):
    for starts, lengths in HARD:
        test = example((np.array(starts, np.int32), np.array(lengths, np.int32)))(test)
    return settings(deadline=None, max_examples=60)(given(layouts())(test))


def naive(starts, lengths):
    """Sample and place of each token of one shard, b and 0 where there is none."""
    sample, place = np.full(N, B), np.zeros(N, int)
    for b in range(B):
        for t in range(lengths[b]):
            sample[starts[b] + t], place[starts[b] + t] = b, t
    return sample, place


@in_any_layout
def test_tokens_know_their_sample_and_place(layout):
    starts, lengths = layout
    sample, place = naive(starts[0], lengths[0])
    np.testing.assert_array_equal(jax.jit(token_samples, static_argnums=2)(starts[0], lengths[0], N), sample)
    sequence = Jagged({"x": np.zeros((1, N, 2)), "y": np.zeros((1, N))}, starts, lengths, T).check()
    np.testing.assert_array_equal(jax.jit(positions)(sequence)[0], place)
    later = np.where(sample < B, np.append(lengths[0], 0)[sample] - 1 - place, 0)
    np.testing.assert_array_equal(jax.jit(later_events)(sequence)[0], later)


@in_any_layout
def test_padding_and_packing_are_inverse_and_let_nothing_in_from_outside(layout):
    starts, lengths = layout
    sample, _ = naive(starts[0], lengths[0])
    values = np.arange(1, 2 * N + 1, dtype=np.float32).reshape(1, N, 2)
    values[0, sample == B] = np.nan
    sequence = Jagged(values, starts, lengths, T)
    padded, real = jax.jit(to_padded)(sequence)
    chex.assert_shape(padded, (B, T, 2))
    for b, tokens in enumerate(unpack(sequence)):
        np.testing.assert_array_equal(padded[b, : len(tokens)], tokens)
        np.testing.assert_array_equal(padded[b, len(tokens) :], 0)
        np.testing.assert_array_equal(real[b], np.arange(T) < len(tokens))
    again = jax.jit(from_padded)(padded, sequence)
    np.testing.assert_array_equal(again.values, np.nan_to_num(values))
    # The two are transposes of each other, so the gradient of one is the other.
    cotangent = np.random.default_rng(0).normal(size=(B, T, 2)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda v: jnp.vdot(to_padded(sequence.with_values(v))[0], cotangent)))(values)
    np.testing.assert_array_equal(gradient, jax.jit(from_padded)(cotangent, sequence).values)


CLS = np.arange(-2 * B * 2, 0, dtype=np.float32).reshape(B, 2, 2)
PLACES = np.array([[[0, 1, -1], [0, 3, 1], [2, 2, 0], [9, 0, 1], [1, 0, 3]]])


@jax.jit
def between_samples_and_tokens(sequence, rows):
    """Everything that moves values between samples and tokens, and the gradients of what reads tokens."""

    def read(values):
        filled = sequence.with_values(values)
        return sum_over_samples(filled), take_places(filled, PLACES), prepend(CLS, filled)

    out, pull = jax.vjp(lambda v: jax.tree.leaves(read(v))[:3], sequence.values)
    return spread(rows, sequence), read(sequence.values), pull([jnp.ones_like(x) for x in out])[0]


@in_any_layout
def test_values_move_between_samples_and_tokens(layout):
    starts, lengths = layout
    sample, place = naive(starts[0], lengths[0])
    values = np.arange(1, 2 * N + 1, dtype=np.float32).reshape(1, N, 2)
    values[0, sample == B] = np.nan
    sequence = Jagged(values, starts, lengths, T)
    rows = np.arange(1.0, B + 1, dtype=np.float32)[:, None]
    spread_rows, (sums, taken, longer), gradient = between_samples_and_tokens(sequence, rows)
    np.testing.assert_array_equal(spread_rows[0, :, 0], np.append(rows, 0)[sample])
    longer = Jagged(np.asarray(longer.values), *map(np.asarray, (longer.starts, longer.lengths)), longer.max_length)
    assert longer.check().max_length == T + 2
    assert np.isfinite(longer.values).all()
    uses = np.zeros(N)
    for b, (own, extended) in enumerate(zip(unpack(sequence), unpack(longer), strict=True)):
        np.testing.assert_array_equal(sums[b], own.sum(axis=0))
        np.testing.assert_array_equal(extended, np.concatenate([CLS[b], own]))
        for k, at in enumerate(PLACES[0, b]):
            inside = 0 <= at < len(own)
            np.testing.assert_array_equal(taken[b, k], own[at] if inside else [0, 0])
            uses[starts[0, b] + at if inside else 0] += inside
    # each token of a sample is summed once, prepended to once, and taken as often as its place is named
    np.testing.assert_array_equal(gradient[0, :, 0], np.where(sample < B, 2 + uses, 0))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 3), st.integers(0, 5))
def test_packing_and_unpacking_are_inverse(of_sample, shards, spare):
    lengths = np.array(of_sample * shards)
    x, ids = np.random.default_rng(0).normal(size=(lengths.sum(), 2)), np.arange(lengths.sum(), dtype=np.int32)
    capacity = int(sum(of_sample)) + spare
    sequence = pack(
        {"x": x, "id": ids}, lengths, capacity=capacity, shards=shards, max_length=6, fill={"x": 0, "id": -7}
    ).check()
    chex.assert_shape(sequence.values["x"], (shards, capacity, 2))
    assert sequence.starts.dtype == sequence.lengths.dtype == np.int32
    for name, rows in (("x", x), ("id", ids)):
        found = unpack(sequence.with_values(sequence.values[name]))
        assert len(found) == len(lengths)
        for tokens, expected in zip(found, np.split(rows, np.cumsum(lengths)[:-1]), strict=True):
            np.testing.assert_array_equal(tokens, expected)
        assert sequence.values[name].dtype == rows.dtype
    np.testing.assert_array_equal(sequence.values["id"][:, sum(of_sample) :], -7)
    assert set(np.unique(sequence.values["id"])) <= {-7, *ids.tolist()}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=8))
def test_span_index_lists_the_spans_rows(spans):
    starts, lengths = np.array([s for s, _ in spans], np.int64), np.array([n for _, n in spans], np.int64)
    expected = [i for s, n in spans for i in range(s, s + n)]
    np.testing.assert_array_equal(span_index(starts, lengths), expected)


# --- sizes and shards ----------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.integers(1, 300))
def test_capacities_are_whole_tiles_that_grow_to_hold_everything(batch_size, max_length):
    sizes = capacities(batch_size, max_length)
    assert len(sizes) == len(CAPACITY_FRACTIONS)
    assert sizes == sorted(sizes)
    assert all(size % CAPACITY_MULTIPLE == 0 for size in sizes)
    assert 0 <= sizes[-1] - batch_size * max_length < CAPACITY_MULTIPLE
    assert all(size >= f * batch_size * max_length for f, size in zip(CAPACITY_FRACTIONS, sizes, strict=True))


@given(st.integers(1, 300), st.data())
def test_the_bucket_is_the_smallest_that_holds_every_type(batch_size, data):
    longest = {"a": data.draw(st.integers(1, 200)), "b": data.draw(st.integers(1, 200))}
    tokens = {name: data.draw(st.integers(0, batch_size * length)) for name, length in longest.items()}
    bucket = choose_bucket(tokens, batch_size, longest)

    def fits(index):
        return all(tokens[name] <= capacities(batch_size, longest[name])[index] for name in tokens)

    assert fits(bucket)
    assert bucket == 0 or not fits(bucket - 1)


def test_more_tokens_than_samples_can_have_raise():
    with pytest.raises(ValueError, match="event type 'click': 900 tokens exceed 4 samples of 200"):
        choose_bucket({"view": 3, "click": 900}, 4, {"view": 200, "click": 200})


@given(st.integers(1, 4), st.integers(1, 16), st.data())
def test_dealing_permutes_and_balances(shards, per_shard, data):
    count = shards * per_shard
    lengths = np.array(data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count)))
    order = deal_to_shards(lengths, shards)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    tokens = lengths[order].reshape(shards, -1).sum(axis=1)
    assert tokens.max() - tokens.min() <= lengths.max()  # a snake is never further off than the longest sample


def test_dealing_goes_forwards_and_backwards():
    """Always forwards, the first shard would hold 20 of the 36 tokens."""
    lengths = np.array([3, 8, 1, 6, 2, 7, 4, 5])
    np.testing.assert_array_equal(lengths[deal_to_shards(lengths, 2)], [8, 5, 4, 1, 7, 6, 3, 2])


def test_one_shard_keeps_the_order_and_uneven_shards_raise():
    np.testing.assert_array_equal(deal_to_shards(np.array([3, 9, 1]), 1), [0, 1, 2])
    with pytest.raises(ValueError, match="7 samples don't divide over 2 batch shards"):
        deal_to_shards(np.arange(7), 2)


@pytest.mark.parametrize("shards", [1, 3])
def test_over_shards_runs_each_shard_alone(shards):
    rng = np.random.default_rng()
    x, w = rng.normal(size=(shards, 6, 2)), {"s": rng.normal(size=(shards, 2))}
    got = over_shards(lambda x, w: {"sum": x @ w["s"], "first": x[0]}, x, w)
    np.testing.assert_allclose(got["sum"], np.einsum("pnd,pd->pn", x, w["s"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["first"], x[:, 0], rtol=1e-6)


def test_shards_count_their_own_tokens():
    """Starts are local: the same layout on each of two shards gives the same answer on each."""
    starts, lengths = np.array([[5, 0], [0, 2]], np.int32), np.array([[3, 4], [2, 0]], np.int32)
    values = np.arange(2 * 9, dtype=np.float32).reshape(2, 9)
    sequence = Jagged(values, starts, lengths, T).check()
    np.testing.assert_array_equal(positions(sequence), [[0, 1, 2, 3, 0, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]])
    padded, _ = to_padded(sequence)
    np.testing.assert_array_equal(padded, [[5, 6, 7, 0], [0, 1, 2, 3], [9, 10, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(from_padded(padded, sequence).values[1], [9, 10] + [0] * 7)


# --- the container and its checks ----------------------------------------------------------------------------------

GOOD = Jagged(np.zeros((2, 8, 3)), np.array([[0, 4], [0, 0]], np.int32), np.array([[4, 4], [0, 2]], np.int32), T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": GOOD.starts[0]}, r"starts \(2,\) and lengths \(2, 2\) must both be \[P, B/P\]"),
        ({"starts": GOOD.starts[:, :1]}, r"starts \(2, 1\) and lengths \(2, 2\)"),
        ({"values": np.zeros((3, 8))}, r"values must all start with \[2, N\], got \[\(3, 8\)\]"),
        ({"values": {"a": np.zeros((2, 8)), "b": np.zeros((2, 7))}}, r"got \[\(2, 7\), \(2, 8\)\]"),
        ({"values": {}}, r"values must all start with \[2, N\], got \[\]"),
        ({"lengths": GOOD.lengths + 1}, r"lengths lie in \[1, 5\], allowed are \[0, 4\]"),
        ({"lengths": GOOD.lengths - 1}, r"lengths lie in \[-1, 3\]"),
        ({"starts": GOOD.starts + 1}, r"samples span tokens \[1, 9\) of a capacity of 8"),
        ({"starts": GOOD.starts - 1}, r"samples span tokens \[-1, 7\)"),
    ],
)
def test_each_check_trips(change, message):
    assert GOOD.check() is GOOD
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change).check()


def test_shapes_are_checked_while_tracing_too():
    jax.jit(lambda s: s.check().lengths)(GOOD)
    with pytest.raises(ValueError, match="must both be"):
        jax.jit(lambda s: s.check().lengths)(replace(GOOD, starts=GOOD.starts[0]))


def test_packing_checks_its_numbers():
    x, lengths = {"x": np.zeros((5, 2))}, np.array([2, 3])
    rest = {"max_length": T, "fill": {"x": 0}}
    with pytest.raises(ValueError, match="pack: a shard holds 5 tokens, its capacity is 4"):
        pack(x, lengths, capacity=4, shards=1, **rest)
    with pytest.raises(ValueError, match="pack: 'x' has 5 tokens, the lengths add up to 6"):
        pack(x, [*lengths, 0, 1], capacity=8, shards=1, **rest)
    with pytest.raises(ValueError, match="pack: 2 samples don't divide over 3 shards"):
        pack(x, lengths, capacity=8, shards=3, **rest)


def test_the_static_maximum_decides_about_tracing_and_the_layout_does_not():
    traces = []

    @jax.jit
    def total(sequence):
        traces.append(1)
        return sequence.values.sum()

    total(GOOD)
    total(replace(GOOD, starts=GOOD.starts[:, ::-1], lengths=GOOD.lengths[:, ::-1].astype(np.int64)))
    assert len(traces) == 1
    total(replace(GOOD, max_length=T + 1))
    assert len(traces) == 2


@pytest.mark.parametrize("fractions", [(), (0.0, 1.0), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0), (0.5,)])
def test_capacity_fractions_must_rise_to_one(fractions):
    with pytest.raises(ValueError, match="must rise from above 0 and end with 1"):
        capacities(4, 10, fractions)
