"""`gdpa` and `gdpa_block` on the CPU: the XLA path against reference and loops, transformations, bad input."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import SlowerPathWarning, gdpa, gdpa_block
from pallas_kernels.gdpa import api, xla
from pallas_kernels.gdpa.activations import ACTIVATIONS, kernel_activation

NAMES = ("q", "k", "v")
ROWS, KV_ROWS, LONGEST, KV_LONGEST = 60, 40, 25, 12
MIXED = ("gelu_tanh", "relu", "relu", "silu")
GROUPS = (((1, 1), "hardswish"), ((4, 2), MIXED), ((3, 3), "gelu_tanh"))  # (heads, key heads), activation


def batch(seed, *, heads=4, kv_heads=2, samples=4, width=8, dtype=jnp.float32, shared_keys=False):
    """Operands and spans: gaps, empty samples, any order; rows outside the samples are NaN."""
    rng = np.random.default_rng(seed)

    def spans(rows, longest):
        cuts = np.sort(rng.choice(rows + 1, 2 * samples, replace=True)).reshape(samples, 2)
        starts, lengths = cuts[:, 0], np.minimum(cuts[:, 1] - cuts[:, 0], longest)
        order = rng.permutation(samples)
        return starts[order].astype(np.int32), lengths[order].astype(np.int32)

    (q_starts, q_lengths), (kv_starts, kv_lengths) = spans(ROWS, LONGEST), spans(KV_ROWS, KV_LONGEST)
    if shared_keys:
        kv_starts[1:3], kv_lengths[1:3] = kv_starts[0], kv_lengths[0]

    def normal(rows, h, starts, lengths):
        x = rng.standard_normal((rows, h, width))
        inside = np.zeros(rows, bool)
        for start, length in zip(starts, lengths, strict=True):
            inside[start : start + length] = True
        x[~inside] = np.nan
        return jnp.asarray(x, dtype)

    q, do = (normal(ROWS, heads, q_starts, q_lengths) for _ in range(2))
    k, v = (normal(KV_ROWS, kv_heads, kv_starts, kv_lengths) for _ in range(2))
    named = dict(q_starts=q_starts, q_lengths=q_lengths, kv_starts=kv_starts, kv_lengths=kv_lengths)
    return (q, k, v, do), {n: jnp.asarray(x) for n, x in named.items()}


@functools.cache
def compiled(operator, implementation, activation, scale=0.5, post_scale=0.7):
    @jax.jit
    def run(q, k, v, do, spans):
        out, pull = jax.vjp(
            lambda *x: operator(
                *x,
                **spans,
                max_q_length=LONGEST,
                max_kv_length=KV_LONGEST,
                activation=activation,
                scale=scale,
                post_scale=post_scale,
                implementation=implementation,
            ),
            q,
            k,
            v,
        )
        return dict(zip(("out", *NAMES), (out, *pull(do)), strict=True))

    return run


def loops(q, k, v, spans, activation, scale, post_scale):
    """GDPA sample by sample, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for q0, nq, k0, nk in zip(*(np.asarray(spans[n]) for n in spans), strict=True):
        for h, name in enumerate(activation):
            s = scale * q[q0 : q0 + nq, h] @ k[k0 : k0 + nk, h // group].T
            weights = np.asarray(ACTIVATIONS[name](jnp.asarray(s, jnp.float32))[0], np.float64)
            out[q0 : q0 + nq, h] = post_scale * weights @ v[k0 : k0 + nk, h // group]
    return out


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from(GROUPS), st.booleans(), st.sampled_from((gdpa, gdpa_block)))
def test_xla_path_is_the_reference(seed, group, shared_keys, operator):
    heads, activation = group
    operands, spans = batch(seed, heads=heads[0], kv_heads=heads[1], shared_keys=shared_keys)
    got = compiled(operator, "xla", activation)(*operands, spans)
    wanted = compiled(operator, "reference", activation)(*operands, spans)
    for name in got:
        chex.assert_tree_all_finite(got[name])
        np.testing.assert_allclose(got[name], wanted[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_values_are_those_of_plain_loops(implementation):
    operands, spans = batch(3)
    out = compiled(gdpa, implementation, MIXED)(*operands, spans)["out"]
    np.testing.assert_allclose(out, loops(*operands[:3], spans, MIXED, 0.5, 0.7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = jnp.concatenate([jnp.linspace(-6, 6, 96), jnp.linspace(-1e-3, 1e-3, 10)])
    theirs = {
        "identity": lambda x: x,
        "relu": jax.nn.relu,
        "relu2": lambda x: jax.nn.relu(x) ** 2,
        "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "silu": jax.nn.silu,
        "hardswish": jax.nn.hard_swish,
    }[name]
    value, slope = ACTIVATIONS[name](x)
    np.testing.assert_allclose(value, theirs(x), atol=1e-5)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(theirs))(x), atol=1e-5)
    assert ACTIVATIONS[name](jnp.zeros(1))[0] == 0
    for folded in (True, False):
        act = kernel_activation(name, 0.3, 0.7, folded=folded)
        wanted, slope = ACTIVATIONS[name](0.3 * x)
        weight, weight_slope = act.weight_and_slope(x)
        np.testing.assert_allclose(act.weight(x) * act.post, wanted * 0.7, atol=1e-5)
        np.testing.assert_allclose(weight * act.post, wanted * 0.7, atol=1e-5)
        np.testing.assert_allclose(weight_slope * act.slope_post, slope * 0.21, atol=1e-5)


def test_rows_outside_the_samples_are_zero_and_nothing_crosses():
    operands, spans = batch(5)
    for operator in (gdpa, gdpa_block):
        result = compiled(operator, "xla", "silu")(*operands, spans)
        for x, name in zip(operands[:3], NAMES, strict=True):
            assert not np.any(np.asarray(result[name])[np.isnan(np.asarray(x)).any((1, 2))]), name
        assert not np.any(np.asarray(result["out"])[np.isnan(np.asarray(operands[0])).any((1, 2))])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_err_as_the_reference_does(dtype):
    operands, spans = batch(7)
    wide = compiled(gdpa, "reference", "gelu_tanh")(*operands, spans)
    narrow = tuple(x.astype(dtype) for x in operands)
    got, reference = (compiled(gdpa, i, "gelu_tanh")(*narrow, spans) for i in ("xla", "reference"))
    for name in wide:
        assert got[name].dtype == dtype
        error, allowed = (np.linalg.norm(np.asarray(x[name], np.float32) - wide[name]) for x in (got, reference))
        assert error <= 1.5 * allowed, name


def test_reference_counts_the_operators_products():
    samples, lq, lkv, heads, width = 3, 16, 8, 2, 32
    shapes = [jax.ShapeDtypeStruct((samples * n, heads, width), jnp.float32) for n in (lq, lkv, lkv)]
    spans = jnp.arange(samples, dtype=jnp.int32)

    def f(q, k, v, starts, lengths):
        return gdpa(
            q,
            k,
            v,
            q_starts=starts,
            q_lengths=lengths,
            kv_starts=starts,
            kv_lengths=lengths,
            max_q_length=lq,
            max_kv_length=lkv,
            activation="identity",
            implementation="reference",
        )

    cost = jax.jit(f).lower(*shapes, spans, spans).compile().cost_analysis()
    products = 4 * samples * lq * lkv * heads * width
    assert products <= cost["flops"] <= 1.1 * products  # the rest is indices and scaling


def test_empty_extents():
    q, k, spans = jnp.ones((0, 2, 8)), jnp.ones((5, 2, 8)), jnp.zeros(1, jnp.int32)
    named = dict(q_starts=spans, q_lengths=spans, kv_starts=spans, kv_lengths=spans)
    assert gdpa(q, k, k, **named, implementation="xla").shape == (0, 2, 8)
    dq, dk = jax.grad(lambda q, k: gdpa(k, q, q, **named, implementation="xla").sum(), argnums=(0, 1))(q, k)
    assert dq.shape == q.shape
    assert not np.any(dk)


def test_vmap_is_a_loop():
    members = [batch(seed) for seed in (0, 1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    run = compiled(gdpa, "xla", "gelu_tanh")
    together = jax.vmap(lambda operands, spans: run(*operands, spans))(*stacked)
    for i, (operands, spans) in enumerate(members):
        alone = run(*operands, spans)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6)


def test_shard_map_with_local_starts():
    members = [batch(seed) for seed in (0, 1)]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    operands, spans = jax.tree.map(lambda *x: jnp.concatenate(x), *members)
    split = jax.P("data")

    def f(q, k, v, do, spans):
        out = gdpa(q, k, v, **spans, max_q_length=LONGEST, max_kv_length=KV_LONGEST, implementation="xla")
        return jnp.sum(jnp.where(jnp.isnan(do), 0, do) * out)[None]

    def loss(q, k, v):
        return jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split)(q, k, v, operands[3], spans).sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands[:3])
    alone = [compiled(gdpa, "xla", "gelu_tanh", 1.0, 1.0)(*o, s) for o, s in members]
    for name, x in zip(NAMES, got, strict=True):
        np.testing.assert_allclose(x, np.concatenate([a[name] for a in alone]), rtol=1e-4, atol=1e-5, err_msg=name)


def test_shared_keys_are_found_where_the_spans_are_known(monkeypatch):
    """Inside jit the caller says so: the kernels' backward gives every key to one sample."""
    said = []
    monkeypatch.setattr(api, "dispatch", lambda *args, shared_keys, **static: said.append(shared_keys))

    def f(spans, **more):
        gdpa(*batch(0)[0][:3], **spans, max_q_length=LONGEST, max_kv_length=KV_LONGEST, **more)

    for shared in (False, True):
        f(batch(0, shared_keys=shared)[1])
        jax.jit(lambda spans: f(spans))(batch(0, shared_keys=shared)[1])
        jax.jit(lambda spans: f(spans, shared_keys=True))(batch(0, shared_keys=shared)[1])
    assert said == [False, False, True, True, False, True]


def test_two_runs_give_the_same_bits():
    operands, spans = batch(9, shared_keys=True)
    run = compiled(gdpa, "xla", "gelu_tanh")
    chex.assert_trees_all_equal(run(*operands, spans), run(*operands, spans))


def test_chunks_of_a_gpu_agree(monkeypatch):
    """On a GPU a chunk is a whole sample; the arithmetic is the same."""
    operands, spans = batch(11, shared_keys=True)
    wanted = compiled(gdpa, "xla", "silu")(*operands, spans)
    monkeypatch.setattr(xla.jax, "default_backend", lambda: "gpu")
    static = xla.Static(LONGEST, KV_LONGEST, ("silu",) * 4, 0.5, 0.7)
    grads = xla.backward(static, *operands[:3], operands[3], *spans.values())
    for name, x in zip(NAMES, grads, strict=True):
        np.testing.assert_allclose(x, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)


def call(operator=gdpa, **changes):
    (q, k, v, _), spans = batch(0)
    arguments = dict(q=q, k=k, v=v, **spans, max_q_length=LONGEST, max_kv_length=KV_LONGEST, implementation="xla")
    arguments |= changes
    return operator(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("operator", [gdpa, gdpa_block])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=jnp.ones((60, 8))), r"q must have the axes \[rows, H, D\].*\(60, 8\)"),
        (dict(k=jnp.ones((40, 2, 9))), r"k and v must have the same shape, got \(40, 2, 9\) and \(40, 2, 8\)"),
        (dict(q=jnp.ones((60, 4, 9))), "q has head width 9, k and v have 8"),
        (dict(q=jnp.ones((60, 3, 8))), "q has 3 heads, which is not a positive multiple of the 2 heads"),
        (dict(q=jnp.ones((60, 4, 8), jnp.bfloat16)), "q bfloat16, k float32"),
        (dict(q_starts=jnp.zeros(3, jnp.int32)), "q_starts and q_lengths .* 3 and 4"),
        (dict(kv_starts=int32(0), kv_lengths=int32(1)), "q_starts has 4 samples, kv_starts has 1"),
        (dict(q_starts=np.zeros(4, np.float32)), "q_starts must be int32, got float32"),
        (dict(q_lengths=int32(0, 0, 0, 26)), r"q_lengths\[3\] is 26, above max_q_length 25"),
        (dict(kv_lengths=int32(0, 13, 0, 0)), r"kv_lengths\[1\] is 13, above max_kv_length 12"),
        (dict(q_starts=int32(0, 0, 0, 59), q_lengths=int32(0, 0, 0, 2)), r"59 .* 2 = 61 is beyond the array's 60 rows"),
        (dict(kv_starts=int32(39, 0, 0, 0), kv_lengths=int32(2, 0, 0, 0)), "41 is beyond the array's 40 rows"),
        (dict(q_starts=int32(0, 3, 9, 9), q_lengths=int32(4, 2, 0, 0)), r"samples 0 and 1 overlap: rows \[0, 4\)"),
        (dict(q_starts=int32(-1, 3, 9, 9)), r"q_starts\[0\] is -1"),
        (dict(activation="gelu_fast"), "activation 'gelu_fast' is unknown; there are identity"),
        (dict(activation=("silu", "relu")), "activation names 2 heads, but q has 4"),
        (dict(scale=0.0), "scale must be a positive finite number, got 0.0"),
        (dict(post_scale=-1.0), "post_scale must be a positive finite number, got -1.0"),
        (dict(max_q_length=-1), "max_q_length must be an int >= 0"),
        (dict(implementation="cuda"), "implementation='cuda' is unknown; there are mosaic_gpu, xla, reference"),
    ],
)
def test_bad_input(operator, changes, message):
    with pytest.raises(ValueError, match=message):
        call(operator, **changes)


def test_bad_eps():
    with pytest.raises(ValueError, match="eps must be a positive finite number, got 0"):
        call(gdpa_block, eps=0)


def test_traced_scale():
    with pytest.raises(ValueError, match="scale must be a static number"):
        jax.jit(lambda scale: call(scale=scale))(0.5)


@pytest.mark.parametrize("operator", [gdpa, gdpa_block])
def test_the_kernel_says_why_it_cannot_run(operator):
    if jax.default_backend() == "gpu":
        pytest.skip("speaks of machines without a GPU")
    reason = "needs an NVIDIA Hopper GPU, the default backend is cpu"
    with pytest.raises(NotImplementedError, match=reason):
        call(operator, implementation="mosaic_gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(SlowerPathWarning, match=f"runs on 'xla'.*{reason}"):
            call(operator, implementation=None)
