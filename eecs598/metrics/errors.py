"""What kind of mistakes a detector makes: confusion matrix, and the error kinds of TIDE.

:func:`analyse_errors` follows Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", ECCV 2020 (arXiv 2008.08115), section 2: every false positive has one kind,
ground truth that no other fix would find is missed, and the weight of a kind is how much the mAP
rises when an oracle fixes that kind alone.

Overlaps are IoU in inclusive pixels, as in `metrics`. Difficult boxes count neither way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eecs598.metrics.average_precision import area_under_envelope, classes_with_ground_truth
from eecs598.metrics.matching import (
    Matches,
    best_of_pairs,
    first_claims,
    match_detections,
    overlaps_of_pairs,
    pair_up,
)

ERROR_KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """The errors of a data set; what is per image has the order of the predictions or targets.

    Attributes:
        kinds: per image a word for each of its K detections: "true", "ignored" (matches a difficult
            box), "class", "localisation", "both", "duplicate" or "background".
        concerns: per image (K,) the ground truth box of the image that the kind is about: the one
            matched, taken already, named wrongly, framed badly, or for "both" overlapped most; -1
            for "background".
        overlaps: per image (K,) the IoU with that box; -1 for "background".
        missed: per image (M,) bool, the ground truth that is missed as the paper has it: not found,
            and no class or localisation error is about it.
        undetected: per image (M,) bool, the ground truth that no true positive found.
        counts: how many of each kind, with "true", "ignored" and "missed".
        map: the mAP as it is.
        gains: for each of the six kinds of error, what the mAP gains when it alone is fixed.
        gains_false_positives: what the mAP gains without any false positive.
        gains_false_negatives: what the mAP gains without any false negative.
    """

    kinds: list[list[str]]
    concerns: list[np.ndarray]
    overlaps: list[np.ndarray]
    missed: list[np.ndarray]
    undetected: list[np.ndarray]
    counts: dict[str, int]
    map: float
    gains: dict[str, float]
    gains_false_positives: float
    gains_false_negatives: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the data set as a whole, ready for JSON."""
        names = ("counts", "map", "gains", "gains_false_positives", "gains_false_negatives")
        return {name: getattr(self, name) for name in names}


def confusion_matrix(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
    score_threshold: float = 0.4,
) -> np.ndarray:
    """Count which class the detector names where which class is.

    Detections of at least ``score_threshold`` are taken by falling score (equal scores in image
    order, then in the order given). Each takes, whatever the classes, the ground truth box that it
    overlaps most among those not yet taken, if the overlap is at least ``iou_threshold``; of equal
    overlaps one of its own class, then the first. A difficult box can be taken any number of
    times, and neither it nor the detections that take it are counted.

    Because classes play no part in the matching, the diagonal can be lower than the true positives
    of `average_precision`: of two detections of one box only the one with the higher score takes
    it, though its class be wrong, and the other is in the row of the background.

    Args:
        predictions, targets, class_names: as for :func:`eecs598.metrics.average_precision`.
        iou_threshold: the least overlap of a match, in 0..1.
        score_threshold: the least score of a detection that is looked at.

    Returns:
        (C + 1, C + 1) int64: rows are ground truth, columns detections, the last of each is the
        background. Ground truth that is not difficult adds up to the rows 0..C-1.

    Raises:
        ValueError: for input that is not as above.
    """
    matches = match_detections(predictions, targets, class_names, iou_threshold)
    num_classes = len(matches.class_names)
    counts, pair_truth = pair_up(matches.image, matches.truth_image)
    overlaps = overlaps_of_pairs(matches.box, matches.truth_box, counts, pair_truth)
    pair_detection = np.repeat(np.arange(len(counts)), counts)  # (P,)
    kept = matches.score >= score_threshold
    candidates = np.flatnonzero((overlaps >= iou_threshold) & kept[pair_detection])
    pair_detection, pair_truth = pair_detection[candidates], pair_truth[candidates]
    other_class = matches.label[pair_detection] != matches.truth_label[pair_truth]
    order = np.lexsort((pair_truth, other_class, -overlaps[candidates], pair_detection))

    detected_as = np.full(len(matches.truth_label), num_classes)  # column of each box
    free = np.ones(len(matches.truth_label), dtype=bool)
    alone = kept.copy()  # detections without a box
    for detection, truth in zip(
        pair_detection[order].tolist(), pair_truth[order].tolist(), strict=True
    ):
        if alone[detection] and free[truth]:
            alone[detection] = False
            if not matches.truth_difficult[truth]:
                free[truth] = False
                detected_as[truth] = matches.label[detection]

    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    scored = ~matches.truth_difficult
    np.add.at(matrix, (matches.truth_label[scored], detected_as[scored]), 1)
    np.add.at(matrix[num_classes], matches.label[alone], 1)
    return matrix


def analyse_errors(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
    background_threshold: float = 0.1,
) -> ErrorAnalysis:
    """Name the error of every false positive, and weigh the kinds of error.

    With t_f the ``iou_threshold`` and t_b the ``background_threshold``, a false positive is

    - "localisation" if it overlaps a box of its class by at least t_b, and none by t_f;
    - "class" if it overlaps a box of another class by at least t_f;
    - "duplicate" if it overlaps a box of its class by at least t_f: a higher-scoring one has it;
    - "both" if it overlaps a box of another class by at least t_b, and none by t_f;
    - "background" if it overlaps no box by t_b.

    An undetected box is "missed" unless a localisation or class error is about it, that is,
    overlaps it more than any other box of the kind looked at.

    The oracles (section 2.3 of the paper) of "class" and "localisation" make the detection a true
    positive of that box, at its score; of several detections that then have the box, all but the
    highest-scoring are removed. "both", "duplicate" and "background" are removed. "missed" lowers
    the number of boxes that recall is measured against, so that the curve stretches. All false
    positives are removed for ``gains_false_positives``; for ``gains_false_negatives`` the number
    of boxes becomes that of the true positives.

    Where the paper leaves a choice:

    - A false positive that fits several kinds has the first in the list above, the order of the
      authors' toolbox.
    - An overlap of exactly t_f is a match, one of exactly t_b is not background.
    - "The highest-scoring" includes a true positive that the box has already, which goes when the
      fixed detection scores higher. (The toolbox removes the fixed detection whatever its score.)
      Each kind is fixed by itself: a class error leaves the localisation errors of its box alone.
    - When a class is left without boxes to find, its AP is 1 if it is left without detections, too,
      and 0 otherwise: "missed" then means as precise on the missing boxes as on none. The classes
      that the mean is over stay the same.
    - Matching and AP are those of `metrics`: VOC's rules instead of COCO's.
    - Difficult boxes are not seen here: a detection that matches one is "ignored", any other that
      overlaps none but difficult ones is "background".

    Args:
        predictions, targets, class_names: as for :func:`eecs598.metrics.average_precision`.
        iou_threshold: t_f, in 0..1.
        background_threshold: t_b, in 0..``iou_threshold``.

    Raises:
        ValueError: for input that is not as above, or with no ground truth to score against.
    """
    matches = match_detections(predictions, targets, class_names, iou_threshold)
    classes = classes_with_ground_truth(matches)
    if not 0 <= background_threshold <= iou_threshold:
        raise ValueError(
            f"background_threshold must be in 0..iou_threshold ({iou_threshold}), "
            f"got {background_threshold}"
        )
    kind, concern, overlap = _name_errors(matches, background_threshold)
    undetected = ~matches.truth_found & ~matches.truth_difficult
    missed = undetected.copy()
    missed[concern[(kind == "class") | (kind == "localisation")]] = False

    num_classes = len(matches.class_names)
    totals = matches.num_ground_truth
    missed_totals = np.bincount(matches.truth_label[missed], minlength=num_classes)
    found_totals = np.bincount(matches.label[matches.true], minlength=num_classes)
    counted = ~matches.ignored
    as_it_is = (matches.label, matches.true, counted)
    fixed = {
        "class": (*_correct(matches, kind == "class", concern), totals),
        "localisation": (*_correct(matches, kind == "localisation", concern), totals),
        "missed": (*as_it_is, totals - missed_totals),
        "false positives": (matches.label, matches.true, matches.true, totals),
        "false negatives": (*as_it_is, found_totals),
    }
    for name in ("both", "duplicate", "background"):
        fixed[name] = (matches.label, matches.true, counted & (kind != name), totals)
    base = _mean_ap(classes, *as_it_is, totals)
    gains = {name: _mean_ap(classes, *parts) - base for name, parts in fixed.items()}

    counts = {name: int((kind == name).sum()) for name in ("true", "ignored", *ERROR_KINDS)}
    counts["missed"] = int(missed.sum())
    places = np.append(matches.truth_index, -1)  # -1 stays -1
    return ErrorAnalysis(
        kinds=[part.tolist() for part in _by_image(matches, kind)],
        concerns=_by_image(matches, places[concern]),
        overlaps=_by_image(matches, overlap),
        missed=_split(missed, matches.truth_image, matches.num_images),
        undetected=_split(undetected, matches.truth_image, matches.num_images),
        counts=counts,
        map=base,
        gains={name: gains[name] for name in ERROR_KINDS},
        gains_false_positives=gains["false positives"],
        gains_false_negatives=gains["false negatives"],
    )


def _name_errors(
    matches: Matches, background_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kind (K,) of each detection, the box it is about (K,) or -1, and their overlap (K,)."""
    real = np.flatnonzero(~matches.truth_difficult)
    counts, pair_truth = pair_up(matches.image, matches.truth_image[real])
    pair_truth = real[pair_truth]
    overlaps = overlaps_of_pairs(matches.box, matches.truth_box, counts, pair_truth)
    same_class = np.repeat(matches.label, counts) == matches.truth_label[pair_truth]
    own, own_truth = best_of_pairs(np.where(same_class, overlaps, -1.0), counts, pair_truth)
    other, other_truth = best_of_pairs(np.where(same_class, -1.0, overlaps), counts, pair_truth)

    named = [  # the first that holds
        ("true", matches.true),
        ("ignored", matches.ignored),
        ("localisation", (own >= background_threshold) & (own < matches.iou_threshold)),
        ("class", other >= matches.iou_threshold),
        ("duplicate", own >= matches.iou_threshold),
        ("both", other >= background_threshold),
    ]
    kind = np.select([holds for _, holds in named], [name for name, _ in named], "background")
    conditions = [
        matches.true | matches.ignored,
        (kind == "localisation") | (kind == "duplicate"),
        (kind == "class") | (kind == "both"),
    ]
    concern = np.select(conditions, [matches.truth, own_truth, other_truth], -1)
    overlap = np.select(conditions, [matches.overlap, own, other], -1.0)
    return kind, concern, overlap


def _correct(
    matches: Matches, wrong: np.ndarray, concern: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make true positives of wrong detections: labels, true positives and those that count, (K,).

    Of all that then have one box, the first stays, and the others count no more.
    """
    labels = matches.label.copy()
    labels[wrong] = matches.truth_label[concern[wrong]]
    claiming = matches.true | wrong
    true = first_claims(concern, claiming)
    return labels, true, ~matches.ignored & (true | ~claiming)


def _mean_ap(
    classes: np.ndarray,
    labels: np.ndarray,
    true: np.ndarray,
    counted: np.ndarray,
    totals: np.ndarray,
) -> float:
    """mAP over the given classes, of detections by falling score."""
    areas = []
    for label in classes:
        of_class = true[(labels == label) & counted]
        if totals[label]:
            areas.append(area_under_envelope(of_class, int(totals[label])))
        else:
            areas.append(0.0 if len(of_class) else 1.0)
    return math.fsum(areas) / len(areas)


def _by_image(matches: Matches, values: np.ndarray) -> list[np.ndarray]:
    """Bring (K,) values of the detections into the order of the predictions, one array an image."""
    order = np.lexsort((matches.index, matches.image))
    return _split(values[order], matches.image[order], matches.num_images)


def _split(values: np.ndarray, images: np.ndarray, num_images: int) -> list[np.ndarray]:
    ends = np.cumsum(np.bincount(images, minlength=num_images))
    return np.split(values, ends[:-1])
