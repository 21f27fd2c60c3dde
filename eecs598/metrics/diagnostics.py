"""Known smells of a detector's results, in words.

A number such as mAP says that something is wrong, not what. Mirrored or shifted boxes, coordinates
in another scale, a class that is never predicted: each leaves a trace that can be measured, and
each has usual causes. A good detector shows none of them, and neither does one that is only weak:
an effect has to be large and beyond chance before it is called out.

    from eecs598.metrics.diagnostics import find_folder_smells, find_smells

    for smell in find_smells(predictions, targets, class_names, image_sizes=sizes):
        print(smell.message)

Symbols: K detections, M ground truth boxes, C classes, P pairs of a detection and an object. Boxes
are XYXY in pixels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.text_format import DETECTIONS_FOLDER, GROUND_TRUTH_FOLDER, read_text_format

__all__ = ["Smell", "find_folder_smells", "find_smells"]

# Effects that a detector without fault has by chance less than once in ten thousand times.
SIGNIFICANT = 4.0  # standard deviations
MIN_PAIRS = 30

# Usual thresholds: of average precision, and of the assignment's evaluation and pictures.
LOWEST_THRESHOLD, USUAL_THRESHOLD = 0.05, 0.4

MIN_OBJECTS = 5  # of a class, before one wonders why it is never predicted
LOOSE_IOU = 0.1
MIN_SHIFT = 0.05  # of the object's size; a weak detector stays below
MIN_SHIFT_PIXELS = 1.0  # less comes from whole-numbered annotations
MIN_SCALE = 1.2
MIN_CORRELATION, MIN_DIFFERENCE = 0.2, 0.1

WHERE_PLACES = (
    "Look at the order in which the head's maps are flattened and at that of the locations "
    "(tests/test_location_order.py shows how to prove that they agree), and draw a few detections."
)


@dataclass(frozen=True)
class Smell:
    """Something in the results that is hardly right.

    Attributes:
        name: for programs, such as ``"mirrored_diagonal"``.
        message: what is seen, with numbers; what usually causes it; where to look.
        severity: ``"error"`` where the metrics can't be believed, ``"warning"`` where they may be
            right and the detector is what is wrong.
    """

    name: str
    message: str
    severity: Literal["error", "warning"]


class _Image(NamedTuple):
    """Detections and ground truth of an image, in float64 on the CPU."""

    boxes: Tensor  # (K, 4)
    labels: Tensor  # (K,)
    scores: Tensor  # (K,)
    true_boxes: Tensor  # (M, 4)
    true_labels: Tensor  # (M,)
    size: Tensor  # (2,) width, height


def find_smells(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    image_sizes: Sequence[tuple[int, int]],
) -> list[Smell]:
    """Look for known smells in the detections of a data set.

    Unlike ``eecs598.metrics`` it takes scores and boxes that are no numbers, since that is one of
    the smells.

    Args:
        predictions: one mapping an image, of tensors or arrays ``boxes`` (K, 4) XYXY in pixels,
            ``labels`` (K,) in 0..C-1 and ``scores`` (K,).
        targets: the same for the ground truth: ``boxes`` (M, 4) and ``labels`` (M,).
        class_names: the C names.
        image_sizes: height and width of each image, in the pixels of the boxes.

    Returns:
        What was found, the graver first; an empty list is a good sign.

    Raises:
        ValueError: the three sequences have different lengths, or tensors of an image do.

    Example:
        >>> boxes, labels = torch.tensor([[10.0, 10.0, 50.0, 50.0]]), torch.tensor([0])
        >>> predictions = [{"boxes": boxes, "labels": labels, "scores": torch.tensor([1.7])}]
        >>> targets = [{"boxes": boxes, "labels": labels}]
        >>> [s.name for s in find_smells(predictions, targets, ["cat"], image_sizes=[(60, 80)])]
        ['impossible_scores']
    """
    if not len(predictions) == len(targets) == len(image_sizes):
        raise ValueError(
            f"got predictions of {len(predictions)} images, targets of {len(targets)} and "
            f"{len(image_sizes)} image sizes; pass one of each for every image, in the same order."
        )
    images = [_joined(*each) for each in zip(predictions, targets, image_sizes, strict=True)]
    smells = _broken_numbers(images)
    images = [_without_broken(image) for image in images]
    smells += _scores_and_classes(images, class_names)
    extents = _extents(images)
    correlation, num_pairs = _place_correlation(images)
    mirrored = _mirrored(images, class_names, correlation, num_pairs)
    smells += extents + mirrored
    # Only detections that follow their objects can be off them in one direction.
    follow = _follow(correlation.diag().min().item(), num_pairs)
    if follow and not extents and not mirrored:
        smells += _shifted_or_scaled(images)
    return sorted(smells, key=lambda smell: smell.severity)  # "error" before "warning"


def _joined(
    prediction: Mapping[str, Any], target: Mapping[str, Any], size: tuple[int, int]
) -> _Image:
    image = _Image(
        _column(prediction["boxes"]).reshape(-1, 4),
        _column(prediction["labels"]).long(),
        _column(prediction["scores"]),
        _column(target["boxes"]).reshape(-1, 4),
        _column(target["labels"]).long(),
        torch.tensor([size[1], size[0]], dtype=torch.float64),
    )
    counts = [len(column) for column in image[:5]]
    if len(set(counts[:3])) > 1 or counts[3] != counts[4]:
        raise ValueError(
            f"an image has {counts[0]} predicted boxes, {counts[1]} labels and {counts[2]} scores, "
            f"{counts[3]} true boxes and {counts[4]} labels; each box needs one of each."
        )
    return image


def _column(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().cpu().double()


# --------------------------------------------------------------------------------------------
# Numbers that can't be
# --------------------------------------------------------------------------------------------


def _broken_numbers(images: list[_Image]) -> list[Smell]:
    smells = []
    scores = torch.cat([image.scores for image in images]) if images else torch.zeros(0)
    boxes = torch.cat([image.boxes for image in images]) if images else torch.zeros(0, 4)
    nan, outside = (~scores.isfinite()).sum().item(), ((scores < 0) | (scores > 1)).sum().item()
    if nan or outside:
        finite = scores[scores.isfinite()]
        span = f" (from {finite.min():.3g} to {finite.max():.3g})" if len(finite) else ""
        smells.append(
            Smell(
                "impossible_scores",
                f"{nan} of {len(scores)} scores are NaN or infinite, and {outside} lie outside "
                f"0..1{span}. A score is a probability. Usual causes: logits written out without "
                "the sigmoid, percent, a training that diverged. Look at where scores are "
                "computed, and at the loss of the last iterations.",
                "error",
            )
        )
    broken = ~boxes.isfinite().all(dim=1)
    reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    if broken.any() or reversed_.any():
        smells.append(
            Smell(
                "impossible_boxes",
                f"{int(broken.sum())} of {len(boxes)} boxes have corners that are NaN or infinite, "
                f"and {int(reversed_.sum())} end left of or above where they begin. Usual causes: "
                "x, y, width, height or a centre written where two corners are expected, negative "
                "distances that are not clipped, a training that diverged. Look at how deltas "
                "become boxes.",
                "error",
            )
        )
    return smells


def _without_broken(image: _Image) -> _Image:
    """Without detections that have no place or no rank."""
    good = image.boxes.isfinite().all(dim=1) & (image.boxes[:, 2:] >= image.boxes[:, :2]).all(dim=1)
    good &= image.scores.isfinite()
    return image._replace(
        boxes=image.boxes[good], labels=image.labels[good], scores=image.scores[good]
    )


# --------------------------------------------------------------------------------------------
# Scores and classes
# --------------------------------------------------------------------------------------------


def _scores_and_classes(images: list[_Image], class_names: Sequence[str]) -> list[Smell]:
    objects = _count([image.true_labels for image in images], class_names)
    found = _count([image.labels for image in images], class_names)
    if not objects.sum():
        return []
    if not found.sum():
        return [
            Smell(
                "no_detections",
                f"There is not one detection in {len(images)} images with {objects.sum()} objects. "
                f"Usual causes: a score threshold that is too high (with {LOWEST_THRESHOLD:g} a "
                "detector of any use finds something), the weights of the checkpoint not loaded, "
                "images that are not normalised as in training. Look at the highest scores "
                "without a threshold.",
                "error",
            )
        ]
    smells = []
    highest = max(float(image.scores.max()) for image in images if len(image.scores))
    for threshold in (LOWEST_THRESHOLD, USUAL_THRESHOLD):
        if highest <= threshold:
            smells.append(
                Smell(
                    "low_scores",
                    f"No score is above {threshold:g}, a usual threshold: the highest of "
                    f"{found.sum()} is {highest:.3g}. Usual causes: a training that was too short "
                    "or whose loss did not fall, weights that were not loaded, images that are "
                    "not normalised as in training, a detector in training mode. Look at the "
                    "classification loss, and at the detections on training images.",
                    "warning",
                )
            )
            break
    present = objects >= MIN_OBJECTS
    predicted = np.flatnonzero(found)
    if len(predicted) == 1 and present.sum() > 1:
        name = class_names[predicted[0]]
        smells.append(
            Smell(
                "one_class",
                f"All {found.sum()} detections are of class {name!r}, and the ground truth has "
                f"{int((objects > 0).sum())} classes. Usual causes: class ids that are lost on the "
                "way (all 0, or the background's), an argmax over the wrong dimension, a training "
                "in which the most frequent class won. Look at the labels that the loss sees.",
                "warning",
            )
        )
    elif (missing := np.flatnonzero(present & (found == 0))).size:
        listed = ", ".join(f"{class_names[k]} ({objects[k]} objects)" for k in missing)
        smells.append(
            Smell(
                "class_never_predicted",
                f"Never predicted: {listed}. Usual causes: too few examples of it in training, "
                "another name or another order of the classes than in training, scores that stay "
                "below the threshold. Look at its number of training objects and at the order of "
                "the class names.",
                "warning",
            )
        )
    return smells


def _count(labels: list[Tensor], class_names: Sequence[str]) -> np.ndarray:
    joined = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)
    return np.bincount(joined.numpy(), minlength=len(class_names))


# --------------------------------------------------------------------------------------------
# Coordinates in another scale
# --------------------------------------------------------------------------------------------


def _extents(images: list[_Image]) -> list[Smell]:
    sizes = torch.cat([image.size.expand(len(image.boxes), 2) for image in images] or [_NONE])
    true_sizes = torch.cat(
        [image.size.expand(len(image.true_boxes), 2) for image in images] or [_NONE]
    )
    boxes = torch.cat([image.boxes for image in images] or [_NONE.repeat(1, 2)])
    true_boxes = torch.cat([image.true_boxes for image in images] or [_NONE.repeat(1, 2)])
    smells = []
    for what, these, their_sizes in (
        ("detections", boxes, sizes),
        ("ground_truth", true_boxes, true_sizes),
    ):
        smell = _outside(what, these, their_sizes)
        if smell is not None:
            smells.append(smell)
    if smells or min(len(boxes), len(true_boxes)) < MIN_PAIRS:
        return smells
    reach = (boxes[:, 2:] / sizes).quantile(0.95, dim=0)
    true_reach = (true_boxes[:, 2:] / true_sizes).quantile(0.95, dim=0)
    ratio = reach / true_reach
    if (ratio < 0.75).all() or (ratio > 1 / 0.75).all():
        smells.append(
            Smell(
                "other_scale",
                f"Detections reach to {reach[0]:.0%} of the width and {reach[1]:.0%} of the height "
                f"of the images, objects to {true_reach[0]:.0%} and {true_reach[1]:.0%} (95 % of "
                "each end before). Usual cause: one of them is in pixels of the original images, "
                "the other in those of the resized ones. Look at where boxes are scaled together "
                "with the image.",
                "error",
            )
        )
    return smells


_NONE = torch.zeros(0, 2, dtype=torch.float64)


def _outside(what: str, boxes: Tensor, sizes: Tensor) -> Smell | None:
    """Boxes (K, 4) in 0..1, or outside of their images of width and height (K, 2)."""
    if not len(boxes):
        return None
    words = what.replace("_", " ")
    if boxes.max() <= 1.5 and sizes.min() > 10:
        return Smell(
            f"normalised_{what}",
            f"No coordinate of the {words} is above {boxes.max():.3g}, in images of "
            f"{sizes[0, 0]:.0f} x {sizes[0, 1]:.0f} pixels: these are shares of the width and the "
            "height. Boxes have to be in pixels. Look at how they are written or read.",
            "error",
        )
    # A detector that doesn't clip its boxes lets them reach over the edge, but not lie beyond it.
    centers = _centers(boxes)
    share = ((centers < 0) | (centers > sizes)).any(dim=1).double().mean()
    if share <= 0.05:
        return None
    reach = (boxes[:, 2:] / sizes).quantile(0.95, dim=0)
    return Smell(
        f"{what}_outside",
        f"{share:.0%} of the boxes of the {words} have their centre outside of the image; they "
        f"reach to {reach[0]:.0%} of its width and {reach[1]:.0%} of its height (95 % end before). "
        "Usual causes: pixels of the original image and not of the resized one, width and height "
        "of the image mixed up. Look at where boxes are scaled together with the image.",
        "error",
    )


# --------------------------------------------------------------------------------------------
# Mirror images
# --------------------------------------------------------------------------------------------


def _mirrored(
    images: list[_Image], class_names: Sequence[str], correlation: Tensor, num_pairs: int
) -> list[Smell]:
    """Where detections lie, compared with where the objects of their class lie.

    Compared by correlation over the data set, and not by overlap, for three reasons. It needs no
    guess of what became of the boxes' shapes. It sees a detector that was trained mirrored, which
    finds little that overlaps anything. And with maps that are flattened in one order and read in
    another, only square maps are mirrored: on H x W maps, cell (row i, column j) is taken for
    column (i W + j) // H and row (i W + j) mod H. The column still follows the row, by W / H; the
    row is scrambled.
    """
    (xx, xy), (yx, yy) = correlation.tolist()
    numbers = (
        f"Over {num_pairs} pairs of an image and a class, the horizontal place of detections "
        f"correlates with the horizontal one of the objects by {xx:.2f} and with the vertical one "
        f"by {xy:.2f}; their vertical place by {yx:.2f} and {yy:.2f}."
    )
    if _exceeds(xy, xx, num_pairs) or _exceeds(yx, yy, num_pairs):
        return [
            Smell(
                "mirrored_diagonal",
                "The detections look mirrored across the diagonal of the image, x and y swapped. "
                f"{numbers} {_mirrored_back(images, class_names)}Usual causes: predictions "
                "flattened row by row while locations run column by column, or the other way "
                "round, in training, in evaluation or in both; boxes written as y1, x1, y2, x2. "
                f"{WHERE_PLACES}",
                "error",
            )
        ]
    smells = []
    for name, words, value in (
        ("mirrored_left_right", "from left to right", xx),
        ("mirrored_upside_down", "upside down", yy),
    ):
        if _follow(-value, num_pairs):
            smells.append(
                Smell(
                    name,
                    f"The detections look mirrored {words}. {numbers} Usual causes: an image that "
                    "is flipped and its boxes not, or twice; an origin at the bottom. Look at the "
                    "augmentation, and draw a few items of the data set with their boxes.",
                    "error",
                )
            )
    return smells


def _place_correlation(images: list[_Image]) -> tuple[Tensor, int]:
    """Correlations of the places of detections (rows: x, y) and of objects (columns: x, y).

    A pair is an image and a class: the mean centre of its m objects there, and that of its m most
    confident detections. The more confident half of the pairs is used, since the rest is largely
    guesses. Places are shares of width and height, less the mean over their class, or a class
    that is always at the top would correlate with whatever always lies left.

    Returns:
        ``(2, 2)`` correlations, and the number of pairs less the number of classes; zeros for too
        few.
    """
    rows, labels, scores = [], [], []
    for image in images:
        for label in image.true_labels.unique().tolist():
            true_boxes = image.true_boxes[image.true_labels == label]
            of_class = image.labels == label
            order = image.scores[of_class].argsort(descending=True, stable=True)[: len(true_boxes)]
            best = image.boxes[of_class][order]
            if len(best):
                centers = [_centers(boxes).mean(dim=0) / image.size for boxes in (best, true_boxes)]
                rows.append(torch.cat(centers))
                labels.append(label)
                scores.append(image.scores[of_class][order].mean())
    if len(rows) < 2 * MIN_PAIRS:
        return torch.zeros(2, 2), 0
    confident = torch.stack(scores).argsort(descending=True, stable=True)[: (len(rows) + 1) // 2]
    places, labels = torch.stack(rows)[confident], torch.tensor(labels)[confident]  # (P, 4), (P,)
    for label in labels.unique():
        places[labels == label] -= places[labels == label].mean(dim=0)
    num_pairs = len(places) - len(labels.unique())
    if num_pairs < MIN_PAIRS // 2:
        return torch.zeros(2, 2), 0
    # Places that never differ correlate with nothing.
    return torch.corrcoef(places.T)[:2, 2:].nan_to_num(0.0), num_pairs


def _deviations(correlation: float, num_pairs: int) -> float:
    """How many standard deviations a correlation is from 0 (Fisher's z)."""
    return math.atanh(max(-0.999, min(0.999, correlation))) * math.sqrt(max(0, num_pairs - 3))


def _follow(correlation: float, num_pairs: int) -> bool:
    """Whether a correlation is there, large and beyond chance."""
    return correlation > MIN_CORRELATION and _deviations(correlation, num_pairs) > SIGNIFICANT


def _exceeds(swapped: float, right: float, num_pairs: int) -> bool:
    """Whether places follow the other axis, and follow it more than their own."""
    by = (_deviations(swapped, num_pairs) - _deviations(right, num_pairs)) / math.sqrt(2)
    return _follow(swapped, num_pairs) and swapped - right > MIN_DIFFERENCE and by > 2


def _mirrored_back(images: list[_Image], class_names: Sequence[str]) -> str:
    """What mAP would be with the boxes mirrored across the diagonal; empty unless it is higher."""
    as_is, centers, corners = (
        average_precision(
            [
                {"boxes": move(image), "labels": image.labels, "scores": image.scores}
                for image in images
            ],
            [{"boxes": image.true_boxes, "labels": image.true_labels} for image in images],
            class_names,
        )["mAP"]
        for move in (lambda image: image.boxes, _mirrored_centers, _swapped_corners)
    )
    if max(centers, corners) <= as_is:
        return ""
    return (
        f"mAP@0.5 is {as_is:.1%}; with the centres of all boxes mirrored back it would be "
        f"{centers:.1%}, with x and y of their corners swapped {corners:.1%}. "
    )


def _mirrored_centers(image: _Image) -> Tensor:
    """Location (x, y) becomes (y W / H, x H / W); the boxes around it keep their shape."""
    center = _centers(image.boxes)
    move = center.flip(1) * image.size / image.size.flip(0) - center
    return image.boxes + move.repeat(1, 2)


def _swapped_corners(image: _Image) -> Tensor:
    return image.boxes[:, [1, 0, 3, 2]]


def _centers(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2  # (K, 2)


# --------------------------------------------------------------------------------------------
# Shift and scale
# --------------------------------------------------------------------------------------------


def _shifted_or_scaled(images: list[_Image]) -> list[Smell]:
    pairs = [_loose_pairs(image) for image in images]
    boxes = torch.cat([found for found, _ in pairs] or [_NONE.repeat(1, 2)])  # (P, 4)
    true_boxes = torch.cat([true for _, true in pairs] or [_NONE.repeat(1, 2)])  # (P, 4)
    sides, true_sides = (b[:, 2:] - b[:, :2] for b in (boxes, true_boxes))
    good = (sides > 0).all(dim=1) & (true_sides > 0).all(dim=1)
    boxes, true_boxes, sides, true_sides = (
        values[good] for values in (boxes, true_boxes, sides, true_sides)
    )
    if len(boxes) < MIN_PAIRS:
        return []
    pixels = _centers(boxes) - _centers(true_boxes)  # (P, 2)
    return [
        *_shifted(pixels, pixels / true_sides, true_sides.amax(dim=1)),
        *_scaled((sides / true_sides).log()),
    ]


def _shifted(pixels: Tensor, shares: Tensor, sides: Tensor) -> list[Smell]:
    """Offsets (P, 2) of detections from their objects, in pixels and in units of their size."""
    median, median_pixels = (values.median(dim=0).values for values in (shares, pixels))
    clear = (median.abs() > MIN_SHIFT) & (median_pixels.abs() > MIN_SHIFT_PIXELS)
    if not (clear & _one_sided(shares)).any():
        return []
    by_size = []
    bands = (0, 64, "below 64 px"), (64, 128, "of 64 to 128 px"), (128, math.inf, "above 128 px")
    for low, high, words in bands:
        of_size = (sides >= low) & (sides < high)
        if of_size.sum() >= MIN_PAIRS // 3:
            x, y = pixels[of_size].median(dim=0).values.tolist()
            by_size.append(f"({x:+.1f}, {y:+.1f}) px for objects {words}")
    return [
        Smell(
            "shifted",
            f"Detections lie off their objects in one direction: the median of {len(pixels)} pairs "
            f"is ({median_pixels[0]:+.1f}, {median_pixels[1]:+.1f}) px to the right and down, "
            f"({median[0]:+.2f}, {median[1]:+.2f}) of the object's size; {'; '.join(by_size)}. "
            "Usual causes: locations that lack half a stride (4, 8, 16 px for strides of 8, 16, "
            "32), the offset of a crop or of padding that is not undone, a backbone whose padding "
            "depends on the size of the image ('same' padding, with sides that are no multiple of "
            "the largest stride). Look at the coordinates of the first location, at the resizing "
            "of boxes, and whether images padded to a multiple of 32 px show it, too.",
            "warning",
        )
    ]


def _scaled(log_ratios: Tensor) -> list[Smell]:
    """Logarithms (P, 2) of width and height of detections over those of their objects."""
    median = log_ratios.median(dim=0).values
    clear = median.abs() > math.log(MIN_SCALE)
    if not (clear & _one_sided(log_ratios)).any():
        return []
    width, height = median.exp().tolist()
    return [
        Smell(
            "scaled",
            f"Detections have another size than their objects: the median of {len(log_ratios)} "
            f"pairs is {width:.2f} times the width and {height:.2f} times the height. Usual "
            "causes: deltas multiplied by another stride than in training, distances read as "
            "widths, boxes scaled for another image size, or a training that was too short for "
            "the boxes. Look at how deltas become boxes, and at the box loss.",
            "warning",
        )
    ]


def _one_sided(values: Tensor) -> Tensor:
    """Whether more values (P, 2) lie on one side of 0 than chance allows: a sign test."""
    return values.sign().sum(dim=0).abs() / math.sqrt(len(values)) > SIGNIFICANT


def _loose_pairs(image: _Image) -> tuple[Tensor, Tensor]:
    """Boxes (P, 4) and objects (P, 4): of each object the most confident detection around it.

    That is one of its class that overlaps this object more than any other, and be it a little.
    """
    nothing = image.boxes[:0]
    if not len(image.boxes) or not len(image.true_boxes):
        return nothing, nothing
    overlaps = box_iou(image.boxes, image.true_boxes)  # (K, M)
    overlaps = overlaps * (image.labels[:, None] == image.true_labels)
    best, match = overlaps.max(dim=1)
    order = image.scores.argsort(descending=True, stable=True)
    order = order[best[order] >= LOOSE_IOU]
    # The first claim of each object is the most confident one.
    objects, first = np.unique(match[order].numpy(), return_index=True)
    return image.boxes[order[first]], image.true_boxes[objects]


# --------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------


def find_folder_smells(
    folder: str | os.PathLike[str], image_names: Sequence[str] | None = None
) -> list[Smell]:
    """Look for what is missing in a folder in the text format of ``eecs598.metrics``.

    Args:
        folder: with ``detection-results/`` and ``ground-truth/``.
        image_names: of all images of the data set, without suffix, where they are known.

    Raises:
        ValueError: the folder can't be read, see ``eecs598.metrics.read_text_format``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing files, which are a smell below
        data = read_text_format(folder)
    smells = []
    detection_files = set(os.listdir(Path(folder) / DETECTIONS_FOLDER))
    missing = [name for name in data.image_names if f"{name}.txt" not in detection_files]
    if missing:
        smells.append(
            Smell(
                "detection_files_missing",
                f"{_listed(missing)} in {GROUND_TRUTH_FOLDER}/ have no file in "
                f"{DETECTIONS_FOLDER}/. They are scored as images without detections; other "
                "programs stop or leave them out. Usual cause: no file is written where nothing "
                "was detected, or the export was interrupted. Write an empty file for them.",
                "error",
            )
        )
    left_out = sorted(set(image_names or ()) - set(data.image_names))
    if left_out:
        smells.append(
            Smell(
                "ground_truth_missing",
                f"{_listed(left_out)} of the data set have no file in {GROUND_TRUTH_FOLDER}/, so "
                "their objects are not counted as missed. Usual cause: an image without "
                "detections is skipped together with its ground truth. Write both files for every "
                "image.",
                "error",
            )
        )
    elif not missing and image_names is None:
        smells += _skipped_images(data.predictions, data.targets)
    return smells


def _skipped_images(
    predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
) -> list[Smell]:
    """Every image has a detection, where a number of them should have none.

    How many should: an image without detections has neither right nor wrong ones. Of a images with
    wrong ones alone, b with right ones alone and c with both, a b / c is expected to have neither
    when the two are independent (Lincoln and Petersen's estimate of a population). Where they are
    not, it is because crowded images have more of both, and the estimate is too low.
    """
    right_and_wrong = np.zeros((2, 2), dtype=int)
    for prediction, target in zip(predictions, targets, strict=True):
        overlaps = box_iou(prediction["boxes"].double(), target["boxes"].double())  # (K, M)
        overlaps = overlaps * (prediction["labels"][:, None] == target["labels"])
        right = (overlaps >= 0.5).any(dim=1) if overlaps.shape[1] else overlaps.new_zeros(0).bool()
        num_right = int(right.sum())
        right_and_wrong[int(num_right > 0), int(len(overlaps) > num_right)] += 1
    (neither, wrong_alone), (right_alone, both) = right_and_wrong.tolist()
    expected = wrong_alone * right_alone / (both + 1)
    # 10 expected and none seen happens once in 20,000 times.
    if neither or both < 10 or expected < 10:
        return []
    return [
        Smell(
            "images_without_detections_missing",
            f"All {len(targets)} images have detections, though about {expected:.0f} more would be "
            f"expected to have none: {right_alone} have right ones alone, {wrong_alone} wrong ones "
            f"alone, {both} both. Usual cause: an image without detections is skipped together "
            "with its ground truth, and its objects are not counted as missed. Compare the number "
            f"of files in {GROUND_TRUTH_FOLDER}/ with that of the images.",
            "warning",
        )
    ]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} images ({shown}{more})"
