"""The loader: every sample once per epoch, the same order every time, and a position that can be restored."""

import threading
from typing import Any

import chex
import grain
import jax
import numpy as np
import pytest
from grain.experimental import assert_equal_output_after_checkpoint

from kunlun_jax.data.pipeline import IndexBatches, Placed, loader
from kunlun_jax.data.samples import FILLER
from kunlun_jax.data.synthetic import SyntheticConfig, generate

SIZE = 50


@pytest.fixture(scope="module")
def samples():
    return generate(SyntheticConfig(train=SIZE, max_length=6)).samples["train"]


def prices(batches):
    """What identifies the samples, per batch, fillers left out."""
    return [batch.dense["price"][batch.weight > 0] for batch in batches]


def test_time_order_is_kept_and_the_last_batch_filled(samples):
    batches = list(loader(samples, batch_size=16, epochs=2, shuffle=False))
    assert [int((batch.weight > 0).sum()) for batch in batches] == [16, 16, 16, 2] * 2
    assert {batch.size for batch in batches} == {16}
    np.testing.assert_array_equal(np.concatenate(prices(batches)), np.tile(samples.dense["price"], 2))


@pytest.mark.parametrize("shards", [1, 2])
def test_shuffling_visits_every_sample_once_per_epoch_in_new_orders(samples, shards):
    batches = list(loader(samples, batch_size=10, shards=shards, epochs=2, shuffle=True, seed=3))
    first, second = np.concatenate(prices(batches)).reshape(2, SIZE)
    assert not np.array_equal(first, second)
    for epoch in (first, second):
        assert not np.array_equal(epoch, samples.dense["price"])
        np.testing.assert_array_equal(np.sort(epoch), np.sort(samples.dense["price"]))


def test_order_depends_on_the_seed_alone(samples):
    def run(seed, **settings):
        return list(loader(samples, batch_size=10, epochs=2, shuffle=True, seed=seed, **settings))

    chex.assert_trees_all_equal(run(1), run(1), run(1, threads=3, prefetch=7))
    assert not np.array_equal(np.concatenate(prices(run(1))), np.concatenate(prices(run(2))))


def test_position_is_restored_at_every_batch(samples):
    # grain compares with NumPy's assert_equal, which cannot look into Batch; its leaves hold everything.
    class Leaves:
        def __iter__(self):
            return _Leaves(loader(samples, batch_size=16, epochs=2, shuffle=True, threads=2))

    assert_equal_output_after_checkpoint(Leaves())


class _Leaves(grain.DatasetIterator):
    def __init__(self, batches):
        super().__init__(batches)

    def __next__(self):
        return jax.tree.leaves(next(self._parent))

    def get_state(self):
        return self._parent.get_state()

    def set_state(self, state):
        self._parent.set_state(state)


def test_batches_are_prepared_in_another_thread(samples, monkeypatch):
    seen = []
    cut = type(samples).batch
    monkeypatch.setattr(
        type(samples),
        "batch",
        lambda self, *args, **kwargs: seen.append(threading.get_ident()) or cut(self, *args, **kwargs),
    )
    batches = loader(samples, batch_size=5, shuffle=False, prefetch=4)
    next(batches)
    list(batches)
    assert len(seen) == 10
    assert threading.get_ident() not in seen


def test_parts_of_several_processes_make_up_the_batch(samples):
    """The last batch has fillers for whole shards; a part may consist of them."""
    settings = {"batch_size": 48, "shards": 4, "shuffle": True, "seed": 2}
    parts = [list(loader(samples, own=own, **settings)) for own in ([0, 2], [1, 3])]
    for whole, one, two in zip(loader(samples, **settings), *parts, strict=True):
        for x, a, b in zip(*(jax.tree.leaves(batch) for batch in (whole, one, two)), strict=True):
            by_shard, first, second = (y.reshape(shards, -1, *y.shape[1:]) for y, shards in ((x, 4), (a, 2), (b, 2)))
            np.testing.assert_array_equal(by_shard[[0, 2]], first)
            np.testing.assert_array_equal(by_shard[[1, 3]], second)
    assert min(part[-1].weight.sum() for part in parts) <= 1


def test_batches_are_checked(samples):
    broken = type(samples)(**{**vars(samples), "labels": samples.labels + 2})
    with pytest.raises(ValueError, match="labels: sample 0, task 'click'"):
        next(loader(broken, batch_size=5, shuffle=False))


def test_index_batches_hold_no_samples_twice():
    batches = IndexBatches(7, batch_size=3, epochs=2, shuffle=False, seed=0)
    assert [batches[i].tolist() for i in range(len(batches))] == 2 * [[0, 1, 2], [3, 4, 5], [6, FILLER, FILLER]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; need at least 1"),
        ({"batch_size": 10, "shards": 4}, "batch_size 10 is no multiple of 4 shards"),
        ({"batch_size": 10, "shards": 0}, "shards is 0"),
        ({"batch_size": 10, "epochs": 0}, "epochs is 0"),
        ({"batch_size": 10, "seed": -1}, "seed is -1"),
        ({"batch_size": 10, "threads": 0}, "threads is 0"),
        ({"batch_size": 10, "threads": 3, "prefetch": 2}, "prefetch is 2; need at least 3"),
    ],
)
def test_bad_settings_are_refused(samples, settings, message):
    with pytest.raises(ValueError, match=message):
        loader(samples, shuffle=False, **settings)


def test_batches_are_placed_in_order_and_errors_arrive_at_their_place():
    def batches():
        yield from range(5)
        raise RuntimeError("broken file")

    stream = Placed(batches(), lambda x: 10 * x)
    assert [next(stream) for _ in range(5)] == [(i, 10 * i) for i in range(5)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken file"):
            next(stream)
    assert list(Placed(iter(range(3)), str)) == [(0, "0"), (1, "1"), (2, "2")]

    def fail(x):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        next(Placed(iter(range(3)), fail))


def test_the_position_is_that_behind_the_last_batch_returned(samples):
    """However far the threads have read ahead."""
    settings: dict[str, Any] = dict(batch_size=5, shuffle=True, seed=1)
    plain, stream = loader(samples, **settings), Placed(loader(samples, **settings), lambda batch: batch)
    assert stream.get_state() == plain.get_state()
    for _ in range(2):
        chex.assert_trees_all_equal(next(stream)[0], next(plain))
        assert stream.get_state() == plain.get_state()
    stream.close()
    assert list(stream) == []
    assert stream.get_state() == plain.get_state()
