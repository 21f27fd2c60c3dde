"""Every smell is found where it was put, and none where there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from a4_helper import VOC2007DetectionTiny
from eecs598.data.shapes import CLASSES as SHAPES
from eecs598.data.shapes import write_shapes
from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.diagnostics import find_folder_smells, find_smells
from eecs598.metrics.text_format import write_text_format
from one_stage_detector import FCOS
from tests.test_location_order import SmallStages

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


def names(predictions, targets, sizes) -> list[str]:
    return [s.name for s in find_smells(predictions, targets, CLASSES, image_sizes=sizes)]


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


def normalise(boxes: Tensor, height: int, width: int) -> Tensor:
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
        (normalise, "normalised_detections"),
        (to_xywh, "impossible_boxes"),
        (lambda boxes, *_: boxes * torch.tensor([1.0, torch.nan, 1, 1]), "impossible_boxes"),
    ],
)
def test_boxes_in_the_wrong_place(move, expected):
    predictions, targets, sizes = made_up(0)
    found = names(moved(predictions, sizes, move), targets, sizes)
    assert expected in found
    # What follows from it may be named, too; never a mirror image that is none.
    assert [n for n in found if n.startswith("mirrored") and n != expected] == []
    if not expected.startswith("impossible"):
        assert found == [expected]


@pytest.mark.parametrize(
    "move, expected",
    [
        (normalise, "normalised_ground_truth"),
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
        (lambda p: scaled_scores(p, math.nan), ["impossible_scores", "no_detections"]),
    ],
)
def test_scores_and_classes(change, expected):
    predictions, targets, sizes = made_up(0)
    found = names([change(prediction) for prediction in predictions], targets, sizes)
    # Without ranks or classes the places may not be compared, but nothing else is made up.
    assert found == expected


def test_messages_have_numbers_and_come_in_order():
    predictions, targets, sizes = made_up(1)
    shifted = moved(predictions, sizes, half_a_stride)
    (smell,) = find_smells(shifted, targets, CLASSES, image_sizes=sizes)
    assert smell.severity == "warning"
    for size, pixels in (("below", 4), ("of 64", 8), ("above", 16)):
        text = smell.message.split(f" px for objects {size}")[0].rsplit("(", 1)[1]
        assert all(abs(float(value) - pixels) < 1.5 for value in text.rstrip(")").split(","))

    two = [without(p, 2) for p in moved(predictions, sizes, swap_axes)]
    smells = find_smells(two, targets, CLASSES, image_sizes=sizes)
    assert [smell.severity for smell in smells] == ["error", "warning"]
    as_is = average_precision(two, targets, CLASSES)["mAP"]
    assert f"mAP@0.5 is {as_is:.1%}" in smells[0].message
    assert "cat (" in smells[1].message and "ant" not in smells[1].message


def test_input_that_does_not_fit_together():
    predictions, targets, sizes = made_up(0, num_images=3)
    with pytest.raises(ValueError, match="2 image sizes"):
        find_smells(predictions, targets, CLASSES, image_sizes=sizes[:2])
    predictions[1]["labels"] = predictions[1]["labels"][:-1]
    with pytest.raises(ValueError, match="each box needs"):
        find_smells(predictions, targets, CLASSES, image_sizes=sizes)
    assert find_smells([], [], CLASSES, image_sizes=[]) == []


# --------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------


def write_folder(folder, predictions, targets) -> None:
    for number, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        write_text_format(folder, f"{number:03d}", prediction, target, CLASSES)


def confident(predictions, threshold: float = 0.5) -> list[dict]:
    return [{k: v[p["scores"] > threshold] for k, v in p.items()} for p in predictions]


def test_images_that_were_skipped(tmp_path):
    predictions, targets, _ = made_up(0, num_images=300, recall=0.5)
    predictions = confident(predictions)
    write_folder(tmp_path / "whole", predictions, targets)
    assert find_folder_smells(tmp_path / "whole") == []
    kept = [i for i, prediction in enumerate(predictions) if len(prediction["scores"])]
    assert len(kept) < 290
    write_folder(tmp_path / "skipped", [predictions[i] for i in kept], [targets[i] for i in kept])
    (smell,) = find_folder_smells(tmp_path / "skipped")
    assert smell.name == "images_without_detections_missing"
    every = [f"{number:03d}" for number in range(300)]
    (smell,) = find_folder_smells(tmp_path / "skipped", every)
    assert smell.name == "ground_truth_missing"
    assert f"{300 - len(kept)} images" in smell.message
    assert find_folder_smells(tmp_path / "whole", every) == []


@pytest.mark.parametrize(
    "quality, threshold",
    [
        ({"recall": 1.0, "false_positives": 0}, 0),  # finds everything, and nothing else
        ({"recall": 0.9, "false_positives": 6}, 0),  # any image has false ones
        ({"recall": 0.95}, 0.5),
    ],
)
def test_folders_in_which_every_image_should_have_detections(tmp_path, quality, threshold):
    predictions, targets, _ = made_up(0, **quality)
    write_folder(tmp_path, confident(predictions, threshold), targets)
    assert find_folder_smells(tmp_path) == []


def test_missing_detection_files(tmp_path):
    predictions, targets, _ = made_up(0, num_images=20)
    write_folder(tmp_path, predictions, targets)
    for number in (3, 7, 8, 9):
        (tmp_path / f"detection-results/{number:03d}.txt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (smell,) = find_folder_smells(tmp_path)
    assert smell.name == "detection_files_missing"
    assert "4 images (003, 007, 008 and 1 more)" in smell.message


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
    monkeypatch.setattr("common._build_backbone", lambda name, weights: SmallStages())
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
    found = [s.name for s in find_smells(predictions, targets, SHAPES, image_sizes=sizes)]
    assert found == (["mirrored_diagonal"] if mirrored else [])
    if not mirrored:
        other = [{**p, "boxes": p["boxes"][:, [1, 0, 3, 2]]} for p in predictions]
        smells = find_smells(other, targets, SHAPES, image_sizes=sizes)
        assert "mirrored_diagonal" in [smell.name for smell in smells]
