"""Sliding-window attention: values and gradients against float64, reach, isolation of samples, bad input."""

from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import packed_sliding_window_attention, sliding_window_attention
from pallas_kernels.sliding_window import reference, xla

N, B, T, D = 80, 5, 31, 8  # tokens, samples, longest sample, head width
WINDOWS = [(3, 5), (0, 0), (7, 0), (0, 40), (None, 2), (None, None)]


def draw_spans(rng, rows, samples, longest):
    """Spans in any order with gaps; lengths 0, 1 and odd ones come up often."""
    lengths = np.minimum(rng.choice([0, 1, 2, 7, 12, 17, longest], samples), longest)
    while lengths.sum() > rows:
        lengths[np.argmax(lengths)] //= 2
    gaps = rng.multinomial(rows - lengths.sum(), np.ones(samples + 1) / (samples + 1))
    order = rng.permutation(samples)
    starts = np.zeros(samples, np.int32)
    starts[order] = np.cumsum(lengths[order] + gaps[:-1]) - lengths[order]
    return starts, lengths.astype(np.int32)


def draw_operands(rng, heads=4, kv_heads=2, rows=N, width=D):
    shapes = dict(q=heads, k=kv_heads, v=kv_heads, dout=heads)
    x = {name: rng.normal(size=(rows, h, width)).astype(np.float32) for name, h in shapes.items()}
    x["angles"] = rng.uniform(-6, 6, size=(rows, width // 2)).astype(np.float32)
    return x


@lru_cache
def value_and_gradients(implementation, window, max_length=T):
    """A compiled function of one dict of operands and spans: out, dq, dk, dv by name."""

    def run(x, starts, lengths):
        def attend(q, k, v):
            return sliding_window_attention(
                q,
                k,
                v,
                starts=starts,
                lengths=lengths,
                max_length=max_length,
                window=window,
                angles=x.get("angles"),
                implementation=implementation,
            )

        out, pullback = jax.vjp(attend, x["q"], x["k"], x["v"])
        return dict(zip(("out", "dq", "dk", "dv"), (out, *pullback(x["dout"])), strict=True))

    return jax.jit(run)


def naive(x, starts, lengths, window):
    """Row by row in float64 NumPy, rotation by complex numbers: shares nothing with the implementations."""
    q, k, v = (np.asarray(x[name], np.float64) for name in "qkv")
    half = q.shape[2] // 2
    if "angles" in x:
        turn = np.exp(1j * np.asarray(x["angles"], np.float64))[:, None]
        q, k = (
            (np.concatenate([y.real, y.imag], -1))
            for y in ((z[..., :half] + 1j * z[..., half:]) * turn for z in (q, k))
        )
    left, right = (10**6 if side is None else side for side in window)
    out = np.zeros_like(q)
    for first, count in zip(starts, lengths, strict=True):
        for i in range(first, first + count):
            j = slice(max(first, i - left), min(first + count, i + right + 1))
            for h in range(q.shape[1]):
                kv = h * k.shape[1] // q.shape[1]
                s = k[j, kv] @ q[i, h] / np.sqrt(q.shape[2])
                p = np.exp(s - s.max())
                out[i, h] = p / p.sum() @ v[j, kv]
    return out


def worst(got, want, starts, lengths):
    """Maximum over (sample, head) of ‖got - want‖ / ‖want‖; the floor serves what vanishes (dq at length 1)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    errors = [0.0]
    for first, count in zip(starts, lengths, strict=True):
        g, w = got[first : first + count], want[first : first + count]
        scale = np.sqrt((w**2).sum((0, 2))) + 0.1 * np.sqrt(count * w.shape[2] + 1)
        errors += list(np.sqrt(((g - w) ** 2).sum((0, 2))) / scale)
    return np.max(errors)


def outside(rows, starts, lengths):
    free = np.ones(rows, bool)
    for first, count in zip(starts, lengths, strict=True):
        free[first : first + count] = False
    return free


def in_float64(window, x, starts, lengths, max_length=T):
    with jax.enable_x64(True):
        x = {name: jnp.asarray(y, y.dtype if name == "angles" else jnp.float64) for name, y in x.items()}
        got = value_and_gradients("reference", window, max_length)(x, jnp.asarray(starts), jnp.asarray(lengths))
    return jax.tree.map(np.asarray, got)


CASES = [((3, 5), 4, 2, True), ((0, 40), 4, 2, True), ((None, 2), 3, 3, True), ((None, None), 2, 1, False)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), case=st.sampled_from(CASES))
def test_equals_the_float64_reference(seed, case):
    window, heads, kv_heads, turned = case
    rng = np.random.default_rng(seed)
    starts, lengths = draw_spans(rng, N, B, T)
    x = draw_operands(rng, heads, kv_heads)
    if not turned:
        del x["angles"]
    want = in_float64(window, x, starts, lengths)
    got = value_and_gradients("xla", window)(x, starts, lengths)
    for name in want:
        assert worst(got[name], want[name], starts, lengths) < 1e-5, name
        assert not np.asarray(got[name])[outside(N, starts, lengths)].any(), name


@pytest.mark.parametrize("window", WINDOWS)
def test_both_implementations_equal_a_naive_loop(window):
    rng = np.random.default_rng(1)
    starts, lengths = draw_spans(rng, N, B, T)
    x = draw_operands(rng)
    want = naive(x, starts, lengths, window)
    for implementation in ("xla", "reference"):
        got = value_and_gradients(implementation, window)(x, starts, lengths)["out"]
        assert worst(got, want, starts, lengths) < 1e-6


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_packed_operands_give_the_same_and_one_gradient(implementation):
    rng = np.random.default_rng(3)
    starts, lengths = draw_spans(rng, N, B, T)
    x = draw_operands(rng, heads=2, kv_heads=2)
    want = value_and_gradients(implementation, (3, 5))(x, starts, lengths)
    static = dict(max_length=T, window=(3, 5), implementation=implementation)

    @jax.jit
    def run(qkv, dout):
        spans = dict(starts=starts, lengths=lengths, angles=x["angles"])
        out, pull = jax.vjp(lambda qkv: packed_sliding_window_attention(qkv, **spans, **static), qkv)
        return out, *pull(dout)

    out, gradient = run(np.concatenate([x[name] for name in "qkv"], 1), x["dout"])
    np.testing.assert_allclose(out, want["out"], rtol=1e-5, atol=1e-6)
    wanted = np.concatenate([want[f"d{name}"] for name in "qkv"], 1)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((9, 4, 8), "qkv has 4 heads of width 8; it holds 3 parts"), ((9, 8), r"qkv must have the axes \[N, heads, D\]")],
)
def test_packed_operands_that_cannot_be_cut_are_refused(shape, message):
    span = np.array([0], np.int32), np.array([9], np.int32)
    with pytest.raises(ValueError, match=message):
        packed_sliding_window_attention(np.zeros(shape, np.float32), starts=span[0], lengths=span[1], window=(1, 1))


def test_float64_operands_are_computed_in_float64():
    rng = np.random.default_rng(2)
    starts, lengths = draw_spans(rng, N, B, T)
    x = draw_operands(rng)
    want = in_float64((3, 5), x, starts, lengths)
    with jax.enable_x64(True):
        x64 = {name: jnp.asarray(y, y.dtype if name == "angles" else jnp.float64) for name, y in x.items()}
        got = value_and_gradients("xla", (3, 5))(x64, jnp.asarray(starts), jnp.asarray(lengths))
    for name in want:
        assert worst(got[name], want[name], starts, lengths) < 1e-13, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_the_reference_in_that_dtype(dtype):
    rng = np.random.default_rng(3)
    starts, lengths = np.array([40, 2], np.int32), np.array([31, 29], np.int32)
    x = draw_operands(rng, width=64)
    x = {name: y if name == "angles" else np.asarray(jnp.asarray(y, dtype)) for name, y in x.items()}
    want = in_float64((9, 6), x, starts, lengths)
    own = value_and_gradients("reference", (9, 6))(x, starts, lengths)
    got = value_and_gradients("xla", (9, 6))(x, starts, lengths)
    for name in want:
        assert got[name].dtype == dtype
        limit = 1.5 * worst(own[name], want[name], starts, lengths)
        assert worst(got[name], want[name], starts, lengths) <= limit, name


@pytest.mark.parametrize(
    "blocking", [xla.Blocking(1, 1), xla.Blocking(5, 3), xla.Blocking(16, 2), xla.Blocking(128, 1)]
)
def test_the_blocking_does_not_change_the_result(blocking):
    rng = np.random.default_rng(4)
    starts, lengths = draw_spans(rng, N, B, T)
    x = draw_operands(rng)
    args = x["q"], x["k"], x["v"], jnp.asarray(starts), jnp.asarray(lengths), None
    static = dict(max_length=T, left=6, right=3, scale=0.3)

    @partial(jax.jit, static_argnums=0)
    def run(blocking):
        attend = xla.sliding_window_attention if blocking else reference.sliding_window_attention
        more = dict(blocking=blocking) if blocking else {}
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, *args[3:], **static, **more), *args[:3])
        return out, *pullback(x["dout"])

    chex.assert_trees_all_close(run(blocking), run(None), atol=3e-6)


@pytest.mark.parametrize("window", [(3, 5), (0, 0), (4, 0), (None, 1), (None, None)])
def test_the_reach_is_the_window_inside_the_sample(window):
    rng = np.random.default_rng(5)
    starts, lengths = np.array([12, 1], np.int32), np.array([10, 9], np.int32)
    x = draw_operands(rng, 1, 1, rows=24)
    left, right = (24 if side is None else side for side in window)
    sample = np.full(24, -1)
    sample[12:22], sample[1:10] = 0, 1
    ahead = np.arange(24) - np.arange(24)[:, None]
    sees = (ahead >= -left) & (ahead <= right) & (sample[:, None] == sample) & (sample >= 0)

    def attend(q, k, v):
        return sliding_window_attention(q, k, v, starts=starts, lengths=lengths, window=window)[:, 0].sum(-1)

    dq, dk, dv = (np.abs(j).max((2, 3)) for j in jax.jacobian(attend, (0, 1, 2))(x["q"], x["k"], x["v"]))
    several = sees.sum(1) > 1  # one key alone has probability 1 whatever the score
    np.testing.assert_array_equal(dv > 0, sees)
    np.testing.assert_array_equal(dk > 1e-6, sees & several[:, None])
    np.testing.assert_array_equal(dq > 1e-6, np.diag(several))
    assert not dk[~sees].any()
    assert not dq[~np.eye(24, dtype=bool)].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["q", "k", "v", "dout", "angles"])
def test_poison_stays_where_it_is(operand, poison):
    """NaN or Inf in the rows of no sample reaches nothing; in one sample it reaches no other, and is not hidden."""
    rng = np.random.default_rng(6)
    starts, lengths = np.array([45, 3, 33, 20], np.int32), np.array([19, 17, 12, 9], np.int32)
    clean = draw_operands(rng)
    run = value_and_gradients("xla", (4, 6))
    want = run(clean, starts, lengths)
    dirty = {**clean, operand: clean[operand].copy()}
    dirty[operand][outside(N, starts, lengths)] = poison
    chex.assert_trees_all_equal(run(dirty, starts, lengths), want)

    dirty[operand][33:45] = poison  # sample 2, with neighbours on both sides that touch it
    got = run(dirty, starts, lengths)
    others = np.r_[0:33, 45:N]
    chex.assert_trees_all_equal({k: v[others] for k, v in got.items()}, {k: v[others] for k, v in want.items()})
    seen = ("dq", "dk", "dv") if operand == "dout" else ("out", "dq", "dk", "dv")
    for name in seen:
        assert np.isnan(got[name][33:45]).all(), name


def test_a_nan_reaches_exactly_the_rows_that_see_it():
    rng = np.random.default_rng(7)
    x = draw_operands(rng, 2, 2)
    x["v"][40, 1, 3] = np.nan
    got = value_and_gradients("xla", (4, 6), N)(x, np.array([0], np.int32), np.array([N], np.int32))
    hit = np.zeros((N, 2), bool)
    hit[34:45, 1] = True  # i - 4 <= 40 <= i + 6, in the same head
    np.testing.assert_array_equal(np.isnan(got["out"]).any(-1), hit)


def test_an_unbounded_window_ignores_how_far_the_array_goes():
    rng = np.random.default_rng(8)
    starts, lengths = draw_spans(rng, N, B, T)
    x = draw_operands(rng)
    full = value_and_gradients("xla", (None, None))(x, starts, lengths)
    wide = value_and_gradients("xla", (T - 1, 10**9))(x, starts, lengths)
    chex.assert_trees_all_equal(full, wide)


def test_shifting_all_angles_of_a_sample_changes_nothing():
    rng = np.random.default_rng(9)
    starts, lengths = np.array([5, 40], np.int32), np.array([30, 31], np.int32)
    x = draw_operands(rng)
    moved = {**x, "angles": x["angles"] + np.where(np.arange(N) < 38, 1.5, -0.7).astype(np.float32)[:, None]}
    run = value_and_gradients("xla", (8, 8))
    a, b = run(x, starts, lengths), run(moved, starts, lengths)
    chex.assert_trees_all_close(a, b, atol=2e-5)
    still = run({k: v for k, v in x.items() if k != "angles"}, starts, lengths)
    assert worst(a["out"], still["out"], starts, lengths) > 0.05


def test_angles_get_no_gradient():
    x = draw_operands(np.random.default_rng(10))
    spans = dict(starts=np.array([0]), lengths=np.array([30]), window=(5, 5))

    @jax.jit
    def loss(angles):
        return jnp.sum(x["dout"] * sliding_window_attention(x["q"], x["k"], x["v"], angles=angles, **spans))

    assert not jax.grad(loss)(x["angles"]).any()


def joined(how, trees):
    return jax.tree.map(lambda *x: how(x), *trees)


def test_under_vmap():
    rng = np.random.default_rng(11)
    spans = [draw_spans(rng, N, B, T) for _ in range(3)]
    spans[1] = (spans[1][0], np.zeros_like(spans[1][1]))  # members with different numbers of live blocks
    xs = [draw_operands(rng) for _ in range(3)]
    run = value_and_gradients("xla", (3, 5))
    want = [run(x, *s) for x, s in zip(xs, spans, strict=True)]
    got = jax.vmap(run)(joined(jnp.stack, xs), *joined(jnp.stack, spans))
    chex.assert_trees_all_close(got, joined(jnp.stack, want), atol=3e-6)


def test_under_shard_map_with_local_starts():
    assert jax.device_count() >= 4, "tests/conftest.py simulates the devices"
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(12)
    spans = [draw_spans(rng, N, B, T) for _ in range(4)]
    xs = [draw_operands(rng) for _ in range(4)]
    run = value_and_gradients("xla", (3, 5))
    want = [run(x, *s) for x, s in zip(xs, spans, strict=True)]
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    got = sharded(joined(jnp.concatenate, xs), *joined(jnp.concatenate, spans))
    chex.assert_trees_all_close(got, joined(jnp.concatenate, want), atol=3e-6)


def test_memory_is_linear_in_the_tokens():
    def temporaries(rows):
        x = jax.ShapeDtypeStruct((rows, 2, 16), jnp.float32)
        span = jax.ShapeDtypeStruct((1,), jnp.int32)

        def loss(q, k, v, starts, lengths):
            return sliding_window_attention(q, k, v, starts=starts, lengths=lengths, window=(16, 16)).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, span, span).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    operand, small = 16384 * 2 * 16 * 4, temporaries(16384)
    assert small < 20 * operand + 2**24  # scores of all pairs would take 2 GB
    assert temporaries(32768) - small < 20 * operand


def test_the_reference_does_no_product_too_many():
    B, T, H, D = 2, 64, 2, 128
    x = jax.ShapeDtypeStruct((B * T, H, D), jnp.float32)
    span = jax.ShapeDtypeStruct((B,), jnp.int32)
    run = partial(reference.sliding_window_attention, angles=None, max_length=T, left=T, right=T, scale=1.0)
    flops = jax.jit(run).lower(x, x, x, span, span).cost_analysis()["flops"]
    products = 2 * (2 * B * H * T * T * D)
    assert products < flops < 1.05 * products  # the rest is the softmax


def test_no_tokens_give_no_rows():
    x = jnp.zeros((0, 2, 4))
    out = sliding_window_attention(x, x, x, starts=np.array([0]), lengths=np.array([0]), window=(1, 1))
    assert out.shape == (0, 2, 4)


def call(**changes):
    q = jnp.zeros((20, 4, 8))
    k = jnp.zeros((20, 2, 8))
    arguments = dict(q=q, k=k, v=k, starts=np.array([0, 12]), lengths=np.array([12, 8]), window=(2, 2)) | changes
    q, k, v = (arguments.pop(name) for name in "qkv")
    return sliding_window_attention(q, k, v, **arguments)


zeros = jnp.zeros


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=zeros((20, 8))), r"q must have the axes \[rows, H, D\], got shape \(20, 8\)"),
        (dict(k=zeros((20, 8)), v=zeros((20, 8))), r"k must have the axes \[N, Hkv, D\]"),
        (dict(v=zeros((20, 2, 4))), r"k and v must have the same shape, got \(20, 2, 8\) and \(20, 2, 4\)"),
        (dict(q=zeros((19, 4, 8))), "q has 19 rows, k and v have 20"),
        (dict(q=zeros((20, 4, 16))), "q has head width 16, k and v have 8"),
        (dict(q=zeros((20, 3, 8))), "q has 3 heads, which is not a positive multiple of the 2 heads"),
        (dict(q=zeros((20, 4, 8), jnp.bfloat16)), "q bfloat16, k float32, v float32"),
        (dict(zip("qkv", [zeros((20, 2, 8), jnp.int32)] * 3, strict=True)), "q int32"),
        (dict(starts=np.array([0.0, 12.0])), "starts must be int32, got float32"),
        (dict(lengths=np.array([[12, 8]])), r"lengths must have the axes \[B\], got shape \(1, 2\)"),
        (dict(lengths=np.array([12])), "must name the same samples, at least one; got 2 and 1"),
        (dict(starts=np.zeros(0, np.int32), lengths=np.zeros(0, np.int32)), "at least one; got 0 and 0"),
        (dict(starts=np.array([-1, 12])), r"starts\[0\] is -1, must be >= 0"),
        (dict(lengths=np.array([12, -8])), r"lengths\[1\] is -8, must be >= 0"),
        (dict(lengths=np.array([12, 9])), r"starts\[1\] 12 \+ lengths\[1\] 9 = 21 is beyond the array's 20 rows"),
        (dict(max_length=11), r"lengths\[0\] is 12, above max_length 11"),
        (dict(lengths=np.array([13, 8])), r"samples 0 and 1 overlap: rows \[0, 13\) and \[12, 20\)"),
        (dict(max_length=-1), "max_length must be an int >= 0, got -1"),
        (dict(max_length=12.0), "max_length must be a static int, got 12.0"),
        (dict(window=3), r"window must be a tuple \(left, right\), got 3"),
        (dict(window=(1, 2, 3)), "window must be a tuple"),
        (dict(window=(-1, 2)), r"window\[0\] must be an int >= 0, got -1"),
        (dict(window=(1, -2)), r"window\[1\] must be an int >= 0, got -2"),
        (dict(window=(1, 2.5)), r"window\[1\] must be a static int, got 2.5"),
        (dict(scale=0.0), "scale must be a positive finite number, got 0.0"),
        (dict(scale=-1.0), "scale must be a positive finite number, got -1.0"),
        (dict(scale=float("inf")), "scale must be a positive finite number, got inf"),
        (
            dict(angles=zeros((19, 4))),
            r"angles must be float32 \[N, D/2\] with an even D, here \[20, 4\]; got float32 \[19, 4\]",
        ),
        (dict(angles=zeros((20, 8))), r"got float32 \[20, 8\]"),
        (dict(angles=zeros((20, 4), jnp.bfloat16)), r"got bfloat16 \[20, 4\]"),
        (dict(implementation="mosaics"), "implementation='mosaics' is unknown; there are .*xla, reference"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_a_traced_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be a static number, got a traced value"):
        jax.jit(lambda s: call(scale=s))(1.0)


@pytest.mark.parametrize("numbers", [(0, 4), (4, 0)])
def test_bad_blocking(numbers):
    with pytest.raises(ValueError, match=f"rows and tiles must be positive, got {numbers[0]} and {numbers[1]}"):
        xla.Blocking(*numbers)
