"""Diagnostics: known faults of a detector that show in its results, with their likely causes.

A number such as mAP says that something is wrong, not what. Mirrored or shifted boxes, coordinates
in another scale, a class that is never predicted: each leaves a trace that can be measured, and
each has usual causes. A good detector has none of them, and neither has one that is only weak: an
effect has to be large and beyond chance before it is reported.

    from eecs598.metrics import find_diagnostics, match_detections

    matches = match_detections(predictions, targets, class_names)
    for diagnostic in find_diagnostics(matches, image_sizes):
        print(diagnostic.message)

Objects are all ground truth boxes, difficult ones among them. Symbols: B images, K detections, M
objects, C classes, P pairs of a detection and an object. Boxes are XYXY in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eecs598.metrics.average_precision import score_matches
from eecs598.metrics.matching import (
    Matches,
    Pairs,
    best_of_pairs,
    check_shapes,
    concatenate,
    first_claims,
    pair_iou,
    rank_in_group,
)

# A detector without faults has such an effect by chance less than once in ten thousand times.
SIGNIFICANT = 4.0  # standard deviations
MIN_PAIRS = 30

# Usual thresholds: of average precision, and of the assignment's evaluation and pictures.
LOWEST_THRESHOLD, USUAL_THRESHOLD = 0.05, 0.4

MIN_OBJECTS = 5  # of a class, before it is reported as never predicted
LOOSE_IOU = 0.1
MIN_SHIFT = 0.05  # of the object's size; a weak detector stays below
MIN_SHIFT_PIXELS = 1.0  # less comes from whole-numbered annotations
MIN_SCALE = 1.2
MIN_CORRELATION, MIN_DIFFERENCE = 0.2, 0.1


@dataclass(frozen=True)
class Diagnostic:
    """Something in the results that is very likely a fault.

    Attributes:
        name: for programs, such as ``"mirrored_diagonal"``.
        message: what is seen, with numbers; what usually causes it; where to look.
        severity: ``"error"`` where the metrics can't be trusted, ``"warning"`` where they may be
            right and the fault is in the detector.
    """

    name: str
    message: str
    severity: Literal["error", "warning"]


def find_diagnostics(matches: Matches, image_sizes: Sequence[tuple[int, int]]) -> list[Diagnostic]:
    """Look for known faults in the detections of a data set.

    Args:
        matches: what ``match_detections`` returned. Predictions that it refuses can be given to
            ``find_broken_numbers``.
        image_sizes: height and width of each image, in the pixels of the boxes.

    Returns:
        What was found, errors before warnings; an empty list is a good sign.

    Raises:
        ValueError: another number of sizes than of images.

    Example:
        >>> import torch
        >>> from eecs598.metrics import match_detections
        >>> boxes, labels = torch.tensor([[10.0, 10.0, 50.0, 50.0]]), torch.tensor([0])
        >>> predictions = [{"boxes": boxes, "labels": labels, "scores": torch.tensor([1.7])}]
        >>> matches = match_detections(predictions, [{"boxes": boxes, "labels": labels}], ["cat"])
        >>> [diagnostic.name for diagnostic in find_diagnostics(matches, [(60, 80)])]
        ['impossible_scores']
    """
    if len(image_sizes) != matches.num_images:
        raise ValueError(
            f"got detections of {matches.num_images} images and {len(image_sizes)} image sizes; "
            "pass one size for every image, in the same order."
        )
    sizes = np.array(image_sizes, dtype=np.float64).reshape(-1, 2)[:, ::-1]  # width, height
    extents = _extents(matches, sizes)
    correlation, num_pairs = _place_correlation(matches, sizes)
    mirrored = _mirrored(matches, sizes, correlation, num_pairs)
    found = [
        *_broken_numbers(matches.score, matches.box),
        *_scores_and_classes(matches),
        *extents,
        *mirrored,
    ]
    # A common shift or scale can be measured only where the detections follow their objects.
    follow = _follow(correlation.diagonal().min(), num_pairs)
    if follow and not extents and not mirrored:
        found += _shifted_or_scaled(matches)
    return sorted(found, key=lambda diagnostic: diagnostic.severity)  # "error" before "warning"


# --------------------------------------------------------------------------------------------
# Impossible numbers
# --------------------------------------------------------------------------------------------


def find_broken_numbers(
    predictions: Sequence[Mapping[str, Any]], num_classes: int
) -> list[Diagnostic]:
    """Look for what can't be matched: scores, boxes and labels that no detection can have.

    Scores and boxes may be NaN or infinite, corners swapped, labels out of range.

    Args:
        predictions: one mapping per image, of tensors or arrays ``boxes`` (K, 4) XYXY in pixels,
            ``labels`` (K,) and ``scores`` (K,).
        num_classes: the number of classes, C.

    Raises:
        ValueError: the tensors of an image do not fit together.
    """
    for index, prediction in enumerate(predictions):
        check_shapes(prediction, f"predictions[{index}]", ("scores",))
    scores = concatenate([prediction["scores"] for prediction in predictions])
    boxes = concatenate([prediction["boxes"] for prediction in predictions]).reshape(-1, 4)
    labels = concatenate([prediction["labels"] for prediction in predictions])
    return [*_broken_numbers(scores, boxes), *_broken_labels(labels, num_classes)]


def _broken_labels(labels: np.ndarray, num_classes: int) -> list[Diagnostic]:
    # A comparison with NaN is false, so this counts NaN, too.
    good = (labels >= 0) & (labels < num_classes) & (labels == np.round(labels))
    if good.all():
        return []
    wrong = ", ".join(f"{label:g}" for label in np.unique(labels[~good])[:5])
    return [
        Diagnostic(
            "impossible_labels",
            f"{(~good).sum()} of {len(labels)} labels are none of 0..{num_classes - 1}, the ids of "
            f"{num_classes} classes, for example {wrong}. Usual causes: rows of padding (-1) that "
            "are kept, a background class that is counted as an id, ids that begin with 1, the "
            "category ids of COCO, which have gaps, a detector of other classes. Check how the "
            "best class of a prediction becomes its label.",
            "error",
        )
    ]


def _broken_numbers(scores: np.ndarray, boxes: np.ndarray) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    nan, outside = (~np.isfinite(scores)).sum(), ((scores < 0) | (scores > 1)).sum()
    if nan or outside:
        finite = scores[np.isfinite(scores)]
        span = f" (from {finite.min():.3g} to {finite.max():.3g})" if len(finite) else ""
        found.append(
            Diagnostic(
                "impossible_scores",
                f"{nan} of {len(scores)} scores are NaN or infinite, and {outside} are outside of "
                f"0..1{span}. A score is a probability. Usual causes: logits without the sigmoid, "
                "percentages, a training run that diverged. Check where scores are computed, and "
                "the loss of the last iterations.",
                "error",
            )
        )
    broken = ~np.isfinite(boxes).all(axis=1)
    swapped = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if broken.any() or swapped.any():
        found.append(
            Diagnostic(
                "impossible_boxes",
                f"{broken.sum()} of {len(boxes)} boxes have corners that are NaN or infinite, and "
                f"in {swapped.sum()} the second corner is left of the first or above it. Usual "
                "causes: x, y, width, height or a center where two corners are expected, negative "
                "distances that are not clipped, a training run that diverged. Check how deltas "
                "become boxes.",
                "error",
            )
        )
    return found


# --------------------------------------------------------------------------------------------
# Scores and classes
# --------------------------------------------------------------------------------------------


def _scores_and_classes(matches: Matches) -> list[Diagnostic]:
    names = matches.class_names
    objects = np.bincount(matches.gt_label, minlength=len(names))  # (C,)
    detections = np.bincount(matches.label, minlength=len(names))  # (C,)
    if not objects.sum():
        return []
    if not detections.sum():
        return [
            Diagnostic(
                "no_detections",
                f"There is no detection in {matches.num_images} images with {objects.sum()} "
                "objects. Usual causes: a score threshold that is too high (at "
                f"{LOWEST_THRESHOLD:g} any trained detector finds something), weights that were "
                "not loaded from the checkpoint, images that are not normalized as in training. "
                "Check the highest scores without a threshold.",
                "error",
            )
        ]
    found = []
    highest = matches.score.max()
    for threshold in (LOWEST_THRESHOLD, USUAL_THRESHOLD):
        if highest <= threshold:
            found.append(
                Diagnostic(
                    "low_scores",
                    f"No score is above {threshold:g}, a usual threshold: the highest of "
                    f"{detections.sum()} is {highest:.3g}. Usual causes: a training run that was "
                    "too short or whose loss did not fall, weights that were not loaded, images "
                    "that are not normalized as in training, a detector in training mode. Check "
                    "the classification loss, and the detections on training images.",
                    "warning",
                )
            )
            break
    frequent = objects >= MIN_OBJECTS
    predicted = np.flatnonzero(detections)
    if len(predicted) == 1 and frequent.sum() > 1:
        found.append(
            Diagnostic(
                "one_class",
                f"All {detections.sum()} detections are of class {names[predicted[0]]!r}, but the "
                f"ground truth has {(objects > 0).sum()} classes. Usual causes: class ids that get "
                "lost on the way (all 0, or that of the background), an argmax over the wrong "
                "dimension, training data in which one class is far more frequent than the others. "
                "Check the labels that the loss receives.",
                "warning",
            )
        )
    elif (missing := np.flatnonzero(frequent & (detections == 0))).size:
        listed = ", ".join(f"{names[label]} ({objects[label]} objects)" for label in missing)
        found.append(
            Diagnostic(
                "class_never_predicted",
                f"Never predicted: {listed}. Usual causes: too few examples of the class in "
                "training, another name or another order of the classes than in training, scores "
                "that stay below the threshold. Check how many training objects the class has, and "
                "the order of the class names.",
                "warning",
            )
        )
    return found


# --------------------------------------------------------------------------------------------
# Coordinates in another scale
# --------------------------------------------------------------------------------------------


def _extents(matches: Matches, sizes: np.ndarray) -> list[Diagnostic]:
    """Compare where boxes end with the sizes of their images, width and height (B, 2)."""
    found = [
        *_outside("detections", matches.box, matches.image, sizes),
        *_outside("ground_truth", matches.gt_box, matches.gt_image, sizes),
    ]
    if found or min(len(matches.box), len(matches.gt_box)) < MIN_PAIRS:
        return found
    reach = _reach(matches.box, sizes[matches.image])
    gt_reach = _reach(matches.gt_box, sizes[matches.gt_image])
    ratio = reach / gt_reach
    if (ratio < 0.75).all() or (ratio > 1 / 0.75).all():
        found.append(
            Diagnostic(
                "other_scale",
                f"95 % of the detections end before {reach[0]:.0%} of the width and {reach[1]:.0%} "
                f"of the height of their images, 95 % of the objects before {gt_reach[0]:.0%} and "
                f"{gt_reach[1]:.0%}. Usual cause: one of them is in pixels of the original images, "
                "the other in pixels of the resized ones. Check where boxes are scaled together "
                "with the image.",
                "error",
            )
        )
    return found


def _outside(
    what: str, boxes: np.ndarray, image: np.ndarray, sizes: np.ndarray
) -> list[Diagnostic]:
    """Report boxes (K, 4) with coordinates in 0..1, or outside of their images (K,)."""
    if not len(boxes):
        return []
    words = what.replace("_", " ")
    size_of_box = sizes[image]  # (K, 2)
    if boxes.max() <= 1.5 and size_of_box.min() > 10:
        width, height = sizes[image.min()]
        return [
            Diagnostic(
                f"normalized_{what}",
                f"No coordinate of the {words} is above {boxes.max():.3g}, in images of "
                f"{width:.0f} x {height:.0f} pixels: they are fractions of the width and the "
                "height. Boxes must be in pixels. Check how they are written or read.",
                "error",
            )
        ]
    # A detector that doesn't clip its boxes lets them cross the edge, but not lie beyond it.
    centers = _centers(boxes)
    share = ((centers < 0) | (centers > size_of_box)).any(axis=1).mean()
    if share <= 0.05:
        return []
    reach = _reach(boxes, size_of_box)
    return [
        Diagnostic(
            f"{what}_outside",
            f"{share:.0%} of the boxes of the {words} have their center outside of the image; 95 % "
            f"of them end before {reach[0]:.0%} of its width and {reach[1]:.0%} of its height. "
            "Usual causes: pixels of the original image instead of the resized one, width and "
            "height of the image swapped. Check where boxes are scaled together with the image.",
            "error",
        )
    ]


def _reach(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the share of width and height (2,) before which 95 % of the boxes end."""
    return np.quantile(boxes[:, 2:] / sizes, 0.95, axis=0)


# --------------------------------------------------------------------------------------------
# Mirror images
# --------------------------------------------------------------------------------------------


def _mirrored(
    matches: Matches, sizes: np.ndarray, correlation: np.ndarray, num_pairs: int
) -> list[Diagnostic]:
    """Compare where detections lie with where the objects of their class lie.

    They are compared by correlation over the data set, and not by overlap, for three reasons. It
    needs no guess of what became of the boxes' shapes. It works for a detector that was trained
    mirrored, which finds little that overlaps anything. And with maps that are flattened in one
    order and read in another, only square maps are mirrored: on H x W maps, cell (row i, column j)
    is taken for column (i W + j) // H and row (i W + j) mod H. The column still follows the row, by
    W / H; the row is scrambled.
    """
    (xx, xy), (yx, yy) = correlation.tolist()
    numbers = (
        f"Over {num_pairs} pairs of an image and a class, the x of the detections correlates with "
        f"the x of the objects by {xx:.2f} and with their y by {xy:.2f}; the y of the detections "
        f"by {yx:.2f} and {yy:.2f}."
    )
    if _exceeds(xy, xx, num_pairs) or _exceeds(yx, yy, num_pairs):
        return [
            Diagnostic(
                "mirrored_diagonal",
                "The detections look mirrored across the diagonal of the image, x and y swapped. "
                f"{numbers} {_mirrored_back(matches, sizes)}Usual causes: predictions flattened "
                "row by row while locations run column by column, or the other way round, in "
                "training, in evaluation or in both; boxes written as y1, x1, y2, x2. Check the "
                "order in which the maps of the head are flattened and that of the locations "
                "(tests/test_location_order.py shows how to prove that they agree), and draw a few "
                "detections.",
                "error",
            )
        ]
    found = []
    for name, words, value in (
        ("mirrored_left_right", "from left to right", xx),
        ("mirrored_upside_down", "upside down", yy),
    ):
        if _follow(-value, num_pairs):
            found.append(
                Diagnostic(
                    name,
                    f"The detections look mirrored {words}. {numbers} Usual causes: an image that "
                    "is flipped without its boxes, or with boxes flipped twice; an origin at the "
                    "bottom. Check the augmentation, and draw a few items of the data set with "
                    "their boxes.",
                    "error",
                )
            )
    return found


def _place_correlation(matches: Matches, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Correlate the places of detections (rows: x, y) with those of objects (columns: x, y).

    A pair is an image and a class: the mean center of its m objects there, and that of its m most
    confident detections. The more confident half of the pairs is used, since the rest is largely
    guesses. Places are shares of width and height, less the mean over their class, or a class
    that is always at the top would correlate with whatever always lies left.

    Returns:
        ``(2, 2)`` correlations, and the number of pairs less the number of classes; zeros for too
        few.
    """
    num_classes = len(matches.class_names)
    gt_keys = matches.gt_image * num_classes + matches.gt_label
    keys = matches.image * num_classes + matches.label
    groups, row_of_gt, num_objects = np.unique(gt_keys, return_inverse=True, return_counts=True)
    # The row of the group of each detection; G where its image has no object of its class.
    row = np.searchsorted(groups, keys)
    row[np.append(groups, -1)[row] != keys] = len(groups)
    best = rank_in_group(keys) < np.append(num_objects, 0)[row]
    row_of_best = row[best]
    num_best = np.bincount(row_of_best, minlength=len(groups))

    def means(rows: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        sums = np.bincount(rows, values, minlength=len(groups))
        return sums[num_best > 0] / counts[num_best > 0]

    labels, image = np.divmod(groups[num_best > 0], num_classes)[::-1]
    scores = means(row_of_best, matches.score[best], num_best)
    places = np.stack(
        [means(row_of_best, column, num_best) for column in _centers(matches.box[best]).T]
        + [means(row_of_gt, column, num_objects) for column in _centers(matches.gt_box).T],
        axis=1,
    ) / np.tile(sizes[image], 2)  # (P, 4)
    if len(places) < 2 * MIN_PAIRS:
        return np.zeros((2, 2)), 0
    confident = np.argsort(-scores, kind="stable")[: (len(places) + 1) // 2]
    places, labels = places[confident], labels[confident]
    for label in np.unique(labels):
        places[labels == label] -= places[labels == label].mean(axis=0)
    num_pairs = len(places) - len(np.unique(labels))
    if num_pairs < MIN_PAIRS // 2:
        return np.zeros((2, 2)), 0
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.corrcoef(places.T)[:2, 2:]
    return np.nan_to_num(correlation, nan=0.0), num_pairs  # NaN for places that never differ


def _deviations(correlation: float, num_pairs: int) -> float:
    """Return how many standard deviations a correlation is from 0 (Fisher's z)."""
    return math.atanh(max(-0.999, min(0.999, correlation))) * math.sqrt(max(0, num_pairs - 3))


def _follow(correlation: float, num_pairs: int) -> bool:
    """Return whether a correlation is large and beyond chance."""
    return correlation > MIN_CORRELATION and _deviations(correlation, num_pairs) > SIGNIFICANT


def _exceeds(swapped: float, right: float, num_pairs: int) -> bool:
    """Return whether places follow the other axis, and follow it more than their own."""
    by = (_deviations(swapped, num_pairs) - _deviations(right, num_pairs)) / math.sqrt(2)
    return _follow(swapped, num_pairs) and swapped - right > MIN_DIFFERENCE and by > 2


def _mirrored_back(matches: Matches, sizes: np.ndarray) -> str:
    """Say what the mAP would be with the boxes mirrored back; empty unless it is higher."""
    if not matches.num_ground_truth.any():
        return ""
    size = sizes[matches.image]  # (K, 2)
    center = _centers(matches.box)
    # Location (x, y) becomes (y W / H, x H / W); the boxes around it keep their shape.
    moved = matches.box + np.tile(center[:, ::-1] * size / size[:, ::-1] - center, 2)
    swapped = matches.box[:, [1, 0, 3, 2]]
    as_is, by_center, by_corners = (
        score_matches(candidate)["mAP"]
        for candidate in (matches, matches.with_boxes(moved), matches.with_boxes(swapped))
    )
    if max(by_center, by_corners) <= as_is:
        return ""
    return (
        f"mAP@{matches.iou_threshold:g} is {as_is:.1%}; with the centers of all boxes mirrored "
        f"back it would be {by_center:.1%}, with x and y of their corners swapped "
        f"{by_corners:.1%}. "
    )


def _centers(boxes: np.ndarray) -> np.ndarray:
    """(K, 4) boxes -> (K, 2)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


# --------------------------------------------------------------------------------------------
# Shift and scale
# --------------------------------------------------------------------------------------------


def _shifted_or_scaled(matches: Matches) -> list[Diagnostic]:
    boxes, gt_boxes = _loose_pairs(matches)
    sides, gt_sides = (each[:, 2:] - each[:, :2] for each in (boxes, gt_boxes))
    good = (sides > 0).all(axis=1) & (gt_sides > 0).all(axis=1)
    boxes, gt_boxes, sides, gt_sides = (
        values[good] for values in (boxes, gt_boxes, sides, gt_sides)
    )
    if len(boxes) < MIN_PAIRS:
        return []
    pixels = _centers(boxes) - _centers(gt_boxes)  # (P, 2)
    return [
        *_shifted(pixels, pixels / gt_sides, gt_sides.max(axis=1)),
        *_scaled(np.log(sides / gt_sides)),
    ]


def _loose_pairs(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (P, 4) and objects (P, 4): of each object the most confident detection near it.

    That is a detection of its class that overlaps this object more than any other, however little.
    """
    detection, gt, _ = matches.pairs_of_class
    iou = pair_iou(matches.box[detection], matches.gt_box[gt], pixel=0)
    best_iou, best_gt = best_of_pairs(Pairs(detection, gt, iou), len(matches.label))
    chosen = first_claims(best_gt, best_iou >= LOOSE_IOU)
    return matches.box[chosen], matches.gt_box[best_gt[chosen]]


def _shifted(pixels: np.ndarray, shares: np.ndarray, sides: np.ndarray) -> list[Diagnostic]:
    """Report offsets (P, 2) of detections from their objects, in pixels and in object sizes."""
    median, median_pixels = _lower_median(shares), _lower_median(pixels)
    clear = (np.abs(median) > MIN_SHIFT) & (np.abs(median_pixels) > MIN_SHIFT_PIXELS)
    if not (clear & _one_sided(shares)).any():
        return []
    by_size = []
    bands = (0, 64, "below 64 px"), (64, 128, "of 64 to 128 px"), (128, math.inf, "above 128 px")
    for low, high, words in bands:
        of_size = (sides >= low) & (sides < high)
        if of_size.sum() >= MIN_PAIRS // 3:
            x, y = _lower_median(pixels[of_size])
            by_size.append(f"({x:+.1f}, {y:+.1f}) px for objects {words}")
    return [
        Diagnostic(
            "shifted",
            f"The detections are shifted in one direction: the median shift of {len(pixels)} pairs "
            f"is ({median_pixels[0]:+.1f}, {median_pixels[1]:+.1f}) px to the right and down, "
            f"({median[0]:+.2f}, {median[1]:+.2f}) of the object's size; {'; '.join(by_size)}. "
            "Usual causes: locations that lack half a stride (4, 8, 16 px for strides of 8, 16, "
            "32), the offset of a crop or of padding that is not undone, a backbone whose padding "
            "depends on the size of the image ('same' padding, with sides that are no multiple of "
            "the largest stride). Check the coordinates of the first location, the resizing of "
            "boxes, and whether images padded to a multiple of 32 px show it, too.",
            "warning",
        )
    ]


def _scaled(log_ratios: np.ndarray) -> list[Diagnostic]:
    """Report logarithms (P, 2) of width and height of detections over those of their objects."""
    median = _lower_median(log_ratios)
    clear = np.abs(median) > math.log(MIN_SCALE)
    if not (clear & _one_sided(log_ratios)).any():
        return []
    width, height = np.exp(median)
    return [
        Diagnostic(
            "scaled",
            f"The detections have another size than their objects: the median of {len(log_ratios)} "
            f"pairs is {width:.2f} times the width and {height:.2f} times the height. Usual "
            "causes: deltas multiplied by another stride than in training, distances read as "
            "widths, boxes scaled for another image size, or a training run that was too short to "
            "learn the boxes. Check how deltas become boxes, and the box loss.",
            "warning",
        )
    ]


def _lower_median(values: np.ndarray) -> np.ndarray:
    """(P, 2) -> (2,): of two values in the middle, the lower."""
    return np.quantile(values, 0.5, axis=0, method="lower")


def _one_sided(values: np.ndarray) -> np.ndarray:
    """Return whether more values (P, 2) lie on one side of 0 than chance allows: a sign test."""
    return np.abs(np.sign(values).sum(axis=0)) / math.sqrt(len(values)) > SIGNIFICANT
