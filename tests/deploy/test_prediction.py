"""Prediction: boxes in the original's pixels, names of pictures, drawings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eecs598.data import LoadedImage
from eecs598.deploy.prediction import (
    class_color,
    detect,
    draw_detections,
    picture_names,
    to_json,
    write_picture,
)

CLASSES = ["cube", "dice"]


def test_detect_scales_and_clips_boxes():
    def corners(images):
        boxes = torch.tensor([[-3.0, 1.0, 5.0, 9.0]])
        seen.append(tuple(images.shape))
        one = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
        return [one] * len(images)

    seen: list[tuple] = []
    wide, tall = torch.zeros(3, 8, 10), torch.zeros(3, 10, 8)
    batch = [
        LoadedImage(Path("a"), wide, 100, 40),
        LoadedImage(Path("b"), tall, 8, 10),
        LoadedImage(Path("c"), error="broken"),
        LoadedImage(Path("d"), wide, 10, 8),
    ]
    found = list(detect(corners, [batch]))
    assert [image.path.name for image, _ in found] == ["a", "b", "c", "d"]
    assert seen == [(2, 3, 8, 10), (1, 3, 10, 8)]
    assert found[0][1]["boxes"].tolist() == [[0, 5, 50, 40]]
    assert found[1][1]["boxes"].tolist() == [[0, 1, 5, 9]]
    assert found[2][1] is None
    assert found[3][1]["boxes"].tolist() == [[0, 1, 5, 8]]


def test_picture_names():
    paths = ["x/a.jpg", "y/a.png", "A.gif", "a-2.jpg", "\udcff.jpg", "é" * 300 + ".jpg"]
    names = picture_names([Path(path) for path in paths])
    assert names[:5] == ["a.jpg", "a-2.jpg", "A-3.jpg", "a-2-2.jpg", "image.jpg"]
    assert names[5].startswith("éé") and len(names[5].encode()) < 200
    assert len({name.casefold() for name in names}) == len(names)


@pytest.mark.parametrize("size", [(3000, 2000), (640, 480), (90, 60), (20, 400), (1, 1)])
def test_drawing_at_any_size(size):
    image = Image.new("RGB", size, (90, 90, 90))
    width, height = size
    detections = {
        "boxes": torch.tensor(
            [
                [0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height],
                [0.0, 0.0, width, height],
                [width, height, width, height],
            ]
        ),
        "labels": torch.tensor([0, 1, 0]),
        "scores": torch.tensor([0.9, 0.5, 0.4]),
    }
    picture = draw_detections(image, detections, CLASSES)
    factor = picture.width // width
    assert picture.size == (factor * width, factor * height)
    assert factor == (1 if max(size) >= 480 else -(-480 // max(size)))
    pixels = np.asarray(picture)
    # The left side of the first box.
    if min(size) > 50:
        assert tuple(pixels[picture.height // 2, round(0.25 * picture.width)]) == class_color(0)
    assert np.asarray(image).max() == 90  # the image itself stays as it is


def test_class_colors_differ():
    colors = np.array([class_color(label) for label in range(20)], float)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)[np.triu_indices(20, 1)]
    assert distances.min() > 40


def test_to_json_rounds_and_keeps_the_order():
    detections = {
        "boxes": torch.tensor([[1.006, 2.0, 30.333, 40.5], [0.0, 0.0, 1.0, 1.0]]),
        "labels": torch.tensor([1, 0]),
        "scores": torch.tensor([0.12345678, 0.9]),
    }
    result = to_json(LoadedImage(Path("x/a.jpg"), width=50, height=60), detections, CLASSES)
    assert json.loads(json.dumps(result)) == result
    assert (result["path"], result["width"], result["height"]) == (str(Path("x/a.jpg")), 50, 60)
    assert result["detections"] == [
        {"box": [1.01, 2.0, 30.33, 40.5], "label": "dice", "class_id": 1, "score": 0.123457},
        {"box": [0.0, 0.0, 1.0, 1.0], "label": "cube", "class_id": 0, "score": 0.9},
    ]


@pytest.mark.parametrize(("size", "format_"), [((600, 400), "JPEG"), ((65_501, 1), "PNG")])
def test_write_picture(tmp_path, size, format_):
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    write_picture(Image.new("RGB", size), nothing, CLASSES, tmp_path / "new/a.jpg")
    with Image.open(tmp_path / "new/a.jpg") as picture:
        assert picture.format == format_ and picture.size == size
    assert len(list((tmp_path / "new").iterdir())) == 1
