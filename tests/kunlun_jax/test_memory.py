"""The estimate of a step's bytes: against the compiled program, its growth, and the refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kunlun_jax.data.synthetic import SyntheticConfig, make_schema
from kunlun_jax.memory import (
    USABLE,
    _dependent,
    _without_repeatable,
    abstract_batch,
    check_fits,
    largest_batch,
    step_memory,
)
from kunlun_jax.model_configs import EventConfig, KunlunConfig
from kunlun_jax.models import build
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.training import Learner
from pallas_kernels import SlowerPathWarning, hopper

BATCH = 64


@pytest.fixture(scope="module")
def learner():
    schema = make_schema(SyntheticConfig(max_length=40))
    model = nnx.eval_shape(lambda: build(KunlunConfig.tiny(schema), schema, rngs=nnx.Rngs(0)))
    return Learner(model, schema, OptimizerConfig(), steps=10)


def test_estimate_is_near_what_the_program_takes(learner):
    """Within a factor of 2.5 on the CPU, whose compiler fuses less than a GPU's."""
    step = learner.train_step.lower(learner.abstract_state(), abstract_batch(learner.schema, BATCH))
    analysis = step.compile().memory_analysis()
    estimate = step_memory(learner, BATCH)
    batch = estimate.batch // 2
    assert estimate.state + batch == pytest.approx(analysis.argument_size_in_bytes, rel=0.01)
    taken = analysis.temp_size_in_bytes
    assert taken / 2.5 < estimate.gradients + estimate.residuals < 2.5 * taken


def test_state_is_counted_to_the_byte(learner):
    state = learner.abstract_state()
    assert step_memory(learner, 8).state == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert state.params
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))


def test_residuals_grow_with_the_batch_and_shrink_with_the_capacity(learner):
    one, two, half = step_memory(learner, 64), step_memory(learner, 128), step_memory(learner, 64, fraction=0.5)
    assert two.residuals == pytest.approx(2 * one.residuals, rel=0.02)
    assert 0.4 < half.residuals / one.residuals < 0.8
    assert one.state == two.state


def test_steps_with_kernels_are_counted_without_a_gpu():
    """The same as on a Hopper GPU: kernels keep less than the XLA paths."""
    schema = make_schema(SyntheticConfig(max_length=1000))
    event = EventConfig(width=64, head_width=64, n_seeds=16)
    config = KunlunConfig(dict.fromkeys(("clicked", "viewed"), event), dtype="bfloat16", implementation="mosaic_gpu")

    def residuals(config, batch):
        model = nnx.eval_shape(lambda: build(config, schema, rngs=nnx.Rngs(0)))
        return step_memory(Learner(model, schema, OptimizerConfig(), steps=10), batch).residuals

    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        residuals(config, 16)
    with hopper.assumed(), pytest.warns(SlowerPathWarning, match="masked_by_mlp"):  # of twelve columns
        few, many = (residuals(config, n) for n in (16, 32))
    assert few < many < 2.02 * few
    with pytest.warns(SlowerPathWarning):
        assert many < 0.95 * residuals(dataclasses.replace(config, implementation=None), 32)


def test_what_xla_computes_again_is_not_kept():
    def forward(x, w):
        h = x @ w
        again, operand, sums = jnp.tanh(h), jnp.exp(h), h.sum(1, keepdims=True)
        return h, again, operand, sums, operand @ w, jnp.broadcast_to(w[0], h.shape)

    program = jax.make_jaxpr(forward)(jnp.ones((32, 8)), jnp.ones((8, 8))).jaxpr
    h, _, operand, sums, product, repeated = kept = program.outvars
    assert _dependent(program, program.invars[:1]).isdisjoint([repeated])
    assert _dependent(program, program.invars[:1]).issuperset(kept[:-1])
    assert _without_repeatable(program, dict.fromkeys(kept[:-1])) == [h, operand, sums, product]


def test_a_step_that_does_not_fit_names_its_bytes_and_the_batch_that_would(learner):
    limit = round(step_memory(learner, 104).total / USABLE)
    fits = largest_batch(learner, limit)
    assert 88 <= fits <= 104  # tables larger than a small batch's ids make the growth not quite linear
    with pytest.raises(ValueError, match=rf"batch_size 512: .* of the device's {limit:,} bytes .*; a batch of {fits} "):
        check_fits(learner, 512, limit)
    assert check_fits(learner, fits, limit).total <= USABLE * limit
    assert step_memory(learner, 110).total < limit
    with pytest.raises(ValueError, match="batch_size 110"):  # it would fill the memory to the brim
        check_fits(learner, 110, limit)


def test_a_model_whose_state_alone_is_too_large_fits_no_batch(learner):
    assert largest_batch(learner, 1000) == 0
    with pytest.raises(ValueError, match="no batch fits"):
        check_fits(learner, 8, 1000)


def test_shapes_are_those_of_real_batches():
    config = SyntheticConfig(
        max_length=9, conversions=4, set_noise=2, event_noise=1, event_numbers=2, train=8, fill=1.0
    )
    from kunlun_jax.data.synthetic import generate

    samples = generate(config).samples["train"]
    real = samples.batch(jnp.arange(8))
    shapes = abstract_batch(samples.schema, 8)
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for x, s in zip(jax.tree.leaves(real), jax.tree.leaves(shapes), strict=True):
        assert (x.shape, x.dtype) == (s.shape, s.dtype)
