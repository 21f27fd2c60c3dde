"""Checks of non-maximum suppression, over all boxes and within classes."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.ops import nms as torchvision_nms

from eecs598.grading.result import (
    CheckFailure,
    CheckResult,
    call_snippet,
    expect,
    expect_close,
    once,
    show,
)
from eecs598.grading.submission import Submission

__all__ = ["cell_boxes", "check_class_spec_nms", "check_nms"]

MAX_SHOWN = 4  # boxes in a sentence
MAX_SEARCH_SECONDS = 2.0  # for a small example; it counts to the time of the check


def check_nms(submission: Submission) -> CheckResult:
    """Check ``nms``: the assignment's 5,000 boxes, ties, duplicates, touching and empty boxes."""
    result = CheckResult("nms")

    outcomes = {
        threshold: once(partial(_on_cell_boxes, submission, threshold))
        for threshold in (0.3, 0.5, 0.7)
    }
    for threshold, outcome in outcomes.items():
        with result.probe(f"5,000 boxes at {threshold}, difference to torchvision below 1 %"):
            expected, got = outcome()
            if _differ(expected, got):
                difference = 1 - len(set(expected) & set(got)) / len(expected)
                sentence, snippet = _smaller_example(submission, threshold)
                raise CheckFailure(
                    f"got {difference:.1%} difference, {len(got)} boxes kept; torchvision keeps "
                    f"{len(expected)}{sentence}",
                    snippet,
                )

    with result.probe("5,000 boxes, exactly as torchvision"):
        for threshold, outcome in outcomes.items():
            try:
                expected, got = outcome()
            except Exception:
                continue  # the probe above says so
            if got != expected and not _differ(expected, got):
                sentence, snippet = _smaller_example(submission, threshold)
                number = len(set(expected) ^ set(got))
                what = f"{number} boxes differ" if number else "the order differs"
                raise CheckFailure(f"at {threshold}, {what}{sentence}", snippet)

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
        got = sorted(_indices(got))
        expect(got == [0, 1, 2], f"three boxes far apart with score 0.5: expected all, got {got}")

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


def _indices(got: object) -> list[int]:
    """Return indices as a list; what is not a tensor fails the probe."""
    if not isinstance(got, Tensor):
        raise CheckFailure(
            f"expected a tensor of indices, got the {type(got).__name__} {show(got)}"
        )
    return got.tolist()


def cell_boxes() -> tuple[Tensor, Tensor]:
    """Return the boxes (5000, 4) and scores (5000,) of the assignment's cell."""
    generator = torch.Generator().manual_seed(0)
    boxes = (100.0 * torch.rand(5000, 4, generator=generator)).round()
    boxes[:, 2] = boxes[:, 2] + boxes[:, 0] + 1.0
    boxes[:, 3] = boxes[:, 3] + boxes[:, 1] + 1.0
    return boxes, torch.randn(5000, generator=generator)


def _differ(expected: list[int], got: list[int]) -> bool:
    """Whether kept boxes differ from torchvision's by 1 % or more, as the assignment counts."""
    common = len(set(expected) & set(got))
    return 1 - common / len(expected) >= 0.01 or abs(len(got) - len(expected)) >= 0.01 * len(
        expected
    )


def _on_cell_boxes(submission: Submission, threshold: float) -> tuple[list[int], list[int]]:
    """Return the indices that torchvision keeps and those that the submission keeps."""
    boxes, scores = cell_boxes()
    expected = torchvision_nms(boxes, scores, threshold).tolist()
    return expected, _indices(submission.common.nms(boxes, scores, threshold))


def _smaller_example(submission: Submission, threshold: float) -> tuple[str, str]:
    """Describe a few of the 5,000 boxes on which the submission is wrong.

    Returns:
        The end of a sentence and a snippet, both "" if no few boxes are found.
    """
    boxes, scores = cell_boxes()

    def outcome(indices: Tensor) -> tuple[list[int], list[int]]:
        some = boxes[indices], scores[indices]
        expected = torchvision_nms(*some, threshold).tolist()
        return expected, _indices(submission.common.nms(*some, threshold))

    few = _minimize(lambda indices: operator.ne(*outcome(indices)), len(boxes))
    if len(few) > MAX_SHOWN:
        return "", ""
    expected, got = outcome(few)
    sentence = f"; for {len(few)} of them expected {expected}, got {got}"
    if len(few) == 2:
        iou = box_iou(boxes[few], boxes[few])[0, 1].item()
        near = abs(iou - threshold) < 1e-6
        if iou == threshold:
            sentence += ": an IoU equal to the threshold"
        elif near:
            sentence += f": the IoU is {iou:.9f} in float32"
        else:
            sentence += f": the IoU is {iou:.4g}"
    return sentence, call_snippet("common.nms", boxes[few], scores[few], threshold)


def _minimize(differs: Callable[[Tensor], bool], number: int) -> Tensor:
    """Leave out items as long as the results still differ (a short form of delta debugging).

    Source: Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002.

    Args:
        differs: whether the results differ for the items of some indices.
        number: of items.

    Returns:
        The indices of few items for which they differ.
    """
    indices, size = torch.arange(number), number // 2
    end = time.monotonic() + MAX_SEARCH_SECONDS
    while size >= 1 and len(indices) > 2:
        for start in range(0, len(indices), size):
            fewer = torch.cat([indices[:start], indices[start + size :]])
            if time.monotonic() > end:
                return indices
            if len(fewer) > 1 and differs(fewer):
                indices = fewer
                size = min(size, len(indices) // 2)
                break
        else:
            size //= 2
    return indices


def _expect_kept(submission: Submission, boxes: Tensor, scores: Tensor, threshold: float) -> None:
    got = _indices(submission.common.nms(boxes.clone(), scores.clone(), threshold))
    expected = torchvision_nms(boxes, scores, threshold).tolist()
    expect(
        got == expected,
        f"expected {expected}, got {show(got)}",
        call_snippet("common.nms", boxes, scores, threshold),
    )


def check_class_spec_nms(submission: Submission) -> CheckResult:
    """Check ``class_spec_nms`` against torchvision's NMS of each class, for any coordinates."""
    result = CheckResult("class_spec_nms")
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(300, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 40 * torch.rand(300, 2, generator=generator)], dim=1)
    boxes = (boxes * 4).round() / 4
    scores = torch.randperm(300, generator=generator) / 300
    classes = torch.randint(6, (300,), generator=generator)

    with result.probe("classes do not suppress each other"):
        three = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [2, 0, 12, 10]])
        _expect_kept_by_class(
            submission, three, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
        )

    with result.probe("300 boxes of 6 classes"):
        for threshold in (0.3, 0.5, 0.7):
            _expect_kept_by_class(submission, boxes, scores, classes, threshold)

    with result.probe("coordinates below zero"):
        _expect_kept_by_class(submission, boxes - 70, scores, classes)

    with result.probe("large coordinates"):
        # Multiples of 1/4 with 24 bits are exact in float32; shifted by class, they are not.
        large = boxes + 2.0**20
        for threshold in (0.3, 0.5, 0.7):
            _expect_kept_by_class(submission, large, scores, classes + 14, threshold)

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
    def outcome(indices: Tensor) -> tuple[list[int], list[int]]:
        some = boxes[indices], scores[indices], classes[indices]
        return sorted(_kept_by_class(*some, threshold)), sorted(
            _indices(submission.common.class_spec_nms(*some, threshold))
        )

    expected, got = outcome(torch.arange(len(boxes)))
    if expected == got:
        return
    few = _minimize(lambda indices: operator.ne(*outcome(indices)), len(boxes))
    expected, got = outcome(few)
    some = boxes[few], scores[few], classes[few]
    raise CheckFailure(
        f"{len(few)} boxes, threshold {threshold}: expected {show(expected)}, got {show(got)}",
        call_snippet("common.class_spec_nms", *some, threshold) if len(few) <= MAX_SHOWN else "",
    )


def _kept_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    for class_id in classes.unique():
        members = (classes == class_id).nonzero().squeeze(1)
        kept += members[torchvision_nms(boxes[members], scores[members], threshold)].tolist()
    return kept
