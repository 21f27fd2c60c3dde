"""The generated data set: reproducible, complete, correctly annotated, varied."""

from __future__ import annotations

import json
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageChops

from eecs598.data import shapes
from eecs598.data.shapes import CLASSES, draw_image, write_shapes


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def drawn():
    """The first 200 images of each split of the default set: (image size, objects)."""
    splits = {}
    for split in ("train", "val"):
        pairs = (draw_image(0, split, index) for index in range(200))
        splits[split] = [(image.size, objects) for image, objects in pairs]
    return splits


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("data") / "set", num_train=5, num_val=3)


def test_classes_are_sorted_single_words():
    assert isinstance(CLASSES, tuple)
    assert list(CLASSES) == sorted(set(CLASSES))
    assert len(CLASSES) >= 8
    assert all(name.isalpha() and name.islower() for name in CLASSES)


def test_same_settings_give_the_same_bytes(small_set, tmp_path):
    again = write_shapes(tmp_path / "again", num_train=5, num_val=3)
    assert contents(again) == contents(small_set)


def test_images_do_not_depend_on_the_counts(small_set, tmp_path):
    more = contents(write_shapes(tmp_path / "more", num_train=6, num_val=5))
    for name, data in contents(small_set).items():
        if name.endswith((".jpg", ".xml")):
            assert more[name] == data


def test_seed_split_and_index_each_give_another_picture():
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    assert len({draw_image(*key)[0].tobytes() for key in keys}) == len(keys)


def test_layout_is_complete(small_set):
    train = [f"train_{index:05d}" for index in range(5)]
    val = [f"val_{index:05d}" for index in range(3)]
    lists = {"train": train, "val": val, "trainval": train + val}
    expected = {"shapes.json"}
    expected |= {f"ImageSets/Main/{name}.txt" for name in lists}
    expected |= {f"JPEGImages/{name}.jpg" for name in train + val}
    expected |= {f"Annotations/{name}.xml" for name in train + val}
    assert {name.replace("\\", "/") for name in contents(small_set)} == expected
    for name, ids in lists.items():
        text = (small_set / "ImageSets" / "Main" / f"{name}.txt").read_text()
        assert text.split() == ids


def test_annotations_say_what_was_drawn(small_set):
    for split, count in (("train", 5), ("val", 3)):
        for index in range(count):
            name = f"{split}_{index:05d}"
            image, objects = draw_image(0, split, index)
            root = ElementTree.parse(small_set / "Annotations" / f"{name}.xml").getroot()
            assert root.findtext("folder")
            assert root.findtext("filename") == f"{name}.jpg"
            size = [int(root.findtext(f"size/{tag}")) for tag in ("width", "height", "depth")]
            assert size == [*image.size, 3]
            assert [
                {
                    "name": node.findtext("name"),
                    "xyxy": tuple(
                        int(node.findtext(f"bndbox/{tag}"))
                        for tag in ("xmin", "ymin", "xmax", "ymax")
                    ),
                    "difficult": node.findtext("difficult") == "1",
                    "truncated": node.findtext("truncated") == "1",
                }
                for node in root.iter("object")
            ] == objects
            assert all(node.findtext("pose") for node in root.iter("object"))
            with Image.open(small_set / "JPEGImages" / f"{name}.jpg") as stored:
                assert stored.mode == "RGB"
                difference = np.asarray(stored, float) - np.asarray(image, float)
            assert np.abs(difference).mean() < 8  # JPEG alone


def test_boxes_lie_in_the_frame_and_are_not_tiny(drawn):
    for pairs in drawn.values():
        for (width, height), objects in pairs:
            assert 1 <= len(objects) <= 8
            for item in objects:
                x1, y1, x2, y2 = item["xyxy"]
                assert all(type(value) is int for value in item["xyxy"])
                assert 1 <= x1 < x2 <= width
                assert 1 <= y1 < y2 <= height
                assert max(x2 - x1, y2 - y1) + 1 >= 12


def test_boxes_and_flags_fit_the_visible_silhouettes(monkeypatch):
    """Draw each object in a flat color of its own on black, and read the pixels back."""
    areas = []
    real_sprite, real_background = shapes._make_sprite, shapes._background

    def flat_sprite(*args):
        sprite = real_sprite(*args)
        hard = sprite.mask.point([255 * (v >= 128) for v in range(256)])
        areas.append(hard.histogram()[255])
        sprite.paint.paste((len(areas), 0, 0), (0, 0, *sprite.paint.size))
        sprite.mask = hard
        sprite.shadow = Image.new("L", sprite.mask.size)
        return sprite

    def black_background(*args):
        return Image.new("RGB", real_background(*args).size)

    monkeypatch.setattr(shapes, "_make_sprite", flat_sprite)
    monkeypatch.setattr(shapes, "_background", black_background)
    for index in range(60):
        areas.clear()
        image, objects = draw_image(0, "train", index)
        red = image.getchannel("R")
        colors = [value for value, count in enumerate(red.histogram()) if count and value]
        assert len(colors) == len(objects)
        for value, item in zip(colors, objects, strict=True):
            mask = red.point([255 * (v == value) for v in range(256)])
            left, top, right, bottom = mask.getbbox()
            assert item["xyxy"] == (left + 1, top + 1, right, bottom)
            visible = mask.histogram()[255] / areas[value - 1]
            tiny = max(right - left, bottom - top) < 15
            assert item["difficult"] == (tiny or visible < 0.35)
            if item is objects[-1]:  # nothing lies on it: what is missing is outside the frame
                assert item["truncated"] == (visible < 1)


def test_boxes_fit_the_change_that_an_object_makes(monkeypatch):
    """Pictures with and without their last object differ in its box, and up to its edges."""
    real_arrange = shapes._arrange

    def without_last(*args):
        sprites, owner = real_arrange(*args)
        return sprites[:-1], owner

    monkeypatch.setattr(shapes, "_SHADOW", [0] * 256)
    for index in range(40):
        image, objects = draw_image(0, "train", index)
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "_arrange", without_last)
            before, others = draw_image(0, "train", index)
        assert others == objects[:-1]
        change = np.asarray(ImageChops.difference(image, before)).max(-1) > 16
        rows, columns = np.flatnonzero(change.any(1)), np.flatnonzero(change.any(0))
        found = np.array([columns[0], rows[0], columns[-1], rows[-1]]) + 1
        assert np.abs(found - objects[-1]["xyxy"]).max() <= 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_class_band_and_flag_occurs(drawn, split):
    objects = [item for _, objects in drawn[split] for item in objects]
    longest = np.array(
        [max(x2 - x1, y2 - y1) + 1 for x1, y1, x2, y2 in (item["xyxy"] for item in objects)]
    )
    assert (longest < 24).sum() >= 8
    assert 0.4 < (longest < 64).mean() < 0.6
    assert 0.2 < ((longest >= 64) & (longest <= 128)).mean() < 0.45
    assert 0.1 < (longest > 128).mean() < 0.3
    counts = Counter(item["name"] for item in objects)
    assert set(counts) == set(CLASSES)
    assert min(counts.values()) > 0.5 * len(objects) / len(CLASSES)
    assert 0 < np.mean([item["difficult"] for item in objects]) < 0.1
    assert 0.1 < np.mean([item["truncated"] for item in objects]) < 0.4
    assert max(len(objects) for _, objects in drawn[split]) >= 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_are_wide_and_tall(drawn, split):
    sizes = np.array([size for size, _ in drawn[split]])
    assert (sizes.min(1) == 160).all()
    assert sizes.max() <= 220
    ratio = sizes[:, 0] / sizes[:, 1]
    assert (ratio > 1.2).mean() > 0.15
    assert (ratio < 1 / 1.2).mean() > 0.15
    assert (abs(ratio - 1) < 0.1).mean() > 0.05


def test_mirrored_boxes_miss(drawn):
    """A detector that swaps x and y cannot score well on this set."""

    def overlap(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        if min(width, height) <= 0:
            return 0.0
        sizes = ((r[2] - r[0]) * (r[3] - r[1]) for r in (a, b))
        return width * height / (sum(sizes) - width * height)

    hits = []
    for (width, height), objects in drawn["val"]:
        ratio = width / height
        for item in objects:
            x1, y1, x2, y2 = item["xyxy"]
            mirrored = (y1 * ratio, x1 / ratio, y2 * ratio, x2 / ratio)
            same = (other["xyxy"] for other in objects if other["name"] == item["name"])
            hits.append(any(overlap(mirrored, box) >= 0.5 for box in same))
    assert np.mean(hits) < 0.4


def test_a_finished_set_is_not_drawn_again(small_set, monkeypatch):
    def no_drawing(*args):
        raise AssertionError("drawn again")

    monkeypatch.setattr(shapes, "draw_image", no_drawing)
    assert write_shapes(small_set, num_train=5, num_val=3) == small_set


@pytest.mark.parametrize("other", [{"seed": 1}, {"num_train": 6}, {"num_val": 4}])
def test_a_set_with_other_settings_is_refused_and_kept(small_set, other):
    before = contents(small_set)
    with pytest.raises(ValueError, match="was made with .* choose another folder"):
        write_shapes(small_set, **{"num_train": 5, "num_val": 3, **other})
    assert contents(small_set) == before


def test_a_set_by_older_code_is_refused(small_set, monkeypatch):
    monkeypatch.setattr(shapes, "VERSION", shapes.VERSION + 1)
    with pytest.raises(ValueError, match="was made with"):
        write_shapes(small_set, num_train=5, num_val=3)


def test_a_set_with_missing_files_is_refused(tmp_path):
    folder = write_shapes(tmp_path / "set", num_train=2, num_val=1)
    (folder / "JPEGImages" / "train_00001.jpg").unlink()
    with pytest.raises(ValueError, match="holds 2 of 3 files"):
        write_shapes(folder, num_train=2, num_val=1)


@pytest.mark.parametrize("name", ["notes.txt", "shapes.json"])
def test_a_folder_with_other_contents_is_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="not a generated set"):
        write_shapes(tmp_path, num_train=1, num_val=1)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    path = tmp_path / "set"
    path.write_text("mine")
    with pytest.raises(ValueError, match="not a generated set"):
        write_shapes(path, num_train=1, num_val=1)
    assert path.read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    deep = tmp_path / "a" / "b"
    for folder in (empty, deep):
        write_shapes(folder, num_train=1, num_val=1)
        assert json.loads((folder / "shapes.json").read_text())["num_train"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_nothing_appears_when_the_writing_is_interrupted(tmp_path, monkeypatch):
    def interrupted(seed, split, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw_image(seed, split, index)

    monkeypatch.setattr(shapes, "draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "set", num_train=5, num_val=1)
    assert not list(tmp_path.iterdir())


def test_a_set_published_meanwhile_is_accepted(tmp_path, monkeypatch):
    write_set = shapes._write_set

    def slow(root, settings):
        write_set(root, settings)
        write_set(tmp_path / "set", settings)  # the other process is faster

    monkeypatch.setattr(shapes, "_write_set", slow)
    folder = write_shapes(tmp_path / "set", num_train=1, num_val=1)
    assert len(contents(folder)) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("counts", [{"num_train": 0}, {"num_val": 0}, {"num_train": -3}])
def test_counts_below_one_are_refused(tmp_path, counts):
    with pytest.raises(ValueError, match="at least 1 image"):
        write_shapes(tmp_path / "set", **counts)
    assert not list(tmp_path.iterdir())
