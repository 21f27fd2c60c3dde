"""A fault is graded once: what one change of a correct solution costs, and in which sections."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from eecs598.grading import load_rubric, run_checks
from tests.grading.checks.mutants import LOCATIONS, load

MOST = 12  # points that a single fault may cost

Change = tuple[str, str, str]  # module, text in its source, text to put there


class SingleFault(NamedTuple):
    """A change of this repository, and the lost points of each section that it is about."""

    name: str
    change: Change
    costs: dict[str, float]
    other_style: Change | None = None  # a change that is no fault


DETECTOR, COMMON = "one_stage_detector", "common"
DELTAS = "return (_distances(locations, gt_boxes) / stride)"

FAULTS = [
    SingleFault(
        "locations on square maps only",
        (COMMON, "height, width = shape[-2:]", "height = width = shape[-2]"),
        {"other_sizes": 2},
    ),
    SingleFault(
        "20 classes in the loss",
        (
            DETECTOR,
            "classes = torch.arange(class_logits.shape[-1]",
            "classes = torch.arange(20",
        ),
        {"other_sizes": 2},
    ),
    SingleFault(
        "20 classes in the prediction network",
        (
            DETECTOR,
            "nn.Conv2d(class_channels, num_classes, kernel_size=3, padding=1)",
            "nn.Conv2d(class_channels, 20, kernel_size=3, padding=1)",
        ),
        {"other_sizes": 2},
    ),
    SingleFault(
        "float32 locations",
        (COMMON, LOCATIONS, f"{LOCATIONS}.float()"),
        {"other_sizes": 1},
    ),
    SingleFault(
        "float32 deltas",
        (DETECTOR, DELTAS, DELTAS.replace("gt_boxes)", "gt_boxes).float()")),
        {"other_sizes": 1},
    ),
    SingleFault(
        "32 has to divide the sides",
        (COMMON, "top_down, size=merged.shape[-2:], mode", "top_down, scale_factor=2, mode"),
        {"other_sizes": 1},
    ),
    SingleFault(
        "boxes clipped to 224 pixels",
        (DETECTOR, "clip_boxes_to_image(boxes, image_size)", "boxes.clamp(0, 224)"),
        {"other_sizes": 4},  # each line with images of other sizes
    ),
    SingleFault(
        "16 images per batch",
        (
            DETECTOR,
            "normalizer.clamp(min=1.0) * batch_size",
            "normalizer.clamp(min=1.0) * targets.boxes.view(16, -1, 5).shape[0]",
        ),
        {"other_sizes": 1},
    ),
    SingleFault(
        "wrong sign in deltas",
        (DETECTOR, DELTAS, f"{DELTAS[:-1]} * locations.new_tensor([1, 1, -1, -1]))"),
        {"deltas": 3},
    ),
    SingleFault(
        "boxes of every level with stride 8",
        (DETECTOR, "deltas.clamp(min=0) * stride", "deltas.clamp(min=0) * 8"),
        {"inverse": 2},
    ),
    SingleFault(
        "centerness without the root",
        (DETECTOR, ".masked_fill(background, 1.0).sqrt()", ".masked_fill(background, 1.0)"),
        {"centerness": 4},
    ),
    SingleFault(
        "locations without half a stride",
        (
            COMMON,
            "y = stride * (torch.arange(height, dtype=dtype, device=device) + 0.5)",
            "y = stride * torch.arange(height, dtype=dtype, device=device)",
        ),
        {"locations": 4},
    ),
    SingleFault(
        "nms that keeps everything, and class_spec_nms calls it",
        (
            COMMON,
            "return _greedy_nms(boxes, scores, None, iou_threshold)",
            "return scores.argsort(descending=True)",
        ),
        {"nms": 8.5},
        (
            COMMON,
            "return _greedy_nms(boxes, scores, class_ids, iou_threshold)",
            "low = boxes.min() if len(boxes) else 0\n"
            "    width = boxes.max() - low + 1 if len(boxes) else 1\n"
            "    shifted = (boxes - low).double() + (class_ids * width)[:, None]\n"
            "    return nms(shifted, scores, iou_threshold)",
        ),
    ),
    SingleFault(
        "nms that fails without boxes",
        (
            COMMON,
            "return _greedy_nms(boxes, scores, None, iou_threshold)",
            "return _greedy_nms(boxes, scores, None, iou_threshold)[[0]].new_tensor("
            "_greedy_nms(boxes, scores, None, iou_threshold).tolist())",
        ),
        {"nms": 0.5},
    ),
    SingleFault(
        "score without the root",
        (DETECTOR, "(class_probs * centerness).sqrt()", "(class_probs * centerness)"),
        {"inference": 3},
    ),
    SingleFault(
        "scores without a sigmoid",
        (
            DETECTOR,
            "_join_predictions(outputs.class_logits).sigmoid()",
            "_join_predictions(outputs.class_logits)",
        ),
        {"inference": 3.5},
    ),
    SingleFault(
        "mean instead of sum of the box loss",
        (
            DETECTOR,
            '"loss_box": loss_box.sum() / divisor',
            '"loss_box": loss_box.mean() / divisor',
        ),
        {"losses": 4},
    ),
    SingleFault(
        "no top-down pathway",
        (
            COMMON,
            'merged + F.interpolate(top_down, size=merged.shape[-2:], mode="nearest")',
            "merged",
        ),
        {"backbone": 4},
    ),
    SingleFault(
        "no ReLU in the stems",
        (DETECTOR, "layers.append(nn.ReLU())", "layers.append(nn.Identity())"),
        {"head": 1},
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_single_fault_costs_its_own_section(fault):
    rubric = load_rubric()
    changes = [change for change in (fault.change, fault.other_style) if change]
    results = run_checks(load(*changes), rubric.checks)
    grade = rubric.grade(results)
    lost = {item.name: item.lost for item in grade.items if item.lost}
    sentences = {item.name: item.failures for item in grade.items if item.lost}
    assert lost == fault.costs, sentences
    assert sum(lost.values()) <= MOST


def test_the_result_says_what_was_judged_with_ours():
    deltas = next(fault for fault in FAULTS if fault.name == "wrong sign in deltas")
    (result,) = run_checks(load(deltas.change), ["losses"])
    assert result.ok and result.with_ours == ["deltas"]
    root = next(fault for fault in FAULTS if fault.name == "score without the root")
    (result,) = run_checks(load(root.change), ["inference"])
    assert not result.ok and result.with_ours == []
