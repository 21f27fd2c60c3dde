"""Checks of non-maximum suppression."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from eecs598.grading.result import CheckResult, Wrong, expect, expect_close, show
from eecs598.grading.submission import Submission

__all__ = ["check_class_spec_nms", "check_nms"]


def check_nms(submission: Submission) -> CheckResult:
    """``nms``: the assignment's 5,000 boxes, then ties, duplicates, touching and empty boxes."""
    result = CheckResult("nms")

    @cache
    def difference(threshold: float) -> tuple[float, list[int], list[int]]:
        """The cell's measure, what torchvision keeps, and what the submission keeps."""
        boxes, scores = _cell_boxes()
        expected = torchvision_nms(boxes, scores, threshold).tolist()
        got = submission.common.nms(boxes, scores, threshold).tolist()
        return 1 - len(set(expected) & set(got)) / len(expected), expected, got

    for threshold in (0.3, 0.5, 0.7):
        with result.probe(f"5,000 boxes at {threshold}, difference to torchvision below 1 %"):
            measure, expected, got = difference(threshold)
            expect(
                measure < 0.01 and abs(len(got) - len(expected)) < 0.01 * len(expected),
                f"expected below 1 % difference, got {measure:.2%} ({len(got)} boxes kept, "
                f"torchvision keeps {len(expected)})",
            )
        with result.probe(f"5,000 boxes at {threshold}, exactly as torchvision"):
            measure, expected, got = difference(threshold)
            n = next((n for n, (e, g) in enumerate(zip(expected, got, strict=False)) if e != g), 0)
            hint = "torchvision compares the float32 IoU with the threshold in double precision"
            expect(
                got == expected,
                f"kept box number {n}: expected index {expected[n]}, got "
                f"{got[n] if got else 'nothing'} ({len(got)} kept, torchvision {len(expected)})"
                f"{'. ' + hint if measure < 0.01 else ''}",
            )

    with result.probe("by decreasing score"):
        boxes = torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10], [1, 0, 11, 10], [0, 50, 10, 60]])
        _expect_kept(submission, boxes, torch.tensor([0.6, 0.3, 0.9, 0.7]), 0.5)

    with result.probe("an IoU equal to the threshold does not suppress"):
        boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])  # IoU exactly 1/2
        _expect_kept(submission, boxes, torch.tensor([0.9, 0.8]), 0.5)

    with result.probe("a suppressed box suppresses nothing"):
        boxes = torch.tensor([[0.0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]])
        _expect_kept(submission, boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)

    with result.probe("ties"):
        # Equal scores leave the order open, so the boxes are far apart: all stay.
        boxes = torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10], [0, 50, 10, 60]])
        got = submission.common.nms(boxes, torch.full((3,), 0.5), 0.5)
        expect_close("three boxes far apart with score 0.5", got.sort().values, [0, 1, 2])

    with result.probe("duplicates"):
        boxes = torch.tensor([[5.0, 5, 20, 20]]).repeat(4, 1)
        got = submission.common.nms(boxes, torch.full((4,), 0.5), 0.5)
        expect(
            len(got) == 1, f"four equal boxes of equal score: expected one kept, got {show(got)}"
        )

    with result.probe("touching boxes"):
        boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20]])
        _expect_kept(submission, boxes, torch.tensor([0.9, 0.8, 0.7]), 0.0)

    with result.probe("boxes without area"):
        boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [3, 0, 3, 10]])
        _expect_kept(submission, boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.5)

    with result.probe("no boxes"):
        got = submission.common.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
        expect_close("boxes of shape (0, 4)", got, torch.zeros(0))

    with result.probe("indices are int64"):
        got = submission.common.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0.5]), 0.5).dtype
        expect(got == torch.int64, f"expected indices of torch.int64, got {got}")

    with result.probe("input unchanged"):
        boxes = torch.tensor([[0.3, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]])
        scores = torch.tensor([0.2, 0.9, 0.5])
        before = boxes.clone(), scores.clone()
        submission.common.nms(boxes, scores, 0.5)
        expect_close("boxes after the call", boxes, before[0])
        expect_close("scores after the call", scores, before[1])
    return result


def _cell_boxes() -> tuple[Tensor, Tensor]:
    """The boxes and scores of the assignment's cell after reset_seed(0)."""
    generator = torch.Generator().manual_seed(0)
    boxes = (100.0 * torch.rand(5000, 4, generator=generator)).round()
    boxes[:, 2] = boxes[:, 2] + boxes[:, 0] + 1.0
    boxes[:, 3] = boxes[:, 3] + boxes[:, 1] + 1.0
    return boxes, torch.randn(5000, generator=generator)


def _expect_kept(submission: Submission, boxes: Tensor, scores: Tensor, threshold: float) -> None:
    got = submission.common.nms(boxes.clone(), scores.clone(), threshold).tolist()
    expected = torchvision_nms(boxes, scores, threshold).tolist()
    expect(
        got == expected,
        f"boxes {show(boxes)}, scores {show(scores)}, threshold {threshold}: expected {expected}, "
        f"got {got}",
    )


def check_class_spec_nms(submission: Submission) -> CheckResult:
    """``class_spec_nms`` against torchvision's NMS of each class, wherever the boxes lie."""
    result = CheckResult("class_spec_nms")
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(300, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 40 * torch.rand(300, 2, generator=generator)], dim=1)
    scores = torch.rand(300, generator=generator)
    classes = torch.randint(6, (300,), generator=generator)

    with result.probe("classes do not suppress each other"):
        pair = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [2, 0, 12, 10]])
        _expect_kept_by_class(
            submission, pair, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
        )

    with result.probe("300 boxes of 6 classes"):
        for threshold in (0.3, 0.5, 0.7):
            _expect_kept_by_class(submission, boxes, scores, classes, threshold)

    with result.probe("coordinates below zero"):
        _expect_kept_by_class(submission, boxes - 70, scores, classes)

    with result.probe("large coordinates"):
        # Multiples of 1/4 with 24 bits are exact in float32; shifted by class, they are not.
        large = (boxes * 4).round() / 4 + 2.0**20
        _expect_kept_by_class(submission, large, scores, classes + 14)

    with result.probe("no boxes"):
        got = submission.common.class_spec_nms(
            torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5
        )
        expect_close("boxes of shape (0, 4)", got, torch.zeros(0))

    with result.probe("input unchanged"):
        before = boxes.clone(), scores.clone(), classes.clone()
        submission.common.class_spec_nms(boxes, scores, classes, 0.5)
        for name, now, then in zip(
            ("boxes", "scores", "class_ids"), (boxes, scores, classes), before, strict=True
        ):
            expect_close(f"{name} after the call", now, then)
    return result


def _expect_kept_by_class(
    submission: Submission, boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float = 0.5
) -> None:
    got = submission.common.class_spec_nms(
        boxes.clone(), scores.clone(), classes.clone(), threshold
    ).tolist()
    expected: list[int] = []
    for class_id in classes.unique():
        members = (classes == class_id).nonzero().squeeze(1)
        expected += members[torchvision_nms(boxes[members], scores[members], threshold)].tolist()
    for n in sorted(set(expected) ^ set(got)):  # the first box that differs, if any
        outcomes = ("kept", "suppressed") if n in expected else ("suppressed", "kept")
        raise Wrong(
            f"{len(boxes)} boxes, threshold {threshold}: box {n}, {show(boxes[n])} of class "
            f"{int(classes[n])}, expected to be {outcomes[0]}, got {outcomes[1]}"
        )
    expect(
        len(got) == len(expected), f"expected each index once, got {len(got)} for {len(expected)}"
    )
