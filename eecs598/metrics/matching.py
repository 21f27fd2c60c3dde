"""Match the detections of a data set to its ground truth: the input of every metric.

The rules are those of the VOC 2010+ development kit (Everingham et al., "The Pascal Visual
Object Classes Challenge: A Retrospective", IJCV 2015) as the script https://github.com/Cartucho/mAP
applies them to text files:

- detections are taken by falling score; equal scores in image order, then in the order given;
- each is paired with the ground truth of its image and class that it overlaps most, of several
  equal ones the first; widths and heights count inclusive pixels, ``x2 - x1 + 1``;
- with an overlap (IoU) of at least the threshold it is a true positive if no earlier detection took
  that box, and otherwise a false positive; if the box is difficult it counts neither way.

An evaluation is matched once (``Evaluation.matches``), and all measures take the ``Matches``.

Symbols: B images, K detections, M ground truth boxes, C classes, P pairs of a detection and a
ground truth box of one image. Boxes are XYXY in pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch


class Pairs(NamedTuple):
    """Pairs of a detection and a ground truth box of one image that have a pixel in common."""

    detection: np.ndarray  # (P,) row of the detection, rising
    gt: np.ndarray  # (P,) row of the ground truth box, rising for each detection
    iou: np.ndarray  # (P,) in inclusive pixels, above 0


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections of a data set by falling score, each paired with a ground truth box or none.

    A detection is a true positive, a false positive, or neither: it is ignored where it matches a
    difficult box.

    Attributes:
        class_names: the C names.
        num_images: number of images, B.
        iou_threshold: the least IoU of a match.
        image: (K,) the image of each detection.
        index: (K,) its place among the predictions of that image.
        label: (K,) its class.
        box: (K, 4) float64, XYXY in pixels.
        score: (K,) float64, falling; equal scores in image order, then in the order given.
        gt: (K,) the ground truth box of its image and class that it overlaps most, as a row of the
            ``gt_`` arrays; -1 where it overlaps none.
        iou: (K,) the IoU with that box in inclusive pixels; -1 where there is none.
        is_tp: (K,) bool, the true positives.
        is_ignored: (K,) bool, the detections that match a difficult box.
        gt_image: (M,) the image of each ground truth box; image after image.
        gt_index: (M,) its place among the ground truth of that image.
        gt_label: (M,) its class.
        gt_box: (M, 4) float64, XYXY in pixels.
        gt_difficult: (M,) bool.
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
    gt: np.ndarray
    iou: np.ndarray
    is_tp: np.ndarray
    is_ignored: np.ndarray
    gt_image: np.ndarray
    gt_index: np.ndarray
    gt_label: np.ndarray
    gt_box: np.ndarray
    gt_difficult: np.ndarray
    num_ground_truth: np.ndarray

    @property
    def is_fp(self) -> np.ndarray:
        """(K,) bool, the false positives."""
        return ~(self.is_tp | self.is_ignored)

    @property
    def is_match(self) -> np.ndarray:
        """(K,) bool: the IoU reaches the threshold; a false positive among them is a duplicate."""
        return self.iou >= self.iou_threshold

    @property
    def gt_found(self) -> np.ndarray:
        """(M,) bool: the ground truth boxes that have a true positive."""
        found = np.zeros(len(self.gt_label), dtype=bool)
        found[self.gt[self.is_tp]] = True
        return found

    @functools.cached_property
    def pairs(self) -> Pairs:
        """Every overlapping pair of one image, whatever the classes; made at the first use."""
        return overlapping_pairs(self.image, self.box, self.gt_image, self.gt_box)

    @functools.cached_property
    def pairs_of_class(self) -> Pairs:
        """Those of ``pairs`` in which both are of one class."""
        same = self.label[self.pairs.detection] == self.gt_label[self.pairs.gt]
        return Pairs(*(column[same] for column in self.pairs))

    def with_boxes(self, box: np.ndarray) -> Matches:
        """Match the detections again, as if their boxes were these, ``(K, 4)``."""
        detections = _Detections(self.image, self.index, self.label, box, self.score)
        ground_truth = _GroundTruth(
            self.gt_image, self.gt_index, self.gt_label, self.gt_box, self.gt_difficult
        )
        return _match(
            detections, ground_truth, self.class_names, self.num_images, self.iou_threshold
        )


@dataclass(frozen=True, eq=False)
class _Boxes:
    """The boxes of a data set, N of them."""

    image: np.ndarray  # (N,) int64
    index: np.ndarray  # (N,) int64, place within the image
    label: np.ndarray  # (N,) int64
    box: np.ndarray  # (N, 4) float64


@dataclass(frozen=True, eq=False)
class _Detections(_Boxes):
    """The detections of a data set."""

    score: np.ndarray  # (N,) float64


@dataclass(frozen=True, eq=False)
class _GroundTruth(_Boxes):
    """The ground truth boxes of a data set, image after image."""

    difficult: np.ndarray  # (N,) bool


def match_detections(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
) -> Matches:
    """Sort the detections of a data set by score and match them to its ground truth.

    Args:
        predictions: one mapping per image, of tensors or arrays ``boxes`` (K, 4) XYXY in pixels,
            ``labels`` (K,) in 0..C-1 and ``scores`` (K,). An image without detections has K = 0.
        targets: one mapping per image, in the same order: ``boxes`` (M, 4), ``labels`` (M,) and,
            where known, ``difficult`` (M,) bool. No padding. There may be none at all.
        class_names: the C names; ``class_names[label]`` names a label.
        iou_threshold: the least IoU of a match, in 0..1.

    Raises:
        ValueError: input that is not as above, such as a score that is not finite.
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
    by_score = np.argsort(-detections.score, kind="stable")
    detections = _Detections(**{key: values[by_score] for key, values in vars(detections).items()})
    return _match(detections, ground_truth, names, len(targets), float(iou_threshold))


def _match(
    detections: _Detections,
    ground_truth: _GroundTruth,
    class_names: list[str],
    num_images: int,
    iou_threshold: float,
) -> Matches:
    """Match detections that are sorted by score."""
    num_classes = len(class_names)
    # The candidates of a detection: the boxes of its image and class.
    keys = detections.image * num_classes + detections.label
    gt_keys = ground_truth.image * num_classes + ground_truth.label
    pairs = overlapping_pairs(keys, detections.box, gt_keys, ground_truth.box)
    iou, gt = best_of_pairs(pairs, len(keys))

    is_match = iou >= iou_threshold
    is_ignored = np.zeros(len(is_match), dtype=bool)
    is_ignored[is_match] = ground_truth.difficult[gt[is_match]]
    counted_labels = ground_truth.label[~ground_truth.difficult]
    return Matches(
        class_names=class_names,
        num_images=num_images,
        iou_threshold=iou_threshold,
        **vars(detections),
        gt=gt,
        iou=iou,
        is_tp=first_claims(gt, is_match & ~is_ignored),
        is_ignored=is_ignored,
        **{f"gt_{name}": column for name, column in vars(ground_truth).items()},
        num_ground_truth=np.bincount(counted_labels, minlength=num_classes),
    )


# ---------------------------------------------------------------------------------------
# Pairs of a detection and a ground truth box
# ---------------------------------------------------------------------------------------


def overlapping_pairs(
    keys: np.ndarray, boxes: np.ndarray, gt_keys: np.ndarray, gt_boxes: np.ndarray
) -> Pairs:
    """Return all pairs of a detection and a ground truth box that overlap and have equal keys.

    Args:
        keys: (K,) whole numbers, one per detection, such as its image.
        boxes: (K, 4) of the detections.
        gt_keys: (M,) one per ground truth box.
        gt_boxes: (M, 4).
    """
    # With the ground truth sorted by key, the candidates of a detection are one slice, and a
    # stable sort leaves them in the order given.
    order = np.argsort(gt_keys, kind="stable")
    gt_keys = gt_keys[order]
    first = np.searchsorted(gt_keys, keys, side="left")  # (K,)
    counts = np.searchsorted(gt_keys, keys, side="right") - first  # (K,)
    starts = np.cumsum(counts) - counts  # (K,) the first candidate pair of each detection
    detection = np.repeat(np.arange(len(keys)), counts)  # (P,)
    gt = order[np.arange(len(detection)) - np.repeat(starts - first, counts)]  # (P,)
    iou = pair_iou(boxes[detection], gt_boxes[gt])
    overlapping = np.flatnonzero(iou > 0)
    return Pairs(detection[overlapping], gt[overlapping], iou[overlapping])


def best_of_pairs(pairs: Pairs, num_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest IoU of each detection, and the box it has it with: ``(K,)`` and ``(K,)``.

    Of several boxes with that IoU it is the first. Both are -1 for a detection without a pair.
    """
    best_iou, best_gt = np.full(num_detections, -1.0), np.full(num_detections, -1)
    starts = np.flatnonzero(np.diff(pairs.detection, prepend=-1))  # first pair of each detection
    detection = pairs.detection[starts]
    best_iou[detection] = np.maximum.reduceat(pairs.iou, starts)
    places = np.arange(len(pairs.iou))
    is_best = pairs.iou == best_iou[pairs.detection]
    first_best = np.minimum.reduceat(np.where(is_best, places, len(places)), starts)
    best_gt[detection] = pairs.gt[first_best]
    return best_iou, best_gt


def first_claims(gt: np.ndarray, claiming: np.ndarray) -> np.ndarray:
    """Return which detections get the ground truth box that they claim: the first for each box.

    Args:
        gt: (K,) the box that each detection claims.
        claiming: (K,) bool, the detections that claim one.

    Returns:
        (K,) bool. With the detections sorted by score, the first claim has the highest score.
    """
    claims = np.flatnonzero(claiming)
    _, first = np.unique(gt[claims], return_index=True)
    granted = np.zeros(len(gt), dtype=bool)
    granted[claims[first]] = True
    return granted


def rank_in_group(keys: np.ndarray) -> np.ndarray:
    """Return the place ``(K,)`` of each element among those with an equal key, from 0."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys)) - np.searchsorted(sorted_keys, sorted_keys, side="left")
    return rank


def pair_iou(boxes: np.ndarray, others: np.ndarray, pixel: float = 1.0) -> np.ndarray:
    """Return the IoU ``(P,)`` of box i with other i, both ``(P, 4)``; 0 where they are disjoint.

    Args:
        boxes, others: XYXY in pixels.
        pixel: 1 where corners are the first and the last pixel of a box (VOC), 0 where they are
            points (COCO).
    """
    # Column by column, which is twice as fast as arrays of (P, 2).
    left, top = (np.maximum(boxes[:, axis], others[:, axis]) for axis in (0, 1))
    right, bottom = (np.minimum(boxes[:, axis], others[:, axis]) for axis in (2, 3))
    # Two negative sides would have a positive product.
    intersection = np.maximum(right - left + pixel, 0) * np.maximum(bottom - top + pixel, 0)
    area, other_area = (
        (each[:, 2] - each[:, 0] + pixel) * (each[:, 3] - each[:, 1] + pixel)
        for each in (boxes, others)
    )
    union = area + other_area - intersection
    return np.divide(intersection, union, out=np.zeros(len(boxes)), where=intersection > 0)


# ---------------------------------------------------------------------------------------
# Checks of the input
# ---------------------------------------------------------------------------------------


def gather_detections(predictions: Sequence[Mapping[str, Any]], num_classes: int) -> _Detections:
    """Check the predictions of all images and join them."""
    images, labels, boxes = _gather_boxes(predictions, "predictions", ("scores",), num_classes)
    scores = concatenate([prediction["scores"] for prediction in predictions])
    scores = scores.astype(np.float64, copy=False)
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise ValueError(
            f"predictions[{images[wrong[0]]}] has a score {scores[wrong[0]]}; scores must be "
            "finite: look for NaN in the network's output"
        )
    return _Detections(images, rank_in_group(images), labels, boxes, scores)


def gather_ground_truth(targets: Sequence[Mapping[str, Any]], num_classes: int) -> _GroundTruth:
    """Check the targets of all images and join them."""
    images, labels, boxes = _gather_boxes(targets, "targets", (), num_classes)
    difficult = np.zeros(len(images), dtype=bool)
    flagged = np.array([target.get("difficult") is not None for target in targets], dtype=bool)
    if flagged.any():
        flags = [targets[index]["difficult"] for index in np.flatnonzero(flagged).tolist()]
        difficult[flagged[images]] = concatenate(flags)
    return _GroundTruth(images, rank_in_group(images), labels, boxes, difficult)


def _gather_boxes(
    items: Sequence[Mapping[str, Any]], what: str, more_keys: tuple[str, ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the shapes and values of all images and join them: image indices, labels, boxes."""
    sizes = [check_shapes(item, f"{what}[{index}]", more_keys) for index, item in enumerate(items)]
    images = np.repeat(np.arange(len(items)), np.array(sizes, dtype=np.int64))

    given = concatenate([item["labels"] for item in items])
    with np.errstate(invalid="ignore"):  # NaN is reported below
        labels = given.astype(np.int64)
    wrong = np.flatnonzero((labels != given) | (labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{what}[{images[wrong[0]]}] has the label {given[wrong[0]]}, expected whole numbers "
            f"0..{num_classes - 1} for {num_classes} class names; remove padding (-1) and check "
            "that the class names are those of the data"
        )
    boxes = concatenate([item["boxes"] for item in items]).astype(np.float64, copy=False)
    boxes = boxes.reshape(-1, 4)
    good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] >= boxes[:, :2]).all(axis=1)
    wrong = np.flatnonzero(~good)
    if len(wrong):
        raise ValueError(
            f"{what}[{images[wrong[0]]}] has the box {boxes[wrong[0]].tolist()}, expected finite "
            "x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; convert boxes of another form first"
        )
    return images, labels, boxes


def check_shapes(item: Mapping[str, Any], what: str, more_keys: tuple[str, ...]) -> int:
    """Return the number of boxes of one image after checking that its columns fit together."""
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


def concatenate(parts: list[Any]) -> np.ndarray:
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
    """Raise a ValueError for an IoU threshold outside 0..1."""
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, got {iou_threshold}")


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Return the names as a list after checking that the text format can hold them.

    Raises:
        ValueError: a name that is empty, is there twice, begins or ends with a space, or has a line
            break.
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
