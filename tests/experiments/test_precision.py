"""The paired comparison of dtypes: its arithmetic, and that it needs two seeds."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "experiments"))

from precision import compare, main


def test_differences_are_paired_by_seed():
    values = {(0, "float32"): 0.8, (0, "bfloat16"): 0.81, (1, "float32"): 0.7, (1, "bfloat16"): 0.73}
    runs = [
        {"seed": s, "dtype": d, "progressive_ne": ne, "test_ne": ne + 1}
        for (s, d), ne in reversed(values.items())  # in any order
    ]
    found = compare(runs)["test_ne"]
    assert found["mean_difference"] == pytest.approx(0.02)
    assert found["spread_of_differences"] == pytest.approx(0.02 / 2**0.5)
    assert found["spread_between_seeds"] == pytest.approx(0.1 / 2**0.5)


def test_one_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds: 1 given"):
        main(seeds=(0,), out=tmp_path / "none.json")
