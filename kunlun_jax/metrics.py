"""Metrics of click prediction that can be merged: over batches, hosts, tasks.

Every metric is a frozen state with `update(...)`, `merge(other)` and `result()`; `update` and `merge` return a new
state, and updating by parts equals updating at once. Plain NumPy on the host: sums in float64, ids in int64. A sample
counts as often as its weight says. Where a metric is not defined (no samples, one class only) the result is NaN.

`Evaluation` bundles everything for several tasks and is what training and evaluation use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import numpy as np
from jaxtyping import Float, Int

Weights = Float[np.ndarray, "B"] | None


def _samples(predictions, labels, weight, name="logits"):
    """The three columns as checked float64 arrays."""
    x, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    w = np.ones(x.shape) if weight is None else np.asarray(weight, np.float64)
    if x.ndim != 1 or y.shape != x.shape or w.shape != x.shape:
        raise ValueError(f"{name}, labels and weight must have one shape [B], got {x.shape}, {y.shape} and {w.shape}")
    _refuse(~np.isfinite(x), name, x, "not finite: the model has diverged or an input is broken")
    _refuse((y != 0) & (y != 1), "labels", y, "not 0 or 1")
    _refuse(~(np.isfinite(w) & (w >= 0)), "weight", w, "not a finite number >= 0")
    return x, y, w


def _refuse(bad, name, x, why):
    if bad.any():
        i = tuple(int(j) for j in np.argwhere(bad)[0])
        raise ValueError(f"{name}[{', '.join(map(str, i))}] is {x[i]}, {why} ({int(bad.sum())} of {x.size} values)")


def sigmoid(logits: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """1 / (1 + exp(-x)), without overflow."""
    e = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, e) / (1 + e)


def entropy(rate: float) -> float:
    """Entropy in nats of a click rate: the log loss of always predicting it where it holds.

    Raises:
      ValueError: the rate is not strictly between 0 and 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"base rate must lie strictly between 0 and 1, got {rate}; is the training data of one class?")
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))


def _ratio(a, b) -> float:
    return float(a / b) if b else float("nan")


@dataclass(frozen=True)
class _Summed:
    """A state whose fields are sums: merging adds them."""

    def merge(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LogLoss(_Summed):
    """Weighted mean of -log p(label) in nats, from logits."""

    loss: float = 0.0
    weight: float = 0.0

    def update(self, logits: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None) -> Self:
        x, y, w = _samples(logits, labels, weight)
        return replace(self, loss=self.loss + float(w @ (np.logaddexp(0, x) - y * x)), weight=self.weight + w.sum())

    def result(self) -> float:
        return _ratio(self.loss, self.weight)


@dataclass(frozen=True)
class Calibration(_Summed):
    """Sum of predicted probabilities over sum of labels; 1 is calibrated, above 1 predicts too many clicks."""

    predicted: float = 0.0
    clicked: float = 0.0

    def update(self, logits: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None) -> Self:
        x, y, w = _samples(logits, labels, weight)
        return type(self)(self.predicted + float(w @ sigmoid(x)), self.clicked + float(w @ y))

    def result(self) -> float:
        return _ratio(self.predicted, self.clicked)


def _areas(scores, labels, weight, groups):
    """Per distinct group, ascending: (correctly ordered pairs with ties counted half, all pairs, weight), exact."""
    order = np.lexsort((scores, groups))
    s, y, w, g = scores[order], labels[order], weight[order], groups[order]
    new_group = np.r_[True, g[1:] != g[:-1]]
    new_tie = new_group | np.r_[True, s[1:] != s[:-1]]
    ties = np.flatnonzero(new_tie)
    positive, negative = np.add.reduceat(w * y, ties), np.add.reduceat(w * (1 - y), ties)
    first = np.flatnonzero(new_group[ties])
    total_positive, total_negative = np.add.reduceat(positive, first), np.add.reduceat(negative, first)
    sizes = np.diff(np.r_[first, len(ties)])
    below = np.cumsum(negative) - negative
    below -= np.repeat(below[first], sizes)
    ordered = np.add.reduceat(positive * (below + negative / 2), first)
    return ordered, total_positive * total_negative, total_positive + total_negative


def auc(scores: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None) -> float:
    """Exact weighted area under the ROC curve, ties counted half; NaN with one class only."""
    x, y, w = _samples(scores, labels, weight, "scores")
    if not x.size:
        return float("nan")
    ordered, pairs, _ = _areas(x, y, w, np.zeros(x.size, np.int64))
    return _ratio(ordered[0], pairs[0])


@dataclass(frozen=True)
class _Kept:
    """A state that keeps its samples, in the parts they came in."""

    parts: tuple[tuple[np.ndarray, ...], ...] = ()

    def merge(self, other: Self) -> Self:
        return type(self)(self.parts + other.parts)

    def _with(self, *columns):
        # Copies: the caller may reuse its buffers.
        return type(self)((*self.parts, tuple(column.copy() for column in columns)))

    def _columns(self):
        return tuple(np.concatenate(column) for column in zip(*self.parts, strict=True))


@dataclass(frozen=True)
class AUC(_Kept):
    """Exact area under the ROC curve. Keeps every sample (24 bytes each): for reports; StreamingAUC for streams."""

    def update(self, logits: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None) -> Self:
        return self._with(*_samples(logits, labels, weight))

    def result(self) -> float:
        return auc(*self._columns()) if self.parts else float("nan")


@dataclass(frozen=True)
class GroupedAUCResult:
    """Means of the groups' exact AUCs; groups with one class only have none and are dropped."""

    weighted: float  # by the groups' impressions (summed weights)
    unweighted: float
    kept: int
    dropped: int


@dataclass(frozen=True)
class GroupedAUC(_Kept):
    """gAUC: the AUC within each group (user), averaged over groups. Exact; keeps every sample (32 bytes each)."""

    def update(
        self,
        logits: Float[np.ndarray, "B"],
        labels: Float[np.ndarray, "B"],
        groups: Int[np.ndarray, "B"],
        weight: Weights = None,
    ) -> Self:
        columns = _samples(logits, labels, weight)
        return self._with(*columns, _group_ids(groups, columns[0].shape))

    def result(self) -> GroupedAUCResult:
        if not self.parts or not sum(len(part[0]) for part in self.parts):
            return GroupedAUCResult(float("nan"), float("nan"), 0, 0)
        ordered, pairs, weight = _areas(*self._columns())
        kept = pairs > 0
        area = ordered[kept] / pairs[kept]
        return GroupedAUCResult(
            weighted=_ratio(area @ weight[kept], weight[kept].sum()),
            unweighted=_ratio(area.sum(), kept.sum()),
            kept=int(kept.sum()),
            dropped=int((~kept & (weight > 0)).sum()),
        )


def _group_ids(groups, shape):
    groups = np.asarray(groups)
    if not np.issubdtype(groups.dtype, np.integer):
        raise ValueError(f"groups must be integer ids, got {groups.dtype}")
    if groups.shape != shape:
        raise ValueError(f"groups must have the shape {shape} of the logits' batch axis, got {groups.shape}")
    return groups.astype(np.int64)


BUCKETS = 2**14
LOGIT_RANGE = 16.0  # [choice] ±16 holds every probability from 1e-7 up; what lies beyond shares the outermost buckets


def _empty_histogram():
    return np.zeros((2, BUCKETS))


@dataclass(frozen=True)
class StreamingAUC(_Summed):
    """AUC with bounded state: weights of negatives and positives in 16,384 equal buckets of the logit in [-16, 16].

    Samples of one bucket count as ties, so the exact AUC lies within `error_bound()` of `result()`.
    """

    counts: np.ndarray = field(default_factory=_empty_histogram)  # [2, BUCKETS], by label

    def update(self, logits: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None) -> Self:
        x, y, w = _samples(logits, labels, weight)
        bucket = np.floor((x + LOGIT_RANGE) * (BUCKETS / (2 * LOGIT_RANGE)))
        bucket = np.clip(bucket, 0, BUCKETS - 1).astype(np.int64)
        flat = np.bincount(y.astype(np.int64) * BUCKETS + bucket, weights=w, minlength=2 * BUCKETS)
        return type(self)(self.counts + flat.reshape(2, BUCKETS))

    def result(self) -> float:
        negative, positive = self.counts
        below = np.cumsum(negative) - negative
        return _ratio(positive @ (below + negative / 2), positive.sum() * negative.sum())

    def error_bound(self) -> float:
        """Half the share of (positive, negative) pairs in one bucket: each is counted ½ where truth lies in [0, 1]."""
        negative, positive = self.counts
        return _ratio(positive @ negative / 2, positive.sum() * negative.sum())


@dataclass(frozen=True)
class _Task:
    """The metrics of one task."""

    samples: int = 0
    log_loss: LogLoss = LogLoss()
    calibration: Calibration = Calibration()
    auc: AUC = AUC()
    grouped: GroupedAUC = GroupedAUC()

    def merge(self, other: Self) -> Self:
        merged = {f.name: getattr(self, f.name).merge(getattr(other, f.name)) for f in fields(self)[1:]}
        return type(self)(samples=self.samples + other.samples, **merged)


@dataclass(frozen=True)
class Evaluation:
    """All metrics of several tasks over a data set. Exact; keeps every sample.

    Args:
      tasks: their names, in the order of the logits' and labels' last axis.
      base_rates: click rate of each task in the training data, the base of normalised entropy.

    Raises:
      ValueError: no task, a name twice, base rates for other tasks, a rate outside (0, 1).
    """

    tasks: Sequence[str]
    base_rates: Mapping[str, float]
    states: tuple[_Task, ...] = ()

    def __post_init__(self):
        if not self.tasks or isinstance(self.tasks, str) or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be distinct names, at least one, got {self.tasks!r}")
        if set(self.base_rates) != set(self.tasks):
            raise ValueError(f"base_rates are for {sorted(self.base_rates)}, tasks are {sorted(self.tasks)}")
        for task, rate in self.base_rates.items():
            try:
                entropy(rate)
            except ValueError as e:
                raise ValueError(f"task {task!r}: {e}") from None
        if not self.states:
            object.__setattr__(self, "states", (_Task(),) * len(self.tasks))

    def update(
        self,
        logits: Float[np.ndarray, "B tasks"],
        labels: Float[np.ndarray, "B tasks"],
        label_mask: Float[np.ndarray, "B tasks"] | None = None,
        weight: Float[np.ndarray, "B"] | None = None,
        groups: Int[np.ndarray, "B"] | None = None,
    ) -> Self:
        """Add a batch.

        Args:
          label_mask: which labels are known; 0 or False leaves that task of that sample out, whatever label it holds.
          weight: of the samples, >= 0, by default 1; a sample of weight 0 is left out.
          groups: whose samples these are, for gAUC; without them gAUC stays undefined.

        Raises:
          ValueError: shapes that disagree, a label outside {0, 1}, a logit or weight that is not finite.
        """
        logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
        B, tasks = logits.shape[0] if logits.ndim else 0, len(self.tasks)
        mask = np.ones(labels.shape, bool) if label_mask is None else np.asarray(label_mask)
        weight = np.ones(B) if weight is None else np.asarray(weight, np.float64)
        for name, x, shape in (
            ("logits", logits, (B, tasks)),
            ("labels", labels, (B, tasks)),
            ("label_mask", mask, (B, tasks)),
            ("weight", weight, (B,)),
        ):
            if x.shape != shape:
                raise ValueError(f"{name} must have the shape {shape}, got {x.shape} ({tasks} tasks)")
        _refuse((mask != 0) & (mask != 1), "label_mask", mask, "not 0 or 1")
        groups = None if groups is None else _group_ids(groups, (B,))
        states = []
        for t, (name, state) in enumerate(zip(self.tasks, self.states, strict=True)):
            known = (mask[:, t] != 0) & (weight != 0)
            try:
                columns = _samples(logits[known, t], labels[known, t], weight[known])
            except ValueError as e:
                raise ValueError(f"task {name!r}: {e}") from None
            x, y, w = columns
            states.append(
                _Task(
                    samples=state.samples + len(x),
                    log_loss=state.log_loss.update(*columns),
                    calibration=state.calibration.update(*columns),
                    auc=state.auc.update(*columns),
                    grouped=state.grouped if groups is None else state.grouped.update(x, y, groups[known], w),
                )
            )
        return replace(self, states=tuple(states))

    def merge(self, other: Self) -> Self:
        """Both data sets together.

        Raises:
          ValueError: the two are of different tasks or base rates.
        """
        if tuple(self.tasks) != tuple(other.tasks) or dict(self.base_rates) != dict(other.base_rates):
            raise ValueError(
                f"evaluations of different tasks or base rates don't merge: {dict(self.base_rates)} and "
                f"{dict(other.base_rates)}"
            )
        return replace(self, states=tuple(a.merge(b) for a, b in zip(self.states, other.states, strict=True)))

    def results(self) -> dict[str, float]:
        """Per task: samples, log_loss, ne, calibration, auc; and, where groups were given, gauc (unweighted),
        gauc_weighted (by impressions), gauc_users_kept and gauc_users_dropped. Keys are "task/metric"."""
        out = {}
        for task, state in zip(self.tasks, self.states, strict=True):
            log_loss = state.log_loss.result()
            values = {
                "samples": state.samples,
                "log_loss": log_loss,
                "ne": log_loss / entropy(self.base_rates[task]),
                "calibration": state.calibration.result(),
                "auc": state.auc.result(),
            }
            if state.grouped.parts:
                grouped = state.grouped.result()
                values |= {
                    "gauc": grouped.unweighted,
                    "gauc_weighted": grouped.weighted,
                    "gauc_users_kept": grouped.kept,
                    "gauc_users_dropped": grouped.dropped,
                }
            out |= {f"{task}/{name}": value for name, value in values.items()}
        return out

    def columns(self, task: str) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
        """Logits, labels and weights of a task's samples so far, for plots."""
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}; there are {', '.join(self.tasks)}")
        kept = self.states[list(self.tasks).index(task)].auc
        if not kept.parts:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        logits, labels, weight = kept._columns()
        return logits, labels, weight


def reliability_curve(
    logits: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None, *, bins: int = 20
) -> tuple[Float[np.ndarray, "bins"], Float[np.ndarray, "bins"], Float[np.ndarray, "bins"]]:
    """Mean prediction, click rate and weight of `bins` bins of nearly equal weight, by ascending prediction.

    Equal predictions stay in one bin, so there may be fewer bins.

    Raises:
      ValueError: bins < 1, or a bad column.
    """
    x, y, w = _samples(logits, labels, weight)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    x, y, w = x[w > 0], y[w > 0], w[w > 0]
    if not x.size:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    value, tie = np.unique(x, return_inverse=True)
    w_tie, y_tie = np.bincount(tie, w), np.bincount(tie, w * y)
    middle = np.cumsum(w_tie) - w_tie / 2
    bin_of = np.minimum((middle / w_tie.sum() * bins).astype(np.int64), bins - 1)
    total = np.bincount(bin_of, w_tie)
    used = total > 0
    predicted = np.bincount(bin_of, w_tie * sigmoid(value))[used] / total[used]
    return predicted, np.bincount(bin_of, y_tie)[used] / total[used], total[used]


def roc_curve(
    logits: Float[np.ndarray, "B"], labels: Float[np.ndarray, "B"], weight: Weights = None
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1).

    Raises:
      ValueError: one class only, or a bad column.
    """
    x, y, w = _samples(logits, labels, weight)
    tie = np.unique(-x, return_inverse=True)[1]
    rates = []
    for name, of_class in (("negative", w * (1 - y)), ("positive", w * y)):
        if not of_class.sum():
            raise ValueError(f"the ROC curve needs both classes, there is no {name} sample of {x.size}")
        summed = np.cumsum(np.bincount(tie, of_class))
        rates.append(np.r_[0, summed / summed[-1]])
    return rates[0], rates[1]
