"""The benchmark of several devices and the model on paper that goes on from it."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from kunlun_jax.model_configs import DCNv2Config
from kunlun_jax.models.dcnv2 import DCNv2

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
KNOWN = dict(compute=0.02, ids=1000, dense=10**6)


@pytest.fixture(scope="module")
def paper():
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import parallel_paper

        yield parallel_paper
    finally:
        sys.path.remove(str(EXPERIMENTS))


def test_parts_of_a_step_on_paper_by_hand(paper):
    settings = paper.Paper(group=2, rows=10**6, width=4, inside=100.0, across=10.0, latency=1.0)
    known = paper.Known(**KNOWN, beyond=5.0)
    assert paper.step_time(settings, 1, 1, 1, known) == {
        "compute": 0.02, "exchange": 0.0, "averaging": 0.0, "dense": 0.0, "beyond": 0.0,
    }  # fmt: skip
    # A group of two inside a host: ids of 4 bytes, rows of 16 bytes there and back, three waits of one doubling.
    two = paper.step_time(settings, 2, 2, 1, known)
    assert two["exchange"] == pytest.approx(1000 * (4 + 2 * 16) / 100 + 3)
    assert two["averaging"] == 0
    assert two["dense"] == pytest.approx(4 * 10**6 / 100 + 2)
    # Two such groups: each device receives the other group's ids and changes of 4 + 16 + 4 bytes.
    four = paper.step_time(settings, 4, 2, 1, known)
    assert four["averaging"] == pytest.approx(2 * 1000 * (4 + 16 + 4) / 10 + 2)
    assert four["beyond"] == 5.0
    # Where the ids outnumber the rows the block is averaged, however many there are.
    many = dataclasses.replace(known, ids=10**7)
    assert paper.step_time(settings, 4, 2, 1, many)["averaging"] == pytest.approx(5 * 10**5 * 20 / 10 + 2)
    assert paper.step_time(settings, 4, 2, 10, many)["averaging"] == pytest.approx((5 * 10**5 * 20 / 10 + 2) / 10)


def test_the_measured_rows_of_the_described_batch_are_the_papers(paper):
    measured = json.loads((EXPERIMENTS / "results" / "bench_parallel.json").read_text())["measure"]
    known, one = paper.known_from(paper.Paper(), measured)
    samples = measured["model"]["values"]["samples_per_device"]
    assert (one["devices"], one["samples"], known.compute) == (1, samples, one["ms"] / 1e3)
    for row in measured["weak_scaling"]["values"]:
        if row["setting"].startswith("2D") and row["samples"] == 2 * samples:
            on_paper = sum(paper.step_time(paper.Paper(), 2, 1, 1, known).values())
            assert known.beyond == 0 or on_paper == pytest.approx(row["ms"] / 1e3)


def test_a_tiny_measurement_saves_every_part_and_leaves_the_others(paper, tmp_path, monkeypatch):
    import bench_parallel

    def quick(config, schema, rngs):
        return DCNv2(DCNv2Config(width=4, cross_depth=1, cross_rank=0, hidden=(4,)), schema, rngs=rngs)

    monkeypatch.setattr(bench_parallel, "Kunlun", quick)
    monkeypatch.setattr(bench_parallel.jax, "device_count", lambda: 2)
    (tmp_path / "bench_parallel.json").write_text(json.dumps({"quality": {"runs": {"about": {}, "values": [1]}}}))
    tiny = bench_parallel.Measure(
        batches=(4,), table_rows=1000, max_length=8, ids=128, rows=(500,), steps=1, rounds=1, settings="2D",
        rows_in_a_step=(500,), batch_in_a_step=4, parts=("scaling", "steps"), out=tmp_path,
    )  # fmt: skip
    bench_parallel.measure(tiny)
    results = bench_parallel.read_results(tmp_path)
    assert results["quality"]["runs"]["values"] == [1]
    assert {part["about"]["device"] for part in results["measure"].values()} == {"2 × cpu"}
    one, two = results["measure"]["weak_scaling"]["values"]
    assert (one["samples"], one["speedup"], two["samples"], two["devices"]) == (4, 1.0, 8, 2)
    assert two["speedup"] == pytest.approx(two["samples_per_second"] / one["samples_per_second"])
    assert [row["rows"] for row in results["measure"]["rows_in_a_step"]["values"]] == [500]
    assert results["measure"]["model"]["values"]["samples_per_device"] == 4
