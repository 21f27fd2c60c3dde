"""Augmentation: the boxes follow the pixels, and a seed gives one image."""

from __future__ import annotations

import pytest
import torch

from a4_helper import AugmentedTrainingSet, VOC2007DetectionTiny
from eecs598.data.augment import AUGMENTATIONS, Augmentation
from eecs598.data.sampling import Sample

GEOMETRY = [("flip",), ("zoom",), ("iou_crop",), ("mosaic",), ("flip", "zoom", "iou_crop"), ()]


def picture_with_squares() -> tuple[torch.Tensor, torch.Tensor]:
    """A red, a green and a blue square on grey, which no augmentation takes for another."""
    image = torch.full((3, 90, 120), 90, dtype=torch.uint8)
    boxes = [(10, 10, 40, 40, 0), (60, 20, 100, 60, 1), (20, 50, 50, 80, 2)]
    for x1, y1, x2, y2, label in boxes:
        image[:, y1:y2, x1:x2] = 0
        image[label, y1:y2, x1:x2] = 255
    return image, torch.tensor(boxes, dtype=torch.float32)


@pytest.mark.parametrize("names", GEOMETRY, ids="+".join)
def test_boxes_follow_the_pixels(names):
    augment = Augmentation(names)
    seen = 0
    for seed in range(25):
        image, boxes = augment(lambda _: picture_with_squares(), 4, 0, seed, 96)
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        pixels = image / 255
        for *xyxy, label in boxes.tolist():
            x1, y1, x2, y2 = (round(v) for v in xyxy)
            assert 0 <= x1 < x2 <= 96 and 0 <= y1 < y2 <= 96
            inside = pixels[:, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
            if min(inside.shape) == 0:
                continue
            colored = (inside.argmax(0) == int(label)) & (inside.amax(0) > 0.6)
            assert colored.float().mean() > 0.8
            seen += 1
    assert seen > 20


def test_every_object_that_is_seen_has_a_box():
    augment = Augmentation(("flip", "zoom"))
    for seed in range(25):
        image, boxes = augment(lambda _: picture_with_squares(), 4, 0, seed, 96)
        pixels = image / 255
        for label in range(3):
            bright = (pixels[label] > 0.9) & (pixels.sum(0) < 1.2)
            if bright.sum() > 60 and (bright.any(0).sum() > 6 and bright.any(1).sum() > 6):
                assert label in boxes[:, 4]


@pytest.mark.parametrize("names", [*GEOMETRY, AUGMENTATIONS], ids="+".join)
def test_a_seed_gives_one_image_and_leaves_the_generator_alone(names):
    augment = Augmentation(names)
    before = torch.get_rng_state()
    results = [
        augment(lambda _: picture_with_squares(), 4, 0, seed, 64) for seed in (1, 1, *range(2, 12))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    bytes_of = [image.numpy().tobytes() for image, _ in results]
    assert bytes_of[0] == bytes_of[1] and torch.equal(results[0][1], results[1][1])
    assert (len(set(bytes_of)) > 1) == bool(names)


def test_photometric_leaves_the_boxes():
    _, plain = Augmentation(())(lambda _: picture_with_squares(), 1, 0, 3, 96)
    images = []
    for seed in range(6):
        image, boxes = Augmentation(("photometric",))(
            lambda _: picture_with_squares(), 1, 0, seed, 96
        )
        assert torch.equal(boxes, plain)
        images.append(image.numpy().tobytes())
    assert len(set(images)) > 3


@pytest.mark.parametrize("names", [*GEOMETRY, AUGMENTATIONS], ids="+".join)
def test_an_image_without_boxes(names):
    image = torch.zeros(3, 80, 50, dtype=torch.uint8)
    for seed in range(5):
        result, boxes = Augmentation(names)(lambda _: (image, torch.zeros(0, 5)), 1, 0, seed, 64)
        assert result.shape == (3, 64, 64) and boxes.shape == (0, 5)


def test_unknown_name():
    with pytest.raises(ValueError, match="rotate.*flip"):
        Augmentation(("flip", "rotate"))


def test_the_training_set(small_voc):
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=64, classes=("cube", "dice"))
    plain = AugmentedTrainingSet(dataset)
    for ours, theirs in zip(plain[Sample(3, 0, None)], dataset[3], strict=True):
        assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)
    assert plain[Sample(3, 0, 96)][1].shape == (3, 96, 96)
    augmented = AugmentedTrainingSet(dataset, AUGMENTATIONS)
    path, image, boxes = augmented[Sample(3, 7, 96)]
    assert path == dataset[3][0] and image.shape == (3, 96, 96) and image.dtype == torch.float32
    assert boxes.shape == (8, 5)  # a mosaic shows four images of up to two objects
    assert len(augmented) == len(dataset)


def test_loading_leaves_the_cached_images_alone(small_voc):
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=64, classes=("cube", "dice"))
    plain = AugmentedTrainingSet(dataset, AUGMENTATIONS)
    cached = AugmentedTrainingSet(dataset, AUGMENTATIONS, cache=True)
    for _ in range(2):
        for seed in range(len(dataset)):
            sample = Sample(seed, seed, 96)
            for ours, theirs in zip(cached[sample], plain[sample], strict=True):
                assert ours == theirs if isinstance(ours, str) else torch.equal(ours, theirs)
    assert len(cached.cache) == len(dataset)


@pytest.mark.parametrize("size", [(1200, 6), (6, 900)])
def test_a_strip(size):
    boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0, 0.0]])
    for seed in range(5):
        image, _ = Augmentation(("zoom", "flip"))(
            lambda _: (torch.zeros(3, *size, dtype=torch.uint8), boxes), 1, 0, seed, 64
        )
        assert image.shape == (3, 64, 64)
