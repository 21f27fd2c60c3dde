"""Reference implementation of targets and losses, slow: one location at a time, in float64.

The checks compare submissions with them. They follow the formulas so closely that they are easy to
verify: FCOS (arXiv 1904.01355) equations 1 and 3 and section 3.2, focal loss (arXiv 1708.02002)
equation 5, with the assignment's L1 loss and divisor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["STRIDES", "best_box", "centerness", "ltrb", "sums_of_losses"]

STRIDES = {"p3": 8, "p4": 16, "p5": 32}
FIRST_AVERAGE = 150.0  # initial moving average of foreground locations per image


def ltrb(x: float, y: float, box: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the pixels from a location to the left, top, right and bottom side of a box."""
    return x - box[0], y - box[1], box[2] - x, box[3] - y


def best_box(level: str, x: float, y: float, boxes: Sequence[Sequence[float]]) -> int | None:
    """Return the index of the box that a location matches; None for background.

    Source: FCOS, sections 3.1 and 3.2; the limits are those of the assignment.

    Args:
        level: of the location: "p3", "p4" or "p5".
        x: of the location, in pixels.
        y: of the location, in pixels.
        boxes: rows of x1, y1, x2, y2, class id; a class id below 0 is padding.
    """
    stride = STRIDES[level]
    lower = 0 if level == "p3" else 4 * stride
    upper = math.inf if level == "p5" else 8 * stride
    best, best_area = None, math.inf
    for index, box in enumerate(boxes):
        distances = ltrb(x, y, box)
        area = (box[2] - box[0]) * (box[3] - box[1])
        if (
            box[4] >= 0
            and min(distances) > 0
            and lower < max(distances) < upper
            and area < best_area
        ):
            best, best_area = index, area
    return best


def centerness(left: float, top: float, right: float, bottom: float) -> float:
    """Return the centerness of a location inside its box (FCOS, equation 3)."""
    nearer = min(left, right) * min(top, bottom)
    farther = max(left, right) * max(top, bottom)
    return math.sqrt(nearer / farther)


def sums_of_losses(
    locations: Mapping[str, Tensor],
    predictions: Sequence[Mapping[str, Tensor]],
    gt_boxes: Tensor,
) -> tuple[dict[str, float], float]:
    """Return the three losses summed over a batch, without their divisor.

    Args:
        locations: per level ``(N, 2)``.
        predictions: class logits ``(B, N, C)``, deltas ``(B, N, 4)`` and centerness logits
            ``(B, N, 1)``, each per level.
        gt_boxes: ``(B, M, 5)``.

    Returns:
        The sums by name of the loss, and the number of foreground locations per image.
    """
    sums = {"loss_cls": 0.0, "loss_box": 0.0, "loss_ctr": 0.0}
    foreground = 0
    for image, rows in enumerate(gt_boxes.tolist()):
        boxes = [row for row in rows if row[4] >= 0]
        for level, points in locations.items():
            logits, deltas, center = (p[level][image].double() for p in predictions)
            is_target = torch.zeros(logits.shape, dtype=torch.bool)
            for n, (x, y) in enumerate(points.tolist()):
                match = best_box(level, x, y, boxes)
                if match is None:
                    continue
                foreground += 1
                is_target[n, int(boxes[match][4])] = True
                distances = ltrb(x, y, boxes[match])
                sums["loss_box"] += 0.25 * sum(
                    abs(predicted - distance / STRIDES[level])
                    for predicted, distance in zip(deltas[n].tolist(), distances, strict=True)
                )
                sums["loss_ctr"] += _cross_entropy(float(center[n, 0]), centerness(*distances))
            sums["loss_cls"] += float(_focal_loss(logits, is_target).sum())
    return sums, foreground / len(gt_boxes)


def _focal_loss(
    logits: Tensor, is_target: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    probability = torch.where(is_target, logits, -logits).sigmoid()  # of what is right
    weight = torch.where(is_target, alpha, 1 - alpha)
    return -weight * (1 - probability) ** gamma * probability.log()


def _cross_entropy(logit: float, target: float) -> float:
    return -target * math.log(_sigmoid(logit)) - (1 - target) * math.log(_sigmoid(-logit))


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
