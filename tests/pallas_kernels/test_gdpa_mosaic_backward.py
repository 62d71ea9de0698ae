"""GDPA's backward kernels: interpreted with race detection and lowered for sm_90 on a CPU, run on a Hopper GPU."""

import functools

import interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.gdpa import mosaic_backward, mosaic_backward_fused, mosaic_backward_kv, mosaic_backward_q
from pallas_kernels.gdpa.activations import ACTIVATIONS
from pallas_kernels.gdpa.mosaic_backward import finishes_norm, gdpa_backward, is_fused

interpreter.install()

SPANS = ("q_starts", "q_lengths", "kv_starts", "kv_lengths")
SMS = 2
# The reference's own error in bfloat16 is about 2.4e-3 where lengths are long; single rows and keys scatter more.
LIMIT = {"bfloat16": 3.6e-3, "float16": 6e-4}


@pytest.fixture
def whole_tiles(monkeypatch):
    """Activations of whole tiles at once: slices save registers, which cost nothing here, and take long to trace."""
    monkeypatch.setattr(hopper, "SLICE", 128)


def jagged(rng, lengths, gap):
    """(starts, rows): samples in random order with random gaps."""
    starts, at = np.zeros(len(lengths), np.int32), gap
    for b in rng.permutation(len(lengths)):
        starts[b] = at
        at += lengths[b] + int(rng.integers(0, gap + 1))
    return starts, max(at + gap, 128)


def inputs(seed, *, width, heads, kv_heads, q_lengths, kv_lengths, dtype, gap=5):
    """Operands with NaN in every row outside the samples, the spans, and which rows are covered."""
    rng = np.random.default_rng(seed)
    q_starts, q_rows = jagged(rng, q_lengths, gap)
    kv_starts, kv_rows = jagged(rng, kv_lengths, gap)
    spans = dict(zip(SPANS, (q_starts, np.int32(q_lengths), kv_starts, np.int32(kv_lengths)), strict=True))
    covered = []
    for starts, lengths, rows in ((q_starts, q_lengths, q_rows), (kv_starts, kv_lengths, kv_rows)):
        mask = np.zeros(rows, bool)
        for start, length in zip(starts, lengths, strict=True):
            mask[start : start + length] = True
        covered.append(mask)

    def draw(mask, n_heads, size):
        x = rng.normal(size=(len(mask), n_heads, width)) * size
        return jnp.asarray(np.where(mask[:, None, None], x, np.nan), dtype)

    q, do = draw(covered[0], heads, 0.7), draw(covered[0], heads, 1.0)
    k, v = draw(covered[1], kv_heads, 0.7), draw(covered[1], kv_heads, 1.0)
    return (q, k, v, do), spans, covered


def padded(x, starts, lengths, size):
    """[N, H, D] to float32 [B, size, H, D], zero behind each sample."""
    offset = jnp.arange(size)
    inside = offset < lengths[:, None]
    rows = jnp.where(inside, starts[:, None] + offset, 0)
    return jnp.where(inside[..., None, None], x.astype(jnp.float32)[rows], 0)


def worst_errors(grads, operands, spans, activation, scale, post_scale):
    """The largest relative error over (sample, head) of dq, dk, dv against float32 autodiff."""
    sizes = [int(max(spans[f"{p}_lengths"].max(), 1)) for p in ("q", "kv")]
    worst = _worst(grads, operands, [jnp.asarray(spans[n]) for n in SPANS], *sizes, activation, scale, post_scale)
    return dict(zip(("dq", "dk", "dv"), map(float, worst), strict=True))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _worst(grads, operands, spans, q_size, kv_size, activation, scale, post_scale):
    q_place, kv_place = (*spans[:2], q_size), (*spans[2:], kv_size)
    places = (q_place, kv_place, kv_place, q_place)
    q, k, v, do = (padded(x, *place) for x, place in zip(operands, places, strict=True))
    group = q.shape[2] // k.shape[2]

    def loss(q, k, v):
        s = jnp.einsum("bqhd,bkhd->hbqk", q, jnp.repeat(k, group, 2), precision="highest") * scale
        weights = jnp.stack([ACTIVATIONS[name](s[h])[0] for h, name in enumerate(activation)]) * post_scale
        return jnp.sum(do * jnp.einsum("hbqk,bkhd->bqhd", weights, jnp.repeat(v, group, 2), precision="highest"))

    worst = []
    for x, want, (starts, lengths, size) in zip(grads, jax.grad(loss, (0, 1, 2))(q, k, v), places[:3], strict=True):
        inside = (jnp.arange(size) < lengths[:, None])[..., None, None]
        want = jnp.where(inside, want, 0)  # act'(0) reaches padded rows
        error = jnp.sqrt(jnp.sum((padded(x, starts, lengths, size) - want) ** 2, axis=(1, 3)))
        norm = jnp.sqrt(jnp.sum(want**2, axis=(1, 3)))
        worst.append(jnp.max(jnp.where(norm > 0, error / jnp.where(norm > 0, norm, 1), error)))
    return worst


def check(operands, spans, covered, *, activation, fused, scale=0.2, post_scale=1.5, interpret=None, sms=None):
    """Run one route: values, and zeros outside the samples. On a GPU run it again: the same bits."""
    static = dict(activation=activation, scale=scale, post_scale=post_scale, interpret=interpret, sms=sms)
    run = functools.partial(
        mosaic_backward.ROUTES[fused],
        max_q_length=int(spans["q_lengths"].max()),
        max_kv_length=int(spans["kv_lengths"].max()),
        **static,
    )
    run, where = jax.jit(run), [jnp.asarray(spans[n]) for n in SPANS]
    grads = run(*operands, *where)
    worst = worst_errors(grads, operands, spans, activation, scale, post_scale)
    limit = LIMIT[operands[0].dtype.name]
    assert all(error < limit for error in worst.values()), worst
    for name, grad, mask in zip(("dq", "dk", "dv"), grads, (covered[0], covered[1], covered[1]), strict=True):
        assert not np.asarray(grad, np.float32)[~mask].any(), f"{name} outside the samples"
    if interpret is None:
        for name, a, b in zip(("dq", "dk", "dv"), grads, run(*operands, *where), strict=True):
            bits = (np.asarray(x).view(np.uint16) for x in (a, b))
            assert np.array_equal(*bits), f"{name} differs between two runs"


INTERPRETED = {
    # name: fused, dtype, width, heads, kv heads, query lengths, key lengths, activation
    "fused-one-pass": (True, "float16", 64, 2, 2, (70, 1, 0), (1, 128, 9), ("gelu_tanh", "silu")),
    "fused-two-passes-grouped": (True, "bfloat16", 64, 2, 1, (65, 3), (70, 130), ("relu2", "relu2")),
    "fused-wide": (True, "bfloat16", 128, 1, 1, (67,), (129,), ("identity",)),
    "split-resident": (False, "float16", 64, 2, 1, (70, 0, 1), (1, 9, 130), ("leaky_relu", "relu")),
    "split-streamed-wide": (False, "bfloat16", 128, 1, 1, (130,), (260,), ("relu",)),
}


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_without_races(name):
    fused, dtype, width, heads, kv_heads, q_lengths, kv_lengths, activation = INTERPRETED[name]
    case = inputs(
        1, width=width, heads=heads, kv_heads=kv_heads, q_lengths=q_lengths, kv_lengths=kv_lengths, dtype=dtype
    )
    check(*case, activation=activation, fused=fused, interpret=interpreter.RACES, sms=SMS)


BEHIND_NORM = {
    # dtype, width, heads, kv heads, query lengths, key lengths, activation
    "resident-no-keys-grouped": ("float16", 64, 4, 2, (70, 0, 1), (130, 9, 0), ("relu", "silu", "identity", "relu2")),
    "streamed-wide": ("bfloat16", 128, 2, 2, (130, 5), (300, 7), ("relu", "relu")),
    "three-heads": ("bfloat16", 64, 3, 1, (3, 70), (2, 20), ("relu",) * 3),
    "one-head": ("bfloat16", 64, 1, 1, (70,), (20,), ("relu",)),
}


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("name", BEHIND_NORM)
def test_interpreted_behind_a_norm(name):
    dtype, width, heads, kv_heads, q_lengths, kv_lengths, activation = BEHIND_NORM[name]
    case = dict(width=width, heads=heads, kv_heads=kv_heads, q_lengths=q_lengths, kv_lengths=kv_lengths)
    operands, spans, (covered, _) = inputs(5, **case, dtype=dtype)
    rng = np.random.default_rng(6)
    residual = jnp.asarray(np.where(covered[:, None, None], rng.normal(size=operands[0].shape), np.nan), dtype)
    factor = jnp.asarray(np.where(covered, rng.uniform(0.5, 2, covered.shape), np.nan), jnp.float32)
    static = dict(activation=activation, scale=0.2, post_scale=1.5)

    def run(*operands, **more):
        where = [jnp.asarray(spans[n]) for n in SPANS]
        lengths = dict(max_q_length=max(q_lengths), max_kv_length=max(kv_lengths))
        behind = mosaic_backward_q.BehindNorm(factor, residual)
        return mosaic_backward.gdpa_backward_behind_norm(*operands, *where, behind, **lengths, **static, **more)

    dx, *_ = jax.jit(functools.partial(run, sms=SMS, interpret=interpreter.RACES))(*operands)
    sizes = (max(q_lengths), max(kv_lengths))
    places = (("q", 0), ("kv", 1), ("kv", 1), ("q", 0))
    q, k, v, do = (
        padded(x, spans[f"{p}_starts"], spans[f"{p}_lengths"], sizes[i])
        for x, (p, i) in zip(operands, places, strict=True)
    )
    k, v = (jnp.repeat(x, heads // kv_heads, 2) for x in (k, v))

    def loss(q):
        s = jnp.einsum("bqhd,bkhd->hbqk", q, k, precision="highest") * static["scale"]
        weights = jnp.stack([ACTIVATIONS[name](s[h])[0] for h, name in enumerate(activation)]) * static["post_scale"]
        return jnp.sum(do * jnp.einsum("hbqk,bkhd->bqhd", weights, v, precision="highest"))

    d = jax.grad(loss)(q) + do
    means = (jnp.mean(x, axis=(2, 3), keepdims=True) for x in (d, d * q))
    place = (spans["q_starts"], spans["q_lengths"], sizes[0])
    scaled, added = (padded(x, *place) for x in (jnp.broadcast_to(factor[:, None, None], residual.shape), residual))
    of_one, of_q = means
    wanted = scaled * (d - of_one - q * of_q) + added
    got = padded(dx, *place)
    for b, length in enumerate(q_lengths):
        error, norm = (np.linalg.norm(np.asarray(x[b, :length]), axis=(0, 2)) for x in (got - wanted, wanted))
        assert (error <= LIMIT[dtype] * norm).all(), (b, error / norm)
    assert not np.asarray(dx, np.float32)[~covered].any()


def test_no_keys_or_no_queries_anywhere():
    case = inputs(2, width=64, heads=1, kv_heads=1, q_lengths=(9, 0), kv_lengths=(0, 30), dtype="bfloat16")
    check(*case, activation=("identity",), fused=True, interpret=interpreter.RACES, sms=SMS)  # in slices
    operands, spans, _ = case
    zeros = gdpa_backward(
        *operands,
        *(jnp.asarray(spans[n]) for n in SPANS),
        activation=("silu",),
        scale=1.0,
        post_scale=1.0,
        max_q_length=9,
        max_kv_length=0,
        sms=SMS,
    )
    for grad, x in zip(zeros, operands, strict=False):
        assert grad.shape == x.shape
        assert not grad.any()


def shapes(width, dtype, heads=4, kv_heads=4, rows=1000, samples=600):
    q, k = (jax.ShapeDtypeStruct((rows, h, width), dtype) for h in (heads, kv_heads))
    span = jax.ShapeDtypeStruct((samples,), jnp.int32)
    return q, k, k, q, span, span, span, span


def lower(operands, *, max_kv_length, activation):
    def f(*operands):
        return gdpa_backward(
            *operands,
            activation=activation,
            scale=0.1,
            post_scale=1.0,
            max_q_length=1000,
            max_kv_length=max_kv_length,
            sms=132,
        )

    return interpreter.lower_for_hopper(f, *operands)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("max_kv_length", "kernels"), [(256, ["gdpa_backward"]), (1000, ["gdpa_dkv", "gdpa_dq"])])
def test_lowers_for_hopper(width, max_kv_length, kernels):
    text = lower(shapes(width, "bfloat16"), max_kv_length=max_kv_length, activation=("relu",) * 4)
    for kernel in kernels:
        assert kernel in text


def test_lowers_behind_a_norm():
    """Wide heads are lowered with the whole block."""
    operands = shapes(64, "bfloat16", heads=8, kv_heads=4)
    q = operands[0]
    static = dict(activation=("relu",) * 8, scale=0.1, post_scale=1.0, max_q_length=1000, max_kv_length=512)

    def f(*operands):
        *operands, factor, residual = operands
        behind = mosaic_backward_q.BehindNorm(factor, residual)
        return mosaic_backward.gdpa_backward_behind_norm(*operands, behind, **static, sms=132)

    factor = jax.ShapeDtypeStruct(q.shape[:1], jnp.float32)
    assert "gdpa_dq_behind_norm" in interpreter.lower_for_hopper(f, *operands, factor, q)


@pytest.mark.parametrize(
    ("max_kv_length", "activation"),
    [
        (256, tuple(ACTIVATIONS)),  # all at once, so that an unsupported operation in any shows
        (1000, ("gelu", "gelu_tanh")),
    ],
)
@pytest.mark.usefixtures("whole_tiles")
def test_lowers_with_one_activation_per_head(max_kv_length, activation):
    heads = len(activation)
    lower(shapes(64, "float16", heads=heads, kv_heads=heads // 2), max_kv_length=max_kv_length, activation=activation)


@pytest.mark.parametrize("panels", [1, 2])
def test_shared_memory_fits(panels):
    behind_norm = mosaic_backward_q.BEHIND_NORM_KV_BLOCK[64 * panels]
    for scratch in (
        mosaic_backward_fused.fused_scratch(jnp.bfloat16, panels, interpret=None),
        mosaic_backward_kv.dkv_scratch(jnp.bfloat16, panels, stages=2 if panels == 2 else 4, interpret=None),
        mosaic_backward_q.dq_scratch(jnp.bfloat16, panels, interpret=None),
        mosaic_backward_q.dq_scratch(jnp.bfloat16, panels, kv_block=behind_norm, behind_norm=True, interpret=None),
    ):
        assert hopper.shared_bytes(scratch) <= hopper.SHARED_MEMORY


def test_route():
    many = dict(samples=1152, kv_heads=4, sms=132)
    assert is_fused(max_kv_length=256, **many)
    assert not is_fused(max_kv_length=257, **many)  # a third pass would round dq again
    assert not is_fused(max_kv_length=128, samples=8, kv_heads=4, sms=132)  # 32 items would leave 100 SMs idle


def test_which_calls_finish_the_norm():
    assert all(finishes_norm(heads=h, max_q_length=1000, max_kv_length=512) for h in range(1, 9))
    assert not finishes_norm(heads=9, max_q_length=1000, max_kv_length=512)
    assert not finishes_norm(heads=4, max_q_length=1000, max_kv_length=0)


def test_unsupported_says_why():
    assert "Hopper" in mosaic_backward.unsupported(*shapes(64, "bfloat16")[:3])


# --- on a GPU

GELU, MIXED, PLAIN = (
    ("gelu_tanh",) * 4,
    ("silu", "relu2", "gelu", "hardswish"),
    ("identity", "relu", "leaky_relu", "silu"),
)
GPU_CASES = [
    # fused, width, kv heads, longest queries and keys, activation, dtype
    (True, 128, 4, 300, 256, GELU, "bfloat16"),
    (True, 128, 4, 300, 256, MIXED, "float16"),
    (True, 128, 2, 300, 128, GELU, "bfloat16"),
    (True, 64, 1, 500, 256, GELU, "float16"),
    (True, 64, 4, 500, 200, MIXED, "bfloat16"),
    (False, 128, 4, 300, 500, GELU, "bfloat16"),
    (False, 128, 2, 300, 500, PLAIN, "float16"),
    (False, 64, 2, 300, 700, GELU, "bfloat16"),
    (False, 64, 4, 300, 700, MIXED, "float16"),
    (False, 64, 4, 100, 60, PLAIN, "bfloat16"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("fused", "width", "kv_heads", "max_q", "max_kv", "activation", "dtype"), GPU_CASES)
def test_compiled(fused, width, kv_heads, max_q, max_kv, activation, dtype):
    rng = np.random.default_rng(3)
    q_lengths, kv_lengths = (rng.integers(0, n + 1, 200) for n in (max_q, max_kv))
    q_lengths[:4], kv_lengths[:4] = (0, 1, max_q, 63), (5, max_kv, 0, 1)
    case = inputs(4, width=width, heads=4, kv_heads=kv_heads, q_lengths=q_lengths, kv_lengths=kv_lengths, dtype=dtype)
    check(*case, activation=activation, fused=fused)
