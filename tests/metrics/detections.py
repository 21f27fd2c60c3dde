"""Detections as a detector makes them, with the errors given and no other fault."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASSES = ["ant", "bee", "cat", "dog"]


def made_up(
    seed: int,
    num_images: int = 120,
    recall: float = 0.85,
    jitter: float = 0.05,
    false_positives: int = 2,
) -> tuple[list[dict], list[dict], list[tuple[int, int]]]:
    """Predictions, targets and image sizes of a detector without any fault but the errors given."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng)

    def random_boxes(count: int, size: Tensor) -> Tensor:
        sides = uniform(math.log(16), math.log(150), count, 2).exp().minimum(size)
        corner = uniform(0, 1, count, 2) * (size - sides)
        return torch.cat([corner, corner + sides], dim=1)

    def random_labels(count: int) -> Tensor:
        return torch.randint(0, len(CLASSES), (count,), generator=rng)

    predictions, targets, sizes = [], [], []
    for _ in range(num_images):
        width, height = torch.randint(160, 240, (2,), generator=rng).tolist()
        size = torch.tensor([width, height])
        count = int(torch.randint(1, 5, (), generator=rng))
        boxes, labels = random_boxes(count, size), random_labels(count)
        found = uniform(0, 1, count) < recall
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        near = boxes + jitter * sides * torch.randn(count, 4, generator=rng)
        near[:, 2:] = near[:, 2:].maximum(near[:, :2])
        near = torch.cat([near, random_boxes(false_positives, size)])
        near = near.clamp(min=0).minimum(size.repeat(2))
        kept = torch.cat([found, torch.ones(false_positives, dtype=torch.bool)])
        predictions.append(
            {
                "boxes": near[kept],
                "labels": torch.cat([labels, random_labels(false_positives)])[kept],
                "scores": torch.cat([uniform(0.3, 1, count), uniform(0.05, 0.6, false_positives)])[
                    kept
                ],
            }
        )
        targets.append({"boxes": boxes, "labels": labels})
        sizes.append((height, width))
    return predictions, targets, sizes
