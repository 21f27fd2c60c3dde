"""Check of the whole detector's detections.

So that the right detections are known, the network is replaced by a stub with given predictions,
see ``eecs598.grading.checks.stubs``. The location of each prediction is looked up among the
submission's own coordinates, so their order and values do not affect these checks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eecs598.grading.answers import to_plain_data
from eecs598.grading.checks.locations import find_cell
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.checks.stubs import Predictions, locations_of, stub_detector
from eecs598.grading.result import CheckFailure, CheckResult, expect, expect_close, show
from eecs598.grading.submission import OWN_GROUND, Submission, evaluating

__all__ = [
    "HUGE",
    "THREE_APART",
    "check_inference",
    "make_inference_case",
    "three_results",
]


class GivenPrediction(NamedTuple):
    """A confident prediction at one location, from which one detection must follow.

    Attributes:
        level: of the pyramid.
        cell: row and column of the location in the level's feature map.
        label: class id.
        logits: class logit of the label, and centerness logit.
        deltas: left, top, right, bottom in strides.
    """

    level: str
    cell: tuple[int, int]
    label: int
    logits: tuple[float, float]
    deltas: tuple[float, float, float, float]

    @property
    def score(self) -> float:
        """Score of the detection."""
        class_probability, centerness = (1 / (1 + math.exp(-z)) for z in self.logits)
        return math.sqrt(class_probability * centerness)


# Far from each other, one per level; scores 0.85, 0.53 and 0.38.
THREE_APART = (
    GivenPrediction("p3", (1, 2), 0, (1.5, 2.0), (0.5, 0.75, 1.0, 1.25)),
    GivenPrediction("p4", (2, 4), 2, (0.5, -0.2), (0.5, 0.25, 0.5, 0.25)),
    GivenPrediction("p5", (1, 0), 1, (0.2, -1.0), (0.25, 0.125, 0.5, 0.25)),
)

# Its box surrounds each image.
HUGE = GivenPrediction("p4", (1, 2), 1, (2.0, 2.0), (20.0, 20.0, 20.0, 20.0))

# A threshold below these scores, even if a submission computes scores in another way, so that only
# the probe of the score fails then.
LOW_SCORE = 0.05


class _InferenceCase(NamedTuple):
    """A detector that makes given predictions and no others for an image.

    Attributes:
        detector: the submission's, with stubs for backbone and head.
        images: ``(1, 3, H, W)``.
        locations: the submission's, ``(N, 2)`` per level.
        predictions: class logits, deltas and centerness logits per level.
        boxes: ``(K, 4)``, those of the given predictions.
    """

    detector: nn.Module
    images: Tensor
    locations: dict[str, Tensor]
    predictions: Predictions
    boxes: Tensor

    @torch.no_grad()
    def detect(self, score_thresh: float = LOW_SCORE, nms_thresh: float = 0.5) -> Sequence[Tensor]:
        """Return boxes, classes and scores of the detections."""
        found = self.detector(
            self.images, test_score_thresh=score_thresh, test_nms_thresh=nms_thresh
        )
        return three_results(to_plain_data(found))


def three_results(found: object) -> Sequence[Tensor]:
    """Return what a detector returned if it is a sequence of three values."""
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        got = f"{len(found)} values" if isinstance(found, (tuple, list)) else show(found)
        raise CheckFailure(f"expected (boxes, classes, scores), got {got}")
    return found


def make_inference_case(
    submission: Submission, given: Sequence[GivenPrediction], size: tuple[int, int] = (224, 224)
) -> _InferenceCase:
    """Make a detector with given predictions.

    Args:
        submission: its functions list the locations.
        given: the predictions; all others are background.
        size: height and width of the image.
    """
    images = torch.zeros(1, 3, *size)
    locations = locations_of(submission, images)
    predictions = [
        {level: torch.full((1, len(points), c), value) for level, points in locations.items()}
        for c, value in ((OWN_GROUND.num_classes, -15.0), (4, 0.5), (1, -15.0))
    ]
    boxes = []
    for level, cell, label, (class_logit, center_logit), deltas in given:
        n = find_cell(locations[level], *cell)
        predictions[0][level][0, n] = class_logit - 2.0  # the other classes are less likely
        predictions[0][level][0, n, label] = class_logit
        predictions[1][level][0, n] = torch.tensor(deltas)
        predictions[2][level][0, n] = center_logit
        x, y = locations[level][n].tolist()
        left, top, right, bottom = (STRIDES[level] * delta for delta in deltas)
        boxes.append([x - left, y - top, x + right, y + bottom])
    return _InferenceCase(
        evaluating(stub_detector(submission, predictions)),
        images,
        locations,
        predictions,
        torch.tensor(boxes),
    )


def check_inference(submission: Submission) -> CheckResult:
    """Check ``FCOS`` in evaluation mode on given predictions, whose detections are known."""
    result = CheckResult("inference")

    def three_detections() -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, classes and scores for ``THREE_APART``, by decreasing score."""
        boxes, classes, scores = make_inference_case(submission, THREE_APART).detect()
        expect(
            len(boxes) == len(classes) == len(scores) == len(THREE_APART),
            f"3 predictions far apart, score threshold {LOW_SCORE}: expected 3 detections, got "
            f"those with scores {show(scores, 3)}",
        )
        order = scores.argsort(descending=True)
        return boxes[order], classes[order], scores[order]

    with result.probe("three tensors of matching shapes"):
        found = make_inference_case(submission, THREE_APART).detect()
        got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found]
        expect(
            got == [(3, 4), (3,), (3,)],
            f"three detections: expected shapes (3, 4), (3,), (3,), got {got}",
        )

    with result.probe("score is sqrt(class probability * centerness)"):
        _, _, scores = three_detections()
        for given, score in zip(THREE_APART, scores.tolist(), strict=True):
            expect(
                math.isclose(score, given.score, rel_tol=1e-4),
                f"class logit {given.logits[0]:g}, centerness logit {given.logits[1]:g}: "
                f"expected score {given.score:.6g}, got {score:.6g}",
            )

    with result.probe("the most probable class"):
        _, classes, _ = three_detections()
        expect_close(
            "three detections: classes",
            classes,
            [given.label for given in THREE_APART],
        )

    with result.probe("boxes of each level in pixels"):
        boxes, _, _ = three_detections()
        expected = make_inference_case(submission, THREE_APART).boxes
        for given, got_box, box in zip(THREE_APART, boxes, expected, strict=True):
            what = f"deltas {show(given.deltas)} at row, column {given.cell} of {given.level}"
            expect_close(what, got_box, box, 1e-3)

    with result.probe("nothing below the score threshold"):
        _expect_found(submission, THREE_APART, [0, 1], score_thresh=0.5)
        _expect_found(submission, THREE_APART, [0], score_thresh=0.8)

    with result.probe("no detections"):
        lengths = [
            len(x) for x in make_inference_case(submission, THREE_APART).detect(score_thresh=0.99)
        ]
        expect(lengths == [0, 0, 0], f"threshold 0.99: expected no detections, got {lengths}")

    with result.probe("boxes clipped to the image"):
        boxes, _, _ = make_inference_case(submission, [HUGE]).detect()
        what = "a box that surrounds an image of 224 x 224"
        expect_close(what, boxes, [[0.0, 0, 224, 224]])

    # The same box from two neighboring locations of p3, 8 pixels apart.
    first = GivenPrediction("p3", (3, 4), 1, (2.0, 2.0), (1.5, 1.5, 1.5, 1.5))
    second = GivenPrediction("p3", (3, 5), 1, (1.0, 1.0), (2.5, 1.5, 0.5, 1.5))

    with result.probe("NMS within a class"):
        _expect_found(submission, [first, second], [0])

    with result.probe("no NMS between classes"):
        _expect_found(submission, [first, second._replace(label=2)], [0, 1])

    with result.probe("the NMS threshold is used"):
        shifted = second._replace(deltas=(1.5, 1.5, 1.5, 1.5))  # IoU 1/2 with the first
        _expect_found(submission, [first, shifted], [0], nms_thresh=0.45)
        _expect_found(submission, [first, shifted], [0, 1], nms_thresh=0.55)

    with result.probe("input unchanged"):
        # Huge and negative deltas, because clipping is often done in place.
        beyond = GivenPrediction("p3", (5, 9), 1, (1.0, 1.0), (20.0, -1.0, 20.0, -1.0))
        _expect_unchanged(make_inference_case(submission, [*THREE_APART, beyond]))
    return result


def _expect_found(
    submission: Submission,
    given: Sequence[GivenPrediction],
    kept: Sequence[int],
    score_thresh: float = LOW_SCORE,
    nms_thresh: float = 0.5,
) -> None:
    """Expect one detection for each given prediction with an index in ``kept``, and no other."""
    case = make_inference_case(submission, given)
    _, classes, scores = case.detect(score_thresh, nms_thresh)
    expected = sorted(given[index].label for index in kept)
    got = sorted(int(label) for label in classes.tolist())
    expect(
        got == expected,
        f"score threshold {score_thresh}, NMS threshold {nms_thresh}: expected detections of the "
        f"classes {expected}, got {len(got)} of the classes {got[:6]} with scores "
        f"{show(scores[:6], 3)}",
        f"# predicted: boxes {show(case.boxes)}\n# of the classes {[p.label for p in given]} with "
        f"scores {[round(p.score, 2) for p in given]}",
    )


@torch.no_grad()
def _expect_unchanged(case: _InferenceCase) -> None:
    """Expect detection, and the handout's method ``inference``, to change none of its inputs."""
    inputs = [case.locations, *case.predictions]
    images_before, inputs_before = case.images.clone(), copy.deepcopy(inputs)
    case.detect()
    inference = getattr(case.detector, "inference", None)
    if inference is not None:
        inference(case.images, *inputs, test_score_thresh=LOW_SCORE, test_nms_thresh=0.5)
    expect_close("images after inference", case.images, images_before)
    names = ("locations", "class logits", "deltas", "centerness logits")
    for name, now, then in zip(names, inputs, inputs_before, strict=True):
        for level in STRIDES:
            expect_close(f"{name} of {level} after inference", now[level], then[level])
