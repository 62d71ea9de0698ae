"""The presets named by their FLOPs: what they cost by formula, where it goes, and what the kernels need of them."""

import jax
import jax.numpy as jnp
import pytest

from kunlun_jax.data.synthetic import SyntheticConfig, make_schema
from kunlun_jax.flops import model_flops, sequence_share, total
from kunlun_jax.layers.features import event_inputs
from kunlun_jax.model_configs import InterFormerConfig, KunlunConfig, WukongConfig
from pallas_kernels.mlp.api import unsupported

SIZES = (6, 60, 180)


def preset(config, size):
    return getattr(config, f"gflops_{size}")()


def counted(config, size):
    """The preset's FLOPs by module on its own stream with every sequence at its full length."""
    schema = make_schema(preset(SyntheticConfig, size))
    full = {event.name: event.max_length for event in schema.events}
    return model_flops(preset(config, size), schema, full)


@pytest.mark.parametrize("size", SIZES)
def test_kunlun_costs_what_its_name_says_mostly_for_sequences(size):
    flops = counted(KunlunConfig, size)
    assert total(flops) == pytest.approx(size * 1e9, rel=0.05)
    assert sequence_share(flops) >= 0.7


@pytest.mark.parametrize(("config", "size"), [(WukongConfig, 6), *((InterFormerConfig, size) for size in SIZES)])
def test_baselines_cost_the_same(config, size):
    assert total(counted(config, size)) == pytest.approx(total(counted(KunlunConfig, size)), rel=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_streams_have_the_set_tokens_and_event_types_of_the_preset(size):
    schema, config = make_schema(preset(SyntheticConfig, size)), preset(KunlunConfig, size)
    n = config.check(schema).set_tokens(schema)
    assert n == (128 if size == 6 else 256)
    assert (n + config.summary_tokens) // config.experts % 16 == 0  # tokens of an expert, aligned for products
    lengths = {event.name: event.max_length for event in schema.events}
    assert lengths == {"clicked": 1000, "converted": 250 if size == 6 else 500, "viewed": 1000}


@pytest.mark.parametrize("size", SIZES)
def test_kernels_and_compskip_are_used_to_the_full(size):
    config = preset(KunlunConfig, size)
    assert not config.dead_layers()  # odd depths
    assert config.dtype == "bfloat16"
    assert all(e.head_width == (64 if e.width % 128 else 128) for e in config.events.values())


@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_take_what_describes_an_event(size):
    schema = make_schema(preset(SyntheticConfig, size))
    for event in schema.events:
        rows, inputs = 1024, event_inputs(schema, event)
        shapes = (rows, inputs), (inputs, 128), (128,), (128, inputs), (inputs,)
        assert unsupported(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), masked=True) is None


@pytest.mark.parametrize("size", SIZES)
def test_views_get_half_a_stack(size):
    """As in the paper's example: (256, 8 heads, 32 tokens, 3 layers, window 100) for clicks, (128, 4, 16, 2, 50) for
    impressions, the second layer of which would have nothing to do under CompSkip."""
    config = preset(KunlunConfig, size)
    clicked, viewed = config.events["clicked"], config.events["viewed"]
    assert (viewed.width, viewed.n_tokens, viewed.window) == (config.width // 2, clicked.n_tokens // 2, 50)
    assert viewed.depth == {3: 1, 5: 3, 9: 5}[clicked.depth]
