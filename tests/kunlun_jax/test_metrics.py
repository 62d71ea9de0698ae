"""Metrics: hand-computed tables, scikit-learn as an independent check, merging, weights, bad input."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from kunlun_jax.metrics import (
    AUC,
    Calibration,
    Evaluation,
    GroupedAUC,
    LogLoss,
    StreamingAUC,
    auc,
    entropy,
    reliability_curve,
    roc_curve,
    sigmoid,
)


def draw(rng, n=200, ties=False):
    logits = rng.normal(size=n) * 2
    if ties:
        logits = np.round(logits)
    labels = (rng.random(n) < sigmoid(logits - 1)).astype(np.float64)
    labels[:2] = 0, 1
    return logits, labels, rng.integers(1, 5, n).astype(np.float64)


def test_log_loss_by_hand():
    # p = 1/2 costs ln 2; p = 3/4 (logit ln 3) costs ln(4/3) on a click and ln 4 on none.
    state = LogLoss().update([0.0, math.log(3), math.log(3)], [1, 1, 0])
    assert state.result() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3, rel=1e-15)
    weighted = LogLoss().update([0.0, math.log(3)], [1, 0], [3.0, 1.0])
    assert weighted.result() == pytest.approx((3 * math.log(2) + math.log(4)) / 4, rel=1e-15)


def test_log_loss_is_stable_for_large_logits():
    assert LogLoss().update([800.0, -800.0], [0, 1]).result() == 800.0
    assert LogLoss().update([800.0, -800.0], [1, 0]).result() == 0.0
    assert LogLoss().update([40.0], [1]).result() == pytest.approx(math.exp(-40), rel=1e-12)


def test_calibration_by_hand():
    # 0.5 + 0.75 predicted for one click, then three times as much weight on the first.
    assert Calibration().update([0.0, math.log(3)], [1, 0]).result() == pytest.approx(1.25)
    assert Calibration().update([0.0, math.log(3)], [1, 0], [3.0, 1.0]).result() == pytest.approx(2.25 / 3)


def test_entropy_by_hand():
    assert entropy(0.5) == pytest.approx(math.log(2))
    assert entropy(0.25) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


def test_auc_by_hand():
    # Clicks at 3 and 1, none at 2 and 1: pairs (3,2) (3,1) right, (1,2) wrong, (1,1) tied.
    assert auc([3.0, 1, 2, 1], [1, 1, 0, 0]) == pytest.approx(2.5 / 4)
    # The click at 1 counts twice, the other sample at 1 three times: 1·1 + 1·3 + 0 + 2·3/2 of 3·4.
    assert auc([3.0, 1, 2, 1], [1, 1, 0, 0], [1.0, 2, 1, 3]) == pytest.approx(7 / 12)


def test_grouped_auc_by_hand():
    """User 7 all right (2 samples), user -3 tied (3 samples, one pair wrong), users 1 and 2**40 with one class."""
    logits = [2.0, 1, 0, 0, 1, 5, 6, 9]
    labels = [1, 0, 1, 0, 0, 1, 1, 0]
    users = np.array([7, 7, -3, -3, -3, 1, 1, 2**40])
    got = GroupedAUC().update(logits, labels, users).result()
    assert got.unweighted == pytest.approx((1 + 0.25) / 2)
    assert got.weighted == pytest.approx((2 * 1 + 3 * 0.25) / 5)
    assert (got.kept, got.dropped) == (2, 2)


def test_groups_beyond_32_bits_stay_apart():
    users = np.array([0, 0, 2**32, 2**32])
    got = GroupedAUC().update([1.0, 0, 10, 11], [1, 0, 1, 0], users).result()
    assert (got.unweighted, got.kept) == (0.5, 2)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans(), weighted=st.booleans())
def test_against_scikit_learn(seed, ties, weighted):
    rng = np.random.default_rng(seed)
    x, y, w = draw(rng, ties=ties)
    w = w if weighted else np.ones_like(w)
    p = sigmoid(x)
    assert LogLoss().update(x, y, w).result() == pytest.approx(sk.log_loss(y, p, sample_weight=w), rel=1e-12)
    assert AUC().update(x, y, w).result() == pytest.approx(sk.roc_auc_score(y, x, sample_weight=w), rel=1e-12)
    users = rng.integers(0, 20, len(x)) * 10**12
    got = GroupedAUC().update(x, y, users, w).result()
    areas, sizes, one_class = [], [], 0
    for user in np.unique(users):
        of = users == user
        if 0 < y[of].mean() < 1:
            areas.append(sk.roc_auc_score(y[of], x[of], sample_weight=w[of]))
            sizes.append(w[of].sum())
        else:
            one_class += 1
    assert got.unweighted == pytest.approx(np.mean(areas), rel=1e-12)
    assert got.weighted == pytest.approx(np.average(areas, weights=sizes), rel=1e-12)
    assert (got.kept, got.dropped) == (len(areas), one_class)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans(), spread=st.sampled_from([0.01, 1.0, 30.0]))
def test_streaming_auc_is_within_its_own_bound(seed, ties, spread):
    x, y, w = draw(np.random.default_rng(seed), 500, ties)
    x = x * spread
    state = StreamingAUC().update(x, y, w)
    error = abs(state.result() - auc(x, y, w))
    assert error <= state.error_bound() + 1e-12
    if spread == 1.0 and not ties:
        assert state.error_bound() < 2e-3


def test_streaming_auc_by_hand():
    """All samples in one bucket: ½, and nothing is known; one pair apart and one tied: ¾ ± ¼."""
    state = StreamingAUC().update([0.0, 1e-9], [0, 1])
    assert (state.result(), state.error_bound()) == (0.5, 0.5)
    state = StreamingAUC().update([0.0, 1.0, 1.0 + 1e-9], [0, 0, 1])
    assert (state.result(), state.error_bound()) == (0.75, 0.25)


def test_streaming_auc_counts_logits_beyond_its_range():
    assert StreamingAUC().update([-1e30, 1e30], [0, 1]).result() == 1.0


def test_streaming_auc_is_close_on_a_large_stream():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200_000) - 3.5
    y = rng.random(len(x)) < sigmoid(x)
    state = StreamingAUC()
    for part in np.array_split(np.arange(len(x)), 7):
        state = state.update(x[part], y[part])
    assert abs(state.result() - auc(x, y)) < 2e-6
    assert state.error_bound() < 5e-4


@pytest.mark.parametrize("metric", [LogLoss, Calibration, AUC, StreamingAUC, GroupedAUC])
def test_merging_equals_all_at_once_and_weight_equals_repetition(metric):
    rng = np.random.default_rng(1)
    x, y, w = draw(rng, ties=True)
    users = rng.integers(0, 9, len(x))

    def state(i, weight):
        groups = (users[i],) if metric is GroupedAUC else ()
        return metric().update(x[i], y[i], *groups, weight)

    def close(a, b):
        if metric is GroupedAUC:
            a, b = (list(vars(z).values()) for z in (a, b))
        assert a == pytest.approx(b, rel=1e-12)

    everything = np.arange(len(x))
    whole = state(everything, w).result()
    parts = [everything[:3], everything[3:3], everything[3:150], everything[150:]]
    merged = metric()
    for part in parts:
        merged = merged.merge(state(part, w[part]))
    close(merged.result(), whole)
    left = state(parts[0], w[parts[0]]).merge(metric().merge(state(parts[2], w[parts[2]])))
    close(left.merge(state(parts[3], w[parts[3]])).result(), whole)
    repeated = np.repeat(everything, w.astype(int))
    if metric is GroupedAUC:
        again, once = state(repeated, None).result(), whole
        close(again, once)
    else:
        close(state(repeated, None).result(), whole)


def test_states_do_not_change_with_the_callers_buffers():
    x, y = np.array([1.0, 0.0]), np.array([1.0, 0.0])
    users = np.zeros(2, np.int64)
    state, grouped = AUC().update(x, y), GroupedAUC().update(x, y, users)
    x[:], users[:] = [0, 1], [0, 1]
    assert state.result() == 1.0
    assert grouped.result().kept == 1


def test_undefined_results_are_nan():
    for state in (LogLoss(), Calibration(), AUC(), StreamingAUC(), AUC().update([], [])):
        assert math.isnan(state.result())
    assert math.isnan(StreamingAUC().error_bound())
    assert math.isnan(AUC().update([1.0, 2.0], [1, 1]).result())
    assert math.isnan(Calibration().update([1.0], [0]).result())
    for state in (GroupedAUC(), GroupedAUC().update([], [], np.zeros(0, int))):
        assert (state.result().kept, state.result().dropped) == (0, 0)
        assert math.isnan(state.result().unweighted)
    one_class = GroupedAUC().update([1.0, 2.0], [1, 1], np.array([4, 4])).result()
    assert math.isnan(one_class.weighted)
    assert one_class.dropped == 1


def test_evaluation_by_hand():
    third = math.log(3)
    evaluation = Evaluation(tasks=("click", "buy"), base_rates={"click": 0.5, "buy": 0.25}).update(
        logits=[[0.0, third], [third, 0.0], [-third, 7.0]],
        labels=[[0, 1], [1, 0], [0, -1]],
        label_mask=[[1, 1], [1, 1], [1, 0]],  # the label -1 is unknown: not an error
        weight=[1.0, 2.0, 1.0],
        groups=np.array([5, 5, 6]),
    )
    click = (math.log(2) + 3 * math.log(4 / 3)) / 4
    buy = (math.log(4 / 3) + 2 * math.log(2)) / 3
    assert evaluation.results() == pytest.approx(
        {
            "click/samples": 3,
            "click/log_loss": click,
            "click/ne": click / math.log(2),
            "click/calibration": (0.5 + 2 * 0.75 + 0.25) / 2,
            "click/auc": 1.0,
            "click/gauc": 1.0,
            "click/gauc_weighted": 1.0,
            "click/gauc_users_kept": 1,
            "click/gauc_users_dropped": 1,
            "buy/samples": 2,
            "buy/log_loss": buy,
            "buy/ne": buy / entropy(0.25),
            "buy/calibration": (0.75 + 2 * 0.5) / 1,
            "buy/auc": 1.0,
            "buy/gauc": 1.0,
            "buy/gauc_weighted": 1.0,
            "buy/gauc_users_kept": 1,
            "buy/gauc_users_dropped": 0,
        },
        rel=1e-12,
    )
    np.testing.assert_array_equal(evaluation.columns("buy")[0], [third, 0.0])


def test_predicting_the_base_rate_where_it_holds_scores_one():
    logit = math.log(0.2 / 0.8)
    evaluation = Evaluation(("click",), {"click": 0.2}).update(np.full((10, 1), logit), np.r_[1, 1, [0] * 8][:, None])
    assert evaluation.results()["click/ne"] == pytest.approx(1, rel=1e-12)
    assert "click/gauc" not in evaluation.results()


def test_evaluation_merges_and_drops_weight_zero():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(60, 2)), rng.integers(0, 2, (60, 2))
    mask, weight, users = rng.random((60, 2)) < 0.8, rng.integers(0, 3, 60), rng.integers(0, 7, 60)
    empty = Evaluation(("a", "b"), {"a": 0.4, "b": 0.6})

    def on(evaluation, i):
        return evaluation.update(logits[i], labels[i], mask[i], weight[i], users[i])

    whole = on(empty, slice(None)).results()
    merged = on(empty, slice(0, 20)).merge(on(empty, slice(20, 60))).merge(empty)
    assert merged.results() == pytest.approx(whole, rel=1e-12)
    assert on(on(empty, slice(0, 20)), slice(20, 60)).results() == pytest.approx(whole, rel=1e-12)
    assert on(empty, weight > 0).results() == pytest.approx(whole, rel=1e-12)
    assert whole["a/samples"] == int((mask[:, 0] & (weight > 0)).sum())


def test_evaluation_takes_jax_arrays_in_low_precision():
    import jax.numpy as jnp

    evaluation = Evaluation(("click",), {"click": 0.5})
    got = evaluation.update(jnp.array([[1.0], [-1.0]], jnp.bfloat16), jnp.array([[1], [0]])).results()
    assert got["click/log_loss"] == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12)


def test_reliability_curve_by_hand():
    third = math.log(3)
    predicted, clicked, weight = reliability_curve([0.0, third, 0.0, third], [1, 1, 0, 1], [1.0, 2, 1, 2], bins=2)
    np.testing.assert_allclose(predicted, [0.5, 0.75])
    np.testing.assert_allclose(clicked, [0.5, 1.0])
    np.testing.assert_allclose(weight, [2, 4])
    x, y, w = draw(np.random.default_rng(3), 1000)
    predicted, clicked, weight = reliability_curve(x, y, w, bins=10)
    assert len(weight) == 10
    np.testing.assert_allclose(weight, w.sum() / 10, rtol=0.02)
    assert weight @ clicked == pytest.approx(w @ y)
    assert weight @ predicted == pytest.approx(w @ sigmoid(x))
    assert all(len(part) == 0 for part in reliability_curve([], []))


@pytest.mark.parametrize("ties", [True, False])
def test_roc_curve_against_scikit_learn(ties):
    x, y, w = draw(np.random.default_rng(4), ties=ties)
    false, true = roc_curve(x, y, w)
    expected_false, expected_true, _ = sk.roc_curve(y, x, sample_weight=w, drop_intermediate=False)
    np.testing.assert_allclose(false, expected_false)
    np.testing.assert_allclose(true, expected_true)
    assert np.trapezoid(true, false) == pytest.approx(auc(x, y, w))


@pytest.mark.parametrize("metric", [LogLoss, Calibration, AUC, StreamingAUC])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([0.0, 1.0], [0, 2]), r"labels\[1\] is 2.0, not 0 or 1 \(1 of 2 values\)"),
        (([0.0, 1.0], [0, 0.5]), r"labels\[1\] is 0.5, not 0 or 1"),
        (([0.0, 1.0], [0, math.nan]), r"labels\[1\] is nan, not 0 or 1"),
        (([math.nan, 1.0], [0, 1]), r"logits\[0\] is nan, not finite"),
        (([math.inf, 1.0], [0, 1]), r"logits\[0\] is inf, not finite"),
        (([0.0, 1.0], [0, 1, 1]), r"must have one shape \[B\], got \(2,\), \(3,\) and \(2,\)"),
        (([[0.0], [1.0]], [[0], [1]]), r"must have one shape \[B\], got \(2, 1\)"),
        (([0.0, 1.0], [0, 1], [1.0]), r"must have one shape \[B\], got \(2,\), \(2,\) and \(1,\)"),
        (([0.0, 1.0], [0, 1], [1.0, -1.0]), r"weight\[1\] is -1.0, not a finite number >= 0"),
        (([0.0, 1.0], [0, 1], [1.0, math.inf]), r"weight\[1\] is inf"),
    ],
)
def test_bad_columns(metric, columns, message):
    with pytest.raises(ValueError, match=message):
        metric().update(*columns)


@pytest.mark.parametrize(
    ("groups", "message"),
    [([0.5, 1.0], "groups must be integer ids, got float64"), ([1, 2, 3], r"shape \(2,\) .* got \(3,\)")],
)
def test_bad_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        GroupedAUC().update([0.0, 1.0], [0, 1], groups)


@pytest.mark.parametrize(
    ("tasks", "rates", "message"),
    [
        (("a",), {"a": 0.0}, "task 'a': base rate must lie strictly between 0 and 1, got 0.0"),
        (("a",), {"a": 1.0}, "got 1.0"),
        (("a",), {"a": math.nan}, "got nan"),
        (("a",), {"b": 0.5}, r"base_rates are for \['b'\], tasks are \['a'\]"),
        ((), {}, "tasks must be distinct names, at least one"),
        (("a", "a"), {"a": 0.5}, "tasks must be distinct names"),
        ("ab", {"a": 0.5, "b": 0.5}, "tasks must be distinct names, at least one, got 'ab'"),
    ],
)
def test_bad_evaluation(tasks, rates, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(tasks, rates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((3, 1))}, r"logits must have the shape \(3, 2\), got \(3, 1\)"),
        ({"logits": np.zeros(3)}, r"logits must have the shape \(3, 2\), got \(3,\)"),
        ({"labels": np.zeros((4, 2))}, r"labels must have the shape \(3, 2\), got \(4, 2\)"),
        ({"label_mask": np.ones((3, 1))}, r"label_mask must have the shape \(3, 2\), got \(3, 1\)"),
        ({"label_mask": np.full((3, 2), 0.5)}, r"label_mask\[0, 0\] is 0.5, not 0 or 1"),
        ({"weight": np.ones(2)}, r"weight must have the shape \(3,\), got \(2,\)"),
        ({"weight": np.array([1, -1, 1])}, r"task 'click': weight\[1\] is -1.0"),
        ({"groups": np.array([1, 2])}, r"groups must have the shape \(3,\)"),
        ({"labels": np.array([[0, 1], [0, 1], [0, 3]])}, r"task 'buy': labels\[2\] is 3.0, not 0 or 1"),
        ({"logits": np.array([[0, 1], [0, 1], [np.nan, 3]])}, r"task 'click': logits\[2\] is nan"),
    ],
)
def test_bad_batch(changes, message):
    batch = {"logits": np.zeros((3, 2)), "labels": np.zeros((3, 2))} | changes
    with pytest.raises(ValueError, match=message):
        Evaluation(("click", "buy"), {"click": 0.5, "buy": 0.5}).update(**batch)


def test_evaluations_of_different_bases_do_not_merge():
    with pytest.raises(ValueError, match="different tasks or base rates don't merge"):
        Evaluation(("a",), {"a": 0.5}).merge(Evaluation(("a",), {"a": 0.4}))


def test_bad_plot_requests():
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        reliability_curve([0.0], [1], bins=0)
    with pytest.raises(ValueError, match="needs both classes, there is no negative sample of 2"):
        roc_curve([0.0, 1.0], [1, 1])
    with pytest.raises(ValueError, match="needs both classes, there is no positive sample of 1"):
        roc_curve([0.0], [0])
    with pytest.raises(ValueError, match="unknown task 'buy'; there are click"):
        Evaluation(("click",), {"click": 0.5}).columns("buy")
