"""Configurations: every check trips with the field and the numbers, and the tables of which layer runs what."""

import dataclasses

import pytest
from batches import small_schema

from kunlun_jax.config import EventConfig, KunlunConfig
from kunlun_jax.optimizer import OptimizerConfig
from kunlun_jax.schema import DenseField, EventType, FeatureSchema, SparseField, Table

SCHEMA = small_schema(scope="candidate")
EVENT = EventConfig(width=8, head_width=4, depth=3, n_seeds=6, n_tokens=3, window=2)
CONFIG = KunlunConfig(events={"click": EVENT, "view": EVENT}, depth=3, dense_tokens=2, experts=2)


@pytest.mark.parametrize("field", ["width", "head_width", "depth", "n_seeds", "n_tokens"])
def test_event_sizes_are_positive(field):
    with pytest.raises(ValueError, match=f"^{field}: must be at least 1, got 0"):
        EventConfig(**{field: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 60, "head_width": 32}, "width 60 must divide into heads of an even head_width, got 32"),
        ({"width": 9, "head_width": 3}, "even head_width, got 3"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_event_numbers_that_dont_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EventConfig(**change)


def test_a_window_may_be_none_or_zero():
    assert (EventConfig(window=None).window, EventConfig(window=0).window) == (None, 0)


@pytest.mark.parametrize(
    "field",
    ["width", "depth", "generated", "dense_tokens", "experts", "interaction_rank", "interaction_hidden", "kron_rank"],
)
def test_model_sizes_are_positive(field):
    with pytest.raises(ValueError, match=f"^{field}: must be at least 1, got -2"):
        KunlunConfig(**{field: -2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_hidden": (8, 0)}, r"head_hidden: every width must be at least 1, got \(8, 0\)"),
        ({"activation": ("gelu", "relu", "silu")}, "activation: 3 names for the 2 heads of events 'click'"),
        ({"depth": 2}, "events 'click': depth 3 exceeds the model's depth 2"),
        (
            {"events": {"click": dataclasses.replace(EVENT, n_seeds=3)}},
            "events 'click': n_seeds 3 must exceed n_tokens 3",
        ),
    ],
)
def test_model_numbers_that_dont_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    "field", ["tau", "weight_inputs", "expert_inputs", "rotary_time", "pffn", "pooling", "compression", "dtype"]
)
def test_unknown_choices_are_refused(field):
    with pytest.raises(ValueError, match=f"^{field}: 'Gdpa' is unknown; choose from"):
        dataclasses.replace(CONFIG, **{field: "Gdpa"})


def test_pma_needs_no_surplus_of_seeds():
    dataclasses.replace(CONFIG, pooling="pma", events={"click": dataclasses.replace(EVENT, n_seeds=1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": {"click": EVENT}}, r"the schema has \['click', 'view'\], the config configures \['click'\]"),
        ({"dense_tokens": 1, "experts": 4}, "experts: 6 set tokens don't divide over 4 experts"),
        ({"experts": 8}, "experts: 14 set and summary tokens don't divide over 8 experts"),
    ],
)
def test_a_config_that_doesnt_fit_the_schema_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change).check(SCHEMA)


def test_request_weights_need_request_fields():
    schema = FeatureSchema(
        tables=(Table("item", 5, 4),),
        sparse=(SparseField("item", "item", "candidate"), SparseField("seller", "item", "candidate")),
        dense=(DenseField("price", "candidate"),),
        events=(EventType("click", 4, (SparseField("item", "item"),)),),
    )
    config = KunlunConfig(events={"click": dataclasses.replace(EVENT, n_tokens=2)}, dense_tokens=2)
    assert config.check(schema) is config
    with pytest.raises(ValueError, match='weight_inputs: "request" needs request-scope fields'):
        dataclasses.replace(config, weight_inputs="request").check(schema)


def test_experts_that_see_all_tokens_need_no_equal_slices():
    dataclasses.replace(CONFIG, experts=4, expert_inputs="all", dense_tokens=2).check(SCHEMA)


def test_tokens_are_counted_by_scope():
    assert CONFIG.set_tokens(SCHEMA) == 8  # four sparse fields, two tokens for the dense field of either scope
    assert CONFIG.set_tokens(SCHEMA, "request") == 3
    assert CONFIG.set_tokens(SCHEMA, "candidate") == 5
    assert CONFIG.summary_tokens == 6


@pytest.mark.parametrize(
    ("comp_skip", "depth", "pffn", "attention", "dead"),
    [
        (True, 1, [1, 0, 1, 0], [0, 0, 0, 0], False),
        (True, 2, [1, 0, 1, 0], [0, 0, 0, 0], True),
        (True, 3, [1, 0, 1, 0], [0, 1, 0, 0], False),
        (True, 4, [1, 0, 1, 0], [0, 1, 0, 0], True),
        (False, 2, [1, 1, 1, 1], [1, 0, 0, 0], False),
        (False, 4, [1, 1, 1, 1], [1, 1, 1, 0], False),
    ],
)
def test_which_layer_runs_what(comp_skip, depth, pffn, attention, dead):
    event = dataclasses.replace(EVENT, depth=depth)
    config = dataclasses.replace(CONFIG, comp_skip=comp_skip, depth=4, events={"click": event})
    assert [config.runs_pffn(layer) for layer in range(4)] == pffn
    assert [config.runs_attention(layer, event) for layer in range(4)] == attention
    assert config.dead_layers() == (["click"] if dead else [])


def test_uniform_events_get_the_largest_size_in_use():
    small = EventConfig(width=16, head_width=2, depth=1, n_seeds=9, n_tokens=3, window=7)
    uniform = dataclasses.replace(CONFIG, events={"click": EVENT, "view": small}).uniform_events()
    largest = EventConfig(width=16, head_width=4, depth=3, n_seeds=9, n_tokens=3, window=7)
    assert uniform.events == {"click": largest, "view": largest}
    unbounded = dataclasses.replace(small, window=None)
    uniform = dataclasses.replace(CONFIG, events={"click": EVENT, "view": unbounded}).uniform_events()
    assert uniform.events["click"] == dataclasses.replace(largest, window=None)
    assert KunlunConfig().uniform_events() == KunlunConfig()


@pytest.mark.parametrize("scope", ["request", "candidate"])
def test_the_tiny_preset_fits_any_schema(scope):
    schema = small_schema(scope=scope)
    assert KunlunConfig.tiny(schema).check(schema).events.keys() == {"click", "view"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, 0.0, "must be positive, got 0.0") for name in
          ("learning_rate", "clip_norm", "table_learning_rate", "table_epsilon")),
        *((name, -0.1, "must not be negative, got -0.1") for name in
          ("weight_decay", "table_initial_accumulator", "table_scale")),
        *((name, value, rf"must lie in \[0, 1\], got {value}") for name in ("warmup", "final", "beta1", "beta2")
          for value in (-0.1, 1.1)),
    ],
)  # fmt: skip
def test_optimiser_numbers_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=f"^{field}: {message}"):
        OptimizerConfig(**{field: value})
