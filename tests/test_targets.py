"""Targets of FCOS: matching, deltas, centerness."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from common import get_fpn_location_coords
from eecs598.grad import rel_error
from one_stage_detector import (
    FCOSLoss,
    fcos_apply_deltas_to_locations,
    fcos_get_deltas_from_locations,
    fcos_level_ranges,
    fcos_make_centerness_targets,
    fcos_match_locations_to_gt,
)
from tests.detectors import STRIDES, match_one_by_one

# --------------------------------------------------------------------------------------------
# Matching
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(160, 224), (224, 96)])
def test_matching_is_the_rule(height, width, rng):
    shapes = {p: (1, 8, -(-height // s), -(-width // s)) for p, s in STRIDES.items()}
    locations = get_fpn_location_coords(shapes, STRIDES)
    for _ in range(10):
        corners = torch.rand(6, 2, 2, generator=rng) * torch.tensor([width, height])
        boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1).round()
        classes = torch.tensor([0.0, 1, 2, 3, 4, -1])[:, None]
        boxes = torch.cat([boxes, classes], dim=1)
        boxes[5] = -1.0
        expected = match_one_by_one(locations, boxes)
        matched = fcos_match_locations_to_gt(locations, STRIDES, boxes)
        for level in STRIDES:
            assert torch.equal(matched[level], expected[level])


@pytest.mark.parametrize("center_radius", [0.5, 1.5])
def test_center_sampling_is_the_rule(center_radius, rng):
    locations = get_fpn_location_coords(
        {p: (1, 8, 160 // s, 224 // s) for p, s in STRIDES.items()}, STRIDES
    )
    fewer = 0
    for _ in range(10):
        corners = torch.rand(5, 2, 2, generator=rng) * torch.tensor([224, 160])
        boxes = torch.cat([corners.amin(1), corners.amax(1), torch.arange(5.0)[:, None]], dim=1)
        expected = match_one_by_one(locations, boxes, center_radius)
        matched = fcos_match_locations_to_gt(locations, STRIDES, boxes, center_radius=center_radius)
        everywhere = fcos_match_locations_to_gt(locations, STRIDES, boxes)
        for level in STRIDES:
            assert torch.equal(matched[level], expected[level])
            fewer += int((everywhere[level][:, 4] >= 0).sum() - (matched[level][:, 4] >= 0).sum())
    assert fewer > 100


def assign_adaptively(locations: dict, gt_boxes: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of ATSS for one image, box by box, on all levels joined."""
    best = torch.zeros(sum(map(len, locations.values())))
    matched = torch.full((len(best), 5), -1.0)
    points = torch.cat(list(locations.values()))
    reach = torch.cat([torch.full((len(p), 1), 4.0 * STRIDES[k]) for k, p in locations.items()])
    anchors = torch.cat([points - reach, points + reach], dim=1)
    for row in gt_boxes[gt_boxes[:, 4] >= 0]:
        center, candidates, first = (row[:2] + row[2:4]) / 2, [], 0
        for level in locations.values():
            nearest = (level - center).norm(dim=1).argsort(stable=True)[:9]
            candidates += (first + nearest).tolist()
            first += len(level)
        overlaps = box_iou(anchors[candidates], row[None, :4])[:, 0]
        threshold = overlaps.mean() + overlaps.std()
        for n, overlap in zip(candidates, overlaps, strict=True):
            inside = (row[:2] < points[n]).all() and (points[n] < row[2:4]).all()
            if inside and overlap >= threshold and overlap > best[n]:
                best[n], matched[n] = overlap, row
    return matched


def test_adaptive_assignment_is_its_algorithm(rng):
    shapes = {p: (1, 8, 160 // s, 224 // s) for p, s in STRIDES.items()}
    locations = get_fpn_location_coords(shapes, STRIDES)
    criterion = FCOSLoss(STRIDES, assignment="atss")
    corners = torch.rand(6, 8, 2, 2, generator=rng) * torch.tensor([224, 160])
    gt_boxes = torch.full((6, 9, 5), -1.0)
    gt_boxes[:, :8] = torch.cat(
        [corners.amin(2), corners.amax(2), torch.arange(8.0)[:, None].expand(6, 8, 1)], dim=2
    )
    targets = criterion.make_targets(locations, gt_boxes)
    expected = torch.stack([assign_adaptively(locations, boxes) for boxes in gt_boxes])
    assert torch.equal(targets.boxes, expected)
    assert (expected[..., 4] >= 0).sum() > 100
    by_size = FCOSLoss(STRIDES).make_targets(locations, gt_boxes)
    assert not torch.equal(targets.boxes, by_size.boxes)


def test_level_ranges_are_those_of_matching():
    ranges = fcos_level_ranges(STRIDES)
    assert ranges == {"p3": (0, 64), "p4": (64, 128), "p5": (128, math.inf)}
    for farthest in (1, 63.5, 64.5, 127.5, 128.5, 5000):
        box = torch.tensor([[-0.5, -0.5, farthest, 0.5, 0]])
        for level, (low, high) in ranges.items():
            matched = fcos_match_locations_to_gt({level: torch.zeros(1, 2)}, STRIDES, box)[level]
            assert (matched[0, 4] == 0) == (low < farthest < high)


def test_limits_of_the_levels_are_open():
    """A location exactly 4 or 8 strides from the farthest side belongs to neither level."""
    locations = {"p4": torch.tensor([[100.0, 100.0]])}
    for farthest, matches in ((64, False), (65, True), (127, True), (128, False)):
        boxes = torch.tensor([[90.0, 90, 100 + farthest, 110, 7]])
        matched = fcos_match_locations_to_gt(locations, STRIDES, boxes)["p4"]
        assert (matched[0, 4] == 7) == matches


def test_inside_is_strict():
    locations = {"p3": torch.tensor([[4.0, 4], [12, 4], [12, 12]])}
    matched = fcos_match_locations_to_gt(locations, STRIDES, torch.tensor([[4.0, 0, 20, 12, 1]]))
    assert matched["p3"][:, 4].tolist() == [-1, 1, -1]


def test_finest_level_takes_the_smallest_and_coarsest_the_largest():
    tiny = torch.tensor([[10.0, 10, 14, 14, 0]])
    huge = torch.tensor([[0.0, 0, 2000, 2000, 1]])
    matched = fcos_match_locations_to_gt({"p3": torch.tensor([[12.0, 12]])}, STRIDES, tiny)
    assert matched["p3"][0, 4] == 0
    matched = fcos_match_locations_to_gt({"p5": torch.tensor([[1008.0, 1008]])}, STRIDES, huge)
    assert matched["p5"][0, 4] == 1


@pytest.mark.parametrize("gt_boxes", [torch.zeros(0, 5), torch.full((3, 5), -1.0)])
def test_matching_without_boxes_is_background(gt_boxes):
    matched = fcos_match_locations_to_gt({"p3": torch.rand(10, 2)}, STRIDES, gt_boxes)
    assert torch.equal(matched["p3"], torch.full((10, 5), -1.0))


def test_matching_wants_boxes_of_one_image():
    with pytest.raises(ValueError, match=r"expected \(M, 5\)"):
        fcos_match_locations_to_gt({"p3": torch.rand(10, 2)}, STRIDES, torch.zeros(2, 3, 5))


# --------------------------------------------------------------------------------------------
# Deltas and centerness
# --------------------------------------------------------------------------------------------

ASSIGNMENT_BOXES = torch.tensor(
    [[10.0, 15, 100, 115, 1], [30, 20, 40, 30, 1], [120, 100, 200, 200, 1]]
)
ASSIGNMENT_LOCATIONS = torch.tensor([[30.0, 40], [32, 29], [125, 150]])


def test_deltas_and_back_are_exact():
    deltas = fcos_get_deltas_from_locations(ASSIGNMENT_LOCATIONS, ASSIGNMENT_BOXES, stride=8)
    assert deltas[0].tolist() == [20 / 8, 25 / 8, 70 / 8, 75 / 8]
    boxes = fcos_apply_deltas_to_locations(deltas, ASSIGNMENT_LOCATIONS, stride=8)
    assert rel_error(boxes, ASSIGNMENT_BOXES[:, :4]) == 0.0


@pytest.mark.parametrize("columns", [4, 5])
def test_background_deltas(columns):
    background = torch.full((1, columns), -1.0)
    location = torch.tensor([[100.0, 200]])
    deltas = fcos_get_deltas_from_locations(location, background, stride=8)
    assert deltas.tolist() == [[-1, -1, -1, -1]]
    boxes = fcos_apply_deltas_to_locations(deltas, location, stride=8)
    assert boxes.tolist() == [[100, 200, 100, 200]]


def test_a_box_of_class_0_is_no_background():
    deltas = fcos_get_deltas_from_locations(
        torch.tensor([[10.0, 10]]), torch.tensor([[0.0, 0, 20, 20, 0]]), stride=10
    )
    assert deltas.tolist() == [[1, 1, 1, 1]]


def test_negative_deltas_count_as_zero():
    boxes = fcos_apply_deltas_to_locations(
        torch.tensor([[-2.0, 1, 3, -0.5]]), torch.tensor([[50.0, 60]]), stride=16
    )
    assert boxes.tolist() == [[50, 44, 98, 60]]


def test_deltas_of_joined_levels():
    strides = torch.tensor([[8.0], [16.0], [32.0]])
    joined = fcos_get_deltas_from_locations(ASSIGNMENT_LOCATIONS, ASSIGNMENT_BOXES, strides)
    for i, stride in enumerate((8, 16, 32)):
        single = fcos_get_deltas_from_locations(
            ASSIGNMENT_LOCATIONS[i : i + 1], ASSIGNMENT_BOXES[i : i + 1], stride
        )
        assert torch.equal(joined[i : i + 1], single)


def test_centerness_of_the_assignment():
    boxes = ASSIGNMENT_BOXES.clone()
    boxes[2] = -1
    deltas = fcos_get_deltas_from_locations(ASSIGNMENT_LOCATIONS, boxes, stride=8)
    expected = torch.tensor([0.30860671401, 0.1666666716, -1.0])
    assert rel_error(fcos_make_centerness_targets(deltas), expected) < 1e-7


def test_centerness_is_one_in_the_center_and_zero_on_the_side():
    deltas = torch.tensor([[2.0, 3, 2, 3], [0, 3, 4, 3]])
    assert fcos_make_centerness_targets(deltas).tolist() == [1, 0]


def test_shape_errors_of_targets():
    with pytest.raises(ValueError, match="expected"):
        fcos_get_deltas_from_locations(torch.zeros(2, 2), torch.zeros(2, 3), 8)
    with pytest.raises(ValueError, match="expected"):
        fcos_apply_deltas_to_locations(torch.zeros(2, 3), torch.zeros(2, 2), 8)
    with pytest.raises(ValueError, match="expected"):
        fcos_make_centerness_targets(torch.zeros(2, 5))
