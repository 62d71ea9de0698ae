"""Configurations as JSON, and what a run keeps on disk."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import pytest

from kunlun_jax.config import EventConfig, KunlunConfig, TrainConfig, from_dict, to_dict
from kunlun_jax.data.synthetic import SyntheticConfig
from kunlun_jax.run import Run, keep_programs, load_config, load_samples, mean_and_spread, stop_on_sigterm
from kunlun_jax.sharding import ParallelConfig

CONFIGS = [
    TrainConfig.movielens(),
    TrainConfig.synthetic_stream(),
    dataclasses.replace(
        TrainConfig.movielens(),
        model=KunlunConfig(events={"x": EventConfig(window=None)}, activation=("relu", "silu"), head_hidden=()),
        data_directory=Path("elsewhere"),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_survives_json(config):
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bach_size": 3}, r"config: \['bach_size'\] unknown; there are .*'batch_size'"),
        ({"batch_size": "many"}, "config.batch_size: 'many' is not int"),
        ({"batch_size": 1.5}, "config.batch_size: 1.5 is not int"),
        ({"shuffle": 1}, "config.shuffle: 1 is not bool"),
        ({"data": "criteo"}, "config.data: 'criteo' is not"),
        ({"optimizer": {"momentum": 1}}, r"config.optimizer: \['momentum'\] unknown"),
        ({"optimizer": 3}, "config.optimizer: 3 unknown"),
        ({"model": {"events": {"x": {"width": "a"}}}}, "config.model.events.x.width: 'a' is not int"),
        ({"model": {"events": {"x": {"window": "a"}}}}, "config.model.events.x.window: 'a' is not"),
        ({"model": {"head_hidden": [8, "a"]}}, "config.model.head_hidden: 'a' is not int"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"seed": -1}, "seed: must not be negative, got -1"),
        ({"embedding_dropout": 1.0}, "embedding_dropout: must be at least 0 and below 1, got 1.0"),
        ({"embedding_dropout": -0.1}, "embedding_dropout: must be at least 0 and below 1, got -0.1"),
    ],
)
def test_unknown_fields_and_wrong_types_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, {**to_dict(CONFIGS[0]), **change})


def test_a_run_is_not_overwritten_and_resumes_only_with_its_own_settings(tmp_path):
    config = CONFIGS[1]
    Run(tmp_path / "run", config, resume=False)
    with pytest.raises(FileExistsError, match="already holds a run; --resume goes on with it"):
        Run(tmp_path / "run", config, resume=False)
    Run(tmp_path / "run", dataclasses.replace(config, log_every=3), resume=True)
    Run(tmp_path / "run", dataclasses.replace(config, parallel=ParallelConfig(data=2, sync_every=4)), resume=True)
    assert load_config(tmp_path / "run").parallel.data == 2
    other = dataclasses.replace(config, seed=7, optimizer=dataclasses.replace(config.optimizer, clip_norm=2.0))
    with pytest.raises(ValueError, match=r"optimizer.clip_norm: there 1.0, now 2.0\n  seed: there 0, now 7"):
        Run(tmp_path / "run", other, resume=True)
    assert load_config(tmp_path / "run").optimizer.clip_norm == 1.0


def test_only_one_of_several_processes_writes(tmp_path):
    run = Run(tmp_path / "run", CONFIGS[1], resume=False, writes=False)
    run.log("train", 2, {"loss": 0.5})
    run.forget_after(1)
    run.finish({"test": {}})
    assert not (tmp_path / "run").exists()
    assert run.summary is None


def test_the_log_drops_half_a_line_and_what_comes_after_a_step(tmp_path):
    run = Run(tmp_path, CONFIGS[1], resume=False)
    for step in (2, 4, 6):
        run.log("train", step, {"loss": 1 / step})
    run.log("validation", 4, {"ne": 0.9})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')
    run.forget_after(4)
    assert [line["step"] for line in run.lines("train")] == [2, 4]
    assert run.lines("validation") == [{"kind": "validation", "step": 4, "ne": 0.9}]


def test_a_change_of_versions_is_noticed(tmp_path):
    Run(tmp_path, CONFIGS[1], resume=False)
    path = tmp_path / "versions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numpy": "1.0"}))
    changed = Run(tmp_path, CONFIGS[1], resume=True).changed_versions
    assert list(changed) == ["numpy"]
    assert changed["numpy"].startswith("1.0 → ")


def test_no_run_and_a_damaged_config_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: .*config.json is missing"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        load_config(tmp_path)


def test_synthetic_data_reports_its_best_ne_and_hashed_ids():
    config = dataclasses.replace(CONFIGS[1], synthetic=SyntheticConfig(train=200, validation=50, test=50))
    samples, facts = load_samples(config)
    assert {part: len(s) for part, s in samples.items()} == {"train": 200, "validation": 50, "test": 50}
    assert 0 < facts["best_ne"]["test"] < 1
    assert facts["out_of_range"]["train"]["user"] > 0.5


def test_mean_and_spread():
    runs = [{"kind": "test", "step": 1, "a/ne": x} for x in (1.0, 2.0, 6.0)]
    assert mean_and_spread(runs) == {"a/ne": {"mean": 3.0, "standard_deviation": pytest.approx(7**0.5)}}


def test_the_first_signal_is_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_sigterm() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize(
    ("backend", "own", "kept"), [("gpu", None, "kunlun_jax"), ("gpu", "own", "own"), ("cpu", None, None)]
)
def test_programs_are_kept_on_a_gpu_where_the_user_names_no_place(tmp_path, monkeypatch, backend, own, kept):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", own and str(tmp_path / own))
        keep_programs()
        assert jax.config.jax_compilation_cache_dir == (kept and str(tmp_path / kept))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
