"""Checks of the whole detector: detections, sizes and dtypes.

To know what must come out, most of them plant predictions: ``pred_net`` is replaced by a module
that returns given tensors, and ``backbone`` by one that takes no time. The location of each
planted value is looked up in the submission's own coordinates, so neither their order nor their
values matter here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eecs598.grading.answers import plain
from eecs598.grading.checks.locations import find_cell
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.checks.stubs import Predictions, locations_of, plant
from eecs598.grading.result import CheckResult, expect, expect_close, once, show
from eecs598.grading.submission import NUM_CLASSES, Submission, build, evaluating, training

__all__ = [
    "APART",
    "check_inference",
    "check_sizes_and_dtypes",
    "make_scene",
]


class _Planted(NamedTuple):
    """One confident prediction, and with it the detection that must come out."""

    level: str
    cell: tuple[int, int]  # row, column
    label: int
    logits: tuple[float, float]  # of the label and of centerness
    deltas: tuple[float, float, float, float]

    @property
    def score(self) -> float:
        class_probability, centerness = (1 / (1 + math.exp(-z)) for z in self.logits)
        return math.sqrt(class_probability * centerness)


# Apart from each other, one a level; scores 0.85, 0.53 and 0.38.
APART = (
    _Planted("p3", (1, 2), 0, (1.5, 2.0), (0.5, 0.75, 1.0, 1.25)),
    _Planted("p4", (2, 4), 2, (0.5, -0.2), (0.5, 0.25, 0.5, 0.25)),
    _Planted("p5", (1, 0), 1, (0.2, -1.0), (0.25, 0.125, 0.5, 0.25)),
)

# Below what these score even where a submission computes the score in another way, so that a
# wrong score is nobody else's matter.
LOW = 0.05


class _Scene(NamedTuple):
    """An image in which a detector sees what was planted and nothing else."""

    detector: nn.Module
    images: Tensor  # (1, 3, H, W)
    locations: dict[str, Tensor]
    predictions: Predictions
    boxes: Tensor  # (K, 4), of what was planted

    @torch.no_grad()
    def detect(self, score_thresh: float = LOW, nms_thresh: float = 0.5) -> Sequence[Tensor]:
        found = plain(
            self.detector(self.images, test_score_thresh=score_thresh, test_nms_thresh=nms_thresh)
        )
        _expect_three(found)
        return found


def _expect_three(found: object) -> None:
    is_sequence = isinstance(found, (tuple, list))
    got = f"{len(found)} values" if is_sequence else show(found)
    expect(is_sequence and len(found) == 3, f"expected (boxes, classes, scores), got {got}")


def make_scene(
    submission: Submission, planted: Sequence[_Planted], size: tuple[int, int] = (96, 96)
) -> _Scene:
    images = torch.zeros(1, 3, *size)
    locations = locations_of(submission, images)
    predictions = [
        {level: torch.full((1, len(points), c), value) for level, points in locations.items()}
        for c, value in ((NUM_CLASSES, -15.0), (4, 0.5), (1, -15.0))
    ]
    boxes = []
    for level, cell, label, (class_logit, center_logit), deltas in planted:
        n = find_cell(locations[level], *cell)
        predictions[0][level][0, n] = class_logit - 2.0  # the other classes are less likely
        predictions[0][level][0, n, label] = class_logit
        predictions[1][level][0, n] = torch.tensor(deltas)
        predictions[2][level][0, n] = center_logit
        x, y = locations[level][n].tolist()
        left, top, right, bottom = (STRIDES[level] * delta for delta in deltas)
        boxes.append([x - left, y - top, x + right, y + bottom])
    return _Scene(
        evaluating(plant(submission, predictions)),
        images,
        locations,
        predictions,
        torch.tensor(boxes),
    )


def check_inference(submission: Submission) -> CheckResult:
    """``FCOS`` in evaluation mode on planted predictions whose detections are known."""
    result = CheckResult("inference")

    def three_detections() -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, classes and scores of what is planted apart, by decreasing score."""
        boxes, classes, scores = make_scene(submission, APART).detect()
        expect(
            len(boxes) == len(classes) == len(scores) == len(APART),
            f"3 planted predictions far apart, score threshold {LOW}: expected 3 detections, got "
            f"those with scores {show(scores)}",
        )
        order = scores.argsort(descending=True)
        return boxes[order], classes[order], scores[order]

    with result.probe("three tensors of matching shapes"):
        found = make_scene(submission, APART).detect()
        got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found]
        expect(
            got == [(3, 4), (3,), (3,)],
            f"three detections: expected shapes (3, 4), (3,), (3,), got {got}",
        )

    with result.probe("score is sqrt(class probability * centerness)"):
        _, _, scores = three_detections()
        for planted, score in zip(APART, scores.tolist(), strict=True):
            expect(
                math.isclose(score, planted.score, rel_tol=1e-4),
                f"class logit {planted.logits[0]:g}, centerness logit {planted.logits[1]:g}: "
                f"expected score {planted.score:.6g}, got {score:.6g}",
            )

    with result.probe("the most probable class"):
        _, classes, _ = three_detections()
        expect_close("three detections: classes", classes, [planted.label for planted in APART])

    with result.probe("boxes of each level in pixels"):
        boxes, _, _ = three_detections()
        expected = make_scene(submission, APART).boxes
        for planted, got_box, box in zip(APART, boxes, expected, strict=True):
            what = f"deltas {show(planted.deltas)} at row, column {planted.cell} of {planted.level}"
            expect_close(what, got_box, box, 1e-3)

    with result.probe("nothing below the score threshold"):
        _expect_found(submission, APART, [0, 1], score_thresh=0.5)
        _expect_found(submission, APART, [0], score_thresh=0.8)

    with result.probe("no detections"):
        lengths = [len(x) for x in make_scene(submission, APART).detect(score_thresh=0.99)]
        expect(lengths == [0, 0, 0], f"threshold 0.99: expected no detections, got {lengths}")

    with result.probe("boxes clipped to the image"):
        huge = _Planted("p4", (1, 2), 1, (2.0, 2.0), (9.0, 9.0, 9.0, 9.0))
        boxes, _, _ = make_scene(submission, [huge], size=(64, 96)).detect()
        what = "a box that surrounds an image of height 64 and width 96"
        expect_close(what, boxes, [[0.0, 0, 96, 64]])

    # The same box from two neighbouring locations of p3, 8 pixels apart.
    first = _Planted("p3", (3, 4), 1, (2.0, 2.0), (1.5, 1.5, 1.5, 1.5))
    second = _Planted("p3", (3, 5), 1, (1.0, 1.0), (2.5, 1.5, 0.5, 1.5))

    with result.probe("NMS within a class"):
        _expect_found(submission, [first, second], [0])

    with result.probe("no NMS between classes"):
        _expect_found(submission, [first, second._replace(label=2)], [0, 1])

    with result.probe("the NMS threshold is used"):
        shifted = second._replace(deltas=(1.5, 1.5, 1.5, 1.5))  # IoU 1/2 with the first
        _expect_found(submission, [first, shifted], [0], nms_thresh=0.45)
        _expect_found(submission, [first, shifted], [0, 1], nms_thresh=0.55)

    with result.probe("input unchanged"):
        # Huge and negative deltas, because clipping is what is easily done in place.
        beyond = _Planted("p3", (5, 9), 1, (1.0, 1.0), (20.0, -1.0, 20.0, -1.0))
        _expect_unchanged(make_scene(submission, [*APART, beyond]))
    return result


def _expect_found(
    submission: Submission,
    planted: Sequence[_Planted],
    kept: Sequence[int],
    score_thresh: float = LOW,
    nms_thresh: float = 0.5,
) -> None:
    """Expect one detection for each of those that should be kept, and no other."""
    scene = make_scene(submission, planted)
    _, classes, scores = scene.detect(score_thresh, nms_thresh)
    expected = sorted(planted[index].label for index in kept)
    got = sorted(int(label) for label in classes.tolist())
    expect(
        got == expected,
        f"predicted: boxes {show(scene.boxes)} of classes {[p.label for p in planted]} with scores "
        f"{[round(p.score, 2) for p in planted]}, score threshold {score_thresh}, NMS threshold "
        f"{nms_thresh}: expected detections of the classes {expected}, got {len(got)} of the "
        f"classes {got[:6]} with scores {show(scores[:6])}",
    )


@torch.no_grad()
def _expect_unchanged(scene: _Scene) -> None:
    inputs = [scene.locations, *scene.predictions]
    before = copy.deepcopy([scene.images, *inputs])
    scene.detect()
    if hasattr(scene.detector, "inference"):
        scene.detector.inference(scene.images, *inputs, test_score_thresh=LOW, test_nms_thresh=0.5)
    expect_close("images after inference", scene.images, before[0])
    names = ("locations", "class logits", "deltas", "centerness logits")
    for name, now, then in zip(names, inputs, before[1:], strict=True):
        for level in STRIDES:
            expect_close(f"{name} of {level} after inference", now[level], then[level])


# --------------------------------------------------------------------------------------------
# Other sizes
# --------------------------------------------------------------------------------------------


def check_sizes_and_dtypes(submission: Submission) -> CheckResult:
    """Nothing may depend on 224 pixels, 16 images, 20 classes or float32."""
    result = CheckResult("sizes_and_dtypes")

    def run(detector: nn.Module, images: Tensor) -> None:
        gt_boxes = torch.tensor([[[4.0, 6, 40, 50, 0], [-1] * 5]]).repeat(len(images), 1, 1)
        what = f"images {tuple(images.shape)} of {images.dtype}"
        losses = plain(training(detector)(images, gt_boxes.to(images.dtype)))
        loss = sum(losses.values())
        loss.backward()
        expect(bool(loss.isfinite()), f"{what}: expected a finite loss, got {show(loss.detach())}")
        with torch.no_grad():
            found = plain(
                evaluating(detector)(images[:1], test_score_thresh=0.0, test_nms_thresh=0.5)
            )
        _expect_three(found)
        boxes, classes, scores = found
        expect(
            len(boxes) == len(classes) == len(scores) > 0,
            f"{what}, score threshold 0: expected detections, got {len(boxes)} boxes and "
            f"{len(scores)} scores",
        )
        expect(
            bool(boxes.isfinite().all() and scores.isfinite().all()),
            f"{what}: expected finite boxes and scores, got NaN or infinity",
        )

    detector = once(submission.detector)

    with result.probe("three images of 64 x 64"):
        run(detector(), torch.randn(3, 3, 64, 64))

    with result.probe("one image of 65 x 105"):
        run(detector(), torch.randn(1, 3, 65, 105))

    with result.probe("one class, other channels, a longer stem"):
        other = build(
            submission.one_stage_detector.FCOS,
            num_classes=1,
            fpn_channels=12,
            stem_channels=[8, 10, 8],
        )
        run(other, torch.randn(2, 3, 64, 96))

    with result.probe("float64"):
        run(detector().double(), torch.randn(2, 3, 64, 32, dtype=torch.float64))

    with result.probe("targets and boxes in float64"):
        for name in ("get_deltas_from", "apply_deltas_to", "make_centerness"):
            for written, reason in submission.replaced.items():
                expect(f"fcos_{name}_" not in written, f"{written}: {reason}")
        _expect_double_precision(submission.one_stage_detector)
    return result


def _expect_double_precision(osd: ModuleType) -> None:
    """Targets and boxes must tell apart what float32 can't; what they are is no matter here."""
    step = 2**-30
    location = torch.tensor([[12.0, 20.0]], dtype=torch.float64)
    boxes = [
        torch.tensor([[10.0, 10.0, 20.0, bottom, 1.0]], dtype=torch.float64)
        for bottom in (37.0, 37.0 + step)
    ]
    all_deltas = [
        torch.tensor([[left, 1.25, 1.0, 2.125]], dtype=torch.float64)
        for left in (0.25, 0.25 + step)
    ]
    for what, one, other in (
        (
            "deltas of the boxes [10, 10, 20, 37] and [10, 10, 20, 37 + 2**-30] in float64",
            *(osd.fcos_get_deltas_from_locations(location, box, stride=8) for box in boxes),
        ),
        (
            "boxes of the deltas [0.25, 1.25, 1, 2.125] and [0.25 + 2**-30, 1.25, 1, 2.125] in "
            "float64",
            *(osd.fcos_apply_deltas_to_locations(deltas, location, 8) for deltas in all_deltas),
        ),
        (
            "centerness of the deltas [0.25, 1.25, 1, 2.125] and [0.25 + 2**-30, 1.25, 1, 2.125] "
            "in float64",
            *(osd.fcos_make_centerness_targets(deltas) for deltas in all_deltas),
        ),
    ):
        expect(
            isinstance(one, Tensor) and isinstance(other, Tensor),
            f"{what}: expected tensors, got {show(one)}",
        )
        expect(
            not torch.equal(one, other),
            f"{what}: expected different values, got twice {show(one, 12)} of {one.dtype}",
        )
