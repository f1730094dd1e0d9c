"""Scores of a classifier: accuracy, macro-F1, Matthews correlation, confusion matrix, baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics


class Scores(NamedTuple):
    """How well predictions match the labels.

    Attributes:
        accuracy: share of rows predicted right.
        macro_f1: unweighted mean over all classes of F1 = 2PR / (P + R); a class that is neither
            present nor predicted counts as 0.
        matthews: Matthews correlation in [-1, 1]; 0 where either side is constant.
        confusion: int64 (classes, classes); row = label, column = prediction.
    """

    accuracy: float
    macro_f1: float
    matthews: float
    confusion: NDArray[np.int64]

    def summary(self) -> dict[str, float]:
        """Return the figures that tables and curves show, by name."""
        return {"accuracy": self.accuracy, "macro-F1": self.macro_f1}

    def record(self) -> dict[str, Any]:
        """Return all of it, for a JSON file."""
        return {**self._asdict(), "confusion": np.asarray(self.confusion).tolist()}


def score(labels: Sequence[int] | NDArray[Any], predicted: Any, *, classes: int) -> Scores:
    """Return the scores of predicted class indices.

    Args:
        labels: class indices (rows,).
        predicted: class indices (rows,), or logits (rows, classes), whose argmax is taken.
        classes: number of classes of the task, also those that no row has.

    Returns:
        `Scores`.

    Raises:
        ValueError: no rows, lengths that differ, logits of another width or not finite, or an
            index outside 0 .. classes-1.

    Example:
        >>> score([0, 1, 1], [0, 1, 0], classes=2).confusion.tolist()
        [[1, 0], [1, 1]]
    """
    true, guess = np.asarray(labels), np.asarray(predicted)
    if guess.ndim == true.ndim + 1:
        guess = _argmax(guess, classes)
    if not len(true) or true.shape != guess.shape:
        raise ValueError(
            f"labels have shape {true.shape} and predicted {guess.shape}; give the same number of "
            "rows, at least one"
        )
    for name, values in (("labels", true), ("predicted", guess)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} has dtype {values.dtype}; give integer class indices")
        if values.min() < 0 or values.max() >= classes:
            raise ValueError(
                f"{name} reaches from {values.min()} to {values.max()}, outside 0..{classes - 1}; "
                f"check classes={classes}"
            )
    confusion = metrics.confusion_matrix(true, guess, labels=np.arange(classes))
    return Scores(
        accuracy=float(metrics.accuracy_score(true, guess)),
        macro_f1=_macro_f1(confusion),
        matthews=float(metrics.matthews_corrcoef(true, guess)),
        confusion=confusion,
    )


def majority_baseline(
    train_labels: Sequence[int] | NDArray[Any],
    labels: Sequence[int] | NDArray[Any],
    *,
    classes: int,
) -> Scores:
    """Return the scores of always predicting the most frequent training class.

    Args:
        train_labels: class indices of the training split; the lowest index wins a tie.
        labels: class indices of the split to score.
        classes: number of classes of the task.

    Raises:
        ValueError: `train_labels` is empty, or see `score`.
    """
    if not len(train_labels):
        raise ValueError("train_labels is empty; the majority class needs at least one row")
    most = np.bincount(np.asarray(train_labels), minlength=classes).argmax()
    return score(labels, np.full(len(labels), most), classes=classes)


def _macro_f1(confusion: NDArray[np.int64]) -> float:
    # F1_c = 2 TP / (2 TP + FP + FN), whose denominator is the row sum plus the column sum.
    denominator = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * confusion.diagonal() / np.maximum(denominator, 1)).mean())


def _argmax(logits: NDArray[Any], classes: int) -> NDArray[Any]:
    if logits.shape[1] != classes or not np.isfinite(logits.astype(np.float32)).all():
        raise ValueError(
            f"predicted logits of shape {logits.shape} must be finite and {classes} wide; check "
            f"classes={classes} and the model for NaN"
        )
    return logits.argmax(axis=1)
