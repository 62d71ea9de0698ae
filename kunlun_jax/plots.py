"""The plots of a run: learning curve, calibration, ROC."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed

import matplotlib.pyplot as plt

from kunlun_jax.metrics import Evaluation, reliability_curve, roc_curve, sigmoid


def plot_learning(
    train: list[dict], validation: list[dict], task: str, path: Path, best_ne: float | None = None
) -> None:
    """NE over steps: of each logged stretch of training, predicted before it was trained on, and of validation."""
    figure, axes = _figure("step", "normalised entropy")
    key = f"{task}/ne"
    axes.plot([x["step"] for x in train], [x[key] for x in train], color="0.6", label="training, before each update")
    axes.plot([x["step"] for x in validation], [x[key] for x in validation], "o-", color="C0", label="validation")
    if best_ne is not None:
        axes.axhline(best_ne, color="C2", linestyle="--", label="best possible on validation")
    axes.set_title(f"Learning to predict {task!r}")
    _save(figure, axes, path)


def plot_calibration(evaluation: Evaluation, task: str, path: Path) -> None:
    """Mean prediction against observed rate, in bins of equal size."""
    logits, labels, weight = evaluation.columns(task)
    predicted, observed, _ = reliability_curve(logits, labels, weight)
    figure, axes = _figure("mean prediction", "observed rate")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfect")
    axes.plot(predicted, observed, "o-", color="C0", label="test")
    axes.hist(
        sigmoid(logits), bins=50, weights=weight / weight.sum(), color="C0", alpha=0.25, label="share of predictions"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1), title=f"Calibration of {task!r}")
    _save(figure, axes, path)


def plot_roc(evaluation: Evaluation, task: str, path: Path) -> None:
    """True against false positive rate over all thresholds."""
    logits, labels, weight = evaluation.columns(task)
    false_positive, true_positive = roc_curve(logits, labels, weight)[:2]
    figure, axes = _figure("false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="chance")
    auc = evaluation.results()[f"{task}/auc"]
    axes.plot(false_positive, true_positive, color="C0", label=f"test, AUC {auc:.4f}")
    axes.set(xlim=(0, 1), ylim=(0, 1), title=f"ROC of {task!r}")
    _save(figure, axes, path)


def plot_run(run: Any, evaluation: Evaluation, tasks, best_ne: float | None = None) -> None:
    """All plots of a run into its plots/ directory."""
    for task in tasks:
        suffix = f"_{task}" if len(tasks) > 1 else ""
        plot_learning(
            run.lines("train"), run.lines("validation"), task, run.plots / f"learning_curve{suffix}.png", best_ne
        )
        plot_calibration(evaluation, task, run.plots / f"calibration{suffix}.png")
        plot_roc(evaluation, task, run.plots / f"roc{suffix}.png")


def _figure(x: str, y: str):
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, axes, path: Path) -> None:
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
