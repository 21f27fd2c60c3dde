"""The training set: items of the sampler's samples, the same with and without a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from a4_helper import VOC2007DetectionTiny
from eecs598.data import training_set
from eecs598.data.augment import AUGMENTATIONS
from eecs598.data.index import IGNORED, Instance, load_instances
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


@pytest.mark.parametrize("allowed", [True, False])
def test_a_sample_may_refuse_a_mosaic(instances, allowed):
    items = TrainingSet(instances, 64, ("mosaic",))
    samples = [Sample(3, seed, allows_mosaic=allowed) for seed in range(12)]
    images = {items[sample][1].numpy().tobytes() for sample in samples}
    assert (len(images) > 1) == allowed  # alone, an image is always the same


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

    def refuse(path: Path, *_: object) -> None:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(training_set, "read_annotated_image", refuse)
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


@pytest.mark.parametrize("augment", [(), ("flip",), ("photometric",)])
@pytest.mark.parametrize("cache", [False, True])
def test_a_small_object_stays_at_every_size(voc_folder, augment, cache):
    """One rule for all: an object of 3 px has its box, one of which nothing is left has none."""
    picture = Image.new("RGB", (160, 64))
    objects = [("cube", 60, 30, 63, 33), ("dice", 3, 3, 40, 40), ("cube", 110, 8, 150, 20)]
    folder = voc_folder({"train": {"a": (picture, objects)}})
    instances = load_instances(folder, "train", CLASSES)
    items = TrainingSet(instances, 64, augment, image_sizes=(32, 64, 96), cache=cache)
    for side, whole in ((32, 1.5), (64, 3), (96, 4.5), (None, 3)):
        boxes = items[Sample(0, 5, side)][2]
        boxes = boxes[boxes[:, 4] >= 0]
        width, height = (boxes[:, 2:4] - boxes[:, :2]).T.tolist()
        # The crop of 64 x 64 in the center begins at x = 48 and cuts the third object at 112.
        assert width == pytest.approx([whole, whole * 2 / 3]) and height[0] == whole
        assert boxes[:, 4].tolist() == [0, 0]


def test_augmentations_keep_what_is_left_of_an_object(instances):
    """Of all boxes, also those of mosaics and random crops, none is empty or outside."""
    items = TrainingSet(instances, 64, AUGMENTATIONS)
    for seed in range(40):
        boxes = items[Sample(seed % 8, seed, None)][2]
        boxes = boxes[boxes[:, 4] >= 0]
        assert (boxes[:, 2:4] > boxes[:, :2]).all()
        assert (boxes[:, :4] >= 0).all() and (boxes[:, :4] <= 64).all()


def test_make_item_pads():
    boxes = torch.tensor([[1.0, 2, 3, 4, 0]])
    path, image, padded = make_item(
        Path("a.jpg"), torch.zeros(3, 4, 5, dtype=torch.uint8), boxes, 3
    )
    assert path == "a.jpg" and image.shape == (3, 4, 5)
    assert padded.tolist() == [[1, 2, 3, 4, 0], [-1] * 5, [-1] * 5]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("augment", [(), ("zoom",)])
def test_a_photograph_turned_by_exif_is_upright_where_its_boxes_are(tmp_path, augment, cache):
    """The white object, in the upper left of the upright picture, is under its box."""
    picture = Image.new("RGB", (64, 96))
    picture.paste((255, 255, 255), (8, 8, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right by a quarter
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    boxes, ordinary = torch.tensor([[8.0, 8, 40, 40, 0]]), torch.tensor([False])
    instance = Instance(tmp_path / "x.png", boxes, ordinary, (96, 64))
    images = TrainingSet([instance], 64, augment, cache=cache).images
    for pixels, found in (images.original(0), images.resized(0)):
        assert pixels.shape == (3, 96, 64) and found[0, :4].tolist() == [8, 8, 40, 40]
        assert (pixels[:, 8:40, 8:40] == 255).all() and pixels.sum() == 3 * 255 * 32 * 32


def test_an_image_of_another_size_than_its_annotation_says_is_refused(small_voc, instances):
    instances[1] = instances[1]._replace(size=(64, 97))
    path = str(instances[1].path)
    with pytest.raises(ValueError, match="but its annotation is for 97 x 64") as caught:
        TrainingSet(instances, 64)[Sample(1, 0, None)]
    assert path in str(caught.value)
    with pytest.raises(ValueError, match="but its annotation is for 97 x 64"):
        TrainingSet(instances, 64, cache=True)


@pytest.mark.parametrize("augment", [(), ("flip",), ("zoom",), ("iou_crop",), AUGMENTATIONS])
def test_difficult_objects_are_regions_to_ignore_if_asked_for(tmp_path, augment):
    """What is white lies under ignored boxes, in every way an image is made."""
    picture = Image.new("RGB", (96, 64))
    picture.paste((255, 255, 255), (24, 8, 72, 56))
    picture.save(tmp_path / "x.png")
    boxes = torch.tensor([[0.0, 0, 96, 64, 1], [24.0, 8, 72, 56, 0]])
    instance = Instance(tmp_path / "x.png", boxes, torch.tensor([False, True]), (64, 96))
    shown = 0
    for seed in range(8):
        sample = Sample(0, seed, None)
        _, image, rows = TrainingSet([instance], 64, augment, ignore_difficult=True)[sample]
        assert len(rows) == 2 * (4 if "mosaic" in augment else 1)
        ignored = rows[rows[:, 4] == IGNORED]
        assert set(rows[:, 4].tolist()) <= {-1.0, IGNORED, 1.0}
        for x1, y1, x2, y2 in ignored[:, :4].round().int().tolist():
            middle = image[:, (y1 + y2) // 2, (x1 + x2) // 2]
            assert (middle > 1.5).all() or "photometric" in augment
        shown += len(ignored)
        _, _, rows = TrainingSet([instance], 64, augment)[sample]
        assert set(rows[:, 4].tolist()) <= {-1.0, 1.0} and len(rows) in (1, 4)
    assert shown >= 4
    unknown = instance._replace(difficult_known=False)
    with pytest.raises(ValueError, match=r"ignore_difficult: of 1 images, the first .*x\.png"):
        TrainingSet([unknown], 64, augment, ignore_difficult=True)


@pytest.mark.parametrize("augment", [(), ("flip",)])
def test_boxes_from_edge_to_edge_cover_their_object_mirrored_or_not(tmp_path, augment):
    """With the annotation's numbers, a mirror moves the column that they leave out."""
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (8, 16, 24, 40))
    picture.save(tmp_path / "x.png")
    voc = torch.tensor([[9.0, 17, 24, 40, 0]])  # the first and the last pixel, counted from 1
    instance = Instance(
        tmp_path / "x.png", voc, torch.tensor([False]), (64, 64), True, first_pixel=1
    )
    covered = {True: set(), False: set()}
    for edges in covered:
        for seed in range(8):
            dataset = TrainingSet([instance], 64, augment, pixel_edges=edges)
            _, image, boxes = dataset[Sample(0, seed, None)]
            x1, y1, x2, y2 = boxes[0, :4].int().tolist()
            bright = image[0] > 1
            inside = int(bright[y1:y2, x1:x2].sum())
            covered[edges].add((inside, (y2 - y1) * (x2 - x1), bool(bright[y1:y2, x1].all())))
    assert covered[True] == {(16 * 24, 16 * 24, True)}
    assert {inside for inside, *_ in covered[False]} == {15 * 23}
