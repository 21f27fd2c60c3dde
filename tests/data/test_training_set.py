"""The training set: items of the sampler's samples, the same with and without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from a4_helper import VOC2007DetectionTiny
from eecs598.data import training_set
from eecs598.data.augment import AUGMENTATIONS
from eecs598.data.index import Instance, load_instances
from eecs598.data.sampling import Sample
from eecs598.data.training_set import AnnotatedImages, TrainingSet, crop_center, make_item

CLASSES = ("cube", "dice")


def assert_same(item: tuple, other: tuple) -> None:
    assert item[0] == other[0]
    assert torch.equal(item[1], other[1]) and torch.equal(item[2], other[2])


@pytest.fixture
def instances(small_voc) -> list[Instance]:
    return load_instances(small_voc, "train", CLASSES)


def test_without_augmentation_items_are_those_of_the_data_set(small_voc, instances):
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=64, classes=CLASSES)
    plain = TrainingSet(instances, 64)
    assert len(plain) == len(dataset)
    for index in range(len(dataset)):
        assert_same(plain[Sample(index, 0, None)], dataset[index])
        assert_same(plain[Sample(index, 0, 64)], dataset[index])
    assert plain[Sample(3, 0, 96)][1].shape == (3, 96, 96)


def test_augmented_items(instances):
    augmented = TrainingSet(instances, 64, AUGMENTATIONS)
    path, image, boxes = augmented[Sample(3, 7, 96)]
    assert path == str(instances[3][0])
    assert image.shape == (3, 96, 96) and image.dtype == torch.float32
    assert boxes.shape == (8, 5)  # a mosaic shows four images of up to two objects
    assert augmented[Sample(3, 7, None)][1].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("augment", "image_sizes"), [((), ()), ((), (64, 96)), (AUGMENTATIONS, (64, 96))]
)
def test_items_from_the_cache_are_the_same_and_no_file_is_read_twice(
    instances, capsys, monkeypatch, augment, image_sizes
):
    plain = TrainingSet(instances, 64, augment, image_sizes=image_sizes)
    assert plain.images.cache is None and capsys.readouterr().out == ""
    cached = TrainingSet(instances, 64, augment, image_sizes=image_sizes, cache=True)
    assert capsys.readouterr().out.count("images in memory: ") == 1
    sides = image_sizes or (None,)
    samples = [Sample(i, i, side) for i in range(len(instances)) for side in sides]
    first = [plain[sample] for sample in samples]
    for sample, item in zip(samples, first, strict=True):
        assert_same(cached[sample], item)
    assert len(cached.images.cache) == len(instances)

    def refuse(path: Path, **_: object) -> None:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(training_set, "read_image", refuse)
    for sample, item in zip(samples, first, strict=True):
        assert_same(cached[sample], item)


def test_the_cache_has_what_is_needed(instances):
    """Resized images where all batches show the same pixels, otherwise originals."""
    original = sum(
        image.numel() for image, _ in map(AnnotatedImages(instances, 32).original, range(8))
    )
    resized = sum(
        image.numel() for image, _ in map(AnnotatedImages(instances, 32).resized, range(8))
    )
    assert resized < original
    for expected, settings in (
        (resized, {}),
        (original, {"augment": ("flip",)}),
        (original, {"image_sizes": (32, 48)}),
    ):
        assert TrainingSet(instances, 32, cache=True, **settings).images.cache.num_bytes == expected


@pytest.mark.parametrize("cache_originals", [False, True])
def test_any_image_from_any_cache(instances, cache_originals):
    plain = AnnotatedImages(instances, 40)
    cached = AnnotatedImages(instances, 40, cache=True, cache_originals=cache_originals)
    for index in (*range(len(instances)), 0):
        for ours, theirs in zip(cached.original(index), plain.original(index), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(cached.resized(index), plain.resized(index), strict=True):
            assert torch.equal(ours, theirs)


def test_crop_center():
    boxes = torch.tensor([[0.0, 0, 25, 20, 1], [30, 5, 50, 9, 0], [0, 0, 20, 20, 0]])
    pixels = torch.arange(3 * 20 * 60).view(3, 20, 60)
    square, cropped = crop_center(pixels, boxes)
    assert torch.equal(square, pixels[:, :, 20:40])
    assert cropped.tolist() == [[0, 0, 5, 20, 1], [10, 5, 20, 9, 0], [-1] * 5]


def test_make_item_pads():
    boxes = torch.tensor([[1.0, 2, 3, 4, 0]])
    path, image, padded = make_item(
        Path("a.jpg"), torch.zeros(3, 4, 5, dtype=torch.uint8), boxes, 3
    )
    assert path == "a.jpg" and image.shape == (3, 4, 5)
    assert padded.tolist() == [[1, 2, 3, 4, 0], [-1] * 5, [-1] * 5]
