"""The comparison and the ablation: same results as ordinary training, equal FLOPs, choices by validation, refusals."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import ablation
import compare
import jobs
from population import Population, Trial, cut
from train import model_argument

from kunlun_jax.config import TrainConfig
from kunlun_jax.data.pipeline import Placed, loader
from kunlun_jax.flops import model_flops, total
from kunlun_jax.model_configs import KunlunConfig
from kunlun_jax.models import MODELS, build
from kunlun_jax.run import load_samples
from kunlun_jax.training import Learner, fit

SMALL = {"train": 220, "validation": 60, "test": 60, "max_length": 8}


def small(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, synthetic=dataclasses.replace(config.synthetic, **SMALL), batch_size=50)


def in_order(samples, epochs=1):
    return loader(samples, batch_size=50, epochs=epochs, shuffle=False, capacity_fractions=(1.0,))


TRIALS = [Trial(1e-3, 0.5, 1), Trial(3e-3, 0.0, 0)]


@pytest.fixture(scope="module")
def ordinary():
    """Config, samples, and for each trial the logged losses and the validation metrics of an ordinary training."""
    config, found = small(TrainConfig.synthetic_stream("dcnv2")), []
    samples, _ = load_samples(config)
    schema, rates = samples["train"].schema, samples["train"].base_rates()
    for rate, dropout, seed in TRIALS:
        optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
        model = build(config.model, schema, rngs=nnx.Rngs(seed))
        learner = Learner(model, schema, optimizer, steps=10, dropout=dropout, seed=seed)
        logged = []
        state = fit(
            learner, learner.init(seed), Placed(in_order(samples["train"], epochs=2), learner.place),
            base_rates=rates, log_every=1, on_log=lambda _, values, to=logged: to.append(values["click/log_loss"]),
            after_step=lambda *_: True,
        )  # fmt: skip
        found.append((logged, learner.evaluate(state, in_order(samples["validation"]), rates).results()))
    return config, samples, found


@pytest.mark.parametrize("threads", [False, True])
def test_a_member_of_a_population_is_an_ordinary_training(ordinary, threads):
    """Same parameters, order, dropout, schedule and optimiser: the losses agree, with a partly filled last batch."""
    config, samples, found = ordinary
    batches = {part: cut(x, 50, (1.0,)) for part, x in samples.items() if part != "test"}
    population = Population(config.model, samples, config.optimizer, batches, size=2, threads=threads)
    population.compile()
    state, losses = population.run(TRIALS, epochs=2)
    validation = population.evaluate(state, "validation")
    for mine, metrics, (logged, wanted) in zip(losses, validation, found, strict=True):
        np.testing.assert_allclose(mine, logged, rtol=1e-4)
        assert metrics["click/ne"] == pytest.approx(wanted["click/ne"], rel=1e-4)
        assert metrics["click/gauc_users_dropped"] == wanted["click/gauc_users_dropped"]
    assert abs(losses[0] - losses[1]).max() > 1e-3
    assert population.evaluate(state, "validation", slice(1, 2)) == validation[1:]
    with pytest.raises(ValueError, match="1 trials for a population of 2 members"):
        population.run([Trial(1e-3, 0.0, 0)], epochs=1)


def test_models_are_scaled_to_the_first_ones_flops():
    def few(config):
        return dataclasses.replace(config, synthetic=dataclasses.replace(config.synthetic, train=300))

    configs = compare.equal_flops({name: few(compare.data_config("synthetic", name)) for name in MODELS})
    samples, _ = load_samples(configs["kunlun"])
    lengths = {name: e.stop - e.start for name, e in samples["train"].events.items()}
    flops = {n: total(model_flops(c.model, samples["train"].schema, lengths)) for n, c in configs.items()}
    assert configs["kunlun"].model == compare.data_config("synthetic", "kunlun").model
    assert all(f == pytest.approx(flops["kunlun"], rel=0.05) for f in flops.values()), flops


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="preset 'criteo' is unknown"):
        compare.data_config("criteo", "kunlun")
    with pytest.raises(ValueError, match="model 'deepfm' is unknown"):
        compare.data_config("synthetic", "deepfm")
    with pytest.raises(ValueError, match="model 'deepfm' is unknown"):
        model_argument(["synthetic", "--model", "deepfm"])
    assert model_argument(["movielens", "--model", "din", "--model.width", "8"]) == (
        "din",
        ["movielens", "--model.width", "8"],
    )
    assert model_argument(["movielens"]) == ("kunlun", ["movielens"])
    with pytest.raises(ValueError, match="row 'no softmax' is unknown"):
        ablation.ablated("no softmax", KunlunConfig())
    with pytest.raises(ValueError, match="lack 'Kunlun'"):
        ablation.ablation(rows=("one expert",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": ()}, "epochs: give at least one"),
        ({"seeds": (1,)}, "two different"),
        ({"seeds": (1, 1)}, "two different"),
    ],
)
def test_grids_without_trials_or_spread_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(compare.GRIDS["synthetic"], **change)


def test_every_row_of_the_ablation_changes_one_thing():
    base = ablation.learning_config().model
    rows = {row: ablation.ablated(row, base) for row in ablation.ROWS}
    assert rows.pop("Kunlun") == base
    assert len({repr(config) for config in rows.values()}) == len(rows)
    for config in rows.values():
        changed = [f.name for f in dataclasses.fields(base) if getattr(config, f.name) != getattr(base, f.name)]
        assert len(changed) == 1
    assert ablation.change(70.0, 100.0) == pytest.approx(-0.3)


def test_the_ablation_compares_every_row_with_kunlun_and_keeps_what_it_does_not_do(tmp_path, capsys):
    def learned(*test_nes):
        return {"runs": [{part: {"click/ne": x} for part in ("validation", "test")} for x in test_nes]}

    versions = {"device": "a (b), 1 of them"}
    results = {"Kunlun": learned(0.7, 0.8), "one expert": learned(0.75, 0.75)}
    speeds = {"Kunlun": {"samples_per_second": 130.0}, "full attention": {"samples_per_second": 100.0}}
    kept = {
        "learned": {"command": "c", "versions": versions, "results": results},
        "measured": {"command": "c", "versions": versions, "results": speeds},
    }
    (tmp_path / "ablation.json").write_text(json.dumps(kept))
    ablation.ablation(rows=("Kunlun", "one expert", "full attention"), out=tmp_path, learn=False, speed=False)
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert {part: written[part] for part in kept} == kept
    entries = {entry["row"]: entry for entry in written["rows"]}
    assert entries["one expert"]["NE"] == pytest.approx(0.0)
    assert entries["one expert"]["NE_by_seed"] == pytest.approx([0.7 / 0.75 - 1, 0.8 / 0.75 - 1])
    assert entries["full attention"]["speed"] == pytest.approx(0.3)
    assert entries["full attention"]["FLOPs"] == pytest.approx(-0.23, abs=0.01)
    assert "test_ne" not in entries["full attention"]
    printed = capsys.readouterr().out
    assert "| full attention | -23.0% | −29.5 % | 100 | +30.0% | QPS +31.1 % | – | – | neutral |" in printed
    assert (tmp_path / "ablation.png").exists()


@pytest.mark.slow
def test_jobs_tune_repeat_measure_and_survive_a_failure(tmp_path):
    """Two processes on the CPU: one job trains two settings with two seeds, one can't be built."""
    config = small(TrainConfig.synthetic_stream("dcnv2"))
    grid = jobs.Grid((1e-9, 1e-2), (0.0,), (2,), (0, 1), (1.0,))
    broken = dataclasses.replace(config, synthetic=dataclasses.replace(config.synthetic, train=1))
    both, so_far = [jobs.Job("DCNv2", config, grid), jobs.Job("broken", broken, grid)], tmp_path / "so_far.json"
    results = jobs.run_jobs(both, processes=2, turns=2, so_far=so_far, setting="a")
    assert "training labels are" in results["broken"]["error"]
    done = results["DCNv2"]
    assert [run["seed"] for run in done["runs"]] == [0, 1]
    assert done["best"]["learning_rate"] == 1e-2
    assert done["best"]["validation_ne"] == min(t["validation_ne"] for t in done["tried"])
    assert done["best"]["validation_ne"] == pytest.approx(np.mean([r["validation"]["click/ne"] for r in done["runs"]]))
    assert [np.mean(t["validation_ne_by_seed"]) for t in done["tried"]] == [t["validation_ne"] for t in done["tried"]]
    assert all(run["trained_ne"] < run["progressive_ne"][0] for run in done["runs"])
    assert done["samples_per_second"] > 0
    assert json.loads(so_far.read_text())["results"] == json.loads(json.dumps(results))
    compare.write("synthetic", results, {"dcnv2": config}, tmp_path, "compare")
    written = json.loads((tmp_path / "compare_synthetic.json").read_text())
    assert written["means"]["DCNv2"]["test"]["click/ne"]["standard_deviation"] > 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"compare_synthetic.png", "compare_synthetic_curves.png"}
    assert jax.default_backend() == "cpu"

    # Again: the training is kept, a speed that is missing is measured, what failed is tried again.
    kept = json.loads(so_far.read_text())
    del kept["results"]["DCNv2"]["samples_per_second"]
    kept["results"]["DCNv2"]["runs"][0]["test"]["click/ne"] = 0.123
    so_far.write_text(json.dumps(kept))
    again = jobs.run_jobs(both, processes=2, turns=1, so_far=so_far, setting="a")
    assert again["DCNv2"]["runs"][0]["test"]["click/ne"] == 0.123
    assert again["DCNv2"]["samples_per_second"] > 0
    assert "training labels are" in again["broken"]["error"]
    with pytest.raises(ValueError, match="failed; the same command tries them again"):
        compare.finish(again, so_far)
    with pytest.raises(ValueError, match=r"of other settings \(setting a and now b\): finish those, or remove it"):
        jobs.run_jobs(both, processes=2, turns=1, so_far=so_far, setting="b")
    compare.finish({"DCNv2": again["DCNv2"]}, so_far)
    assert not so_far.exists()
