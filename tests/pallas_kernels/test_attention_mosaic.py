"""The Hopper kernels of sliding-window and seed attention without a GPU: tables, interpret mode with race detection,
lowering for sm_90."""

import functools
import itertools

import interpreter
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import hopper, seed_attention, sliding_window_attention
from pallas_kernels.attention import rotary
from pallas_kernels.attention import tables as tables_module
from pallas_kernels.attention.backward_kv import dkv_scratch
from pallas_kernels.attention.backward_q import dq_scratch
from pallas_kernels.attention.common import blocks_seen, registers
from pallas_kernels.attention.forward import forward_scratch
from pallas_kernels.attention.tables import (
    BLOCK,
    DealtWalk,
    EmptySamples,
    Place,
    RangeGaps,
    RangeWalk,
    SpanGaps,
    Spans,
    TileWalk,
    longest_first,
    ranges,
    window_reach,
)
from pallas_kernels.attention.work import SeedQueries
from pallas_kernels.seed_attention import mosaic as seed_mosaic
from pallas_kernels.seed_attention import reference as seed_reference
from pallas_kernels.sliding_window import mosaic as window_mosaic
from pallas_kernels.sliding_window import reference as window_reference
from pallas_kernels.sliding_window import xla as window_xla


@pytest.fixture(autouse=True)
def _patched_interpreter():
    interpreter.install()


# --- tables and walks


def draw_spans(rng, samples, longest):
    """Spans in any order with gaps; many are empty."""
    lengths = rng.integers(0, longest + 1, samples) * rng.integers(0, 2, samples)
    gaps = rng.integers(0, 5, samples)
    starts, order = np.cumsum(lengths + gaps) - lengths, rng.permutation(samples)
    rows = int(starts[-1] + lengths[-1]) + 3
    return *(jnp.asarray(x[order], jnp.int32) for x in (starts, lengths)), rows


def gaps_of(starts, lengths, rows):
    """[(row, rows)], are there any gaps; of spans read one by one."""

    @jax.jit
    def read(starts, lengths):
        gaps = SpanGaps(Spans(starts, lengths), rows)
        return lax.map(gaps.read, jnp.arange(gaps.count)), gaps.exist(0, 1)

    gaps, exist = read(starts, lengths)
    return list(zip(*(x.tolist() for x in gaps), strict=True)), bool(exist)


def places(walk):
    at = walk.first()
    while bool(walk.more(at)):
        yield jax.tree.map(int, walk.read(at))
        at = walk.next(at)


def tiles_of(spans, *, sms, **static):
    """The places of each block of the grid, [n, fields], as one program."""

    @jax.jit
    def run(sm):
        walk = TileWalk(spans, sm, sms=sms, **static)

        def step(state):
            at, n, found = state
            return walk.next(at), n + 1, found.at[n].set(jnp.stack([jnp.asarray(x) for x in walk.read(at)]))

        state = walk.first(), jnp.int32(0), jnp.zeros((500, 7), jnp.int32)
        return lax.while_loop(lambda state: walk.more(state[0]), step, state)[1:]

    for sm in range(sms):
        n, found = run(jnp.int32(sm))
        assert n < len(found)
        yield [Place(*map(int, x)) for x in found[:n]]


@pytest.mark.parametrize(
    ("heads", "sms", "runs", "reach"),
    [(2, 6, True, 3), (4, 12, False, 5), (3, 6, True, 3), (1, 7, True, None), (8, 12, True, 5)],
)
def test_every_row_of_every_head_is_walked_through_once(heads, sms, runs, reach):
    starts, lengths, rows = draw_spans(np.random.default_rng(heads), 20, 400)
    written = np.zeros((rows, heads), int)
    before = np.append(0, np.cumsum(-(-np.asarray(lengths) // BLOCK)))
    for mine in tiles_of(Spans(starts, lengths), heads=heads, sms=sms, blocks=3, reach=reach, runs=runs):
        for place in mine:
            assert (place.start, place.length) == (int(starts[place.sample]), int(lengths[place.sample]))
            assert place.before == before[place.sample]
            assert 1 <= place.blocks <= 3
            first = place.block * BLOCK
            end = min(place.length, first + place.blocks * BLOCK)
            written[place.start + first : place.start + end, place.head] += 1
    for row, count in gaps_of(starts, lengths, rows)[0]:
        written[row : row + count] += 1
    assert (written == 1).all()
    assert before[-1] * BLOCK <= tables_module.statistics_rows(rows, starts.size)


def test_runs_have_near_equal_cost(monkeypatch):
    monkeypatch.setattr(tables_module, "LANES", 10**6)  # vectors need a kernel
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1025, 200)
    starts, reach = np.cumsum(lengths) - lengths, window_reach(100, 100)
    spans = Spans(*(jnp.asarray(x, jnp.int32) for x in (starts, lengths)))
    sums = []
    for mine in tiles_of(spans, heads=1, sms=33, blocks=3, reach=reach, runs=True):
        sums.append(sum(p.blocks * (min(-(-p.length // BLOCK), reach) + 2) for p in mine))
    assert max(sums) <= 1.02 * np.mean(sums)


def test_members_of_a_team_get_small_tiles_by_turns():
    """Samples of 16 BLOCKs are cut into six tiles, the last two smaller; without changing places: 36, 36 and 24."""
    lengths = jnp.full(64, 1024, jnp.int32)
    spans = Spans(jnp.arange(64, dtype=jnp.int32) * 1024, lengths)
    sums = [sum(p.blocks for p in x) for x in tiles_of(spans, heads=1, sms=33, blocks=3, reach=5, runs=False)]
    assert max(sums) <= np.mean(sums) + 3


def test_no_samples_have_rows():
    zero = jnp.zeros(3, jnp.int32)
    spans = Spans(zero, zero)
    for runs in (True, False):
        assert not any(tiles_of(spans, heads=2, sms=4, blocks=2, reach=3, runs=runs))
    assert [count for _, count in gaps_of(zero, zero, 50)[0]] == [0, 0, 0, 50]


def test_samples_without_gaps():
    starts, lengths = jnp.array([5, 0, 0], jnp.int32), jnp.array([4, 5, 0], jnp.int32)
    assert not gaps_of(starts, lengths, 9)[1]


@pytest.mark.parametrize("samples", [5, 70])
def test_gaps_are_read_in_a_kernel(samples):
    """Few samples one by one, many as vectors."""
    starts, lengths, rows = draw_spans(np.random.default_rng(samples), samples, 9)

    def read(starts, lengths, out):
        gaps = SpanGaps(Spans(starts, lengths), rows)

        def one(i, _):
            out[0, i], out[1, i] = gaps.read(i)

        lax.fori_loop(0, gaps.count, one, None)
        out[0, gaps.count] = jnp.where(gaps.exist(0, 1), 1, 0)

    shape = jax.ShapeDtypeStruct((2, samples + 2), jnp.int32)
    kernel = plgpu.kernel(read, out_type=shape, grid=(1,), grid_names=("one",), interpret=interpreter.RACES)
    found = np.asarray(kernel(starts, lengths))
    used = np.zeros(rows, bool)
    for start, length in zip(starts, lengths, strict=True):
        used[start : start + length] = True
    for row, count in found[:, : samples + 1].T:
        assert not used[row : row + count].any()
        used[row : row + count] = True
    assert used.all()
    assert found[0, -1] == 1


@pytest.mark.parametrize(("heads", "sms", "pairwise"), [(2, 3, True), (3, 6, False), (4, 2, True)])
def test_every_row_is_walked_through_once_by_tables(heads, sms, pairwise, monkeypatch):
    if not pairwise:
        monkeypatch.setattr(tables_module, "PAIRWISE", 0)
    starts, lengths, rows = draw_spans(np.random.default_rng(heads), 9, 400)
    shares = jax.jit(functools.partial(ranges, rows=rows, heads=heads, reach=3, sms=sms))(starts, lengths)
    assert (np.diff(np.asarray(shares.before)) == -(-np.asarray(lengths) // BLOCK)).all()
    written = np.zeros((rows, heads), int)
    for sm in range(sms):
        for place in places(RangeWalk(shares, jnp.int32(sm), heads=heads, sms=sms, blocks=3)):
            assert (place.start, place.length) == (int(starts[place.sample]), int(lengths[place.sample]))
            assert 1 <= place.blocks <= 3
            first = place.block * BLOCK
            end = min(place.length, first + place.blocks * BLOCK)
            written[place.start + first : place.start + end, place.head] += 1
    gaps = RangeGaps(shares, rows)
    assert gaps.exist(0, 1)
    for gap in range(gaps.count):
        row, count = map(int, gaps.read(gap))
        written[row : row + count] += 1
    assert (written == 1).all()


def test_samples_are_dealt_longest_first_and_once():
    lengths = np.array([5, 0, 9, 300, 0, 7])
    samples = longest_first(jnp.arange(6, dtype=jnp.int32), jnp.asarray(lengths, jnp.int32))
    seen = []
    for worker in range(3):
        walk = DealtWalk(samples, jnp.int32(worker), heads=2, tiles=2, workers=3)
        mine = list(places(walk))
        assert all(a.length >= b.length for a, b in itertools.pairwise(mine))
        seen += [(p.sample, p.head, p.tile) for p in mine]
    assert sorted(seen) == [(s, h, t) for s in (0, 2, 3, 5) for h in range(2) for t in range(2)]


def test_empty_samples_are_the_gaps_of_the_pooled_rows():
    samples = longest_first(jnp.zeros(3, jnp.int32), jnp.array([4, 0, 2], jnp.int32))
    gaps = SeedQueries(seeds=100, samples=3).gaps(samples)
    assert isinstance(gaps, EmptySamples)
    assert gaps.exist(0, 1)
    assert [tuple(map(int, gaps.read(i))) for i in range(4)] == [(0, 0), (100, 100), (200, 0), (300, 0)]


@settings(max_examples=200, deadline=None)
@given(
    first=st.integers(0, 300),
    rows=st.integers(1, 192),
    others=st.integers(1, 500),
    before=st.none() | st.integers(0, 200),
    after=st.none() | st.integers(0, 200),
    earlier=st.none() | st.integers(0, 192),
)
def test_blocks_seen_are_those_that_meet(first, rows, others, before, after, earlier):
    """Blocks begin with the sample, or with the first row that an earlier row of the same tile meets."""
    origin = 0 if before is None or earlier is None else max(0, first - earlier - before)
    begin, end = map(int, blocks_seen(jnp.int32(first), rows, others, before, after, origin))
    i, j = np.arange(first, first + rows)[:, None], np.arange(others)
    meet = np.ones((rows, others), bool)
    if before is not None:
        meet &= j >= i - before
    if after is not None:
        meet &= j <= i + after
    seen = (np.flatnonzero(meet.any(0)) - origin) // BLOCK
    if seen.size:
        assert begin <= seen[0]
        assert end > seen[-1]


# --- shared memory, lowering


@pytest.mark.parametrize("window", [(None, None), (100, 100), (100, 0)])
@pytest.mark.parametrize("width", [64, 128])
def test_shared_memory_and_registers_suffice(width, window):
    panels = width // hopper.PANEL
    static = dict(dtype=jnp.bfloat16, panels=panels, interpret=None)
    warpgroups = window_mosaic.forward_warpgroups(width, *window)
    scratches = [forward_scratch(warpgroups=warpgroups, **static), dq_scratch(**static), dkv_scratch(**static)]
    assert all(hopper.shared_bytes(s) <= hopper.SHARED_MEMORY for s in scratches)
    # What the accumulators of scores and result take, and half of the scores again as probabilities, is not all.
    assert registers(warpgroups)[0] > 80 + 32 * (panels - 1)


@pytest.mark.parametrize("warpgroups", [2, 3, 4])
def test_registers_are_moved_and_not_made(warpgroups):
    compute, memory = registers(warpgroups)
    at_start = 65536 // (128 * (warpgroups + 1)) // 8 * 8
    assert warpgroups * compute + memory <= (warpgroups + 1) * at_start
    assert compute % 8 == memory % 8 == 0


@pytest.mark.parametrize(
    ("window", "width", "heads", "kv_heads", "rotated"),
    [
        ((None, None), 64, 8, 2, None),
        ((100, 0), 128, 4, 2, "before"),
        ((100, 100), 128, 2, 2, "packed"),
        ((None, 7), 64, 8, 8, None),
    ],
)
def test_window_kernels_are_lowered(window, width, heads, kv_heads, rotated):
    """Packed ones inside shard_map, where JAX has no references: there the rotated heads are an array of their own."""
    dtype = jnp.bfloat16 if window[0] else jnp.float16
    rows, shards = 3008, 2 if rotated == "packed" else 1
    q, k = (jax.ShapeDtypeStruct((shards * rows, h, width), dtype) for h in (heads, kv_heads))
    span, angles = (
        jax.ShapeDtypeStruct((shards * n, *rest), dtype)
        for n, rest, dtype in ((5, (), jnp.int32), (rows, (width // 2,), jnp.float32))
    )
    left, right = (2999 if side is None else side for side in window)

    def f(q, k, v, starts, lengths, angles):
        def attend(*x):
            static = dict(max_length=3000, left=left, right=right, scale=0.1, sms=132)
            if rotated == "packed":
                return window_mosaic.mosaic_gpu_packed(jnp.concatenate(x, 1), starts, lengths, angles, **static)
            return window_mosaic.mosaic_gpu(*x, starts, lengths, angles if rotated else None, **static)

        out, pull = jax.vjp(attend, q, k, v)
        return pull(out)

    if shards > 1:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:shards]), ("data",))
        f = jax.shard_map(f, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    text = interpreter.lower_for_hopper(f, q, k, k, span, span, angles)
    assert text.count("mosaic_gpu_v2") >= (4 if rotated == "packed" else 3)


@pytest.mark.parametrize(("width", "seeds", "packed"), [(128, 256, False), (64, 40, True)])
def test_seed_kernels_are_lowered(width, seeds, packed):
    q, k = jax.ShapeDtypeStruct((seeds, 4, width), jnp.bfloat16), jax.ShapeDtypeStruct((3000, 2, width), jnp.bfloat16)
    span = jax.ShapeDtypeStruct((5,), jnp.int32)

    def f(q, k, v, starts, lengths):
        def attend(q, *kv):
            run = seed_mosaic.mosaic_gpu_packed if packed else seed_mosaic.mosaic_gpu
            kv = [jnp.concatenate(kv, 1)] if packed else kv
            return run(q, *kv, starts, lengths, max_length=3000, scale=0.1, sms=132)

        out, pull = jax.vjp(attend, q, k, v)
        return pull(out)

    assert interpreter.lower_for_hopper(f, q, k, k, span, span).count("mosaic_gpu_v2") >= 3


@pytest.mark.parametrize("turned", [False, True])
def test_packed_operands_are_kept_once(turned):
    """Three ranges of heads of one array are one array: the estimate of a step's memory counts what is kept."""
    rows, heads, width = 3072, 2, 64
    shapes = [((rows, heads, width), jnp.bfloat16), ((rows, 3 * heads, width), jnp.bfloat16)]
    shapes += [((5,), jnp.int32), ((rows, width // 2), jnp.float32)]
    seeds, packed, span, angles = (jax.ShapeDtypeStruct(*x) for x in shapes)
    static = dict(max_length=3000, scale=0.1, sms=132)

    def kept(attend, *operands):
        leaves = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], *operands))
        return sum(x.shape == operands[-1].shape for x in leaves)

    def window(qkv):
        turns = jnp.zeros(angles.shape) if turned else None
        return window_mosaic.mosaic_gpu_packed(qkv, *spans, turns, left=100, right=100, **static)

    spans = (jnp.zeros(span.shape, span.dtype),) * 2
    assert kept(window, packed) == 1
    assert kept(lambda q, kv: seed_mosaic.mosaic_gpu_packed(q, kv, *spans, **static), seeds, packed) == 1


# --- the kernels, interpreted


def jagged(rng, lengths, heads, width, dtype):
    """Arrays whose rows outside the samples are NaN, a function that clears those, and spans in shuffled order."""
    lengths = np.asarray(lengths)
    starts = np.cumsum(lengths + 3) - lengths
    rows = max(int(starts[-1] + lengths[-1]) + 7, 128)
    used = np.zeros(rows, bool)
    for start, length in zip(starts, lengths, strict=True):
        used[start : start + length] = True
    arrays = [
        jnp.asarray(np.where(used[:, None, None], rng.normal(size=(rows, h, width)), np.nan), dtype) for h in heads
    ]
    order = rng.permutation(len(lengths))
    spans = [jnp.asarray(x[order], jnp.int32) for x in (starts, lengths)]
    return arrays, used, spans


def value_and_gradients(f, *operands, dout):
    out, pull = jax.vjp(f, *operands)
    return out, *pull(dout.astype(out.dtype))


def check(names, got, wanted, tolerance):
    for name, a, b in zip(names, got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


INTERPRETED = {  # lengths, window, heads, key heads, width, dtype, where q and k are rotated
    "two-sided, three tiles": ([131, 0, 1], (14, 10), 2, 1, 64, jnp.bfloat16, None),
    "everything ahead, D 128, f16, packed": ([65, 194], (0, None), 1, 1, 128, jnp.float16, "packed"),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_window_kernels_interpreted(name):
    """Wherever q and k are rotated, the kernels turn the gradients back. Packed ones are one array, as its gradient."""
    lengths, window, heads, kv_heads, width, dtype, rotated = INTERPRETED[name]
    rng = np.random.default_rng(0)
    (q, k, v, dout), used, spans = jagged(rng, lengths, (heads, kv_heads, kv_heads, heads), width, dtype)
    angles = rng.uniform(-1000, 1000, (len(used), width // 2)).astype(np.float32)
    poisoned, clean = (jnp.asarray(np.where(used[:, None], angles, np.float32(x))) for x in (np.nan, 0))
    longest = max(lengths)
    left, right = (longest - 1 if side is None else side for side in window)
    static = dict(max_length=longest, left=left, right=right, scale=width**-0.5)

    def run(*x):
        kernels = dict(sms=1 if width == 128 else 2, interpret=interpreter.RACES)
        if rotated == "packed":
            return window_mosaic.mosaic_gpu_packed(jnp.concatenate(x, 1), *spans, poisoned, **static, **kernels)
        return window_mosaic.mosaic_gpu(*x, *spans, poisoned if rotated else None, **static, **kernels)

    def reference(*x):
        return window_reference.sliding_window_attention(*x, *spans, clean if rotated else None, **static)

    got = value_and_gradients(run, q, k, v, dout=dout)
    wide = [jnp.where(used[:, None, None], x, 0).astype(jnp.float32) for x in (q, k, v, dout)]
    wanted = value_and_gradients(reference, *wide[:3], dout=wide[3])
    check(("out", "q", "k", "v"), got, wanted, 6e-3 if rotated else 4e-3)
    for name, x in zip(("out", "q", "k", "v"), got, strict=True):
        assert not np.asarray(x, np.float32)[~used].any(), name


def test_samples_of_one_length_interpreted():
    """Where they fill the rows, the whole grid is one team; the samples' tiles are no multiple of it.

    Nor are the rows one of the rotating pass's blocks, so XLA rotates the packed q and k.
    """
    samples, length, width, static = 3, 70, 128, dict(max_length=70, left=69, right=69, scale=0.1)
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=(samples * length, 1, width)), jnp.bfloat16) for _ in range(3)]
    starts = jnp.asarray(rng.permutation(samples) * length, jnp.int32)
    angles = jnp.asarray(rng.uniform(-9, 9, (samples * length, width // 2)), jnp.float32)
    spans = (starts, jnp.full(samples, length, jnp.int32), angles)
    assert samples * length % rotary.pass_rows(width)
    run = functools.partial(window_mosaic.mosaic_gpu_packed, sms=2, interpret=interpreter.RACES)
    got = run(jnp.concatenate(operands, 1), *spans, **static)
    wide = [x.astype(jnp.float32) for x in operands]
    check(["out"], [got], [window_reference.sliding_window_attention(*wide, *spans, **static)], 6e-3)


@pytest.mark.parametrize("width", [64, 128])
def test_pass_that_rotates_some_heads(width):
    rng = np.random.default_rng(0)
    rows, heads = 2 * rotary.pass_rows(width), 2
    x = jnp.asarray(rng.normal(size=(rows, 3, width)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(-1000, 1000, (rows, width // 2)), jnp.float32)
    got, others = rotary.rotate_pass(x, angles, heads=heads, interpret=interpreter.RACES)
    wanted = window_xla.rotated(jnp.zeros(1, jnp.int32), jnp.full(1, rows, jnp.int32), angles, x[:, :heads])[0]
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (got[:, :heads], wanted)), atol=1e-4, rtol=8e-3)
    np.testing.assert_array_equal(others[:, heads:], x[:, heads:])


def test_turns_are_exact_far_from_zero():
    angle = np.linspace(-20000, 20000, 4001).astype(np.float32)
    for got, wanted in zip(jax.jit(rotary._turns)(angle), (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(got, wanted(angle.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize(("seeds", "lengths", "width", "packed"), [(130, [66, 0], 64, True), (30, [5], 128, False)])
def test_seed_kernels_interpreted(seeds, lengths, width, packed):
    rng = np.random.default_rng(0)
    (k, v), used, spans = jagged(rng, lengths, (1, 1), width, jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(seeds, 2, width)), jnp.bfloat16)
    dout = jnp.asarray(rng.normal(size=(len(lengths), seeds, 2, width)), jnp.bfloat16)
    static = dict(max_length=max(lengths), scale=width**-0.5)

    def run(q, *kv):
        kernels = dict(sms=3, interpret=interpreter.RACES)
        if packed:
            return seed_mosaic.mosaic_gpu_packed(q, jnp.concatenate(kv, 1), *spans, **static, **kernels)
        return seed_mosaic.mosaic_gpu(q, *kv, *spans, **static, **kernels)

    got = value_and_gradients(run, q, k, v, dout=dout)
    wide = [q.astype(jnp.float32), *(jnp.where(used[:, None, None], x, 0).astype(jnp.float32) for x in (k, v))]
    wanted = value_and_gradients(
        lambda *x: seed_reference.seed_attention(*x, *spans, **static), *wide, dout=dout.astype(jnp.float32)
    )
    check(("out", "seeds", "k", "v"), got, wanted, 4e-3)
    for name, x in zip(("k", "v"), got[2:], strict=True):
        assert not np.asarray(x, np.float32)[~used].any(), name


# --- what the kernels refuse


def test_named_kernels_say_why_they_refuse():
    x, span = jnp.zeros((200, 1, 64), jnp.bfloat16), jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' can't run this call: needs an NVIDIA Hopper GPU"):
        sliding_window_attention(x, x, x, starts=span, lengths=span, window=(1, 1), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="'mosaic_gpu' can't run this call: needs an NVIDIA Hopper GPU"):
        seed_attention(x, x, x, starts=span, lengths=span, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=jnp.float32), "is float32, the kernels take bfloat16 and float16"),
        (dict(width=32), "has head width 32, the kernels have 64 and 128"),
        (dict(rows=100), "has 100 rows, the kernels copy boxes of 128"),
        (dict(), None),
    ],
)
def test_operands_that_the_kernels_refuse(change, reason, monkeypatch):
    monkeypatch.setattr(hopper, "unsupported_device", lambda: None)
    shape = dict(rows=200, width=64, dtype=jnp.bfloat16) | change
    x, span = jnp.zeros((shape["rows"], 1, shape["width"]), shape["dtype"]), jnp.zeros(1, jnp.int32)
    window = window_mosaic.unsupported(x, x, x, span, span, None)
    seeds = seed_mosaic.unsupported(x, x, x, span, span)
    if reason is None:
        assert window is None
        assert seeds is None
    else:
        assert reason in window
        assert reason in seeds
