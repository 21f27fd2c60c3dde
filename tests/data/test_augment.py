"""Augmentation: the boxes follow the pixels, and a seed gives one image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eecs598.data.augment import AUGMENTATIONS, FILL, Augmentation, local_seed

GEOMETRY = [("flip",), ("zoom",), ("iou_crop",), ("mosaic",), ("flip", "zoom", "iou_crop"), ()]


def augmented(
    names: tuple[str, ...], make: Callable[[], tuple[Tensor, Tensor]], seed: int, side: int
) -> tuple[Tensor, Tensor]:
    """Make one training image from as many of the same image as the augmentation asks for."""
    augment = Augmentation(names)
    with local_seed(seed):
        return augment([make() for _ in augment.choose_images(0, 4)], side)


def picture_with_squares() -> tuple[Tensor, Tensor]:
    """A red, a green and a blue square on gray, which no augmentation takes for another."""
    image = torch.full((3, 90, 120), 90, dtype=torch.uint8)
    boxes = [(10, 10, 40, 40, 0), (60, 20, 100, 60, 1), (20, 50, 50, 80, 2)]
    for x1, y1, x2, y2, label in boxes:
        image[:, y1:y2, x1:x2] = 0
        image[label, y1:y2, x1:x2] = 255
    return image, torch.tensor(boxes, dtype=torch.float32)


@pytest.mark.parametrize("names", GEOMETRY, ids="+".join)
def test_boxes_follow_the_pixels(names):
    seen = 0
    for seed in range(25):
        image, boxes = augmented(names, picture_with_squares, seed, 96)
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
    for seed in range(25):
        image, boxes = augmented(("flip", "zoom"), picture_with_squares, seed, 96)
        pixels = image / 255
        for label in range(3):
            bright = (pixels[label] > 0.9) & (pixels.sum(0) < 1.2)
            if bright.sum() > 60 and (bright.any(0).sum() > 6 and bright.any(1).sum() > 6):
                assert label in boxes[:, 4]


@pytest.mark.parametrize("names", [*GEOMETRY, AUGMENTATIONS], ids="+".join)
def test_a_seed_gives_one_image_and_leaves_the_generator_alone(names):
    before = torch.get_rng_state()
    results = [augmented(names, picture_with_squares, seed, 64) for seed in (1, 1, *range(2, 12))]
    assert torch.equal(torch.get_rng_state(), before)
    bytes_of = [image.numpy().tobytes() for image, _ in results]
    assert bytes_of[0] == bytes_of[1] and torch.equal(results[0][1], results[1][1])
    assert (len(set(bytes_of)) > 1) == bool(names)


def test_photometric_leaves_the_boxes():
    _, plain = augmented((), picture_with_squares, 3, 96)
    images = []
    for seed in range(6):
        image, boxes = augmented(("photometric",), picture_with_squares, seed, 96)
        assert torch.equal(boxes, plain)
        images.append(image.numpy().tobytes())
    assert len(set(images)) > 3


def test_erasing_hides_a_rectangle():
    plain, plain_boxes = augmented((), picture_with_squares, 0, 96)
    hidden = []
    for seed in range(60):
        image, boxes = augmented(("erasing",), picture_with_squares, seed, 96)
        assert image.dtype == torch.uint8 and torch.equal(boxes, plain_boxes)
        rows, columns = (image != plain).any(0).nonzero(as_tuple=True)
        if len(rows):
            part = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (part == torch.tensor(FILL)[:, None, None]).all()
            hidden.append(part[0].numel() / 96**2)
    assert 15 < len(hidden) < 45
    assert 0.015 < min(hidden) < 0.06 and 0.14 < max(hidden) < 0.21


@pytest.mark.parametrize("names", [*GEOMETRY, AUGMENTATIONS], ids="+".join)
def test_an_image_without_boxes(names):
    image = torch.zeros(3, 80, 50, dtype=torch.uint8)
    for seed in range(5):
        result, boxes = augmented(names, lambda: (image, torch.zeros(0, 5)), seed, 64)
        assert result.shape == (3, 64, 64) and boxes.shape == (0, 5)


def test_a_mosaic_is_made_of_four_images_half_of_the_time():
    augment, chosen = Augmentation(("mosaic",)), []
    for seed in range(200):
        with local_seed(seed):
            chosen.append(augment.choose_images(5, 7))
    assert {len(indices) for indices in chosen} == {1, 4}
    assert 70 < sum(len(indices) == 4 for indices in chosen) < 130
    assert all(indices[0] == 5 for indices in chosen)
    assert {index for indices in chosen for index in indices[1:]} == set(range(7))
    assert Augmentation(("flip", "zoom")).choose_images(5, 7) == [5]


def test_unknown_name():
    with pytest.raises(ValueError, match="rotate.*flip"):
        Augmentation(("flip", "rotate"))


@pytest.mark.parametrize("size", [(1200, 6), (6, 900)])
def test_a_strip(size):
    boxes = torch.tensor([[0.0, 0.0, 6.0, 6.0, 0.0]])
    for seed in range(5):
        strip = torch.zeros(3, *size, dtype=torch.uint8)
        image, _ = augmented(("zoom", "flip"), lambda strip=strip: (strip, boxes), seed, 64)
        assert image.shape == (3, 64, 64)
