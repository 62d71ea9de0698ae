"""The benchmark of whole models: its cases, a toy run from end to end, and where it refuses."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import re
import sys
import time

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments"))

import bench_model
from bench_model import RUNGS, cases, host_batches, ladder, main, plot, toy_cases

from kunlun_jax.data.synthetic import make_schema
from kunlun_jax.flops import model_flops, total
from kunlun_jax.memory import abstract_batch
from kunlun_jax.model_configs import InterFormerConfig, KunlunConfig, WukongConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def test_cases_cover_presets_fills_models_and_the_ladder():
    names = [case.name for case in cases()]
    for preset in ("6", "60", "180"):
        for model in ("kunlun", "interformer"):
            for fill in (1.0, 0.5):
                assert any(name.startswith(f"{model} {preset} fill {fill}") for name in names)
    assert all(any(rung in name for name in names) for rung in RUNGS)
    for case in cases():
        case.config.check(make_schema(case.stream))


def test_every_rung_changes_one_thing_and_ends_with_the_best():
    best = toy_cases()[0]
    rungs = ladder(best)
    assert rungs[-1] == dataclasses.replace(best, rung=RUNGS[-1])
    flops = [
        total(model_flops(r.config, make_schema(r.stream), {"clicked": 24, "converted": 8, "viewed": 24}))
        for r in rungs
    ]
    assert [r.config.pffn for r in rungs] == ["naive"] + ["gdpa"] * 5
    assert [r.padded for r in rungs] == [True] * 3 + [False] * 3
    assert [r.config.comp_skip for r in rungs] == [False] * 4 + [True] * 2
    assert [r.fused for r in rungs] == [False] * 5 + [True]
    assert flops[1] > flops[2] == flops[3] > flops[4] == flops[5]  # window, then CompSkip


def test_padded_rungs_run_full_sequences_and_count_the_real_events():
    padded = ladder(toy_cases()[0])[0]
    batches, lengths = host_batches(padded)
    assert all((b.events["clicked"].lengths == 24).all() for b in batches)
    assert 8 < lengths["clicked"].mean() < 16


def test_separate_norms_are_the_same_block():
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import gdpa_block

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (16, 2, 8)) for key in keys)
    spans = dict(q_starts=jnp.array([0, 9]), q_lengths=jnp.array([9, 7]), kv_starts=jnp.array([0, 8]),
                 kv_lengths=jnp.array([8, 8]))  # fmt: skip
    with bench_model.separate_norms():
        separate = bench_model.gdpa_layer.gdpa_block(q, k, v, **spans)
    np.testing.assert_allclose(separate, gdpa_block(q, k, v, **spans), atol=2e-5)
    assert bench_model.gdpa_layer.gdpa_block is gdpa_block


def test_the_clock_leaves_out_the_warm_up(monkeypatch):
    """On a clock of its own: a batch takes 100 s at first and 2 s later, a step 10 s."""
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    def batches():
        for k in itertools.count():
            passes(100 if k <= bench_model.WARM_UP else 2)
            yield None, k

    def step(state, batch):
        passes(10)
        return state + 1, batch

    monkeypatch.setattr(bench_model.time, "perf_counter", lambda: now)
    state, report, elapsed, waited = bench_model.timed(step, 0, batches(), 5)
    assert (elapsed, waited) == (5 * (2 + 10), 5 * 2)
    assert report == state - 1 == bench_model.WARM_UP + 5


def test_clock_and_power_are_means_over_the_second_half(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    started = tmp_path / "started"
    lines = r"900, 100.0\n1500, [N/A]\n1600, 690.0\n1700, 694.0\n17"
    tool.write_text(f"#!/bin/sh\nprintf '{lines}'\ntouch {started}\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with bench_model.clock_and_power() as card:
        while not started.exists():
            time.sleep(0.01)
        assert card == {}
    assert card == {"sm_clock_mhz": 1650, "power_w": 692}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with bench_model.clock_and_power() as card:
        pass
    assert card == {}


def test_a_toy_run_writes_its_row_and_the_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_model, "clock_and_power", lambda: contextlib.nullcontext({"power_w": 690}))
    out = tmp_path / "toy.json"
    assert main(only="kunlun toy fill 0.5 batch", steps=2, toy=True, out=out) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["samples_per_second"] > 0
    assert row["power_w"] == 690
    assert 0 <= row["data_wait"] < 1
    assert row["largest_batch"] > row["batch"]
    row["ms_by_module"] = {"clicked.pffn": 1.0, "optimizer": 0.5}
    plot([row], tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 1000


def test_without_a_gpu_it_refuses(tmp_path, capsys):
    assert main(only="kunlun 6 fill 1.0", out=tmp_path / "none.json") == 1
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_a_case_that_does_not_fit_says_so_and_costs_no_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_model, "device_memory", lambda: 1000)
    assert main(only="kunlun toy fill 0.5 batch", toy=True, out=tmp_path / "none.json") == 0
    assert "no batch fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scope", "module"),
    [
        ("jit(_train_step)/transpose(jvp(clicked.pffn))/weight_generation/dot", "clicked.weight_generation"),
        ("jit(_train_step)/jvp(viewed.attention)/jit(_forward)/x", "viewed.attention"),
        ("jit(_train_step)/optimizer/mul", "optimizer"),
        ("jit(_train_step)/transpose(jvp(tables))/scatter-add", "tables"),
        ("jit(_train_step)/add", "other"),
    ],
)
def test_scopes_become_modules(scope, module):
    assert bench_model._module(scope) == module


@pytest.mark.parametrize("model", ["kunlun", "interformer", "wukong"])
def test_every_model_names_its_modules(model):
    stream = toy_cases()[0].stream
    schema = make_schema(stream)
    config = {"kunlun": KunlunConfig, "interformer": InterFormerConfig, "wukong": WukongConfig}[model].tiny(schema)
    learner = bench_model.learner_of(bench_model.Case("toy", model, config, stream, 4, 1.0))
    lowered = learner.train_step.lower(learner.abstract_state(), abstract_batch(schema, 4))
    modules = {bench_model._module(scope) for scope in re.findall(r'"(jit\([^"]+)"', lowered.as_text(debug_info=True))}
    wanted = {"set_tokens", "interaction", "head", "tables", "optimizer"}
    parts = ("event_tokens", "pffn", "attention", "seed_pooling") if model != "wukong" else ()
    assert modules >= wanted | {f"{event.name}.{part}" for event in schema.events for part in parts}


def test_bytes_are_told_without_a_gpu(capsys):
    assert main(memory=True, only="kunlun 6 fill 1.0") == 0
    assert "kunlun 6 fill 1.0 batch " in (out := capsys.readouterr().out)
    assert "largest batch in 80 GB: " in out
