"""Which boxes hold a location: the same as the targets of FCOS say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import get_fpn_location_coords
from eecs598.data.locations import Level, hold_location
from one_stage_detector import fcos_level_ranges, fcos_match_locations_to_gt

STRIDES = {"p3": 8, "p4": 16, "p5": 32}
SIDE = 256


def matched(box: list[float]) -> bool:
    """Whether the targets of an image with this object alone have a location for it."""
    shapes = {level: (1, 1, SIDE // stride, SIDE // stride) for level, stride in STRIDES.items()}
    locations = get_fpn_location_coords(shapes, STRIDES)
    targets = fcos_match_locations_to_gt(locations, STRIDES, torch.tensor([[*box, 0.0]]))
    return any((target[:, 4] >= 0).any() for target in targets.values())


@pytest.mark.parametrize("largest", [6, 12, 80, 250])
def test_same_as_the_targets_of_fcos(largest):
    """Boxes of whole and half pixels, so that many end exactly at a location or a bound."""
    rng = np.random.default_rng(largest)
    corners = rng.integers(0, 2 * SIDE, (300, 2)) / 2
    sides = np.stack([rng.integers(1, 2 * largest, 300), rng.integers(1, 500, 300)], axis=1) / 2
    if largest == 12:
        sides[:, 1] = sides[:, 0]
    boxes = np.hstack([corners, corners + sides]).clip(0, SIDE)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    ranges = fcos_level_ranges(STRIDES)
    levels = [Level(stride, *ranges[name]) for name, stride in STRIDES.items()]
    expected = [matched(box) for box in boxes.tolist()]
    assert hold_location(boxes, levels).tolist() == expected
    assert largest > 12 or 0 < sum(expected) < len(expected)


def test_no_boxes_and_no_levels():
    assert hold_location(np.zeros((0, 4)), [Level(8, 0, 64)]).tolist() == []
    assert hold_location(np.array([[0.0, 0, 99, 99]]), []).tolist() == [False]
