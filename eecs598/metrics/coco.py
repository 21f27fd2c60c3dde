"""The twelve numbers of the COCO evaluation.

Definitions: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312, and
https://cocodataset.org/#detection-eval. They differ from those of
``eecs598.metrics.average_precision``: corners are points, so that a box is ``x2 - x1`` wide; a
detection takes the best box that is still free; precision is sampled at 101 recalls; and at most
100 detections per image and class count. A test compares every number with those of
``faster-coco-eval``, a rewrite of COCO's own tools.

Symbols: K detections, M ground truth boxes, P pairs, T = 10 IoU thresholds, R = 101 recalls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eecs598.metrics.matching import Matches, box_area, pair_intersection, rank_in_group

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100  # per image and class
ALL = (0.0, 1e10)
# Areas in square pixels, both ends included.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


class _Candidates(NamedTuple):
    """Pairs of one image and class whose IoU reaches the lowest threshold.

    Detections are limited to the MAX_DETECTIONS of each image and class with the highest scores.
    """

    detection: np.ndarray  # (P,)
    gt: np.ndarray  # (P,)
    iou: np.ndarray  # (P,)
    turn: np.ndarray  # (P,) place of the detection among those of its image and class with pairs


class _Outcome(NamedTuple):
    """What became of each detection at each threshold, for ground truth of some sizes."""

    is_tp: np.ndarray  # (T, K) bool
    is_fp: np.ndarray  # (T, K) bool
    num_gt: np.ndarray  # (C,) boxes that are to be found


def coco_metrics(matches: Matches) -> dict[str, float | None]:
    """Return average precision and average recall as COCO defines them.

    ``AP`` and all ``AR`` are means over the IoU thresholds 0.5, 0.55, ..., 0.95. Small boxes have
    an area of up to 32 x 32, large ones of at least 96 x 96 pixels of the image that the boxes
    belong to: scaling an image moves its boxes from one size to another. ``AR_10`` is the recall
    with 10 detections per image and class.

    Difficult boxes are taken as COCO's crowds: they are not to be found, and a detection that takes
    no other box is left out when the share of *its* area inside a difficult box of its class
    reaches the threshold.

    Args:
        matches: what ``match_detections`` returned, at any threshold.

    Returns:
        ``AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium,
        AR_large``: fractions, None where there is no ground truth (of that size).
    """
    rank = rank_in_group(matches.image * len(matches.class_names) + matches.label)  # (K,)
    candidates = _find_candidates(matches, rank)
    outcome = _assign(matches, candidates, ALL)
    precision, recall = _curves(matches, outcome, rank < MAX_DETECTIONS)
    few = {limit: _curves(matches, outcome, rank < limit)[1] for limit in (1, 10)}
    by_size = {
        name: _curves(matches, _assign(matches, candidates, areas), rank < MAX_DETECTIONS)
        for name, areas in SIZES.items()
    }
    return {
        "AP": _mean(precision),
        "AP50": _mean(precision[0]),
        "AP75": _mean(precision[5]),
        **{f"AP_{name}": _mean(size_precision) for name, (size_precision, _) in by_size.items()},
        **{f"AR_{limit}": _mean(few_recall) for limit, few_recall in few.items()},
        f"AR_{MAX_DETECTIONS}": _mean(recall),
        **{f"AR_{name}": _mean(size_recall) for name, (_, size_recall) in by_size.items()},
    }


def _find_candidates(matches: Matches, rank: np.ndarray) -> _Candidates:
    """Find the pairs that can be matched at any threshold."""
    detection, gt, _ = matches.pairs_of_class
    kept = rank[detection] < MAX_DETECTIONS
    detection, gt = detection[kept], gt[kept]
    boxes, gt_boxes = matches.box[detection], matches.gt_box[gt]
    shared = pair_intersection(boxes, gt_boxes, pixel=0)
    area, gt_area = box_area(boxes, pixel=0), box_area(gt_boxes, pixel=0)
    # In a crowd, only the area of the detection counts.
    union = np.where(matches.gt_difficult[gt], area, area + gt_area - shared)
    iou = np.divide(shared, union, out=np.zeros(len(gt)), where=shared > 0)
    kept = iou >= IOU_THRESHOLDS[0]
    detection, gt = detection[kept], gt[kept]
    with_pairs, row = np.unique(detection, return_inverse=True)
    groups = matches.image * len(matches.class_names) + matches.label
    return _Candidates(detection, gt, iou[kept], rank_in_group(groups[with_pairs])[row])


def _assign(matches: Matches, candidates: _Candidates, areas: tuple[float, float]) -> _Outcome:
    """Let every detection take, by falling score, the best box of its class that is still free.

    Boxes whose area is out of range are ignored: they are taken only where no other is left, and
    such detections do not count, nor do those that take none and are out of range themselves.
    """
    low, high = areas
    gt_area, area = box_area(matches.gt_box, pixel=0), box_area(matches.box, pixel=0)
    gt_ignored = matches.gt_difficult | (gt_area < low) | (gt_area > high)  # (M,)
    num_thresholds = len(IOU_THRESHOLDS)
    is_tp = np.zeros((num_thresholds, len(area)), dtype=bool)
    is_fp = np.tile((area >= low) & (area <= high), (num_thresholds, 1))
    free = np.ones((len(gt_area), num_thresholds), dtype=bool)
    # The pairs of a detection in the order in which it would take them: of equals the last.
    order = np.lexsort(
        (
            -candidates.gt,
            -candidates.iou,
            gt_ignored[candidates.gt],
            candidates.detection,
            candidates.turn,
        )
    )
    detection, gt, iou, turn = (column[order] for column in candidates)
    # The detections of one turn are of different images or classes: they cannot want the same box.
    ends = np.searchsorted(turn, np.arange(turn.max(initial=-1) + 2))
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        some, its_gt = detection[start:end], gt[start:end]  # (P',)
        # A crowd is never used up.
        possible = (free[its_gt] | matches.gt_difficult[its_gt, None]) & (
            iou[start:end, None] >= IOU_THRESHOLDS
        )  # (P', T)
        places = np.where(possible, np.arange(end - start)[:, None], end - start)
        first_pair = np.flatnonzero(np.diff(some, prepend=-1))  # of each of the N detections
        choice = np.minimum.reduceat(places, first_pair, axis=0)  # (N, T)
        row, threshold = np.nonzero(choice < end - start)
        taker, taken = some[first_pair[row]], its_gt[choice[row, threshold]]
        free[taken, threshold] = False
        is_tp[threshold, taker] = ~gt_ignored[taken]
        is_fp[threshold, taker] = False
    num_gt = np.bincount(matches.gt_label[~gt_ignored], minlength=len(matches.class_names))
    return _Outcome(is_tp, is_fp, num_gt)


def _curves(matches: Matches, outcome: _Outcome, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, C') and the highest recall (T, C') of the classes with ground truth.

    Precision is the highest at that recall or above, and 0 where that recall is not reached.
    """
    labels = np.flatnonzero(outcome.num_gt)
    precision = np.zeros((len(IOU_THRESHOLDS), len(RECALLS), len(labels)))
    recall = np.zeros((len(IOU_THRESHOLDS), len(labels)))
    for column, label in enumerate(labels):
        of_class = np.flatnonzero((matches.label == label) & kept)
        if not len(of_class):
            continue
        hits = outcome.is_tp[:, of_class].cumsum(axis=1)  # (T, K')
        counted = hits + outcome.is_fp[:, of_class].cumsum(axis=1)
        envelope = np.divide(hits, counted, out=np.zeros(hits.shape), where=counted > 0)
        envelope = np.maximum.accumulate(envelope[:, ::-1], axis=1)[:, ::-1]
        recalls = hits / outcome.num_gt[label]
        recall[:, column] = recalls[:, -1]
        for threshold, its_recalls in enumerate(recalls):
            places = np.searchsorted(its_recalls, RECALLS)
            reached = places < len(its_recalls)
            precision[threshold, reached, column] = envelope[threshold, places[reached]]
    return precision, recall


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None
