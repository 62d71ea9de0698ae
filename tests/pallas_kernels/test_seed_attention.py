"""Seed attention: values and gradients against float64, isolation of samples, empty samples, bad input."""

from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import packed_seed_attention, seed_attention
from pallas_kernels.seed_attention import reference, xla

N, B, T, S, D = 90, 6, 31, 5, 8  # tokens, samples, longest sample, seeds, head width


def draw_spans(rng, rows=N, samples=B, longest=T):
    """Spans in any order with gaps; lengths 0, 1 and odd ones come up often."""
    lengths = np.minimum(rng.choice([0, 1, 2, 7, 12, 17, longest], samples), longest)
    while lengths.sum() > rows:
        lengths[np.argmax(lengths)] //= 2
    gaps = rng.multinomial(rows - lengths.sum(), np.ones(samples + 1) / (samples + 1))
    order = rng.permutation(samples)
    starts = np.zeros(samples, np.int32)
    starts[order] = np.cumsum(lengths[order] + gaps[:-1]) - lengths[order]
    return starts, lengths.astype(np.int32)


def draw_operands(rng, heads=4, kv_heads=2, width=D):
    shapes = dict(seeds=(S, heads), k=(N, kv_heads), v=(N, kv_heads), dout=(B, S, heads))
    return {name: rng.normal(size=(*shape, width)).astype(np.float32) for name, shape in shapes.items()}


@lru_cache
def value_and_gradients(implementation, blocking=None):
    """A compiled function of one dict of operands and spans: out, dseeds, dk, dv by name."""

    def run(x, starts, lengths):
        def attend(seeds, k, v):
            if blocking:
                static = dict(max_length=T, scale=D**-0.5, blocking=blocking)
                return xla.seed_attention(seeds, k, v, starts, lengths, **static)
            spans = dict(starts=starts, lengths=lengths, max_length=T)
            return seed_attention(seeds, k, v, **spans, implementation=implementation)

        out, pullback = jax.vjp(attend, x["seeds"], x["k"], x["v"])
        return dict(zip(("out", "dseeds", "dk", "dv"), (out, *pullback(x["dout"])), strict=True))

    return jax.jit(run)


def naive(x, starts, lengths):
    """Sample by sample in float64 NumPy: shares nothing with the implementations."""
    seeds, k, v = (np.asarray(x[name], np.float64) for name in ("seeds", "k", "v"))
    out = np.zeros((len(starts), *seeds.shape))
    for b, (first, count) in enumerate(zip(starts, lengths, strict=True)):
        for h in range(seeds.shape[1] if count else 0):
            own = slice(first, first + count), h * k.shape[1] // seeds.shape[1]
            s = seeds[:, h] @ k[own].T / np.sqrt(k.shape[2])
            p = np.exp(s - s.max(1, keepdims=True))
            out[b, :, h] = p / p.sum(1, keepdims=True) @ v[own]
    return out


def error(got, want, heads_axis):
    """Maximum over heads of ‖got - want‖ / ‖want‖; the floor serves what vanishes (dk at length 1)."""
    got, want = (np.moveaxis(np.asarray(x, np.float64), heads_axis, 0) for x in (got, want))
    scale = np.sqrt((want**2).sum((1, 2))) + 0.1 * np.sqrt(want[0].size + 1)
    return np.max(np.sqrt(((got - want) ** 2).sum((1, 2))) / scale)


def worst(name, got, want, starts, lengths):
    """Maximum over (sample, head) where the array has samples, else over heads."""
    if name == "dseeds":
        return error(got, want, 1)
    if name == "out":
        return np.max([error(g, w, 1) for g, w in zip(got, want, strict=True)])  # not max, which loses a NaN
    spans = [slice(first, first + count) for first, count in zip(starts, lengths, strict=True) if count]
    return np.max([error(got[span], want[span], 1) for span in spans], initial=0.0)


def outside(starts, lengths):
    free = np.ones(N, bool)
    for first, count in zip(starts, lengths, strict=True):
        free[first : first + count] = False
    return free


def in_float64(implementation, x, starts, lengths):
    with jax.enable_x64(True):
        x = {name: jnp.asarray(y, jnp.float64) for name, y in x.items()}
        got = value_and_gradients(implementation)(x, jnp.asarray(starts), jnp.asarray(lengths))
    return jax.tree.map(np.asarray, got)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), heads=st.sampled_from([(4, 2), (3, 3)]))
def test_equals_the_float64_reference(seed, heads):
    rng = np.random.default_rng(seed)
    starts, lengths = draw_spans(rng)
    x = draw_operands(rng, *heads)
    want = in_float64("reference", x, starts, lengths)
    got = value_and_gradients("xla")(x, starts, lengths)
    for name in want:
        assert worst(name, got[name], want[name], starts, lengths) < 1e-5, name
    assert not np.asarray(got["out"])[lengths == 0].any()
    for name in ("dk", "dv"):
        assert not np.asarray(got[name])[outside(starts, lengths)].any(), name


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (2, 1)])
def test_both_implementations_equal_a_naive_loop(heads):
    rng = np.random.default_rng(1)
    starts, lengths = draw_spans(rng)
    x = draw_operands(rng, *heads)
    for implementation in ("xla", "reference"):
        got = value_and_gradients(implementation)(x, starts, lengths)["out"]
        assert worst("out", got, naive(x, starts, lengths), starts, lengths) < 1e-6


def test_float64_operands_are_computed_in_float64():
    rng = np.random.default_rng(2)
    starts, lengths = draw_spans(rng)
    x = draw_operands(rng)
    want, got = (in_float64(implementation, x, starts, lengths) for implementation in ("reference", "xla"))
    for name in want:
        assert worst(name, got[name], want[name], starts, lengths) < 1e-13, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_the_reference_in_that_dtype(dtype):
    rng = np.random.default_rng(3)
    starts, lengths = np.array([60, 2, 0, 1, 1, 31], np.int32), np.array([30, 29, 0, 1, 0, 28], np.int32)
    x = {name: np.asarray(jnp.asarray(y, dtype)) for name, y in draw_operands(rng, width=64).items()}
    want = in_float64("reference", x, starts, lengths)
    own, got = (value_and_gradients(implementation)(x, starts, lengths) for implementation in ("reference", "xla"))
    for name in want:
        assert got[name].dtype == dtype
        limit = 1.5 * worst(name, own[name], want[name], starts, lengths)
        assert worst(name, got[name], want[name], starts, lengths) <= limit, name


@pytest.mark.parametrize("blocking", [xla.Blocking(1, 1), xla.Blocking(4, 7), xla.Blocking(B, 64)])
def test_the_blocking_does_not_change_the_result(blocking):
    rng = np.random.default_rng(4)
    starts, lengths = draw_spans(rng)
    x = draw_operands(rng)
    want = value_and_gradients("reference")(x, starts, lengths)
    chex.assert_trees_all_close(value_and_gradients("xla", blocking)(x, starts, lengths), want, atol=5e-6)


def test_samples_do_not_mix():
    rng = np.random.default_rng(5)
    starts, lengths = np.array([40, 0, 8, 29, 55, 70], np.int32), np.array([11, 8, 20, 0, 1, 20], np.int32)
    x = draw_operands(rng, 1, 1)

    @jax.jit
    def total(k, v):  # [B]
        return seed_attention(x["seeds"], k, v, starts=starts, lengths=lengths).sum((1, 2, 3))

    dk, dv = (np.abs(j).max((2, 3)) for j in jax.jacobian(total, (0, 1))(x["k"], x["v"]))
    own = (np.arange(N) >= starts[:, None]) & (np.arange(N) < (starts + lengths)[:, None])
    np.testing.assert_array_equal(dv > 0, own)
    np.testing.assert_array_equal(dk > 1e-6, own & (lengths > 1)[:, None])
    assert not dk[~own].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["k", "v", "dout"])
def test_poison_stays_where_it_is(operand, poison):
    """NaN or Inf in the rows of no sample reaches nothing; in one sample it reaches no other, and is not hidden."""
    rng = np.random.default_rng(6)
    starts, lengths = np.array([50, 3, 33, 20, 70, 45], np.int32), np.array([19, 17, 12, 9, 20, 0], np.int32)
    clean = draw_operands(rng)
    run = value_and_gradients("xla", xla.Blocking(4, 8))
    want = run(clean, starts, lengths)
    dirty = {**clean, operand: clean[operand].copy()}
    if operand == "dout":
        dirty["dout"][5] = poison  # the empty sample's
    else:
        dirty[operand][outside(starts, lengths)] = poison
    chex.assert_trees_all_equal(run(dirty, starts, lengths), want)

    dirty[operand][2 if operand == "dout" else slice(33, 45)] = poison  # sample 2, with neighbours that touch it
    got = run(dirty, starts, lengths)
    rows, samples = np.r_[0:33, 45:N], np.r_[0:2, 3:B]
    chex.assert_trees_all_equal(got["out"][samples], want["out"][samples])
    for name in ("dk", "dv"):
        chex.assert_trees_all_equal(got[name][rows], want[name][rows])
    if np.isnan(poison):  # a key of -Inf is one of probability 0
        assert np.isnan(got["dk"][33:45]).all()
        assert np.isnan(got["dseeds"]).all()  # shared by all samples
        assert operand == "dout" or np.isnan(got["out"][2]).all()


def test_nothing_but_empty_samples():
    x = draw_operands(np.random.default_rng(7))
    starts = np.array([0, 5, N, 0, 3, 3], np.int32)
    got = value_and_gradients("xla")(x, starts, np.zeros(B, np.int32))
    for name, y in got.items():
        assert not np.asarray(y).any(), name


def test_no_tokens_at_all():
    k = jnp.zeros((0, 2, 4))
    out = seed_attention(jnp.ones((3, 2, 4)), k, k, starts=np.array([0, 0]), lengths=np.array([0, 0]))
    chex.assert_trees_all_equal(out, jnp.zeros((2, 3, 2, 4)))


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(8)
    starts, lengths = draw_spans(rng)
    x = draw_operands(rng)
    x["seeds"] *= 300
    got = value_and_gradients("xla", xla.Blocking(2, 4))(x, starts, lengths)
    chex.assert_tree_all_finite(got)
    assert worst("out", got["out"], naive(x, starts, lengths), starts, lengths) < 1e-4


def joined(how, trees):
    return jax.tree.map(lambda *x: how(x), *trees)


def test_under_vmap():
    rng = np.random.default_rng(9)
    spans = [draw_spans(rng) for _ in range(3)]
    spans[1] = (spans[1][0], np.zeros_like(spans[1][1]))  # members with different numbers of live groups
    xs = [draw_operands(rng) for _ in range(3)]
    run = value_and_gradients("xla")
    want = joined(jnp.stack, [run(x, *s) for x, s in zip(xs, spans, strict=True)])
    chex.assert_trees_all_close(jax.vmap(run)(joined(jnp.stack, xs), *joined(jnp.stack, spans)), want, atol=3e-6)


def test_under_shard_map_with_local_starts():
    """Tokens and samples sharded, seeds replicated: their gradient is summed over the shards."""
    assert jax.device_count() >= 4, "tests/conftest.py simulates the devices"
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(10)
    spans = [draw_spans(rng) for _ in range(4)]
    xs = [draw_operands(rng) for _ in range(4)]
    seeds = xs[0]["seeds"]
    want = [value_and_gradients("xla")({**x, "seeds": seeds}, *s) for x, s in zip(xs, spans, strict=True)]

    def attend(seeds, k, v, starts, lengths):
        return seed_attention(seeds, k, v, starts=starts, lengths=lengths, max_length=T)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(P(), *[P("data")] * 4), out_specs=P("data"))

    @jax.jit
    def run(seeds, x, starts, lengths):
        out, pullback = jax.vjp(lambda s, k, v: sharded(s, k, v, starts, lengths), seeds, x["k"], x["v"])
        return dict(zip(("out", "dseeds", "dk", "dv"), (out, *pullback(x["dout"])), strict=True))

    got = run(seeds, joined(jnp.concatenate, xs), *joined(jnp.concatenate, spans))
    for name in ("out", "dk", "dv"):
        chex.assert_trees_all_close(got[name], jnp.concatenate([w[name] for w in want]), atol=3e-6)
    chex.assert_trees_all_close(got["dseeds"], sum(w["dseeds"] for w in want), atol=1e-5)


def test_the_reference_does_no_product_too_many():
    B, T, S, H, D = 2, 64, 64, 2, 128
    x = jax.ShapeDtypeStruct((B * T, H, D), jnp.float32)
    seeds = jax.ShapeDtypeStruct((S, H, D), jnp.float32)
    span = jax.ShapeDtypeStruct((B,), jnp.int32)
    run = partial(reference.seed_attention, max_length=T, scale=1.0)
    flops = jax.jit(run).lower(seeds, x, x, span, span).cost_analysis()["flops"]
    products = 2 * (2 * B * H * S * T * D)
    assert products < flops < 1.05 * products  # the rest is the softmax


zeros = jnp.zeros
TOKENS = zeros((20, 2, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seeds=zeros((3, 8))), r"seeds must have the axes \[rows, H, D\], got shape \(3, 8\)"),
        (dict(k=zeros((20, 16))), r"k must have the axes \[N, Hkv, D\], got shape \(20, 16\)"),
        (dict(v=zeros((19, 2, 8))), r"k and v must have the same shape, got \(20, 2, 8\) and \(19, 2, 8\)"),
        (dict(seeds=zeros((3, 4, 16))), "seeds has head width 16, k and v have 8"),
        (dict(seeds=zeros((3, 3, 8))), "seeds has 3 heads, which is not a positive multiple of the 2 heads"),
        (dict(seeds=zeros((3, 4, 8), jnp.bfloat16)), "seeds bfloat16, k float32, v float32"),
        (dict(starts=np.array([0.0, 12.0])), "starts must be int32, got float32"),
        (dict(lengths=np.array([12])), "must name the same samples, at least one; got 2 and 1"),
        (dict(starts=np.array([0, -2])), r"starts\[1\] is -2, must be >= 0"),
        (dict(lengths=np.array([-1, 8])), r"lengths\[0\] is -1, must be >= 0"),
        (dict(lengths=np.array([12, 9])), r"starts\[1\] 12 \+ lengths\[1\] 9 = 21 is beyond the array's 20 rows"),
        (dict(max_length=11), r"lengths\[0\] is 12, above max_length 11"),
        (dict(max_length=True), "max_length must be an int >= 0, got True"),
        (dict(lengths=np.array([13, 8])), r"samples 0 and 1 overlap: rows \[0, 13\) and \[12, 20\)"),
        (dict(scale=0.0), "scale must be a positive finite number, got 0.0"),
        (dict(scale=float("nan")), "scale must be a positive finite number, got nan"),
        (dict(implementation="mosaics"), "implementation='mosaics' is unknown; there are .*xla, reference"),
    ],
)
def test_bad_input(changes, message):
    arguments = dict(seeds=zeros((3, 4, 8)), k=TOKENS, v=TOKENS, starts=np.array([0, 12]), lengths=np.array([12, 8]))
    arguments |= changes
    operands = [arguments.pop(name) for name in ("seeds", "k", "v")]
    with pytest.raises(ValueError, match=message):
        seed_attention(*operands, **arguments)


@pytest.mark.parametrize("numbers", [(0, 4), (4, 0)])
def test_bad_blocking(numbers):
    with pytest.raises(ValueError, match=f"samples and rows must be positive, got {numbers[0]} and {numbers[1]}"):
        xla.Blocking(*numbers)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_packed_keys_and_values_give_the_same_and_one_gradient(implementation):
    rng = np.random.default_rng(3)
    starts, lengths = draw_spans(rng)
    x = draw_operands(rng)
    want = value_and_gradients(implementation)(x, starts, lengths)

    @jax.jit
    def run(seeds, kv, dout):
        static = dict(starts=starts, lengths=lengths, max_length=T, implementation=implementation)
        out, pull = jax.vjp(lambda *x: packed_seed_attention(*x, **static), seeds, kv)
        return out, *pull(dout)

    out, dseeds, gradient = run(x["seeds"], np.concatenate([x["k"], x["v"]], 1), x["dout"])
    np.testing.assert_allclose(out, want["out"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dseeds, want["dseeds"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, np.concatenate([want["dk"], want["dv"]], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 3, 8), "kv has 3 heads of width 8; it holds 2 parts"),
        ((9, 6, 8), "seeds has 4 heads, which is not a positive multiple of the 3 heads"),
    ],
)
def test_packed_operands_that_do_not_fit_are_refused(shape, message):
    span = np.array([0], np.int32), np.array([9], np.int32)
    with pytest.raises(ValueError, match=message):
        packed_seed_attention(
            np.zeros((S, 4, 8), np.float32), np.zeros(shape, np.float32), starts=span[0], lengths=span[1]
        )
