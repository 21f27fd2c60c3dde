"""Images in memory: the same pixels, decoded once for all processes, within a bound."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from a4_helper import VOC2007DetectionTiny
from eecs598.data import images
from eecs598.data.image_cache import ImageCache

SIZES = [(4, 6), (2, 2), (3, 5)]


def picture(index: int) -> torch.Tensor:
    return torch.full((3, *SIZES[index]), index + 1, dtype=torch.uint8)


def test_images_are_made_once():
    cache, made = ImageCache(SIZES, 10**6), []

    def make(index: int) -> torch.Tensor:
        made.append(index)
        return picture(index)

    for index in (2, 0, 2, 1, 0, 2):
        assert torch.equal(cache.get(index, lambda index=index: make(index)), picture(index))
    assert made == [2, 0, 1]
    assert len(cache) == cache.num_images == 3
    assert cache.num_bytes == 3 * (24 + 4 + 15)


@pytest.mark.parametrize("max_bytes, kept", [(0, 0), (71, 0), (72, 1), (84, 2), (128, 2), (129, 3)])
def test_what_does_not_fit_is_made_again(max_bytes, kept):
    cache = ImageCache(SIZES, max_bytes)
    for _ in range(2):
        for index in range(3):
            assert torch.equal(cache.get(index, lambda index=index: picture(index)), picture(index))
    assert len(cache) == cache.num_images == kept
    assert cache.num_bytes <= max_bytes
    assert ("do not fit" in str(cache)) == (kept < 3)


def test_a_copy_begins_empty():
    cache = ImageCache(SIZES, 10**6)
    cache.get(0, lambda: picture(0))
    copy = pickle.loads(pickle.dumps(cache))
    assert (len(cache), len(copy), copy.num_images) == (1, 0, 3)


def test_an_error_leaves_no_image():
    cache = ImageCache(SIZES, 10**6)
    with pytest.raises(ZeroDivisionError):
        cache.get(0, lambda: picture(1 // 0))
    assert torch.equal(cache.get(0, lambda: picture(0)), picture(0))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_data_set_gives_the_same_items(small_voc, capsys, split):
    settings = {"image_size": 40, "classes": ("cube", "dice")}
    plain = VOC2007DetectionTiny(small_voc, split, **settings)
    cached = VOC2007DetectionTiny(small_voc, split, cache=True, **settings)
    assert f"MB for {len(plain)} images" in capsys.readouterr().out
    for _ in range(2):
        for ours, theirs in zip(cached, plain, strict=True):
            assert ours[0] == theirs[0]
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
        assert len(cached.images.cache) == len(plain)


def test_workers_share_it(small_voc, monkeypatch, tmp_path):
    dataset = VOC2007DetectionTiny(
        small_voc, "train", image_size=40, classes=("cube", "dice"), cache=True
    )
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context="fork")
    first = [image for _, image, _ in loader]
    assert len(dataset.images.cache) == len(dataset)

    def refuse(path: Path, *_: object) -> None:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("eecs598.data.training_set.read_annotated_image", refuse)
    for image, (_, again, _) in zip(first, loader, strict=True):
        assert torch.equal(image, again)


def test_a_broken_file_is_named_before_anything_is_loaded(small_voc):
    path = VOC2007DetectionTiny(small_voc, "train", classes=("cube", "dice")).instances[1].path
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"{path.name} can't be read as an image"):
        VOC2007DetectionTiny(small_voc, "train", classes=("cube", "dice"), cache=True)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (7, 350)])
def test_sizes_are_known_beforehand(size):
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    resized = images.resize_shorter_side(pixels, 224)
    assert tuple(resized.shape[1:]) == images.resized_size(*size, 224)
    assert min(resized.shape[1:]) == 224
