"""Confidence intervals of the mAP, and of a difference in mAP, by bootstrap over images.

Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: as many images as there
are are drawn with replacement, and the interval is cut from the scores of many such samples. Images
and not boxes are drawn, because the boxes of one image are not independent.

Nothing is matched again for a sample: it counts every detection and ground truth box of an image as
often as the image was drawn.

Symbols: B images, S samples, K detections of a class, T true positives among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from eecs598.metrics.average_precision import classes_with_ground_truth, score_matches
from eecs598.metrics.matching import Matches

_SAMPLES_AT_ONCE = 128  # bounds memory: so many numbers per true positive of the largest class


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """The mAP of a data set and its bootstrap interval.

    Attributes:
        map: of the images as they are, what ``average_precision`` gives.
        low: the lower end of the interval.
        high: the upper end.
        confidence: the share of the samples between them.
        samples: (S,) float64, the mAP of each sample.
    """

    map: float
    low: float
    high: float
    confidence: float
    samples: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the samples, and their number, ready for JSON."""
        names = ("map", "low", "high", "confidence")
        return {**{name: getattr(self, name) for name in names}, "num_samples": len(self.samples)}


@dataclass(frozen=True)
class DifferenceResult:
    """How much higher the mAP of run a is than that of run b on the same images.

    Attributes:
        difference: mAP of a less mAP of b, on the images as they are.
        low: the lower end of the interval of the difference.
        high: the upper end.
        exceeds: whether 0 lies outside of the interval, so that the difference is more than the
            choice of the images explains.
        confidence: the share of the samples in the interval.
    """

    difference: float
    low: float
    high: float
    exceeds: bool
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return the same, ready for JSON."""
        return dict(vars(self))


def bootstrap_map(
    matches: Matches, num_samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> BootstrapResult:
    """Return the percentile interval of the mAP (all points) over images.

    A class without ground truth in a sample is left out of that sample's mean, and a sample
    without any ground truth is left out altogether. Where an image is drawn twice, the copies of a
    detection follow each other. ``average_precision`` of the images written twice gives the same,
    unless an image has several detections of one class with the very same score.

    Args:
        matches: what ``match_detections`` returned.
        num_samples: how many samples to draw.
        seed: of the draw; the same seed and number of images give the same draw.
        confidence: share of the samples between the ends of the interval, in 0..1 exclusive.

    Raises:
        ValueError: an argument out of range, or no ground truth to score against.
    """
    value = score_matches(matches)["mAP"]
    weights = _draw(matches, num_samples, seed, confidence)
    samples = resampled_map(matches, weights)
    low, high = _interval(samples, confidence)
    return BootstrapResult(value, low, high, confidence, samples)


def bootstrap_difference(
    matches_a: Matches,
    matches_b: Matches,
    num_samples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> DifferenceResult:
    """Return the percentile interval of the difference in mAP of two runs on the same images.

    Every sample scores both runs on the same draw of images, so that what makes an image hard for
    both cancels out; the interval is narrower than those of the two runs suggest.

    Args:
        matches_a: of one run.
        matches_b: of the other, with the same ground truth; it may have seen the images in another
            size.
        num_samples: how many samples to draw.
        seed: of the draw, as for ``bootstrap_map``.
        confidence: share of the samples between the ends of the interval, in 0..1 exclusive.

    Raises:
        ValueError: runs with other images or objects, an argument out of range, or no ground truth
            to score against.
    """
    if matches_a.num_images != matches_b.num_images:
        raise ValueError(
            f"run a has {matches_a.num_images} images and run b {matches_b.num_images}; pass the "
            "same images, in the same order"
        )
    objects_a, objects_b = _count_objects(matches_a), _count_objects(matches_b)
    if objects_a != objects_b:
        raise ValueError(
            f"run a has the objects {objects_a} and run b {objects_b}; pass runs with the same "
            "ground truth"
        )
    difference = score_matches(matches_a)["mAP"] - score_matches(matches_b)["mAP"]
    weights = _draw(matches_a, num_samples, seed, confidence)
    samples = resampled_map(matches_a, weights) - resampled_map(matches_b, weights)
    low, high = _interval(samples, confidence)
    return DifferenceResult(difference, low, high, low > 0 or high < 0, confidence)


def _count_objects(matches: Matches) -> dict[str, int]:
    """Return the number of boxes that are not difficult, by class; classes without are left out."""
    counts = zip(matches.class_names, matches.num_ground_truth.tolist(), strict=True)
    return {name: count for name, count in counts if count}


def resampled_map(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Return the mAP (S,) of samples that have every image as often as given.

    Args:
        matches: of the images as they are, with ground truth.
        weights: (S, B) whole numbers, how often each sample has each image. Every sample has some
            ground truth that is not difficult.
    """
    classes = [_of_class(matches, label) for label in classes_with_ground_truth(matches)]
    blocks = range(0, len(weights), _SAMPLES_AT_ONCE)
    return np.concatenate(
        # With the samples last, the sums over detections run through memory side by side.
        [
            _block_map(classes, np.ascontiguousarray(weights[i : i + _SAMPLES_AT_ONCE].T))
            for i in blocks
        ]
    )


class _OfClass(NamedTuple):
    """What counts of one class."""

    gt_image: np.ndarray  # (M,) the image of each box
    image: np.ndarray  # (K,) the image of each detection, by falling score
    is_tp: np.ndarray  # (K,) bool


def _of_class(matches: Matches, label: int) -> _OfClass:
    boxes = (matches.gt_label == label) & ~matches.gt_difficult
    detections = (matches.label == label) & ~matches.is_ignored
    return _OfClass(matches.gt_image[boxes], matches.image[detections], matches.is_tp[detections])


def _block_map(classes: list[_OfClass], weights: np.ndarray) -> np.ndarray:
    """(B, S) weights -> (S,) mAP."""
    area_sum = np.zeros(weights.shape[1])
    num_classes = np.zeros(weights.shape[1])
    for gt_image, image, is_tp in classes:
        total = weights[gt_image].sum(axis=0)  # (S,)
        num_classes += total > 0
        area_sum += _area_under_envelope(weights, image, is_tp) / np.maximum(total, 1)
    return area_sum / num_classes


def _area_under_envelope(weights: np.ndarray, image: np.ndarray, is_tp: np.ndarray) -> np.ndarray:
    """Return the area (S,) times the number of boxes of a class.

    Copies of a true positive raise the precision one after the other, so the last has the envelope
    of all; copies of a false positive lower it, so they never make the envelope.

    Args:
        weights: (B, S) how often each sample has each image.
        image: (K,) the image of each detection, by falling score.
        is_tp: (K,) bool.
    """
    places = np.flatnonzero(is_tp)  # (T,)
    hits = weights[image[places]]  # (T, S)
    kept = np.cumsum(_sums_up_to(weights, image, places), axis=0)  # (T, S)
    precision = np.cumsum(hits, axis=0) / np.maximum(kept, 1)
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    return (hits * envelope).sum(axis=0)


def _sums_up_to(weights: np.ndarray, image: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return for each place (T,) the sum (T, S) of the weights after the place before, up to it.

    ``embedding_bag`` sums rows of a table without making the (K, S) array of all of them. Sums of
    whole numbers are exact in float64.
    """
    if not len(places):
        return np.zeros((0, weights.shape[1]))
    table = torch.from_numpy(weights).double()
    rows = torch.from_numpy(image[: places[-1] + 1])
    starts = torch.from_numpy(np.append(0, places[:-1] + 1))
    return torch.nn.functional.embedding_bag(rows, table, starts, mode="sum").numpy()


def _draw(matches: Matches, num_samples: int, seed: int, confidence: float) -> np.ndarray:
    """Return how often each sample has each image (S, B); drop samples without ground truth."""
    if not num_samples >= 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    count = matches.num_images
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, num_samples)
    weights = weights.astype(np.int32)
    with_gt = np.unique(matches.gt_image[~matches.gt_difficult])
    usable = weights[:, with_gt].any(axis=1)
    if not usable.any():
        raise ValueError(
            f"none of {num_samples} samples of {count} images has ground truth; draw more samples"
        )
    return weights[usable]


def _interval(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the ends of the percentile interval."""
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
