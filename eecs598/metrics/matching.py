"""Detections of a data set matched to its ground truth, for every measure of the project.

The rules are those of the VOC 2010+ development kit (Everingham et al., "The Pascal Visual
Object Classes Challenge: A Retrospective", IJCV 2015) as the script https://github.com/Cartucho/mAP
applies them to text files:

- detections are taken by falling score; equal scores in image order, then in the order given;
- each takes the ground truth of its image and class that it overlaps most, of several equal ones
  the first; widths and heights count inclusive pixels, ``x2 - x1 + 1``;
- with an overlap (IoU) of at least the threshold it is a true positive if no earlier detection took
  that box, and otherwise a false positive; if the box is difficult it counts neither way.

Symbols: K detections, M ground truth boxes, C classes, P pairs of a detection and a ground truth
box of its image and class. Boxes are XYXY in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch


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


class Detections(NamedTuple):
    """All detections of a data set, image after image."""

    images: np.ndarray  # (K,) int64
    labels: np.ndarray  # (K,) int64
    boxes: np.ndarray  # (K, 4) float64
    scores: np.ndarray  # (K,) float64


class GroundTruth(NamedTuple):
    """All ground truth boxes of a data set, image after image."""

    images: np.ndarray  # (M,) int64
    labels: np.ndarray  # (M,) int64
    boxes: np.ndarray  # (M, 4) float64
    difficult: np.ndarray  # (M,) bool


def match_detections(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
) -> Matches:
    """Sort the detections of a data set by score and match them to its ground truth.

    Arguments and errors are those of :func:`average_precision`, but ground truth may be absent.
    """
    check_threshold(iou_threshold)
    names = check_class_names(class_names)
    if len(predictions) != len(targets):
        raise ValueError(
            f"got predictions of {len(predictions)} images and targets of {len(targets)}; "
            "pass one of each for every image, in the same order"
        )
    detections = gather_detections(predictions, len(names))
    ground_truth = gather_ground_truth(targets, len(names))
    index = _places(detections.images)

    by_score = np.argsort(-detections.scores, kind="stable")
    detections = Detections(*(column[by_score] for column in detections))
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
        num_ground_truth=np.bincount(
            ground_truth.labels[~ground_truth.difficult], minlength=len(names)
        ),
    )


# ---------------------------------------------------------------------------------------
# Pairs of a detection and a ground truth box
# ---------------------------------------------------------------------------------------


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


def _places(images: np.ndarray) -> np.ndarray:
    """(K,) sorted image indices -> (K,) the place of each element within its image."""
    return np.arange(len(images)) - np.searchsorted(images, images, side="left")


# ---------------------------------------------------------------------------------------
# Checks of the input
# ---------------------------------------------------------------------------------------


def gather_detections(predictions: Sequence[Mapping[str, Any]], num_classes: int) -> Detections:
    images, labels, boxes = _gather_boxes(predictions, "predictions", ("scores",), num_classes)
    scores = _concatenate([prediction["scores"] for prediction in predictions])
    scores = scores.astype(np.float64, copy=False)
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise ValueError(
            f"predictions[{images[wrong[0]]}] has a score {scores[wrong[0]]}; scores must be "
            "finite: look for NaN in the network's output"
        )
    return Detections(images, labels, boxes, scores)


def gather_ground_truth(targets: Sequence[Mapping[str, Any]], num_classes: int) -> GroundTruth:
    images, labels, boxes = _gather_boxes(targets, "targets", (), num_classes)
    difficult = np.zeros(len(images), dtype=bool)
    flagged = np.array([target.get("difficult") is not None for target in targets], dtype=bool)
    if flagged.any():
        flags = [targets[index]["difficult"] for index in np.flatnonzero(flagged)]
        difficult[flagged[images]] = _concatenate(flags)
    return GroundTruth(images, labels, boxes, difficult)


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


def check_threshold(iou_threshold: float) -> None:
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, got {iou_threshold}")


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
