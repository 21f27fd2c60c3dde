"""Detections matched to ground truth, and average precision: of tensors or a folder of text files.

The definition is that of the VOC 2010+ development kit (Everingham et al., "The Pascal Visual
Object Classes Challenge: A Retrospective", IJCV 2015) as the script https://github.com/Cartucho/mAP
applies it to text files:

- detections are taken by falling score; equal scores in image order, then in the order given;
- each takes the ground truth of its image and class that it overlaps most, of several equal ones
  the first; widths and heights count inclusive pixels, ``x2 - x1 + 1``;
- with an overlap (IoU) of at least the threshold it is a true positive if no earlier detection took
  that box, and otherwise a false positive; if the box is difficult it counts neither way;
- difficult boxes are not in the total that recall is measured against;
- average precision (AP) is the area under the precision envelope over all points, or on request the
  mean of the envelope at eleven recalls, as up to VOC 2007;
- mAP is the mean over the classes that have ground truth that is not difficult.

:func:`match_detections` does the matching for every measure of the project; the others are in
`error_analysis`, `uncertainty` and `coco_metrics`. A folder is read with :func:`read_text_format`.

Symbols: K detections, M ground truth boxes, C classes, P pairs of a detection and a ground truth
box of its image and class. Boxes are XYXY in pixels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from eecs598.runtime import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DETECTIONS_FOLDER = "detection-results"
GROUND_TRUTH_FOLDER = "ground-truth"


class TextFormat(NamedTuple):
    """A folder of text files, as the functions on tensors take it."""

    image_names: list[str]  # file names without ".txt", in the order of the images below
    predictions: list[dict[str, torch.Tensor]]  # boxes (K, 4) float64, labels, scores float64
    targets: list[dict[str, torch.Tensor]]  # boxes (M, 4) float64, labels, difficult
    class_names: list[str]  # those of the files, sorted


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections of a data set by falling score, and what each is worth.

    A detection counts as ``true``, ``false``, or neither way (``ignored``, by a difficult box).

    Attributes:
        class_names: the C names.
        num_images: number of images.
        iou_threshold: the least overlap of a match.
        image: (K,) the image of each detection.
        index: (K,) its place among the predictions of that image.
        label: (K,) its class.
        box: (K, 4) float64, XYXY in pixels.
        score: (K,) float64, falling; equal scores in image order, then in the order given.
        truth: (K,) which ground truth box of its image and class it overlaps most, as an index into
            the arrays below; -1 where it overlaps none.
        overlap: (K,) the IoU with that box in inclusive pixels; -1 where there is none.
        true: (K,) bool, the true positives.
        ignored: (K,) bool, those that match a difficult box.
        truth_image, truth_index, truth_label: (M,) image, place in the image, and class of each
            ground truth box, image after image.
        truth_box: (M, 4) float64.
        truth_difficult: (M,) bool.
        num_ground_truth: (C,) boxes of each class that are not difficult.
    """

    class_names: list[str]
    num_images: int
    iou_threshold: float
    image: np.ndarray
    index: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray
    truth: np.ndarray
    overlap: np.ndarray
    true: np.ndarray
    ignored: np.ndarray
    truth_image: np.ndarray
    truth_index: np.ndarray
    truth_label: np.ndarray
    truth_box: np.ndarray
    truth_difficult: np.ndarray
    num_ground_truth: np.ndarray

    @property
    def false(self) -> np.ndarray:
        """(K,) bool, the false positives."""
        return ~(self.true | self.ignored)

    @property
    def matched(self) -> np.ndarray:
        """(K,) bool: the overlap reaches the threshold. Of those, false positives came too late."""
        return self.overlap >= self.iou_threshold

    @property
    def status(self) -> np.ndarray:
        """(K,) of the words "true", "false" and "ignored"."""
        return np.select([self.true, self.ignored], ["true", "ignored"], "false")

    @property
    def truth_found(self) -> np.ndarray:
        """(M,) bool: the ground truth boxes that a true positive took."""
        found = np.zeros(len(self.truth_label), dtype=bool)
        found[self.truth[self.true]] = True
        return found


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


class _Detections(NamedTuple):
    """All detections of a data set, image after image."""

    images: np.ndarray  # (K,) int64
    labels: np.ndarray  # (K,) int64
    boxes: np.ndarray  # (K, 4) float64
    scores: np.ndarray  # (K,) float64


class _GroundTruth(NamedTuple):
    """All ground truth boxes of a data set, image after image."""

    images: np.ndarray  # (M,) int64
    labels: np.ndarray  # (M,) int64
    boxes: np.ndarray  # (M, 4) float64
    difficult: np.ndarray  # (M,) bool


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
        >>> boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
        >>> labels = torch.tensor([0])
        >>> predictions = [{"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9])}]
        >>> average_precision(predictions, [{"boxes": boxes, "labels": labels}], ["cat"])["mAP"]
        1.0
    """
    _check_method(method)
    matches = match_detections(predictions, targets, class_names, iou_threshold)
    return score_matches(matches, method)


def match_detections(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
) -> Matches:
    """Sort the detections of a data set by score and match them to its ground truth.

    Arguments and errors are those of :func:`average_precision`, but ground truth may be absent.
    """
    _check_threshold(iou_threshold)
    names = check_class_names(class_names)
    if len(predictions) != len(targets):
        raise ValueError(
            f"got predictions of {len(predictions)} images and targets of {len(targets)}; "
            "pass one of each for every image, in the same order"
        )
    detections = _gather_detections(predictions, len(names))
    ground_truth = _gather_ground_truth(targets, len(names))
    index = _places(detections.images)

    by_score = np.argsort(-detections.scores, kind="stable")
    detections = _Detections(*(column[by_score] for column in detections))
    # A detection's candidates: the boxes of its image and class.
    keys = detections.images * len(names) + detections.labels
    truth_keys = ground_truth.images * len(names) + ground_truth.labels
    counts, pair_truth = pair_up(keys, truth_keys)
    overlaps = overlaps_of_pairs(detections.boxes, ground_truth.boxes, counts, pair_truth)
    overlap, truth = best_of_pairs(overlaps, counts, pair_truth)

    matched = overlap >= iou_threshold
    ignored = np.zeros(len(matched), dtype=bool)
    ignored[matched] = ground_truth.difficult[truth[matched]]
    return Matches(
        class_names=names,
        num_images=len(targets),
        iou_threshold=float(iou_threshold),
        image=detections.images,
        index=index[by_score],
        label=detections.labels,
        box=detections.boxes,
        score=detections.scores,
        truth=truth,
        overlap=overlap,
        true=first_claims(truth, matched & ~ignored),
        ignored=ignored,
        truth_image=ground_truth.images,
        truth_index=_places(ground_truth.images),
        truth_label=ground_truth.labels,
        truth_box=ground_truth.boxes,
        truth_difficult=ground_truth.difficult,
        num_ground_truth=_count(ground_truth.labels[~ground_truth.difficult], len(names)),
    )


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
    _check_threshold(iou_threshold)
    _check_method(method)
    _, predictions, targets, names = _read_text_format(Path(folder))
    return average_precision(predictions, targets, names, iou_threshold, method=method)


def read_text_format(folder: str | os.PathLike[str]) -> TextFormat:
    """Read a folder of text files, one pair of files an image.

    ``folder/ground-truth/NAME.txt`` has lines ``class x1 y1 x2 y2``, with ``difficult`` at the end
    for a difficult box; ``folder/detection-results/NAME.txt`` has ``class score x1 y1 x2 y2``.
    A class name may contain spaces, a file may be empty. Images come in the order of their sorted
    file names. An image without a file of detections counts as one without detections, and a
    warning says so.

    Args:
        folder: holds the two folders above; :func:`write_text_format` writes such a folder.

    Returns:
        Names, predictions and targets of all images, and the classes. Numbers are float64, so that
        they are those of the files.

    Raises:
        ValueError: for a missing folder, detections without a ground truth file, a malformed line,
            or files that are all empty.
    """
    return _read_text_format(Path(folder))


def _read_text_format(folder: Path) -> TextFormat:
    truth_folder, detection_folder = folder / GROUND_TRUTH_FOLDER, folder / DETECTIONS_FOLDER
    files, detection_files = _list_text_files(truth_folder), _list_text_files(detection_folder)
    if not files:
        raise ValueError(f"{truth_folder} has no .txt file; write one for every image")
    strangers = sorted(set(detection_files) - set(files))
    if strangers:
        raise ValueError(
            f"{_enumerate(strangers)} in {detection_folder} without a file of that name in "
            f"{truth_folder}; write a ground truth file for every image (empty where it shows no "
            "object), or remove the detections of images that are not to be scored"
        )
    missing = sorted(set(files) - set(detection_files))
    if missing:
        warnings.warn(
            f"{_enumerate(missing)} missing in {detection_folder}: scored as images without "
            "detections, all their boxes missed",
            stacklevel=3,  # the caller of the public function
        )

    truths = _read_folder(truth_folder, files, with_score=False)
    found = _read_folder(detection_folder, files, with_score=True, skip=set(missing))
    names = sorted({*truths.names, *found.names})
    if not names:
        raise ValueError(f"the {len(files)} images of {folder} have no ground truth box at all")
    index = {name: label for label, name in enumerate(names)}
    truth_values = np.array(truths.values, dtype=np.float64).reshape(-1, 4)
    values = np.array(found.values, dtype=np.float64).reshape(-1, 5)  # score, x1, y1, x2, y2
    targets = {
        "boxes": truth_values,
        "labels": np.array([index[name] for name in truths.names], dtype=np.int64),
        "difficult": np.array(truths.difficult, dtype=bool),
    }
    predictions = {
        "boxes": values[:, 1:],
        "labels": np.array([index[name] for name in found.names], dtype=np.int64),
        "scores": values[:, 0],
    }
    return TextFormat(
        [file.removesuffix(".txt") for file in files],
        _split_by_image(predictions, found.images, len(files)),
        _split_by_image(targets, truths.images, len(files)),
        names,
    )


def write_text_format(
    folder: str | os.PathLike[str],
    name: str,
    prediction: Mapping[str, Any],
    target: Mapping[str, Any],
    class_names: Sequence[str],
) -> None:
    """Write the pair of files of one image, in the format that :func:`score_folder` reads.

    Numbers keep all their digits, so that a folder scores exactly as the tensors it was written
    from, as long as the images have the order of their file names.

    Args:
        folder: gets ``detection-results/NAME.txt`` and ``ground-truth/NAME.txt``; made if absent.
        name: the image's name, without a folder.
        prediction: ``boxes`` (K, 4), ``labels`` (K,), ``scores`` (K,); K may be 0.
        target: ``boxes`` (M, 4), ``labels`` (M,), optionally ``difficult`` (M,) bool; M may be 0.
        class_names: the C names; ``class_names[label]`` names a label.

    Raises:
        ValueError: for input that is not as above, or names that the format cannot hold.
    """
    if not name or "\0" in name or Path(name).name != name:
        raise ValueError(f"the image name {name!r} cannot name a file; pass it without a folder")
    names = check_class_names(class_names)
    detections = _gather_detections([prediction], len(names))
    ground_truth = _gather_ground_truth([target], len(names))

    detection_lines = [
        f"{names[label]} {score!r} {_format_box(box)}\n"
        for label, score, box in zip(
            detections.labels, detections.scores.tolist(), detections.boxes.tolist(), strict=True
        )
    ]
    truth_lines = [
        f"{names[label]} {_format_box(box)}{' difficult' if difficult else ''}\n"
        for label, box, difficult in zip(
            ground_truth.labels, ground_truth.boxes.tolist(), ground_truth.difficult, strict=True
        )
    ]
    for kind, lines in ((DETECTIONS_FOLDER, detection_lines), (GROUND_TRUTH_FOLDER, truth_lines)):
        with atomic_write(Path(folder) / kind / f"{name}.txt") as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8", newline="\n")


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
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=Path(path).suffix[1:] or "png")
    return axes


# ---------------------------------------------------------------------------------------
# What the other measures build on
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


def pair_up(keys: np.ndarray, truth_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of a detection and a ground truth box with equal keys, detection after detection.

    Args:
        keys: (K,) whole numbers, one a detection.
        truth_keys: (M,) one a ground truth box.

    Returns:
        How many pairs each detection has (K,), and the box of each pair (P,); a detection's boxes
        are in rising order.
    """
    # With the ground truth sorted by key, a detection's candidates are one slice, and a stable
    # sort leaves them in the order of the file.
    order = np.argsort(truth_keys, kind="stable")
    truth_keys = truth_keys[order]
    first = np.searchsorted(truth_keys, keys, side="left")  # (K,)
    counts = np.searchsorted(truth_keys, keys, side="right") - first  # (K,)
    starts = np.cumsum(counts) - counts  # (K,) each detection's first pair
    return counts, order[np.arange(counts.sum()) - np.repeat(starts - first, counts)]


def overlaps_of_pairs(
    boxes: np.ndarray, truth_boxes: np.ndarray, counts: np.ndarray, pair_truth: np.ndarray
) -> np.ndarray:
    """IoU (P,) in inclusive pixels of the pairs of :func:`pair_up`; -1 where disjoint."""
    return _overlaps(np.repeat(boxes, counts, axis=0), truth_boxes[pair_truth])


def best_of_pairs(
    overlaps: np.ndarray, counts: np.ndarray, pair_truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The overlap (K,) of each detection with the box it overlaps most, and that box's index (K,).

    Of several equal overlaps the first. Both are -1 where a detection overlaps nothing.
    """
    best = np.full(len(counts), -1.0)
    match = np.full(len(counts), -1)
    some = counts > 0  # reduceat knows no empty slices
    starts = (np.cumsum(counts) - counts)[some]
    best[some] = np.maximum.reduceat(overlaps, starts)
    pairs = np.arange(len(overlaps))
    winners = np.where(overlaps == np.repeat(best, counts), pairs, len(pairs))
    match[some] = pair_truth[np.minimum.reduceat(winners, starts)]
    match[best < 0] = -1
    return best, match


def first_claims(truth: np.ndarray, claiming: np.ndarray) -> np.ndarray:
    """Which detection gets the box that it claims: of several claims of one box, the first.

    Args:
        truth: (K,) the box that each detection claims.
        claiming: (K,) bool, those that do.

    Returns:
        (K,) bool. With the detections sorted by score, the first claim has the highest score.
    """
    claims = np.flatnonzero(claiming)
    _, first = np.unique(truth[claims], return_index=True)
    granted = np.zeros(len(truth), dtype=bool)
    granted[claims[first]] = True
    return granted


def area_under_envelope(true: np.ndarray, total: int) -> float:
    """AP of one class over all points.

    Args:
        true: (K,) bool, the true positives among its detections, by falling score.
        total: ground truth boxes, more than 0.
    """
    # Recall grows by 1 / total at each true positive and nowhere else.
    return float(_envelope(true).sum() / total)


# ---------------------------------------------------------------------------------------
# Details
# ---------------------------------------------------------------------------------------


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


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of box i with other i, in inclusive pixels: (P, 4), (P, 4) -> (P,); -1 where disjoint."""
    top_left = np.maximum(boxes[:, :2], others[:, :2])
    bottom_right = np.minimum(boxes[:, 2:], others[:, 2:])
    width, height = (bottom_right - top_left + 1).T
    intersection = width * height
    union = _areas(boxes) + _areas(others) - intersection
    # Two negative sides have a positive product, so both signs are looked at.
    overlapping = (width > 0) & (height > 0)
    return np.divide(intersection, union, out=np.full(len(boxes), -1.0), where=overlapping)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _count(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes)


def _places(images: np.ndarray) -> np.ndarray:
    """(K,) sorted image indices -> (K,) the place of each element within its image."""
    return np.arange(len(images)) - np.searchsorted(images, images, side="left")


def _gather_detections(predictions: Sequence[Mapping[str, Any]], num_classes: int) -> _Detections:
    images, labels, boxes = _gather_boxes(predictions, "predictions", ("scores",), num_classes)
    scores = _concatenate([prediction["scores"] for prediction in predictions])
    scores = scores.astype(np.float64, copy=False)
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise ValueError(
            f"predictions[{images[wrong[0]]}] has a score {scores[wrong[0]]}; scores must be "
            "finite: look for NaN in the network's output"
        )
    return _Detections(images, labels, boxes, scores)


def _gather_ground_truth(targets: Sequence[Mapping[str, Any]], num_classes: int) -> _GroundTruth:
    images, labels, boxes = _gather_boxes(targets, "targets", (), num_classes)
    difficult = np.zeros(len(images), dtype=bool)
    flagged = np.array([target.get("difficult") is not None for target in targets], dtype=bool)
    if flagged.any():
        flags = [targets[index]["difficult"] for index in np.flatnonzero(flagged)]
        difficult[flagged[images]] = _concatenate(flags)
    return _GroundTruth(images, labels, boxes, difficult)


def _gather_boxes(
    items: Sequence[Mapping[str, Any]], what: str, more_keys: tuple[str, ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the shapes and values of all images, join them: image index, labels, boxes."""
    sizes = [_check_shapes(item, f"{what}[{index}]", more_keys) for index, item in enumerate(items)]
    images = np.repeat(np.arange(len(items)), np.array(sizes, dtype=np.int64))

    given = _concatenate([item["labels"] for item in items])
    with np.errstate(invalid="ignore"):  # NaN is reported below
        labels = given.astype(np.int64)
    wrong = np.flatnonzero((labels != given) | (labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{what}[{images[wrong[0]]}] has the label {given[wrong[0]]}, expected whole numbers "
            f"0..{num_classes - 1} for {num_classes} class names; remove padding (-1) and check "
            "that the class names are those of the data"
        )
    boxes = _concatenate([item["boxes"] for item in items]).astype(np.float64, copy=False)
    boxes = boxes.reshape(-1, 4)
    good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] >= boxes[:, :2]).all(axis=1)
    wrong = np.flatnonzero(~good)
    if len(wrong):
        raise ValueError(
            f"{what}[{images[wrong[0]]}] has the box {boxes[wrong[0]].tolist()}, expected finite "
            "x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; convert boxes of another form first"
        )
    return images, labels, boxes


def _check_shapes(item: Mapping[str, Any], what: str, more_keys: tuple[str, ...]) -> int:
    """The number of boxes of one image, once its columns are known to fit together."""
    if not isinstance(item, Mapping):
        raise ValueError(
            f"{what} must be a mapping with boxes and labels, got {type(item).__name__}"
        )
    keys = ["boxes", "labels", *more_keys]
    if item.get("difficult") is not None:
        keys.append("difficult")
    for key in keys:
        if not isinstance(item.get(key), torch.Tensor | np.ndarray):
            raise ValueError(
                f"{what}[{key!r}] must be a tensor or an array, got {type(item.get(key)).__name__}"
            )
    shape = tuple(item["boxes"].shape)
    if len(shape) != 2 or shape[1] != 4:
        raise ValueError(f"{what}['boxes'] must have shape (number of boxes, 4), got {shape}")
    for key in keys[1:]:
        if item[key].shape != shape[:1]:
            raise ValueError(
                f"{what}[{key!r}] must have shape {shape[:1]} to go with boxes of shape {shape}, "
                f"got {tuple(item[key].shape)}"
            )
    return shape[0]


def _concatenate(parts: list[Any]) -> np.ndarray:
    """Join the tensors or arrays of all images at once: one conversion, one transfer from a GPU."""
    if not parts:
        return np.empty(0)
    if all(isinstance(part, torch.Tensor) for part in parts):
        return _to_array(torch.cat(parts))
    return np.concatenate([_to_array(part) for part in parts])


def _to_array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    # NumPy has no bfloat16; float64 holds every smaller type exactly.
    return (value.double() if value.is_floating_point() else value).numpy()


def _check_threshold(iou_threshold: float) -> None:
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, got {iou_threshold}")


def _check_method(method: str) -> None:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list, once they are known to be ones that the text format can hold.

    Raises:
        ValueError: a name that is empty, is there twice, or has a line break.
    """
    names = [] if isinstance(class_names, str | Mapping) else list(class_names)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be a list of names, one for a label, got {class_names}")
    for name in names:
        # What the text format would not give back: the reader strips lines and splits on newlines.
        if not name or name != name.strip() or "\n" in name:
            raise ValueError(
                f"the class name {name!r} is empty, begins or ends with a space, or has a line "
                "break; choose another name"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"class_names has a name twice: {names}; every label needs its own")
    return names


class _Lines(NamedTuple):
    """The lines of all files of a folder, in order."""

    images: list[int]
    names: list[str]
    values: list[float]  # the numbers of all lines, one line after the other
    difficult: list[bool]


def _list_text_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; scoring needs a folder that holds {GROUND_TRUTH_FOLDER}/ "
            f"and {DETECTIONS_FOLDER}/ with one .txt file an image in each"
        )
    names = (name for name in os.listdir(folder) if name.endswith(".txt"))
    # A killed process leaves what it began to write under a hidden name.
    return sorted(name for name in names if not name.startswith("."))


def _read_folder(
    folder: Path, files: list[str], with_score: bool, skip: set[str] = frozenset()
) -> _Lines:
    lines = _Lines([], [], [], [])
    for image, file in enumerate(files):
        if file in skip:
            continue
        # Plain strings: building a Path for each of thousands of files costs as much as reading.
        path = os.path.join(folder, file)
        with open(path, "rb") as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file in UTF-8; save it as one") from error
        for number, line in enumerate(text.split("\n"), start=1):
            line = line.strip()
            if not line:
                continue
            try:
                name, values, difficult = _parse_line(line, with_score)
            except ValueError as error:
                form = "class score x1 y1 x2 y2" if with_score else "class x1 y1 x2 y2 [difficult]"
                raise ValueError(
                    f"{path}, line {number}: {line!r} must have the form '{form}', in finite "
                    "numbers with x1 <= x2 and y1 <= y2; correct or remove the line"
                ) from error
            lines.images.append(image)
            lines.names.append(name)
            lines.values.extend(values)
            lines.difficult.append(difficult)
    return lines


def _parse_line(line: str, with_score: bool) -> tuple[str, list[float], bool]:
    """Split a line from the right, because the class name on its left may contain spaces."""
    difficult = False
    if not with_score:
        rest, *last = line.rsplit(None, 1)
        if last == ["difficult"]:
            line, difficult = rest, True
    name, *fields = line.rsplit(None, 5 if with_score else 4)
    values = [float(field) for field in fields]
    x1, y1, x2, y2 = values[-4:]  # too few fields fail here
    if len(values) != 4 + with_score or not all(map(math.isfinite, values)) or x2 < x1 or y2 < y1:
        raise ValueError("not a box")
    return name, values, difficult


def _split_by_image(
    columns: dict[str, np.ndarray], images: list[int], num_images: int
) -> list[dict[str, torch.Tensor]]:
    """Cut the columns of all images, in image order, into one mapping an image."""
    sizes = np.bincount(np.array(images, dtype=np.int64), minlength=num_images).tolist()
    parts = (torch.from_numpy(column).split(sizes) for column in columns.values())
    return [dict(zip(columns, image, strict=True)) for image in zip(*parts, strict=True)]


def _format_box(box: list[float]) -> str:
    return " ".join(map(repr, box))


def _enumerate(files: list[str]) -> str:
    shown = ", ".join(files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} ({shown}{more})"
