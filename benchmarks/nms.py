"""How long does NMS take, next to torchvision's in C++?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torchvision.ops import batched_nms
from torchvision.ops import nms as torchvision_nms

from benchmarks.timing import Row, side_by_side
from common import class_spec_nms, nms

THRESHOLDS = (0.3, 0.5, 0.7)
SIZES = {1_000: None, 5_000: 0.4, 20_000: None, 100_000: None}
NUM_CLASSES = 20


def rows(device: str) -> Iterator[Row]:
    """The boxes of the assignment's cell, at its three thresholds one after the other."""
    for size, goal in SIZES.items():
        boxes, scores, class_ids = random_boxes(size, device)

        def ours(boxes=boxes, scores=scores):
            return [nms(boxes, scores, threshold) for threshold in THRESHOLDS]

        def theirs(boxes=boxes, scores=scores):
            return [torchvision_nms(boxes, scores, threshold) for threshold in THRESHOLDS]

        if device == "cpu":  # divisions on a GPU may round differently
            assert all(map(torch.equal, ours(), theirs()))
        repetitions = 9 if size <= 20_000 else 3
        times = side_by_side(ours, theirs, repetitions)
        yield Row(f"nms, {size:,} boxes", "torchvision.ops.nms", *times, goal)

    boxes, scores, class_ids = random_boxes(5_000, device)
    arguments = (boxes, scores, class_ids)

    def ours_by_class():
        return [class_spec_nms(*arguments, threshold) for threshold in THRESHOLDS]

    def theirs_by_class():
        return [batched_nms(*arguments, threshold) for threshold in THRESHOLDS]

    if device == "cpu":
        assert all(map(torch.equal, ours_by_class(), theirs_by_class()))
    times = side_by_side(ours_by_class, theirs_by_class, 15)
    question = f"class_spec_nms, 5,000 boxes, {NUM_CLASSES} classes"
    yield Row(question, "torchvision.ops.batched_nms", *times, 0.7)


def random_boxes(count: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes as in the assignment's cell: whole numbers, large overlaps."""
    generator = torch.Generator().manual_seed(0)
    boxes = (100.0 * torch.rand(count, 4, generator=generator)).round()
    boxes[:, 2:] += boxes[:, :2] + 1.0
    scores = torch.randn(count, generator=generator)
    class_ids = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return boxes.to(device), scores.to(device), class_ids.to(device)
