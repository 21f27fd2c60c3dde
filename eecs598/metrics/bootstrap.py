"""How far the mAP of a data set would differ on other images: bootstrap over images.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: the images are drawn
anew, with replacement and as many as there are, and the interval is cut from the scores of many
such samples. Images and not boxes are drawn, because the boxes of one image are not independent.

Detections are matched once: a sample counts every detection and ground truth box of an image as
often as the image was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eecs598.metrics.average_precision import classes_with_ground_truth, score_matches
from eecs598.metrics.matching import Matches, match_detections

_SAMPLES_AT_ONCE = 128  # bounds memory: this many numbers a detection of the largest class


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """The mAP of a data set and how it scatters.

    Attributes:
        map: of the images as they are, what `average_precision` gives.
        low, high: the ends of the interval.
        confidence: which share of the samples lies between them.
        samples: (S,) float64, the mAP of each sample.
    """

    map: float
    low: float
    high: float
    confidence: float
    samples: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """All but the samples, and their number, ready for JSON."""
        names = ("map", "low", "high", "confidence")
        return {**{name: getattr(self, name) for name in names}, "num_samples": len(self.samples)}


@dataclass(frozen=True)
class DifferenceResult:
    """By how much the mAP of run a is above that of run b on the same images.

    Attributes:
        difference: mAP of a less mAP of b, on the images as they are.
        low, high: the ends of the interval of the difference.
        exceeds: whether the interval leaves out 0, so that chance in the choice of images does not
            explain the difference.
        confidence: which share of the samples lies in the interval.
    """

    difference: float
    low: float
    high: float
    exceeds: bool
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return dict(vars(self))


def bootstrap_map(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapResult:
    """The percentile interval of the mAP (all points) over images.

    A class without ground truth in a sample is left out of that sample's mean, and a sample
    without any ground truth is left out altogether. Where an image is drawn twice, the copies of a
    detection follow each other; that is how `average_precision` would score the images written
    twice, unless an image has several detections of one class with the very same score.

    Args:
        predictions, targets, class_names, iou_threshold: as for
            :func:`eecs598.metrics.average_precision`.
        num_samples: how many samples to draw.
        seed: of the draw; the same seed and number of images give the same draw.
        confidence: share of the samples between the ends of the interval, in 0..1 exclusive.

    Raises:
        ValueError: for input that is not as above, or with no ground truth to score against.
    """
    matches = match_detections(predictions, targets, class_names, iou_threshold)
    value = score_matches(matches)["mAP"]
    weights = _draw(matches, num_samples, seed, confidence)
    samples = resampled_map(matches, weights)
    low, high = _interval(samples, confidence)
    return BootstrapResult(value, low, high, confidence, samples)


def bootstrap_difference(
    predictions_a: Sequence[Mapping[str, Any]],
    predictions_b: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    *,
    targets_b: Sequence[Mapping[str, Any]] | None = None,
) -> DifferenceResult:
    """The percentile interval of the difference in mAP of two runs on the same images.

    Every sample scores both runs on the same draw of images, so that what makes an image hard for
    both falls out; the interval is narrower than those of the two runs suggest.

    Args:
        predictions_a, predictions_b: of the two runs, each as for
            :func:`eecs598.metrics.average_precision`.
        targets, class_names, iou_threshold: as there.
        num_samples, seed, confidence: as for :func:`bootstrap_map`.
        targets_b: the same ground truth in the pixels of run b, where that saw the images in
            another size.

    Raises:
        ValueError: for input that is not as above, or with no ground truth to score against.
    """
    targets_b = targets if targets_b is None else targets_b
    matches_a = match_detections(predictions_a, targets, class_names, iou_threshold)
    matches_b = match_detections(predictions_b, targets_b, class_names, iou_threshold)
    if matches_a.num_images != matches_b.num_images:
        raise ValueError(
            f"run a has {matches_a.num_images} images and run b {matches_b.num_images}; pass the "
            "same images, in the same order"
        )
    difference = score_matches(matches_a)["mAP"] - score_matches(matches_b)["mAP"]
    weights = _draw(matches_a, num_samples, seed, confidence)
    samples = resampled_map(matches_a, weights) - resampled_map(matches_b, weights)
    low, high = _interval(samples, confidence)
    return DifferenceResult(difference, low, high, low > 0 or high < 0, confidence)


def resampled_map(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """The mAP (S,) of samples that have every image as often as given.

    Args:
        matches: the images as they are, with ground truth.
        weights: (S, B) whole numbers, how often each sample has each image. Every sample has some
            ground truth that is not difficult.
    """
    blocks = range(0, len(weights), _SAMPLES_AT_ONCE)
    return np.concatenate(
        # With the samples last, the sums over detections run through memory side by side.
        [
            _block_map(matches, np.ascontiguousarray(weights[i : i + _SAMPLES_AT_ONCE].T))
            for i in blocks
        ]
    )


def _block_map(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """(B, S) weights -> (S,) mAP."""
    area_sum = np.zeros(weights.shape[1])
    num_classes = np.zeros(weights.shape[1])
    scored = ~matches.truth_difficult
    for label in classes_with_ground_truth(matches):
        truth_images = matches.truth_image[scored & (matches.truth_label == label)]
        total = weights[truth_images].sum(axis=0)  # (S,)
        of_class = (matches.label == label) & ~matches.ignored
        area = _area_under_envelope(weights[matches.image[of_class]], matches.true[of_class])
        num_classes += total > 0
        area_sum += area / np.maximum(total, 1)
    return area_sum / num_classes


def _area_under_envelope(weights: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Area (S,) times the number of boxes, of detections (K, S) that count as often as given.

    Copies of a true positive raise the precision one after the other, so the last has the envelope
    of all; copies of a false positive lower it, so they never make the envelope.
    """
    hits = weights[true]  # (T, S)
    kept = np.cumsum(weights, axis=0)[true]
    precision = np.cumsum(hits, axis=0) / np.maximum(kept, 1)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    return (hits * envelope).sum(axis=0)


def _draw(matches: Matches, num_samples: int, seed: int, confidence: float) -> np.ndarray:
    """(S, B) how often each sample has each image; samples without ground truth are dropped."""
    if not num_samples >= 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    count = matches.num_images
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, num_samples)
    weights = weights.astype(np.int32)
    with_truth = np.unique(matches.truth_image[~matches.truth_difficult])
    usable = weights[:, with_truth].any(axis=1)
    if not usable.any():
        raise ValueError(
            f"none of {num_samples} samples of {count} images has ground truth; draw more samples"
        )
    return weights[usable]


def _interval(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
