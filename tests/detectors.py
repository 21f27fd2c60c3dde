"""Small detectors, boxes and the plain matching rule, shared by the tests of the detector."""

from __future__ import annotations

import math

import torch

from one_stage_detector import FCOS

STRIDES = {"p3": 8, "p4": 16, "p5": 32}


def make_fcos(num_classes: int = 3, **options) -> FCOS:
    torch.manual_seed(0)
    return FCOS(num_classes, 8, [8], weights=None, **options)


def pad(*rows: list[float], to: int = 4) -> torch.Tensor:
    """Boxes of one image with class ids, padded with -1."""
    boxes = torch.full((to, 5), -1.0)
    for i, row in enumerate(rows):
        boxes[i] = torch.tensor(row)
    return boxes


def match_one_by_one(
    locations: dict, gt_boxes: torch.Tensor, center_radius: float = math.inf
) -> dict:
    """The matching rule, written as loops."""
    matched = {}
    for level, points in locations.items():
        stride = STRIDES[level]
        low = 0 if level == "p3" else 4 * stride
        high = math.inf if level == "p5" else 8 * stride
        rows = []
        for x, y in points.tolist():
            row, smallest = [-1.0] * 5, math.inf
            for x1, y1, x2, y2, label in gt_boxes.tolist():
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                if label < 0 or min(sides) <= 0 or not low < max(sides) < high:
                    continue
                if max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) >= center_radius * stride:
                    continue
                if (x2 - x1) * (y2 - y1) < smallest:
                    smallest, row = (x2 - x1) * (y2 - y1), [x1, y1, x2, y2, label]
            rows.append(row)
        matched[level] = torch.tensor(rows)
    return matched
