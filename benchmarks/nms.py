"""Time of NMS, compared with torchvision's in C++."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.ops import nms as torchvision_nms

from benchmarks.timing import Row, side_by_side
from common import class_spec_nms, nms

THRESHOLDS = (0.3, 0.5, 0.7)
SIZES = {1_000: None, 5_000: 0.4, 20_000: None, 100_000: None}
NUM_CLASSES = 20


def rows(device: str) -> Iterator[Row]:
    """Time NMS on the boxes of the assignment's cell, at its three thresholds in sequence."""
    for size, goal in SIZES.items():
        boxes, scores, class_ids = random_boxes(size, device)

        def ours(boxes: Tensor = boxes, scores: Tensor = scores) -> list[Tensor]:
            return [nms(boxes, scores, threshold) for threshold in THRESHOLDS]

        def theirs(boxes: Tensor = boxes, scores: Tensor = scores) -> list[Tensor]:
            return [torchvision_nms(boxes, scores, threshold) for threshold in THRESHOLDS]

        if device == "cpu":  # a GPU may round divisions differently
            assert all(map(torch.equal, ours(), theirs()))
        repetitions = 9 if size <= 20_000 else 7
        times = side_by_side(ours, theirs, repetitions)
        yield Row(f"nms, {size:,} boxes", "torchvision.ops.nms", *times, goal)

    boxes, scores, class_ids = random_boxes(5_000, device)
    question = f"class_spec_nms, 5,000 boxes, {NUM_CLASSES} classes"
    yield _by_class(question, boxes, scores, class_ids, 0.7)
    # As in a batch of images: a few classes have most of the boxes.
    index = torch.arange(5_000, device=device)
    skewed = torch.where(index % 2 == 0, 0, 1 + index // 2 % 320)
    question = "class_spec_nms, 5,000 boxes, half of them in one of 321 classes"
    yield _by_class(question, boxes, scores, skewed, None)


def _by_class(
    question: str, boxes: Tensor, scores: Tensor, class_ids: Tensor, goal: float | None
) -> Row:
    def ours() -> list[Tensor]:
        return [class_spec_nms(boxes, scores, class_ids, threshold) for threshold in THRESHOLDS]

    def theirs() -> list[Tensor]:
        return [batched_nms(boxes, scores, class_ids, threshold) for threshold in THRESHOLDS]

    if boxes.device.type == "cpu":
        assert all(map(torch.equal, ours(), theirs()))
    return Row(question, "torchvision.ops.batched_nms", *side_by_side(ours, theirs, 15), goal)


def random_boxes(count: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (whole numbers, large overlaps), scores and classes as in the assignment."""
    generator = torch.Generator().manual_seed(0)
    boxes = (100.0 * torch.rand(count, 4, generator=generator)).round()
    boxes[:, 2:] += boxes[:, :2] + 1.0
    scores = torch.randn(count, generator=generator)
    class_ids = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return boxes.to(device), scores.to(device), class_ids.to(device)
