"""The index as tensors: all objects, the difficult ones flagged and never in the way."""

from __future__ import annotations

import json

import pytest
import torch

from eecs598.data import load_instances
from tests.data.devkit import make_devkit
from tests.data.test_coco import document, write, write_images

CLASSES = ["car", "cat", "dog"]


def test_voc(tmp_path):
    make_devkit(tmp_path / "VOCdevkit/VOC2007")
    first, second = load_instances(tmp_path, "train", CLASSES)
    assert first.boxes.tolist() == [[1, 2, 30, 40, 2], [5.5, 6.5, 7.5, 8.5, 1]]
    assert first.difficult.tolist() == [False, True] and first.difficult_known
    assert first.ordinary.tolist() == [[1, 2, 30, 40, 2]]
    assert second.difficult.tolist() == [False]
    (only_difficult,) = load_instances(tmp_path, "val", ["bird"])
    assert only_difficult.ordinary.shape == (0, 5) and len(only_difficult.boxes) == 1


def test_coco(tmp_path):
    write(tmp_path / "annotations/instances_train.json", document())
    write_images(tmp_path / "images")
    flat, empty, crowded = load_instances(tmp_path, "train", ["cat", "dog"])
    # The crowd region is the second of its image in the file and the last here.
    assert crowded.boxes.tolist() == [[1, 2, 4.5, 6, 1], [5, 5, 10, 10, 1], [9, 8, 16, 14, 0]]
    assert crowded.difficult.tolist() == [False, False, True]
    assert (flat.size, empty.size) == ((32, 48), None)
    assert empty.boxes.shape == (0, 5) and empty.difficult.dtype == torch.bool


def test_difficult_objects_of_other_classes_are_left_out(tmp_path):
    make_devkit(tmp_path / "VOCdevkit/VOC2007")
    first, _ = load_instances(tmp_path, "train", ["car", "dog"])
    assert first.boxes.tolist() == [[1, 2, 30, 40, 1]] and first.difficult.tolist() == [False]
    with pytest.raises(ValueError, match=r"000002\.jpg has an object of class 'car'"):
        load_instances(tmp_path, "train", ["dog", "cat"])


def test_the_courses_index_alone_does_not_know(tmp_path):
    write_images(tmp_path)
    path = tmp_path / "voc07_train.json"
    path.write_text(json.dumps([["a.png", [{"name": "dog", "xyxy": [1, 2, 3, 4]}]]]))
    (instance,) = load_instances(tmp_path, "train", ["dog"])
    assert not instance.difficult_known and instance.size is None
    assert torch.equal(instance.ordinary, instance.boxes)


def test_boxes_from_edge_to_edge(tmp_path):
    """VOC's first pixel is number 1 and its last one belongs to the box; COCO counts edges."""
    make_devkit(tmp_path / "VOCdevkit/VOC2007")
    instance, _ = load_instances(tmp_path, "train", CLASSES)
    assert instance.first_pixel == 1 and instance.with_edges.first_pixel == 0
    # Pixels 1 to 30 and 2 to 40 are 30 wide and 39 high.
    assert instance.with_edges.boxes.tolist() == [[0, 1, 30, 40, 2], [4.5, 5.5, 7.5, 8.5, 1]]
    assert instance.boxes.tolist() == [[1, 2, 30, 40, 2], [5.5, 6.5, 7.5, 8.5, 1]]  # as before
    assert instance.with_edges.with_edges.boxes.tolist() == instance.with_edges.boxes.tolist()
    write(tmp_path / "coco/annotations/instances_train.json", document())
    write_images(tmp_path / "coco/images")
    for instance in load_instances(tmp_path / "coco", "train", ["cat", "dog"]):
        assert instance.first_pixel == 0
        assert torch.equal(instance.with_edges.boxes, instance.boxes)
