"""Every fault is found where it was put, and none where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from a4_helper import VOC2007DetectionTiny
from eecs598.data.shapes import CLASSES as SHAPES
from eecs598.data.shapes import write_shapes
from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.diagnostics import Diagnostic, find_broken_numbers, find_diagnostics
from eecs598.metrics.matching import match_detections
from one_stage_detector import FCOS
from tests.metrics.detections import CLASSES, made_up
from tests.test_location_order import SmallStages


def diagnostics(predictions, targets, sizes, classes=CLASSES) -> list[Diagnostic]:
    return find_diagnostics(match_detections(predictions, targets, classes), sizes)


def names(predictions, targets, sizes) -> list[str]:
    return [found.name for found in diagnostics(predictions, targets, sizes)]


def moved(items: list[dict], sizes, move: Callable[[Tensor, int, int], Tensor]) -> list[dict]:
    """With the boxes of every image, given its height and width, moved."""
    return [
        {**item, "boxes": move(item["boxes"], *size)}
        for item, size in zip(items, sizes, strict=True)
    ]


def swap_axes(boxes: Tensor, height: int, width: int) -> Tensor:
    return boxes[:, [1, 0, 3, 2]] * (
        torch.tensor([width, height, width, height]) / torch.tensor([height, width, height, width])
    )


def swap_centers(boxes: Tensor, height: int, width: int) -> Tensor:
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    there = center.flip(1) * torch.tensor([width / height, height / width])
    boxes = boxes + (there - center).repeat(1, 2)
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def flip_x(boxes: Tensor, height: int, width: int) -> Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def flip_y(boxes: Tensor, height: int, width: int) -> Tensor:
    return torch.stack(
        [boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], dim=1
    )


def half_a_stride(boxes: Tensor, height: int, width: int) -> Tensor:
    side = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True)
    return boxes + torch.where(side < 64, 4.0, torch.where(side < 128, 8.0, 16.0))


def grow(boxes: Tensor, height: int, width: int) -> Tensor:
    side = boxes[:, 2:] - boxes[:, :2]
    return boxes + 0.15 * torch.cat([-side, side], dim=1)


def normalize(boxes: Tensor, height: int, width: int) -> Tensor:
    return boxes / torch.tensor([width, height, width, height])


def to_xywh(boxes: Tensor, height: int, width: int) -> Tensor:
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "quality",
    [
        {},
        {"recall": 1.0, "jitter": 0.0, "false_positives": 0},
        {"recall": 0.5, "jitter": 0.15, "false_positives": 8},
        {"recall": 0.2, "jitter": 0.3, "false_positives": 20},
        {"recall": 0.0, "false_positives": 20},
        {"num_images": 8},
    ],
)
def test_detectors_without_a_fault(seed, quality):
    assert names(*made_up(seed, **quality)) == []


@pytest.mark.parametrize(
    "move, expected",
    [
        (swap_axes, "mirrored_diagonal"),
        (swap_centers, "mirrored_diagonal"),
        (flip_x, "mirrored_left_right"),
        (flip_y, "mirrored_upside_down"),
        (half_a_stride, "shifted"),
        (lambda boxes, *_: boxes - torch.tensor([0.0, 9.0, 0.0, 9.0]), "shifted"),
        (grow, "scaled"),
        (lambda boxes, *_: 0.6 * boxes, "other_scale"),
        (lambda boxes, *_: 1.7 * boxes, "detections_outside"),
        (normalize, "normalized_detections"),
    ],
)
def test_boxes_in_the_wrong_place(move, expected):
    predictions, targets, sizes = made_up(0)
    assert names(moved(predictions, sizes, move), targets, sizes) == [expected]


@pytest.mark.parametrize(
    "move, broken",
    [
        (to_xywh, r"0 of \d+ boxes .* in [1-9]\d* the second corner"),
        (lambda boxes, *_: boxes * torch.tensor([1.0, torch.nan, 1, 1]), r"[1-9]\d* of \d+ boxes"),
    ],
)
def test_boxes_that_cannot_be_matched(move, broken):
    predictions, targets, sizes = made_up(0)
    wrong = moved(predictions, sizes, move)
    with pytest.raises(ValueError, match="has the box"):
        match_detections(wrong, targets, CLASSES)
    (found,) = find_broken_numbers(wrong, len(CLASSES))
    assert found.name == "impossible_boxes" and found.severity == "error"
    assert re.match(broken, found.message)
    assert find_broken_numbers(predictions, len(CLASSES)) == find_broken_numbers([], 1) == []


@pytest.mark.parametrize(
    "move, expected",
    [
        (normalize, "normalized_ground_truth"),
        (lambda boxes, *_: 1.7 * boxes, "ground_truth_outside"),
        (lambda boxes, *_: 0.6 * boxes, "other_scale"),
    ],
)
def test_ground_truth_in_another_scale(move, expected):
    predictions, targets, sizes = made_up(0)
    assert names(predictions, moved(targets, sizes, move), sizes) == [expected]


def with_labels(prediction: dict, labels: Tensor) -> dict:
    return {**prediction, "labels": labels}


def without(prediction: dict, label: int) -> dict:
    kept = prediction["labels"] != label
    return {key: column[kept] for key, column in prediction.items()}


def scaled_scores(prediction: dict, factor: float) -> dict:
    return {**prediction, "scores": factor * prediction["scores"]}


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda p: without(p, 2), ["class_never_predicted"]),
        (lambda p: with_labels(p, torch.zeros_like(p["labels"])), ["one_class"]),
        (lambda p: {key: column[:0] for key, column in p.items()}, ["no_detections"]),
        (lambda p: scaled_scores(p, 0.4), ["low_scores"]),
        (lambda p: scaled_scores(p, 0.04), ["low_scores"]),
        (lambda p: scaled_scores(p, 100), ["impossible_scores"]),
        (lambda p: scaled_scores(p, -1), ["impossible_scores", "low_scores"]),
    ],
)
def test_scores_and_classes(change, expected):
    predictions, targets, sizes = made_up(0)
    assert names([change(prediction) for prediction in predictions], targets, sizes) == expected


def test_scores_that_cannot_be_matched():
    predictions, _, _ = made_up(0)
    (found,) = find_broken_numbers([scaled_scores(p, math.nan) for p in predictions], len(CLASSES))
    count = sum(len(prediction["scores"]) for prediction in predictions)
    assert found.name == "impossible_scores"
    assert found.message.startswith(f"{count} of {count} scores are NaN or infinite, and 0 are")


@pytest.mark.parametrize(
    "wrong, example",
    [(-1, "-1"), (len(CLASSES), str(len(CLASSES))), (0.5, "0.5"), (math.nan, "nan")],
)
def test_labels_that_cannot_be_matched(wrong, example):
    predictions, targets, _ = made_up(0)
    labels = predictions[0]["labels"].tolist()
    predictions[0]["labels"] = torch.tensor([wrong, *labels[1:]])
    with pytest.raises(ValueError, match="has the label"):
        match_detections(predictions, targets, CLASSES)
    (found,) = find_broken_numbers(predictions, len(CLASSES))
    assert found.name == "impossible_labels" and found.severity == "error"
    count = sum(len(prediction["labels"]) for prediction in predictions)
    assert found.message.startswith(f"1 of {count} labels are none of 0..{len(CLASSES) - 1}, the")
    assert f"for example {example}." in found.message


def test_messages_have_numbers_and_come_in_order():
    predictions, targets, sizes = made_up(1)
    shifted = moved(predictions, sizes, half_a_stride)
    (found,) = diagnostics(shifted, targets, sizes)
    assert found.severity == "warning"
    for size, pixels in (("below", 4), ("of 64", 8), ("above", 16)):
        text = found.message.split(f" px for objects {size}")[0].rsplit("(", 1)[1]
        assert all(abs(float(value) - pixels) < 1.5 for value in text.rstrip(")").split(","))

    two = [without(p, 2) for p in moved(predictions, sizes, swap_axes)]
    # Of the four boxes of a class, one is difficult: the mAP named is that of the report.
    targets = [{**t, "difficult": torch.arange(len(t["labels"])) % 4 == 3} for t in targets]
    found = diagnostics(two, targets, sizes)
    assert [each.severity for each in found] == ["error", "warning"]
    as_is = average_precision(two, targets, CLASSES)["mAP"]
    assert f"mAP@0.5 is {as_is:.1%}" in found[0].message
    assert "cat (" in found[1].message and "ant" not in found[1].message


def test_input_that_does_not_fit_together():
    predictions, targets, sizes = made_up(0, num_images=3)
    with pytest.raises(ValueError, match="3 images and 2 image sizes"):
        diagnostics(predictions, targets, sizes[:2])
    predictions[1]["labels"] = predictions[1]["labels"][:-1]
    with pytest.raises(ValueError, match=r"predictions\[1\]\['labels'\] must have shape"):
        find_broken_numbers(predictions, len(CLASSES))
    assert diagnostics([], [], []) == []


# --------------------------------------------------------------------------------------------
# Detectors
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Training images and boxes as two tensors, and the validation set."""
    folder = write_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=200, num_val=200)
    train, val = (
        VOC2007DetectionTiny(folder, split, image_size=96, classes=SHAPES)
        for split in ("train", "val")
    )
    _, images, boxes = zip(*train, strict=True)
    return torch.stack(images), torch.stack(boxes), list(val)


def trained(images: Tensor, boxes: Tensor) -> FCOS:
    torch.manual_seed(0)
    detector = FCOS(len(SHAPES), 32, [32], weights=None).train()
    solver = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, 4e-3, total_steps=250)
    for _ in range(250):
        batch = torch.randint(0, len(images), (16,))
        loss = sum(detector(images[batch], boxes[batch]).values())
        solver.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        solver.step()
        schedule.step()
    return detector.eval()


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirrored_detector_is_called_out(shapes, monkeypatch, mirrored):
    """Trained and evaluated with maps flattened row by row, while locations are x-major.

    What it learns is as good as it can get: mirroring its boxes back does not help, and the
    validation images are not square. Where its detections lie tells all the same.
    """
    monkeypatch.setattr("common._build_backbone", lambda *_: SmallStages())
    if mirrored:
        monkeypatch.setattr(
            "one_stage_detector._flatten_x_major", lambda maps: maps.flatten(2).transpose(1, 2)
        )
    images, boxes, val = shapes
    detector = trained(images, boxes)
    predictions = [detector.predict(image[None], 0.05, 0.6)[0] for _, image, _ in val]
    objects = [boxes[boxes[:, 4] >= 0] for _, _, boxes in val]
    targets = [{"boxes": rows[:, :4], "labels": rows[:, 4].long()} for rows in objects]
    sizes = [tuple(image.shape[1:]) for _, image, _ in val]
    found = [each.name for each in diagnostics(predictions, targets, sizes, SHAPES)]
    assert found == (["mirrored_diagonal"] if mirrored else [])
    if not mirrored:
        other = [{**p, "boxes": p["boxes"][:, [1, 0, 3, 2]]} for p in predictions]
        found = diagnostics(other, targets, sizes, SHAPES)
        assert "mirrored_diagonal" in [each.name for each in found]
