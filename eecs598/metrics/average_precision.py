"""Average precision (AP), its mean over classes (mAP), and curves of precision over recall.

The definition is that of the VOC 2010+ development kit (Everingham et al., "The Pascal Visual
Object Classes Challenge: A Retrospective", IJCV 2015); `matching` has the rules of what a true
positive is.

- difficult boxes are not in the total that recall is measured against;
- average precision (AP) is the area under the precision envelope over all points, or on request the
  mean of the envelope at eleven recalls, as up to VOC 2007;
- mAP is the mean over the classes that have ground truth that is not difficult.

Symbols: K detections, M ground truth boxes, C classes, P points of a curve. Boxes are XYXY in
pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eecs598.metrics.matching import Matches, check_threshold, match_detections
from eecs598.metrics.text_format import read_folder
from eecs598.runtime import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision against recall of one class: one point for each score threshold that differs.

    Attributes:
        recall, precision: (P,) with the detections of at least the score; recall never falls.
        scores: (P,) the thresholds, falling.
        best_f1: the highest harmonic mean of precision and recall, 0 without detections.
        best_f1_threshold: keeping the detections of at least this score gives it, the highest such
            score; None without detections.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    best_f1: float
    best_f1_threshold: float | None

    def to_dict(self) -> dict[str, Any]:
        """The same in lists and plain numbers, ready for JSON."""
        columns = {name: getattr(self, name).tolist() for name in ("recall", "precision", "scores")}
        return {
            **columns,
            "best_f1": self.best_f1,
            "best_f1_threshold": self.best_f1_threshold,
        }


def average_precision(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
    *,
    method: str = "all-point",
) -> dict[str, Any]:
    """Score the detections of a data set against its ground truth.

    Args:
        predictions: one mapping an image, of tensors or arrays ``boxes`` (K, 4) XYXY in pixels,
            ``labels`` (K,) in 0..C-1 and ``scores`` (K,). An image without detections has K = 0.
        targets: one mapping an image, in the same order: ``boxes`` (M, 4), ``labels`` (M,) and,
            where known, ``difficult`` (M,) bool. No padding.
        class_names: the C names; ``class_names[label]`` names a label.
        iou_threshold: the least overlap of a true positive, in 0..1.
        method: "all-point", or "11-point": the mean of the envelope at recalls 0, 0.1, ..., 1
            (Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010,
            equations 1 and 2).

    Returns:
        Plain numbers, ready for JSON. Precisions are fractions; ``AP`` has the classes with ground
        truth that is not difficult, the counts have every class; ``num_ground_truth`` leaves out
        difficult boxes, and detections that match one are in ``num_detections`` alone::

            {"mAP": 0.75, "AP": {"cat": 0.5, "dog": 1.0}, "iou_threshold": 0.5,
             "method": "all-point", "num_images": 2,
             "num_ground_truth": {...}, "num_detections": {...},
             "true_positives": {...}, "false_positives": {...}}

    Raises:
        ValueError: for input that is not as above, or with no ground truth to score against.

    Example:
        >>> import torch
        >>> boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
        >>> labels = torch.tensor([0])
        >>> predictions = [{"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9])}]
        >>> average_precision(predictions, [{"boxes": boxes, "labels": labels}], ["cat"])["mAP"]
        1.0
    """
    _check_method(method)
    matches = match_detections(predictions, targets, class_names, iou_threshold)
    return score_matches(matches, method)


def precision_recall_curves(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
) -> dict[str, PrecisionRecall]:
    """The precision-recall curve of every class with ground truth that is not difficult, by name.

    Detections that match a difficult box count neither way. Arguments and errors are those of
    :func:`average_precision`.
    """
    return curves_of_matches(match_detections(predictions, targets, class_names, iou_threshold))


def score_folder(
    folder: str | os.PathLike[str], iou_threshold: float = 0.5, *, method: str = "all-point"
) -> dict[str, Any]:
    """Score a folder in the text format of :func:`read_text_format`.

    Args:
        folder: :func:`write_text_format` writes such a folder.
        iou_threshold: the least overlap of a true positive, in 0..1.
        method: "all-point" or "11-point", see :func:`average_precision`.

    Returns:
        What :func:`average_precision` returns; the classes are those of the files, sorted by name.

    Raises:
        ValueError: for a missing folder, detections without a ground truth file, a malformed line,
            or no ground truth to score against.
    """
    check_threshold(iou_threshold)
    _check_method(method)
    _, predictions, targets, names = read_folder(Path(folder))
    return average_precision(predictions, targets, names, iou_threshold, method=method)


def format_table(result: Mapping[str, Any]) -> str:
    """Lay out a result of :func:`average_precision` or :func:`score_folder` for a terminal.

    One line a class: AP in percent, and the numbers of ground truth boxes, true positives and
    false positives. The last line is the mAP.
    """
    last = f"mAP@{result['iou_threshold']:g}"
    width = max(len(name) for name in [*result["AP"], last])
    lines = [f"{'class':<{width}}  {'AP %':>6}  {'boxes':>6}  {'true':>6}  {'false':>6}"]
    for name, ap in result["AP"].items():
        columns = ("num_ground_truth", "true_positives", "false_positives")
        counts = "".join(f"  {result[column][name]:>6}" for column in columns)
        lines.append(f"{name:<{width}}  {100 * ap:>6.2f}{counts}")
    lines.append(f"{last:<{width}}  {100 * result['mAP']:>6.2f}")
    return "\n".join(lines)


def plot_average_precision(
    result: Mapping[str, Any], path: str | os.PathLike[str] | None = None
) -> Axes:
    """Draw the AP of every class as horizontal bars, best on top, with the mAP in the title.

    Args:
        result: what :func:`average_precision` or :func:`score_folder` returned.
        path: where to save the figure; its suffix chooses the format. A saved figure does not go
            through pyplot and so needs no display. Without a path, pyplot shows the figure as
            usual (a notebook draws it below the cell).

    Returns:
        The axes.
    """
    ranked = sorted(result["AP"].items(), key=lambda item: item[1], reverse=True)
    percent = [100 * ap for _, ap in ranked]
    size = (7.0, 1.3 + 0.27 * len(ranked))  # inches: bars keep their height
    if path is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size, layout="constrained")
    else:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")

    axes = figure.add_subplot()
    bars = axes.barh(range(len(ranked)), percent, height=0.72, color="#3b76af")
    axes.bar_label(bars, [f"{value:.1f}" for value in percent], padding=4, fontsize=9)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)  # best on top
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"average precision at IoU {result['iou_threshold']:g} (%)")
    axes.set_title(f"mAP {100 * result['mAP']:.1f} %", fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    if path is not None:
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=Path(path).suffix[1:] or "png")
    return axes


# ---------------------------------------------------------------------------------------
# Measures of detections that are matched already
# ---------------------------------------------------------------------------------------


def score_matches(matches: Matches, method: str = "all-point") -> dict[str, Any]:
    """What :func:`average_precision` returns, of detections that are matched already."""
    names, num_classes = matches.class_names, len(matches.class_names)
    ap = {}
    for label in classes_with_ground_truth(matches):
        of_class = (matches.label == label) & ~matches.ignored
        total = int(matches.num_ground_truth[label])
        ap[names[label]] = _METHODS[method](matches.true[of_class], total)
    counts = {
        "num_ground_truth": matches.num_ground_truth,
        "num_detections": _count(matches.label, num_classes),
        "true_positives": _count(matches.label[matches.true], num_classes),
        "false_positives": _count(matches.label[matches.false], num_classes),
    }
    return {
        "mAP": math.fsum(ap.values()) / len(ap),
        "AP": ap,
        "iou_threshold": matches.iou_threshold,
        "method": method,
        "num_images": matches.num_images,
        **{key: dict(zip(names, value.tolist(), strict=True)) for key, value in counts.items()},
    }


def classes_with_ground_truth(matches: Matches) -> np.ndarray:
    """The labels that AP is defined for.

    Raises:
        ValueError: there are none.
    """
    labels = np.flatnonzero(matches.num_ground_truth)
    if not len(labels):
        raise ValueError(
            f"the {matches.num_images} images have no ground truth box that is not difficult, so "
            "average precision is not defined; check that the right annotations were given"
        )
    return labels


def curves_of_matches(matches: Matches) -> dict[str, PrecisionRecall]:
    """As :func:`precision_recall_curves`, from what :func:`match_detections` returned."""
    return {
        matches.class_names[label]: precision_recall(matches, label)
        for label in classes_with_ground_truth(matches)
    }


def precision_recall(matches: Matches, label: int | None = None) -> PrecisionRecall:
    """The precision-recall curve of one class, or of all classes together.

    Detections that match a difficult box count neither way.
    """
    counted = ~matches.ignored
    if label is not None:
        counted &= matches.label == label
    true, scores = matches.true[counted], matches.score[counted]
    total = matches.num_ground_truth if label is None else matches.num_ground_truth[label]
    total = int(total.sum())
    # A threshold takes all detections of a score or none: the last of equal scores is the point.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
    hits, kept = np.cumsum(true)[last], last + 1
    f1 = 2 * hits / (kept + total)
    best = int(np.argmax(f1)) if len(f1) else None
    return PrecisionRecall(
        recall=hits / max(1, total),
        precision=hits / kept,
        scores=scores[last],
        best_f1=0.0 if best is None else float(f1[best]),
        best_f1_threshold=None if best is None else float(scores[last][best]),
    )


def area_under_envelope(true: np.ndarray, total: int) -> float:
    """AP of one class over all points.

    Args:
        true: (K,) bool, the true positives among its detections, by falling score.
        total: ground truth boxes, more than 0.
    """
    # Recall grows by 1 / total at each true positive and nowhere else.
    return float(_envelope(true).sum() / total)


def _eleven_points(true: np.ndarray, total: int) -> float:
    """AP of one class as up to VOC 2007: the mean of the envelope at recalls 0, 0.1, ..., 1."""
    # Recall k / 10 is reached with ceil(k * total / 10) true positives: in whole numbers, because
    # 3 / 10 < 0.1 * 3 in floating point. At recall 0 the envelope is its value at the first one.
    needed = -(-np.arange(11) * total // 10)
    envelope = _envelope(true)
    reached = needed <= len(envelope)
    at = np.maximum(needed[reached], 1) - 1
    return float(envelope[at].sum() / 11) if len(envelope) else 0.0


_METHODS = {"all-point": area_under_envelope, "11-point": _eleven_points}


def _envelope(true: np.ndarray) -> np.ndarray:
    """At each true positive, the best precision at its recall or any higher one."""
    precision = np.cumsum(true) / np.arange(1, len(true) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1][true]


def _count(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes)


def _check_method(method: str) -> None:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
