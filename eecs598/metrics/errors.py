"""Error analysis: the confusion matrix, and the error kinds of TIDE.

``analyze_errors`` follows Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020 (arXiv 2008.08115), section 2: every false positive has one kind, ground truth
that no other fix would find is missed, and the weight of a kind is how much the mAP rises when an
oracle fixes that kind alone.

Overlaps are IoU in inclusive pixels, as in ``eecs598.metrics.matching``. Difficult boxes count
neither way. Symbols: K detections, M ground truth boxes, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from eecs598.metrics.average_precision import area_under_envelope, classes_with_ground_truth
from eecs598.metrics.matching import Matches, Pairs, best_of_pairs, first_claims

ERROR_KINDS = ("class", "localization", "both", "duplicate", "background", "missed")


@dataclass(frozen=True, eq=False)
class ErrorAnalysis:
    """The errors of a data set; arrays have the order of the ``Matches`` that were analyzed.

    Attributes:
        kind: (K,) a word for each detection: "true", "ignored" (matches a difficult box), "class",
            "localization", "both", "duplicate" or "background".
        matched_gt: (K,) the ground truth box that the kind refers to, as a row of the ``gt_``
            arrays: the box that is matched, already taken, of another class, or not overlapped
            enough, and for "both" the box overlapped most; -1 for "background".
        iou: (K,) the IoU with that box; -1 for "background".
        gt_missed: (M,) bool, the ground truth that is missed as the paper has it: not found, and no
            class or localization error refers to it.
        counts: how many of each kind, with "true", "ignored" and "missed".
        map: the mAP as it is.
        gains: for each of the six kinds of error, what the mAP gains when it alone is fixed.
        gains_false_positives: what the mAP gains without any false positive.
        gains_false_negatives: what the mAP gains without any false negative.
    """

    kind: np.ndarray
    matched_gt: np.ndarray
    iou: np.ndarray
    gt_missed: np.ndarray
    counts: dict[str, int]
    map: float
    gains: dict[str, float]
    gains_false_positives: float
    gains_false_negatives: float

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the data set as a whole, ready for JSON."""
        names = ("counts", "map", "gains", "gains_false_positives", "gains_false_negatives")
        return {name: getattr(self, name) for name in names}


def confusion_matrix(matches: Matches, score_threshold: float = 0.4) -> np.ndarray:
    """Count which class the detector predicts for the objects of each class.

    Detections of at least ``score_threshold`` are taken by falling score (equal scores in image
    order, then in the order given). Each takes, whatever the classes, the ground truth box that it
    overlaps most among those not yet taken, if the IoU is at least ``matches.iou_threshold``; of
    equal overlaps a box of its own class, then the first. A difficult box can be taken any number
    of times, and neither it nor the detections that take it are counted.

    Classes play no part in this matching, so that the diagonal can be lower than the true positives
    of ``average_precision``: of two detections of one box only the one with the higher score takes
    it, even if its class is wrong, and the other is counted in the background row.

    Args:
        matches: what ``match_detections`` returned.
        score_threshold: the least score of a detection that is counted.

    Returns:
        (C + 1, C + 1) int64: rows are ground truth, columns detections, the last of each is the
        background. Ground truth that is not difficult adds up to the rows 0..C-1.
    """
    num_classes = len(matches.class_names)
    kept = matches.score >= score_threshold
    pairs = matches.pairs
    candidates = np.flatnonzero((pairs.iou >= matches.iou_threshold) & kept[pairs.detection])
    detection, gt, iou = (column[candidates] for column in pairs)
    other_class = matches.label[detection] != matches.gt_label[gt]
    order = np.lexsort((gt, other_class, -iou, detection))

    detected_as = np.full(len(matches.gt_label), num_classes)  # column of each box
    free = np.ones(len(matches.gt_label), dtype=bool)
    alone = kept.copy()  # detections without a box
    for one, its_gt in zip(detection[order].tolist(), gt[order].tolist(), strict=True):
        if alone[one] and free[its_gt]:
            alone[one] = False
            if not matches.gt_difficult[its_gt]:
                free[its_gt] = False
                detected_as[its_gt] = matches.label[one]

    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    counted = ~matches.gt_difficult
    np.add.at(matrix, (matches.gt_label[counted], detected_as[counted]), 1)
    np.add.at(matrix[num_classes], matches.label[alone], 1)
    return matrix


def analyze_errors(matches: Matches, background_threshold: float = 0.1) -> ErrorAnalysis:
    """Name the error of every false positive, and weigh the kinds of error.

    With t_f the ``matches.iou_threshold`` and t_b the ``background_threshold``, a false positive is

    - "localization" if it overlaps a box of its class by at least t_b, and none by t_f;
    - "class" if it overlaps a box of another class by at least t_f;
    - "duplicate" if it overlaps a box of its class by at least t_f, which another detection with a
      higher score has taken;
    - "both" if it overlaps a box of another class by at least t_b, and none by t_f;
    - "background" if it overlaps no box by t_b.

    A box that no true positive finds is "missed" unless a localization or class error refers to
    it, that is, overlaps it more than any other box of its own or of another class.

    The oracles (section 2.3 of the paper) of "class" and "localization" make the detection a true
    positive of that box, at its score; of several detections that then have the box, only the one
    with the highest score stays. "both", "duplicate" and "background" are removed. "missed" lowers
    the number of boxes that recall is measured against, so that the curve stretches. All false
    positives are removed for ``gains_false_positives``; for ``gains_false_negatives`` the number
    of boxes becomes that of the true positives.

    Where the paper leaves a choice:

    - A false positive that fits several kinds has the first in the list above, the order of the
      authors' toolbox.
    - An IoU of exactly t_f is a match, one of exactly t_b is not background.
    - The detection that stays can be a true positive that the box has already; it is removed when
      the fixed detection scores higher. (The toolbox removes the fixed detection whatever its
      score.) Each kind is fixed by itself: fixing the class errors of a box leaves its
      localization errors as they are.
    - When a class is left without boxes to find, its AP is 1 if it is left without detections, too,
      and 0 otherwise. The classes that the mean is over stay the same.
    - Matching and AP follow VOC's rules instead of COCO's.
    - Difficult boxes are left out: a detection that matches one is "ignored", any other that
      overlaps only difficult ones is "background".

    Args:
        matches: what ``match_detections`` returned.
        background_threshold: t_b, in 0..``matches.iou_threshold``.

    Raises:
        ValueError: ``background_threshold`` is out of range, or there is no ground truth to score
            against.
    """
    classes = classes_with_ground_truth(matches)
    if not 0 <= background_threshold <= matches.iou_threshold:
        raise ValueError(
            f"background_threshold must be in 0..iou_threshold ({matches.iou_threshold}), "
            f"got {background_threshold}"
        )
    kind, matched_gt, iou = _name_errors(matches, background_threshold)
    missed = ~matches.gt_found & ~matches.gt_difficult
    missed[matched_gt[(kind == "class") | (kind == "localization")]] = False

    num_classes = len(matches.class_names)
    totals = matches.num_ground_truth
    missed_totals = np.bincount(matches.gt_label[missed], minlength=num_classes)
    found_totals = np.bincount(matches.label[matches.is_tp], minlength=num_classes)
    counted = ~matches.is_ignored
    as_it_is = (matches.label, matches.is_tp, counted)
    fixed = {
        "class": (*_correct(matches, kind == "class", matched_gt), totals),
        "localization": (*_correct(matches, kind == "localization", matched_gt), totals),
        "missed": (*as_it_is, totals - missed_totals),
        "false positives": (matches.label, matches.is_tp, matches.is_tp, totals),
        "false negatives": (*as_it_is, found_totals),
    }
    for name in ("both", "duplicate", "background"):
        fixed[name] = (matches.label, matches.is_tp, counted & (kind != name), totals)
    base = _mean_ap(classes, *as_it_is, totals)
    gains = {name: _mean_ap(classes, *parts) - base for name, parts in fixed.items()}

    counts = {name: int((kind == name).sum()) for name in ("true", "ignored", *ERROR_KINDS)}
    counts["missed"] = int(missed.sum())
    return ErrorAnalysis(
        kind=kind,
        matched_gt=matched_gt,
        iou=iou,
        gt_missed=missed,
        counts=counts,
        map=base,
        gains={name: gains[name] for name in ERROR_KINDS},
        gains_false_positives=gains["false positives"],
        gains_false_negatives=gains["false negatives"],
    )


def _name_errors(
    matches: Matches, background_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the kind (K,) of each detection, the box it refers to (K,) or -1, their IoU (K,)."""
    pairs = matches.pairs
    counted = ~matches.gt_difficult[pairs.gt]
    same_class = matches.label[pairs.detection] == matches.gt_label[pairs.gt]
    (own, own_gt), (other, other_gt) = (
        best_of_pairs(Pairs(*(column[chosen] for column in pairs)), len(matches.label))
        for chosen in (counted & same_class, counted & ~same_class)
    )
    named = [  # the first that holds
        ("true", matches.is_tp),
        ("ignored", matches.is_ignored),
        ("localization", (own >= background_threshold) & (own < matches.iou_threshold)),
        ("class", other >= matches.iou_threshold),
        ("duplicate", own >= matches.iou_threshold),
        ("both", other >= background_threshold),
    ]
    kind = np.select([holds for _, holds in named], [name for name, _ in named], "background")
    conditions = [
        matches.is_tp | matches.is_ignored,
        (kind == "localization") | (kind == "duplicate"),
        (kind == "class") | (kind == "both"),
    ]
    matched_gt = np.select(conditions, [matches.gt, own_gt, other_gt], -1)
    iou = np.select(conditions, [matches.iou, own, other], -1.0)
    return kind, matched_gt, iou


def _correct(
    matches: Matches, wrong: np.ndarray, matched_gt: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make true positives of wrong detections: labels, true positives and those that count, (K,).

    Of all detections that then have one box, the first stays, and the others no longer count.
    """
    labels = matches.label.copy()
    labels[wrong] = matches.gt_label[matched_gt[wrong]]
    claiming = matches.is_tp | wrong
    is_tp = first_claims(matched_gt, claiming)
    return labels, is_tp, ~matches.is_ignored & (is_tp | ~claiming)


def _mean_ap(
    classes: np.ndarray,
    labels: np.ndarray,
    is_tp: np.ndarray,
    counted: np.ndarray,
    totals: np.ndarray,
) -> float:
    """Return the mAP over the given classes, of detections by falling score."""
    areas = []
    for label in classes:
        of_class = is_tp[(labels == label) & counted]
        if totals[label]:
            areas.append(area_under_envelope(of_class, int(totals[label])))
        else:
            areas.append(0.0 if len(of_class) else 1.0)
    return math.fsum(areas) / len(areas)
