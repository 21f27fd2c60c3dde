"""Average precision (AP), its mean over classes (mAP), and curves of precision over recall.

The definition is that of the VOC 2010+ development kit (Everingham et al., "The Pascal Visual
Object Classes Challenge: A Retrospective", IJCV 2015); ``eecs598.metrics.matching`` says what a
true positive is.

- Difficult boxes are not in the total that recall is measured against.
- AP is the area under the precision envelope over all points, or on request the mean of the
  envelope at eleven recalls, as up to VOC 2007.
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
from eecs598.runtime import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision over recall of one class: one point for each score that occurs.

    Attributes:
        recall: (P,) recall of the detections with at least the score; it never falls.
        precision: (P,) their precision.
        scores: (P,) the scores, falling.
        best_f1: the highest harmonic mean of precision and recall, 0 without detections.
        best_f1_threshold: the highest score threshold that reaches ``best_f1`` (detections of that
            score are kept); None without detections.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray
    best_f1: float
    best_f1_threshold: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the same in lists and plain numbers, ready for JSON."""
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
        predictions: one mapping per image, of tensors or arrays ``boxes`` (K, 4) XYXY in pixels,
            ``labels`` (K,) in 0..C-1 and ``scores`` (K,). An image without detections has K = 0.
        targets: one mapping per image, in the same order: ``boxes`` (M, 4), ``labels`` (M,) and,
            where known, ``difficult`` (M,) bool. No padding.
        class_names: the C names; ``class_names[label]`` names a label.
        iou_threshold: the least IoU of a true positive, in 0..1.
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
        ValueError: input that is not as above, or no ground truth to score against.

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


def score_matches(matches: Matches, method: str = "all-point") -> dict[str, Any]:
    """Return what ``average_precision`` returns, of detections that are matched already.

    Args:
        matches: what ``match_detections`` returned.
        method: "all-point" or "11-point", see ``average_precision``.

    Raises:
        ValueError: no ground truth to score against.
    """
    names, num_classes = matches.class_names, len(matches.class_names)
    ap = {}
    for label in classes_with_ground_truth(matches):
        of_class = (matches.label == label) & ~matches.is_ignored
        total = int(matches.num_ground_truth[label])
        ap[names[label]] = _METHODS[method](matches.is_tp[of_class], total)
    counts = {
        "num_ground_truth": matches.num_ground_truth,
        "num_detections": _count(matches.label, num_classes),
        "true_positives": _count(matches.label[matches.is_tp], num_classes),
        "false_positives": _count(matches.label[matches.is_fp], num_classes),
    }
    return {
        "mAP": math.fsum(ap.values()) / len(ap),
        "AP": ap,
        "iou_threshold": matches.iou_threshold,
        "method": method,
        "num_images": matches.num_images,
        **{key: dict(zip(names, value.tolist(), strict=True)) for key, value in counts.items()},
    }


def score_folder(
    folder: str | os.PathLike[str], iou_threshold: float = 0.5, *, method: str = "all-point"
) -> dict[str, Any]:
    """Score a folder in the text format of ``read_text_format``.

    Args:
        folder: a folder as ``write_text_format`` writes it.
        iou_threshold: the least IoU of a true positive, in 0..1.
        method: "all-point" or "11-point", see ``average_precision``.

    Returns:
        What ``average_precision`` returns; the classes are those of the files, sorted by name.

    Raises:
        ValueError: a missing folder, detections without a ground truth file, a malformed line,
            or no ground truth to score against.
    """
    check_threshold(iou_threshold)
    _check_method(method)
    _, predictions, targets, names = read_folder(Path(folder))
    return average_precision(predictions, targets, names, iou_threshold, method=method)


def format_table(result: Mapping[str, Any]) -> str:
    """Format a result of ``average_precision`` or ``score_folder`` as a table for a terminal.

    Each class has one line: AP in percent, and the numbers of ground truth boxes, true positives
    and false positives. The last line is the mAP.
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
        result: what ``average_precision`` or ``score_folder`` returned.
        path: where to save the figure; its suffix chooses the format. A saved figure is not made
            by pyplot and needs no display. Without a path it is a figure of pyplot, which a
            notebook draws below the cell.

    Returns:
        The axes of the figure.
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
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=Path(path).suffix[1:] or "png")
    return axes


def classes_with_ground_truth(matches: Matches) -> np.ndarray:
    """Return the labels that AP is defined for: classes with boxes that are not difficult.

    Raises:
        ValueError: there is no such class.
    """
    labels = np.flatnonzero(matches.num_ground_truth)
    if not len(labels):
        raise ValueError(
            f"the {matches.num_images} images have no ground truth box that is not difficult, so "
            "average precision is not defined; check that the right annotations were given"
        )
    return labels


def precision_recall_curves(matches: Matches) -> dict[str, PrecisionRecall]:
    """Return the curve of every class with ground truth that is not difficult, by class name.

    Raises:
        ValueError: there is no such class.
    """
    return {
        matches.class_names[label]: precision_recall(matches, label)
        for label in classes_with_ground_truth(matches)
    }


def precision_recall(matches: Matches, label: int | None = None) -> PrecisionRecall:
    """Return the precision-recall curve of one class, or of all classes together.

    Detections that match a difficult box count neither way.
    """
    counted = ~matches.is_ignored
    if label is not None:
        counted &= matches.label == label
    is_tp, scores = matches.is_tp[counted], matches.score[counted]
    totals = matches.num_ground_truth
    total = int(totals.sum() if label is None else totals[label])
    # A threshold takes all detections of a score or none: the last of equal scores is the point.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)[: len(scores)])
    hits, kept = np.cumsum(is_tp)[last], last + 1
    f1 = 2 * hits / (kept + total)
    best = int(np.argmax(f1)) if len(f1) else None
    return PrecisionRecall(
        recall=hits / max(1, total),
        precision=hits / kept,
        scores=scores[last],
        best_f1=0.0 if best is None else float(f1[best]),
        best_f1_threshold=None if best is None else float(scores[last][best]),
    )


def area_under_envelope(is_tp: np.ndarray, total: int) -> float:
    """Return the AP of one class over all points.

    Args:
        is_tp: (K,) bool, the true positives among its detections, by falling score.
        total: number of ground truth boxes, more than 0.
    """
    # Recall grows by 1 / total at each true positive and nowhere else.
    return float(_envelope(is_tp).sum() / total)


def _eleven_points(is_tp: np.ndarray, total: int) -> float:
    """Return the AP of one class as up to VOC 2007: the mean envelope at recalls 0, 0.1, ..., 1."""
    # Recall k / 10 is reached with ceil(k * total / 10) true positives: in whole numbers, because
    # 3 / 10 < 0.1 * 3 in floating point. At recall 0 the envelope is its value at the first one.
    needed = -(-np.arange(11) * total // 10)
    envelope = _envelope(is_tp)
    reached = needed <= len(envelope)
    at = np.maximum(needed[reached], 1) - 1
    return float(envelope[at].sum() / 11) if len(envelope) else 0.0


_METHODS = {"all-point": area_under_envelope, "11-point": _eleven_points}


def _envelope(is_tp: np.ndarray) -> np.ndarray:
    """Return for each true positive the best precision at its recall or any higher one."""
    precision = np.cumsum(is_tp) / np.arange(1, len(is_tp) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1][is_tp]


def _count(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes)


def _check_method(method: str) -> None:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
