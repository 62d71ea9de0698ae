"""The GDPA forward kernel without a GPU: schedule, tiles, interpret mode with race detection, lowering for sm_90."""

import sys

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.gdpa import mosaic, xla
from pallas_kernels.gdpa.activations import ACTIVATIONS
from pallas_kernels.gdpa.mosaic_forward import forward_scratch, gdpa_forward
from pallas_kernels.gdpa.tiles import ForwardTiles, forward_tiles
from pallas_kernels.schedule import (
    Tiling,
    Walk,
    dealt,
    dealt_item,
    make_line,
    make_schedule,
    pieces,
    row_fills,
    sort_descending,
)


@pytest.fixture(autouse=True)
def _patched_interpreter():
    interpreter.install()


# --- schedule


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("samples", "longest", "workers"), [(1, 700, 5), (9, 300, 4), (25, 40, 7), (5, 0, 3), (3, 200, 20)]
)
def test_a_line_gives_every_tile_to_one_worker_and_equal_shares(samples, longest, workers, many, monkeypatch):
    if many:  # the tables as for more samples than all pairs are compared of
        monkeypatch.setattr(sys.modules[make_line.__module__], "PAIRWISE", 0)
    rng = np.random.default_rng(samples)
    lengths, others = rng.integers(0, longest + 1, (2, samples))
    gaps = rng.integers(0, 3, samples)
    starts = np.cumsum(lengths + gaps) - lengths
    rows, heads, tiling = int(starts[-1] + lengths[-1]) + 70, 3, Tiling(64, 64)
    order = rng.permutation(samples)
    spans = (jnp.asarray(x[order], jnp.int32) for x in (starts, lengths, 1000 * np.arange(samples), others))
    line = make_line(*spans, tiling)
    owner, work, filled = np.full((rows, heads), -1), np.zeros(workers), np.zeros(rows, int)

    def fill(row, count):
        assert 0 < int(count) <= 16
        filled[int(row) : int(row + count)] += 1

    with jax.disable_jit():
        for worker in range(workers):
            walk = Walk(line, tiling, heads, workers, jnp.int32(worker))
            cursor, more = walk.first()
            while more:
                row, count, other_row, other_count, head = map(int, walk.item(cursor))
                sample = int(cursor.sample)
                assert count > 0
                assert other_count > 0
                assert (other_row, other_count) == (line.other_starts[sample], line.other_lengths[sample])
                first = row - int(line.starts[sample])
                assert first % tiling.rows == 0
                assert count % tiling.rows == 0 or first + count == line.lengths[sample]
                assert np.all(owner[row : row + count, head] == -1)
                owner[row : row + count, head] = worker
                work[worker] += -(-count // 64) * tiling.cost(other_count)
                cursor, more = walk.after(cursor)
            walk.fill_gaps(fill, rows, 16, worker, workers)
    wanted = np.zeros(rows, bool)
    for start, length, other in zip(starts, lengths, others, strict=True):
        wanted[start : start + length] = other > 0
    assert np.array_equal(owner >= 0, np.repeat(wanted[:, None], heads, 1))
    assert np.array_equal(filled, ~wanted)
    assert work.max() - work.min() <= 2 * max(tiling.cost(o) for o in [*others.tolist(), 1])


def test_items_are_sorted_and_complete():
    q_lengths, kv_lengths = np.array([5, 300, 0, 130, 7]), np.array([10, 100, 9, 0, 400])
    starts = np.cumsum(q_lengths) - q_lengths + 3
    args = (jnp.asarray(x, jnp.int32) for x in (starts, q_lengths, 100 * np.arange(5), kv_lengths))
    schedule = make_schedule(*args, rows=500, max_q_length=300, q_chunk=128)
    items = np.asarray(schedule.items)[: int(schedule.counts[0])]
    wanted = {(3, 5, 0, 10), (438, 7, 400, 400), (8, 128, 100, 100), (136, 128, 100, 100), (264, 44, 100, 100)}
    assert {tuple(map(int, x)) for x in items} == wanted
    cost = -(-items[:, 1] // 128) * -(-items[:, 3] // 64)
    assert np.all(np.diff(cost) <= 0)
    covered = np.zeros(500, int)
    for row, rows in np.asarray(schedule.fills):
        covered[row : row + rows] += 1
    for row, rows in items[:, :2]:
        covered[row : row + rows] += 1
    assert np.all(covered == 1)  # every row is written once: by an item or by a fill


@pytest.mark.parametrize("samples", [6, 5000])
def test_fills_and_sorting_of_few_and_many_samples(samples):
    rng = np.random.default_rng(0)
    lengths, gaps = rng.integers(0, 4, (2, samples))
    starts = np.cumsum(lengths + gaps) - lengths
    rows = int(starts[-1] + lengths[-1]) + 11
    order = rng.permutation(samples)
    starts, lengths = (jnp.asarray(x[order], jnp.int32) for x in (starts, lengths))
    covered = np.zeros(rows, int)
    for spans in (np.asarray(row_fills(starts, lengths, rows)), np.stack([starts, lengths], 1)):
        for row, count in spans:
            covered[row : row + count] += 1
    assert np.all(covered == 1)
    ordered = np.asarray(sort_descending(jnp.stack([lengths, starts]), lengths))
    assert np.array_equal(ordered[:, 1], np.asarray(starts)[np.argsort(-np.asarray(lengths), kind="stable")])
    _, row, count, live = pieces(starts, lengths, rows, 2)
    assert int(live) == int(np.sum(np.asarray(count) > 0)) == int(np.sum(-(-np.asarray(lengths) // 2)))
    assert int(count.sum()) == int(lengths.sum())
    assert int(row.min()) >= 0


@pytest.mark.parametrize(("total", "workers"), [(0, 3), (1, 3), (10, 3), (12, 4), (13, 4)])
def test_dealing_gives_every_item_to_one_worker(total, workers):
    got = [int(dealt_item(turn, workers, w)) for w in range(workers) for turn in range(int(dealt(total, workers, w)))]
    assert sorted(got) == list(range(total))


# --- tiles


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kv_block=96), "kv_block=96"),
        (dict(k_slots=0), "k_slots=0"),
        (dict(v_slots=17), "v_slots=17"),
        (dict(q_slots=0), "q_slots=0"),
        (dict(compute=3), "compute=3"),
    ],
)
def test_bad_tiles(changes, message):
    with pytest.raises(ValueError, match=message):
        ForwardTiles(**dict(kv_block=128, k_slots=2, v_slots=2, q_slots=2, resident=True) | changes)


def choices():
    """Every kind of configuration that the dispatcher can choose."""
    for width, kv in ((128, 64), (128, 128), (128, 256), (128, 1024), (64, 64), (64, 256), (64, 512), (64, 1024)):
        for samples in (2, 1152):
            yield width, kv, samples


@pytest.mark.parametrize(("width", "kv", "samples"), list(choices()))
def test_every_choice_fits_and_is_lowered(width, kv, samples):
    heads, lq = 4, 1024
    tiles = forward_tiles(width=width, max_kv_length=kv)
    scratch = forward_scratch(jnp.bfloat16, width // 64, tiles, interpret=None)
    assert hopper.shared_bytes(scratch) <= hopper.SHARED_MEMORY
    assert tiles.resident == (kv <= (256 if width == 128 else 512))
    if samples == 1152 and kv not in (64, 256, 1024):
        return  # the same kernel as a neighbour's
    dtype, activation = (
        (jnp.float16, ("gelu", "relu2", "silu", "hardswish"))
        if samples == 2
        else (jnp.bfloat16, ("gelu_tanh",) * heads)
    )
    spans = [jax.ShapeDtypeStruct((samples,), jnp.int32)] * 4
    q, k = (jax.ShapeDtypeStruct((samples * n, h, width), dtype) for n, h in ((lq, heads), (kv, 2)))

    def f(q, k, v, *spans):
        order = mosaic.forward_order(*spans, rows=q.shape[0], max_q_length=lq, tiles=tiles)
        return gdpa_forward(q, k, v, order, activation=activation, scale=1.0, post_scale=1.0, tiles=tiles, sms=132)

    assert "mosaic_gpu" in interpreter.lower_for_hopper(f, q, k, k, *spans)


def test_tiles_beyond_shared_memory_are_refused():
    x, spans = jnp.ones((128, 1, 128), jnp.bfloat16), [jnp.zeros(1, jnp.int32)] * 4
    tiles = ForwardTiles(kv_block=128, k_slots=3, v_slots=3, q_slots=2, resident=True)
    static = dict(activation=("relu",), scale=1.0, post_scale=1.0, sms=1, tiles=tiles)
    with pytest.raises(ValueError, match=r"takes \d+ bytes of shared memory, sm_90 has 232448"):
        gdpa_forward(x, x, x, make_line(*spans, tiles.tiling), **static)


# --- what the kernels refuse


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (jnp.ones((200, 1, 64), jnp.float32), "q is float32, the kernels take bfloat16 and float16"),
        (jnp.ones((200, 1, 32), jnp.bfloat16), "q has head width 32, the kernels have 64 and 128"),
        (jnp.ones((100, 1, 64), jnp.bfloat16), "q has 100 rows, the kernels copy boxes of 128"),
        (jnp.ones((200, 1, 64), jnp.float16), None),
    ],
)
def test_unsupported_operands(x, reason):
    assert hopper.unsupported_operands(q=x) == reason


def test_unsupported_device(monkeypatch):
    class Device:
        device_kind, compute_capability = "NVIDIA A100", "8.0"

    monkeypatch.setattr(hopper.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hopper.jax, "devices", lambda: [Device()])
    assert hopper.unsupported_device() == "needs compute capability 9.0 (Hopper), NVIDIA A100 has 8.0"
    Device.compute_capability = "9.0"
    assert hopper.unsupported_device() is None


# --- the kernel, interpreted


def batch(q_lengths, kv_lengths, *, heads, kv_heads, width, dtype):
    """Samples with gaps; all rows outside them are NaN."""
    rng = np.random.default_rng(0)

    def packed(lengths, gap, heads, copies):
        lengths = np.asarray(lengths)
        starts = gap + np.cumsum(lengths + gap) - lengths - gap
        arrays = [np.full((max(int(starts[-1] + lengths[-1]) + 7, 130), heads, width), np.nan) for _ in range(copies)]
        for x in arrays:
            for start, length in zip(starts, lengths, strict=True):
                x[start : start + length] = rng.standard_normal((length, heads, width))
        return starts, lengths, *(jnp.asarray(x, dtype) for x in arrays)

    q_starts, q_lengths, q, do = packed(q_lengths, 3, heads, 2)
    kv_starts, kv_lengths, k, v = packed(kv_lengths, 1, kv_heads, 2)
    order = rng.permutation(len(q_lengths))
    spans = tuple(jnp.asarray(x[order], jnp.int32) for x in (q_starts, q_lengths, kv_starts, kv_lengths))
    return (q, k, v, do), spans


CASES = {
    "resident": (
        64,
        jnp.bfloat16,
        dict(kv_block=128, k_slots=2, v_slots=2, resident=True),
        [131, 0, 70, 1],
        [128, 50, 0, 200],
    ),
    "wide": (128, jnp.bfloat16, dict(kv_block=64, k_slots=2, v_slots=2, resident=True), [260, 3], [33, 100]),
    "streamed": (
        64,
        jnp.bfloat16,
        dict(kv_block=64, k_slots=2, v_slots=2, resident=False),
        [131, 5, 70],
        [200, 50, 129],
    ),
    "float16": (64, jnp.float16, dict(kv_block=64, k_slots=3, v_slots=3, resident=True), [65, 128], [64, 130]),
    "one-block": (64, jnp.bfloat16, dict(kv_block=128, k_slots=2, v_slots=1, resident=True), [260, 5, 1], [128, 3, 77]),
}


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel(name):
    width, dtype, tiles, q_lengths, kv_lengths = CASES[name]
    tiles = ForwardTiles(q_slots=2, **tiles)
    (q, k, v, _), spans = batch(q_lengths, kv_lengths, heads=2, kv_heads=1, width=width, dtype=dtype)
    static = dict(activation=("gelu_tanh", "relu2"), scale=0.3, post_scale=0.7)
    order = mosaic.forward_order(*spans, rows=q.shape[0], max_q_length=max(q_lengths), tiles=tiles)
    out = gdpa_forward(q, k, v, order, **static, tiles=tiles, sms=3, interpret=interpreter.RACES)
    known = xla.Static(max(q_lengths), max(kv_lengths), *static.values())
    wanted = xla.forward(known, *(x.astype(jnp.float32) for x in (q, k, v)), *spans)
    narrow = xla.forward(known, q, k, v, *spans)
    out, wanted, narrow = (np.asarray(x, np.float32) for x in (out, wanted, narrow))
    outside = np.isnan(np.asarray(q, np.float32)).any((1, 2))
    assert not np.any(out[outside])
    for start, length in zip(*map(np.asarray, spans[:2]), strict=True):
        rows = slice(start, start + length)
        for head in range(2):
            error, allowed = (np.linalg.norm(x[rows, head] - wanted[rows, head]) for x in (out, narrow))
            assert error <= max(1.5 * allowed, 4e-3 * np.linalg.norm(wanted[rows, head])), (start, length, head)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_interpreted(name):
    (q, k, v, _), spans = batch([40], [30], heads=1, kv_heads=1, width=64, dtype=jnp.bfloat16)
    static = dict(activation=(name,), scale=0.3, post_scale=1.0)
    tiles = ForwardTiles(kv_block=64, k_slots=1, v_slots=1, q_slots=1, resident=True)
    line = make_line(*spans, tiles.tiling)
    out = gdpa_forward(q, k, v, line, **static, tiles=tiles, sms=1, interpret=interpreter.RACES)
    wanted = np.asarray(xla.forward(xla.Static(40, 30, *static.values()), q, k, v, *spans), np.float32)
    assert np.linalg.norm(np.asarray(out, np.float32) - wanted) <= 6e-3 * np.linalg.norm(wanted)


def test_value_and_gradients_through_both_kernels_and_shared_keys():
    operands, spans = batch([70, 0, 131], [128, 50, 77], heads=2, kv_heads=1, width=64, dtype=jnp.bfloat16)
    shared = (*spans[:2], *(jnp.broadcast_to(x[0], (3,)) for x in spans[2:]))
    for these in (spans, shared):
        static = dict(max_q_length=140, max_kv_length=128, activation=("gelu_tanh", "silu"), scale=0.2, post_scale=0.7)

        def run(f, these=these, static=static, **more):
            out, pull = jax.vjp(lambda *x: f(*x, *these, **static, **more), *operands[:3])
            return out, *pull(operands[3])

        got = run(mosaic.mosaic_gpu, shared_keys=these is shared, sms=2, interpret=interpreter.RACES)
        wanted = run(xla.xla)
        for name, a, b in zip(("out", "q", "k", "v"), got, wanted, strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.linalg.norm(a - b) <= 6e-3 * np.linalg.norm(b), name
