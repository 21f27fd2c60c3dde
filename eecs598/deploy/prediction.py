"""Prediction: detect objects in image files, draw the boxes, give them as plain data.

Symbols: B images, K detections.
"""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from eecs598.data import LoadedImage
from eecs598.runtime import atomic_write, explained

__all__ = ["class_color", "detect", "draw_detections", "picture_names", "to_json", "write_picture"]

Detections = dict[str, Tensor]

MIN_PICTURE_SIDE = 480  # smaller pictures are enlarged, since no label would fit into them
JPEG_MAX_SIDE = 65_500  # the format has no longer sides


def detect(
    predict: Callable[[Tensor], Sequence[Mapping[str, Tensor]]],
    batches: Iterable[Sequence[LoadedImage]],
    device: str | torch.device = "cpu",
) -> Iterator[tuple[LoadedImage, Detections | None]]:
    """Run a detector over loaded images, in batches of images of the same size.

    Args:
        predict: maps images ``(B, 3, H, W)`` to a mapping for each: ``boxes (K, 4)`` as XYXY in
            its pixels, ``labels (K,)`` and ``scores (K,)``.
        batches: items of ``eecs598.data.ImageFiles``.
        device: of the detector.

    Yields:
        For each image, in order, the image without its pixels, and its detections on the CPU: the
        same keys, boxes in pixels of the original and clipped to it. None where the image could
        not be read.

    Raises:
        RunError: memory is too small, or a process that loads images was killed.
    """
    with explained() as batch_shape:
        for batch in batches:
            same_size: dict[torch.Size, list[tuple[int, Tensor]]] = {}
            for number, image in enumerate(batch):
                if image.pixels is not None:
                    same_size.setdefault(image.pixels.shape, []).append((number, image.pixels))
            found: dict[int, Detections] = {}
            for (_, height, width), members in same_size.items():
                batch_shape[:] = len(members), 3, height, width
                images = torch.stack([pixels for _, pixels in members]).to(device)  # (B, 3, H, W)
                for (number, _), detections in zip(members, predict(images), strict=True):
                    found[number] = _in_original(detections, batch[number], height, width)
            for number, image in enumerate(batch):
                yield image._replace(pixels=None), found.get(number)


def _in_original(
    detections: Mapping[str, Tensor], image: LoadedImage, height: int, width: int
) -> Detections:
    """Scale boxes in an image resized to ``height`` and ``width`` back to its original."""
    x, y = image.width / width, image.height / height
    boxes = detections["boxes"].cpu() * torch.tensor([x, y, x, y])
    boxes = clip_boxes_to_image(boxes, (image.height, image.width))
    return {
        "boxes": boxes,
        "labels": detections["labels"].cpu(),
        "scores": detections["scores"].cpu(),
    }


def to_json(
    image: LoadedImage, detections: Detections, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return an image and its detections as values that JSON can hold.

    Args:
        image: as ``detect`` yields it.
        detections: likewise; they keep their order.
        class_names: ``class_names[label]`` names a label.

    Returns:
        ``path``, ``width``, ``height`` and ``detections``, each with ``box`` (XYXY, rounded to a
        hundredth of a pixel), ``label`` (the name), ``class_id`` and ``score`` (six digits).
    """
    return {
        "path": str(image.path),
        "width": image.width,
        "height": image.height,
        "detections": [
            {
                "box": [round(value, 2) for value in box],
                "label": class_names[label],
                "class_id": label,
                "score": round(score, 6),
            }
            for box, label, score in zip(
                *(detections[key].tolist() for key in ("boxes", "labels", "scores")), strict=True
            )
        ],
    }


def picture_names(paths: Sequence[Path]) -> list[str]:
    """Choose a file name for the picture of each image: NAME.jpg, or NAME-2.jpg where it is taken.

    Whatever the names of the images are, these differ in more than upper and lower case, are valid
    Unicode and are not too long for a file system.

    Example:
        >>> picture_names([Path("a/cat.png"), Path("b/cat.jpg")])
        ['cat.jpg', 'cat-2.jpg']
    """
    names: list[str] = []
    taken: set[str] = set()
    last_number: dict[str, int] = {}  # of each stem: many folders may have a file of one name
    for path in paths:
        stem = os.fsencode(path.stem)[:180].decode(errors="ignore") or "image"
        number = last_number.get(stem.casefold(), 0) + 1
        name = f"{stem}.jpg" if number == 1 else f"{stem}-{number}.jpg"
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}.jpg"
        last_number[stem.casefold()] = number
        taken.add(name.casefold())
        names.append(name)
    return names


def write_picture(
    image: Image.Image,
    detections: Detections,
    class_names: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Draw detections and save the picture, as ``draw_detections``."""
    picture = draw_detections(image, detections, class_names)
    # Viewers recognize a format by the content of a file, so the name may stay.
    format_ = "JPEG" if max(picture.size) <= JPEG_MAX_SIDE else "PNG"
    with atomic_write(path) as unfinished:
        picture.save(unfinished, format=format_, quality=92)


def draw_detections(
    image: Image.Image,
    detections: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    letters: float = 1.0,
) -> Image.Image:
    """Draw boxes with class and score onto a copy of an image.

    Lines and letters grow with the image. An image whose longer side is below 480 pixels is first
    enlarged by an integer factor.

    Args:
        image: RGB.
        detections: ``boxes (K, 4)`` in its pixels, ``labels (K,)``, ``scores (K,)``.
        class_names: ``class_names[label]`` names a label.
        letters: factor on the usual size of the letters.

    Returns:
        The drawing, RGB.
    """
    factor = math.ceil(MIN_PICTURE_SIDE / max(image.size))
    size = (factor * image.width, factor * image.height)
    picture = image.resize(size, Image.Resampling.BICUBIC) if factor > 1 else image.copy()
    pen = ImageDraw.Draw(picture)
    line = max(2, round(max(size) / 250))
    font = _font(round(letters * max(12, max(size) / 50)))
    # The highest scores come last, so that no other label hides theirs.
    for k in detections["scores"].argsort().tolist():
        box = [factor * value for value in detections["boxes"][k].tolist()]
        label = int(detections["labels"][k])
        color = class_color(label)
        text = f"{class_names[label]} {detections['scores'][k]:.2f}"
        _draw_box(pen, box, color, line)
        _draw_label(pen, box, text, color, font, line)
    return picture


def class_color(label: int) -> tuple[int, int, int]:
    """Return the color of a class, RGB in 0..255, which differs from those of the next classes."""
    # Steps of the golden ratio keep any number of hues apart; the brightness changes, too.
    hue = (0.02 + 0.618034 * label) % 1
    saturation, value = ((0.9, 0.95), (0.55, 1.0), (0.8, 0.8))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font has Latin letters only; the one that comes with matplotlib has more.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _draw_box(
    pen: ImageDraw.ImageDraw, box: list[float], color: tuple[int, int, int], line: int
) -> None:
    x1, y1, x2, y2 = box
    # The last column of the box is x2 - 1; a dark rim shows the color on any background.
    corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))
    pen.rectangle(corners, outline=(0, 0, 0), width=line + max(1, line // 3))
    pen.rectangle(corners, outline=color, width=line)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    box: list[float],
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    line: int,
) -> None:
    """Draw the label above the box, or inside it where the image has no room above."""
    width = font.getlength(text) + 2 * line
    height = sum(font.getmetrics()) + line
    left = max(0, min(box[0], pen.im.size[0] - width))
    top = box[1] - height if box[1] >= height else box[1]
    pen.rectangle((left, top, left + width, top + height), fill=color)
    red, green, blue = color
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    pen.text((left + line, top + line / 2), text, fill="black" if bright else "white", font=font)
