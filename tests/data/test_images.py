"""Every kind of image file comes out as the picture it shows, or is named with the reason."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from a4_helper import VOC2007DetectionTiny
from eecs598.data.images import (
    ImageFiles,
    annotated_size,
    find_images,
    normalize,
    read_annotated_image,
    read_image,
    resize_shorter_side,
    to_pixels,
)

WIDTH, HEIGHT = 48, 32


def quarters() -> Image.Image:
    """A color in each quarter, so that every turn and mirror image of it differs."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (200, 40, 40))
    image.paste((40, 180, 60), (WIDTH // 2, 0, WIDTH, HEIGHT // 2))
    image.paste((50, 60, 220), (0, HEIGHT // 2, WIDTH // 2, HEIGHT))
    image.paste((120, 120, 120), (WIDTH // 2, HEIGHT // 2, WIDTH, HEIGHT))
    return image


def ramp() -> np.ndarray:
    """From black on the left to white on the right, as uint8."""
    return np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))


def gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values).convert("RGB")


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    assert one.mode == other.mode == "RGB" and one.size == other.size
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize(
    "mode, file, tolerance",
    [
        ("RGB", "x.png", 0),
        ("RGB", "x.jpg", 3),
        ("RGB", "x.gif", 0),
        ("RGB", "x.webp", 3),
        ("RGB", "x.bmp", 0),
        ("P", "x.png", 0),
        ("P", "x.tif", 0),
        ("CMYK", "x.jpg", 3),
        ("CMYK", "x.tif", 0),
        ("YCbCr", "x.jpg", 3),
        ("LAB", "x.tif", 3),
        ("RGBX", "x.tif", 0),
    ],
)
def test_color_modes(tmp_path, mode, file, tolerance):
    image = quarters()
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    elif mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(tmp_path / file, quality=95)
    assert mean_difference(read_image(tmp_path / file), quarters()) <= tolerance


@pytest.mark.parametrize("mode", ["L", "1", "I;16", "I;16B", "I", "F unit", "F bytes", "PGM 16"])
def test_gray_modes(tmp_path, mode):
    path, values, expected = tmp_path / "x.tif", ramp(), gray(ramp())
    if mode in ("L", "1"):
        path = tmp_path / "x.png"
        image = Image.fromarray(values).convert(mode, dither=Image.Dither.NONE)
        if mode == "1":
            expected = gray(np.where(values >= 128, 255, 0).astype(np.uint8))
    elif mode == "PGM 16":
        path = tmp_path / "x.pgm"
        header = f"P5 {WIDTH} {HEIGHT} 65535\n".encode()
        path.write_bytes(header + (257 * values.astype(">u2")).astype(">u2").tobytes())
        image = None
    elif mode.startswith("F"):
        image = Image.fromarray(values.astype(np.float32) / (255 if mode == "F unit" else 1))
    else:
        kind = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]
        image = Image.fromarray((257 * values.astype(np.int32)).astype(kind))
        assert image.mode == mode
    if image is not None:
        image.save(path)
    assert mean_difference(read_image(path), expected) <= 0.5


def test_16_bit_png(tmp_path):
    Image.fromarray(257 * ramp().astype(np.uint16)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode in ("I;16", "I")
    assert mean_difference(read_image(tmp_path / "x.png"), gray(ramp())) <= 0.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """The left half is opaque black, the right half transparent or, with full alpha, half so."""
    right = 255
    mask = Image.new("L", (WIDTH, HEIGHT), 255)
    mask.paste(0, (WIDTH // 2, 0, WIDTH, HEIGHT))
    more = {}
    if mode in ("RGBA", "LA"):
        mask = mask.point([128] * 128 + [255] * 128)  # half transparent
        image = Image.new(mode[:-1], (WIDTH, HEIGHT), "black")
        image.putalpha(mask)
        right = 127
    else:  # one color stands for nothing: a dark one, which would show
        nothing = {"P": 1, "L": 9, "RGB": (9, 9, 9)}[mode]
        image = Image.new(mode, mask.size, 0)
        image.paste(nothing, (WIDTH // 2, 0, WIDTH, HEIGHT))
        if mode == "P":
            image.putpalette([0, 0, 0, 30, 60, 90])
        more = {"transparency": nothing}
    image.save(tmp_path / "x.png", **more)
    found = np.asarray(read_image(tmp_path / "x.png"))
    assert (found[:, : WIDTH // 2] == 0).all()
    assert (abs(found[:, WIDTH // 2 :].astype(int) - right) <= 1).all()


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    # Stored turned by a quarter to the left, to be turned to the right, and the other way round.
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(tmp_path, orientation):
    stored = quarters().transpose(TURNS[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert mean_difference(read_image(tmp_path / "x.jpg"), quarters()) < 3
    assert mean_difference(read_image(tmp_path / "x.jpg", upright=False), stored) < 3


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", TURNS)
def test_the_annotations_size_decides_whether_a_photograph_is_turned(tmp_path, orientation, suffix):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    stored = quarters().transpose(TURNS[orientation])
    stored.save(path, exif=exif, quality=95)
    for size in (None, (stored.height, stored.width)):
        assert mean_difference(read_annotated_image(path, size), stored) < 3
        assert annotated_size(path, size) == (stored.height, stored.width)
    if orientation >= 5:  # quarters() is HEIGHT x WIDTH, what is stored the other way round
        assert mean_difference(read_annotated_image(path, (HEIGHT, WIDTH)), quarters()) < 3
        assert annotated_size(path, (HEIGHT, WIDTH)) == (HEIGHT, WIDTH)
    swapped = (stored.height, stored.width + 1) if orientation >= 5 else (WIDTH, HEIGHT)
    for function in (read_annotated_image, annotated_size):
        with pytest.raises(ValueError, match=rf"x\.{suffix} has .* pixels, but its annotation is"):
            function(path, swapped)


@pytest.mark.parametrize("kind", ["RGBA", "I;16"])
def test_images_that_are_converted_keep_their_orientation(tmp_path, kind):
    path, exif = tmp_path / "x.png", Image.Exif()
    exif[0x0112] = 6
    stored = {
        "RGBA": Image.new("RGBA", (WIDTH, HEIGHT)),
        "I;16": Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)),
    }[kind]
    stored.save(path, exif=exif)
    assert annotated_size(path, (WIDTH, HEIGHT)) == (WIDTH, HEIGHT)
    assert read_annotated_image(path, (WIDTH, HEIGHT)).size == (HEIGHT, WIDTH)


def test_a_tiff_file_is_always_upright(tmp_path):
    path, exif = tmp_path / "x.tif", Image.Exif()
    exif[0x0112] = 6
    quarters().transpose(TURNS[6]).save(path, exif=exif)
    assert annotated_size(path, (HEIGHT, WIDTH)) == (HEIGHT, WIDTH)
    assert read_annotated_image(path, (HEIGHT, WIDTH)).size == (WIDTH, HEIGHT)
    for read in (annotated_size, read_annotated_image):
        with pytest.raises(ValueError, match=f"annotation is for {HEIGHT} x {WIDTH}"):
            read(path, (WIDTH, HEIGHT))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason_to_give_up(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 20
    quarters().save(tmp_path / "x.jpg", exif=exif)
    assert mean_difference(read_image(tmp_path / "x.jpg"), quarters()) < 3


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=100)
    assert mean_difference(read_image(tmp_path / "x.gif"), frames[0]) == 0


def write_broken(folder: Path) -> dict[str, str]:
    """Files that are no image, and what is to be said of them."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.jpg", "cut.png"):
        Image.fromarray(noise).save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:2000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image\n" * 9)
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    # The beginning of a PNG that claims to have 10 gigapixels.
    bomb = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)),
        (b"IDAT", b""),
    ):
        bomb += struct.pack(">I", len(data)) + kind + data
        bomb += struct.pack(">I", zlib.crc32(kind + data))
    (folder / "bomb.png").write_bytes(bomb)
    Image.fromarray(np.full((8, 8), 100_000, np.int32)).save(folder / "range.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tif")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated|broken",
        "empty.jpg": "empty",
        "text.jpg": "none of the formats",
        "program.jpg": "none of the formats",
        "bomb.png": "megapixels",
        "range.tif": "100000",
        "nan.tif": "nan",
        "gone.png": "No such file",
    }


def test_broken_files_are_named_with_the_reason(tmp_path):
    for name, reason in write_broken(tmp_path).items():
        with pytest.raises(ValueError, match=f"{name} can't be read as an image: .*({reason})"):
            read_image(tmp_path / name)


def test_photographs_of_90_megapixels_set_off_no_warning_and_hide_no_others(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    path = tmp_path / "large.png"
    Image.fromarray(rng.integers(0, 256, (640, 640, 3), dtype=np.uint8)).save(path)
    assert path.stat().st_size > 2**20
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 640 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert annotated_size(path, None) == (640, 640)
        with pytest.raises(Image.DecompressionBombWarning):  # of other code in this process
            Image.open(path)


def test_items_of_a_data_set_and_of_files_are_the_same(small_voc):
    dataset = VOC2007DetectionTiny(small_voc, "val", image_size=48, classes=("cube", "dice"))
    paths = [instance.path for instance in dataset.instances]
    for (path, pixels, _), item in zip(dataset, ImageFiles(paths, 48), strict=True):
        assert str(item.path) == path and item.error is None
        assert torch.equal(item.pixels, pixels)
        assert (item.height, item.width) == annotated_size(path, None)


def test_resize_and_normalization():
    pixels = resize_shorter_side(to_pixels(quarters()), 64)
    assert pixels.shape == (3, 64, 96) and pixels.dtype == torch.uint8
    white = normalize(to_pixels(Image.new("RGB", (4, 3), "white")))
    assert white.shape == (3, 3, 4) and white.dtype == torch.float32
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(white[:, 1, 2], expected)


def test_image_files_go_on_after_a_broken_one(tmp_path):
    write_broken(tmp_path)
    quarters().save(tmp_path / "good.png")
    Image.new("RGB", (501, 10)).save(tmp_path / "long.png")
    items = {i.path.name: i for i in ImageFiles(find_images([tmp_path]), 16)}
    assert items["good.png"].pixels.shape == (3, 16, 24)
    assert (items["good.png"].width, items["good.png"].height) == (WIDTH, HEIGHT)
    assert "501 x 10" in items["long.png"].error
    assert [name for name, item in items.items() if item.error is None] == ["good.png"]
    assert all(item.pixels is None for item in items.values() if item.error)


def test_find_images(tmp_path, monkeypatch):
    names = ["b.JPG", "a.png", "c.txt", ".hidden.png", "sub/d.jpeg", "sub/deep/e.webp", "[x]*.jpg"]
    names += ["phone.heic", "odd name\n.gif"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)

    def found(*sources):
        return [os.path.relpath(path) for path in find_images(sources)]

    direct = ["[x]*.jpg", "a.png", "b.JPG", "odd name\n.gif", "phone.heic"]
    assert found(tmp_path) == found(".") == direct
    assert found("b.JPG", ".") == ["b.JPG", *(name for name in direct if name != "b.JPG")]
    assert found("**/*") == sorted([*direct, "sub/d.jpeg", "sub/deep/e.webp"])
    assert found("[x]*.jpg") == ["[x]*.jpg"]  # a name before it is a pattern
    assert found("c.txt", str(tmp_path / "c.txt")) == ["c.txt"]  # whoever names it means it


@pytest.mark.parametrize("source, words", [("no.jpg", "no such file"), ("empty", "no image among")])
def test_find_images_says_what_is_not_there(tmp_path, source, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.txt").touch()
    with pytest.raises(ValueError, match=f"{source}: {words}"):
        find_images([tmp_path / source])
