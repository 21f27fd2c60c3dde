"""The generated data set: drawn objects of eight classes, in the layout of the VOC devkit.

It needs no download, and its classes differ in shape, texture and color. As the files have the
layout of the devkit, they are read by the same code as VOC 2007::

    FOLDER/JPEGImages/train_00000.jpg
    FOLDER/Annotations/train_00000.xml
    FOLDER/ImageSets/Main/{train,val,trainval}.txt
    FOLDER/shapes.json                               the settings it was made with

Boxes follow the devkit: whole numbers, the first and the last pixel of the object's visible part,
both inclusive, counted from 1. Each image has a random generator of its own, so image k of a split
does not depend on the number of images::

    from eecs598.data import write_shapes

    write_shapes("data/shapes")
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

# To be increased whenever the drawings change, so that a folder made by older code is not reused.
VERSION = 1

SHORT_SIDE = 160
LONG_SIDE = 220

# Longer side of an object in pixels and the weight of each band; within a band, sizes are
# log-uniform. The limits 64 and 128 are those between the FCOS levels p3, p4 and p5 (strides 8, 16
# and 32). The small sizes have bands of their own, so that there are some but not many.
_SIZE_BANDS = ((13, 24), (24, 40), (40, 64), (64, 128), (128, 220))
_BAND_WEIGHTS = (2, 8, 26, 40, 24)
_COUNT_WEIGHTS = (1, 2, 4, 5, 5, 5, 4, 3)  # for 1, 2, ... 8 objects

# How much of its silhouette stays visible: of most objects, of crowded ones; the share of those.
# How much of an object may cover others, and the share of objects without this limit.
_CLEAR, _CROWDED, _CROWDED_SHARE = 0.6, 0.15, 0.12
_COVER, _COVERING_SHARE = 0.1, 0.2
_OVERHANG, _OVERHANG_SHARE = 0.4, 0.15  # how far over the border, and how often
_MIN_LONG, _MIN_SHORT = 12, 6  # sides of the smallest box, in pixels
_DIFFICULT, _TINY = 0.35, 15  # below this visible share, or this longer side: difficult
_TRIES = 12

_Color = tuple[float, float, float]  # hue in degrees, saturation and value in 0..1
_Points = Sequence[tuple[float, float]]
_Rect = tuple[float, float, float, float]  # left, top, right, bottom


class _Canvas:
    """Draw one object, colors and silhouette, in coordinates from 0 to 1.

    Whatever is drawn with ``solid=True`` belongs to the silhouette; the rest is texture, visible
    only inside it. Line widths and corner radii are shares of the shorter side.
    """

    MARGIN = 4  # pixels around the object, so that its outermost edges are antialiased too

    def __init__(self, width: int, height: int, edge: _Color, hue: float, gain: float) -> None:
        self.size, self.hue, self.gain = (width, height), hue, gain
        # Antialiased edges mix with the color outside: a dark one makes a fine outline.
        self.edge = self._rgb(edge)
        room = (width + 2 * self.MARGIN, height + 2 * self.MARGIN)
        self.paint, self.mask = Image.new("RGB", room, self.edge), Image.new("L", room)
        self._on_paint, self._on_mask = ImageDraw.Draw(self.paint), ImageDraw.Draw(self.mask)

    def polygon(self, points: _Points, color: _Color, solid: bool = False) -> None:
        self._on_paint.polygon(self._pixels(points), self._rgb(color))
        if solid:
            self._on_mask.polygon(self._pixels(points), 255)

    def ellipse(self, rect: _Rect, color: _Color, solid: bool = False) -> None:
        self._on_paint.ellipse(self._corners(rect), self._rgb(color))
        if solid:
            self._on_mask.ellipse(self._corners(rect), 255)

    def panel(self, rect: _Rect, color: _Color, solid: bool = False, radius: float = 0) -> None:
        corners, pixels = self._corners(rect), radius * min(self.size)
        self._on_paint.rounded_rectangle(corners, pixels, self._rgb(color))
        if solid:
            self._on_mask.rounded_rectangle(corners, pixels, 255)

    def line(self, points: _Points, color: _Color, width: float) -> None:
        self._on_paint.line(self._pixels(points), self._rgb(color), self._width(width))

    def _rgb(self, color: _Color) -> tuple[int, ...]:
        hue, saturation, value = color
        turned = (hue + self.hue) / 360 % 1
        channels = colorsys.hsv_to_rgb(turned, saturation, min(1.0, value * self.gain))
        return tuple(round(255 * channel) for channel in channels)

    def _pixels(self, points: _Points) -> list[tuple[float, float]]:
        width, height = self.size
        return [(self.MARGIN + x * (width - 1), self.MARGIN + y * (height - 1)) for x, y in points]

    def _corners(self, rect: _Rect) -> list[tuple[float, float]]:
        return self._pixels([rect[:2], rect[2:]])

    def _width(self, share: float) -> int:
        return max(1, round(share * min(self.size)))


def _ball(c: _Canvas) -> None:
    c.ellipse((0, 0, 1, 1), (357, 0.85, 0.9), solid=True)
    for x in (0.13, 0.43, 0.73):
        c.panel((x, 0, x + 0.14, 1), (20, 0.03, 0.98))


def _bus(c: _Canvas) -> None:
    body, glass, dark = (49, 0.9, 0.98), (205, 0.35, 0.45), (230, 0.2, 0.17)
    c.panel((0, 0, 1, 0.84), body, solid=True, radius=0.14)
    for x in (0.05, 0.24, 0.43, 0.62, 0.81):
        c.panel((x, 0.13, x + 0.14, 0.42), glass)
    c.panel((0, 0.54, 1, 0.62), dark)
    for x in (0.12, 0.66):
        c.ellipse((x, 0.62, x + 0.21, 1), dark, solid=True)
        c.ellipse((x + 0.065, 0.735, x + 0.145, 0.885), (50, 0.05, 0.8))


def _domino(c: _Canvas) -> None:
    ink = (230, 0.3, 0.12)
    c.panel((0, 0, 1, 1), (48, 0.06, 1), solid=True, radius=0.16)
    c.panel((0.1, 0.48, 0.9, 0.52), ink)
    upper = [(0.27, 0.12), (0.73, 0.12), (0.5, 0.25), (0.27, 0.38), (0.73, 0.38)]
    lower = [(x, y) for x in (0.27, 0.73) for y in (0.62, 0.75, 0.88)]
    for x, y in upper + lower:
        c.ellipse((x - 0.115, y - 0.06, x + 0.115, y + 0.06), ink)


def _fish(c: _Canvas) -> None:
    body, dark, light = (182, 0.8, 0.82), (192, 0.9, 0.5), (176, 0.4, 0.97)
    c.polygon([(0.6, 0.5), (1, 0.06), (0.9, 0.5), (1, 0.94)], dark, solid=True)
    c.polygon([(0.25, 0.2), (0.5, 0), (0.62, 0.25)], dark, solid=True)
    c.ellipse((0, 0.1, 0.8, 0.94), body, solid=True)
    for column in range(4):  # scales, from the tail on: each covers the edge of the one before
        for row in range(6):
            x, y = 0.68 - 0.12 * column, 0.04 + 0.15 * row - 0.075 * (column % 2)
            c.ellipse((x - 0.09, y, x + 0.09, y + 0.19), dark)
            c.ellipse((x - 0.065, y + 0.01, x + 0.115, y + 0.18), light if column % 2 else body)
    c.ellipse((-0.2, 0.06, 0.26, 0.98), body)
    c.ellipse((0.09, 0.3, 0.22, 0.5), (0, 0, 1))
    c.ellipse((0.11, 0.35, 0.18, 0.47), (0, 0, 0.08))


def _flower(c: _Canvas) -> None:
    pale, deep = (300, 0.45, 1), (306, 0.85, 0.75)
    for k in range(7):
        cos, sin = math.cos(2 * math.pi * k / 7), math.sin(2 * math.pi * k / 7)
        for reach, spread, color in ((0.24, 0.165, pale), (0.19, 0.05, deep)):
            petal = []
            for step in range(20):
                turn = 2 * math.pi * step / 20
                u, v = 0.26 + reach * math.cos(turn), spread * math.sin(turn)
                petal.append((0.5 + u * cos - v * sin, 0.5 + u * sin + v * cos))
            c.polygon(petal, color, solid=True)
    c.ellipse((0.34, 0.34, 0.66, 0.66), (46, 0.9, 0.98))
    for x, y in ((0.43, 0.44), (0.57, 0.44), (0.5, 0.5), (0.43, 0.57), (0.57, 0.57)):
        c.ellipse((x - 0.03, y - 0.03, x + 0.03, y + 0.03), (26, 0.9, 0.7))


def _gem(c: _Canvas) -> None:
    top = [(0.22, 0), (0.5, 0), (0.78, 0)]
    girdle = [(0, 0.36), (0.33, 0.36), (0.67, 0.36), (1, 0.36)]
    tip = (0.5, 1)
    facets = [
        ([top[0], girdle[0], girdle[1]], 0.95, 0.6),
        ([top[0], top[1], girdle[1]], 0.7, 0.95),
        ([top[1], girdle[1], girdle[2]], 0.3, 1),
        ([top[1], top[2], girdle[2]], 0.75, 0.9),
        ([top[2], girdle[2], girdle[3]], 0.9, 0.55),
        ([girdle[0], girdle[1], tip], 0.65, 0.95),
        ([girdle[1], girdle[2], tip], 0.85, 0.75),
        ([girdle[2], girdle[3], tip], 0.95, 0.48),
    ]
    for points, saturation, value in facets:
        c.polygon(points, (222, saturation, value), solid=True)


def _pumpkin(c: _Canvas) -> None:
    rib, skin = (22, 0.95, 0.64), (29, 0.92, 0.98)
    stem = [(0.43, 0.25), (0.4, 0), (0.56, 0), (0.56, 0.25)]
    c.polygon(stem, (105, 0.6, 0.4), solid=True)
    for left, right in ((0, 0.42), (0.58, 1), (0.13, 0.56), (0.44, 0.87), (0.3, 0.7)):
        c.ellipse((left, 0.14, right, 1), rib, solid=True)
        c.ellipse((left + 0.03, 0.155, right - 0.03, 0.985), skin)


def _tree(c: _Canvas) -> None:
    dark, leaf, light = (138, 0.85, 0.3), (132, 0.72, 0.6), (128, 0.45, 0.85)
    c.panel((0.41, 0.8, 0.59, 1), (25, 0.6, 0.4), solid=True)
    for top, bottom, reach in ((0.36, 0.86, 0.5), (0.17, 0.6, 0.4), (0, 0.34, 0.29)):
        inner = 0.86 * reach
        corners = [(0.5 - reach, bottom), (0.5 + reach, bottom)]
        c.polygon([(0.5, top), *corners], dark, solid=True)
        c.polygon([(0.5, top), (0.5 - inner, bottom - 0.05), (0.5 + inner, bottom - 0.05)], leaf)
        for k in range(-2, 3):  # needles
            x = 0.5 + 0.34 * k * reach
            c.line([(x, bottom - 0.12), (x, bottom - 0.04)], light, 0.05)


@dataclass(frozen=True)
class _Kind:
    draw: Callable[[_Canvas], None]
    edge: _Color
    aspect: float  # width / height
    tilt: float  # largest rotation either way, in degrees


_KINDS = {
    "ball": _Kind(_ball, (357, 0.85, 0.4), 1, 180),
    "bus": _Kind(_bus, (45, 0.9, 0.35), 1.8, 8),
    "domino": _Kind(_domino, (230, 0.2, 0.35), 0.55, 14),
    "fish": _Kind(_fish, (190, 0.9, 0.27), 1.55, 14),
    "flower": _Kind(_flower, (306, 0.7, 0.4), 1, 180),
    "gem": _Kind(_gem, (225, 0.9, 0.27), 1.15, 14),
    "pumpkin": _Kind(_pumpkin, (20, 0.95, 0.32), 1.15, 14),
    "tree": _Kind(_tree, (135, 0.85, 0.18), 0.75, 8),
}

CLASSES: tuple[str, ...] = tuple(sorted(_KINDS))

# Brightness of the rim and strength of the shadow, from a blurred silhouette; light from above.
_RIM = [min(255, 95 + 4 * v // 5) for v in range(256)]
_SHADOW = [v // 3 for v in range(256)]
_FALL = Image.linear_gradient("L").resize((1, 32)).point([255 - v // 5 for v in range(256)])


@dataclass
class _Sprite:
    """One object of a picture, its upper left corner at (x, y)."""

    name: str
    paint: Image.Image
    mask: Image.Image
    shadow: Image.Image
    x: int = 0
    y: int = 0

    def __post_init__(self) -> None:
        self.silhouette = np.asarray(self.mask) >= 128  # (h, w)
        self.area = int(self.silhouette.sum())


def _make_sprite(rng: random.Random, name: str, size: float) -> _Sprite:
    kind = _KINDS[name]
    aspect = kind.aspect * math.exp(rng.uniform(-0.1, 0.1))
    width, height = size * min(1, aspect), size / max(1, aspect)
    scale = 4 if size < 40 else 2  # drawn larger and shrunk: antialiasing
    hue, gain = rng.uniform(-7, 7), rng.uniform(0.88, 1.08)
    canvas = _Canvas(round(scale * width), round(scale * height), kind.edge, hue, gain)
    kind.draw(canvas)
    mirror, angle = rng.random() < 0.5, math.radians(rng.uniform(-kind.tilt, kind.tilt))
    paint = _turned(canvas.paint.reduce(scale // 2), angle, mirror, canvas.edge)
    mask = _turned(canvas.mask.reduce(scale // 2), angle, mirror, 0)
    return _Sprite(name, *_lit(paint, mask, size))


def _turned(
    image: Image.Image, angle: float, mirror: bool, fill: int | tuple[int, ...]
) -> Image.Image:
    """Rotate by ``angle`` (radians), mirror and halve the size, in one pass."""
    cos, sin = 2 * math.cos(angle), 2 * math.sin(angle)
    width = math.ceil((image.width * abs(cos) + image.height * abs(sin)) / 4)
    height = math.ceil((image.width * abs(sin) + image.height * abs(cos)) / 4)
    sign = -1 if mirror else 1
    # Map output pixels to ``image``; the centers of both are the same point.
    a, b, d, e = sign * cos, sign * sin, -sin, cos
    c = (image.width - a * width - b * height) / 2
    f = (image.height - d * width - e * height) / 2
    return image.transform(
        (width, height),
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=fill,
    )


def _lit(
    paint: Image.Image, mask: Image.Image, size: float
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Add light from above and a darker rim; return paint, mask and the mask of a soft shadow."""
    soft = mask.filter(ImageFilter.BoxBlur(max(1.0, 0.035 * size)))
    shade = ImageChops.multiply(
        soft.point(_RIM), _FALL.resize(mask.size, Image.Resampling.BILINEAR)
    )
    paint = ImageChops.multiply(paint, Image.merge("RGB", (shade, shade, shade)))
    return paint, mask, soft.point(_SHADOW)


def _offset(rng: random.Random, frame: int, side: int, overhang: float) -> int:
    """Choose the offset of an object so that it lies in the frame or covers it.

    It is uniform; ``overhang`` extends the range by a share of the object on either side. Each axis
    has a number of its own, so that nothing favors the place mirrored across the diagonal.
    """
    low, high = sorted((0, frame - side))
    extra = overhang * min(frame, side)
    return round(rng.uniform(low - extra, high + extra))


def _in_frame(owner: np.ndarray, sprite: _Sprite) -> tuple[np.ndarray, np.ndarray]:
    """Return the view of ``owner`` (H, W) under the sprite and the silhouette in the frame."""
    height, width = owner.shape
    left, top = max(0, -sprite.x), max(0, -sprite.y)
    seen = sprite.silhouette[top : height - sprite.y, left : width - sprite.x]
    y, x = sprite.y + top, sprite.x + left
    return owner[y : y + seen.shape[0], x : x + seen.shape[1]], seen


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x1, y1, x2, y2: first and last column and row of a mask (h, w), counted from 1."""
    columns, rows = np.flatnonzero(mask.any(0)) + 1, np.flatnonzero(mask.any(1)) + 1
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _stamped(
    owner: np.ndarray, sprites: list[_Sprite], sprite: _Sprite, least: float, cover: float
) -> np.ndarray | None:
    """Put one more sprite on top of ``owner`` (H, W), or return None where it is not allowed there.

    The sprite and those below it must keep the share ``least`` of their silhouettes, and at most
    the share ``cover`` of the sprite may cover others.
    """
    under, seen = _in_frame(owner, sprite)
    covered = np.bincount(under[seen], minlength=len(sprites) + 1)
    if covered.sum() < least * sprite.area or covered[1:].sum() > cover * sprite.area:
        return None
    owner = owner.copy()
    _in_frame(owner, sprite)[0][seen] = len(sprites) + 1
    for number, other in enumerate([*sprites, sprite], start=1):
        if number <= len(sprites) and not covered[number]:
            continue
        mask = owner == number
        if mask.sum() < least * other.area:
            return None
        x1, y1, x2, y2 = _box(mask)
        sides = (x2 - x1 + 1, y2 - y1 + 1)
        if max(sides) < _MIN_LONG or min(sides) < _MIN_SHORT:
            return None
    return owner


def _arrange(rng: random.Random, width: int, height: int) -> tuple[list[_Sprite], np.ndarray]:
    """Choose and place the objects of one picture.

    Return them in drawing order, and for each pixel (height, width) the number, from 1, of the
    object that is visible there, 0 for the background.
    """
    count = rng.choices(range(1, len(_COUNT_WEIGHTS) + 1), _COUNT_WEIGHTS)[0]
    bands = rng.choices(_SIZE_BANDS, _BAND_WEIGHTS, k=count)
    sizes = [math.exp(rng.uniform(math.log(low), math.log(high))) for low, high in bands]
    # Mostly from large to small, so that large objects do not hide small ones.
    sizes.sort(key=lambda size: -size * rng.uniform(0.6, 1.6))
    sprites: list[_Sprite] = []
    owner = np.zeros((height, width), np.uint8)
    for size in sizes:
        sprite = _make_sprite(rng, rng.choice(CLASSES), size)
        least = _CROWDED if rng.random() < _CROWDED_SHARE else _CLEAR
        cover = 1 if rng.random() < _COVERING_SHARE else _COVER
        overhang = _OVERHANG if rng.random() < _OVERHANG_SHARE else 0
        for _ in range(_TRIES):
            sprite.x = _offset(rng, width, sprite.mask.width, overhang)
            sprite.y = _offset(rng, height, sprite.mask.height, overhang)
            trial = _stamped(owner, sprites, sprite, least, cover)
            if trial is not None:
                sprites.append(sprite)
                owner = trial
                break
    # No object found a place: very rare. The generator has moved on, so the next try differs.
    return (sprites, owner) if sprites else _arrange(rng, width, height)


def _background(rng: random.Random, width: int, height: int) -> Image.Image:
    """Draw a gradient between muted colors, with large soft patches and a few faint blobs."""
    hue, value = rng.random(), rng.uniform(0.45, 0.8)

    def muted(spread: float) -> tuple[int, ...]:
        turned = (hue + rng.uniform(-0.1, 0.1)) % 1
        brightness = min(0.95, value + rng.uniform(-spread, spread))
        channels = colorsys.hsv_to_rgb(turned, rng.uniform(0.05, 0.2), brightness)
        return tuple(round(255 * channel) for channel in channels)

    corners, patches = Image.new("RGB", (2, 2)), Image.new("RGB", (4, 4))
    corners.putdata([muted(0.14) for _ in range(4)])
    patches.putdata([muted(0.2) for _ in range(16)])
    gradient = corners.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.blend(gradient, patches.resize((width, height), Image.Resampling.BICUBIC), 0.25)
    for _ in range(rng.randrange(5)):
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(8, 40)
        flat = reach * rng.uniform(0.6, 1.6)
        blob = Image.new("L", (width, height))
        pen = ImageDraw.Draw(blob)
        draw = rng.choice((pen.ellipse, pen.rectangle))
        draw((x - reach, y - flat, x + reach, y + flat), fill=rng.randrange(50, 120))
        canvas.paste(muted(0.2), mask=blob.filter(ImageFilter.BoxBlur(2)))
    return canvas


def _describe(owner: np.ndarray, number: int, sprite: _Sprite) -> dict[str, Any]:
    visible = owner == number
    x1, y1, x2, y2 = _box(visible)
    tiny = max(x2 - x1, y2 - y1) + 1 < _TINY
    return {
        "name": sprite.name,
        "xyxy": (x1, y1, x2, y2),
        "difficult": bool(tiny or visible.sum() < _DIFFICULT * sprite.area),
        "truncated": bool(_in_frame(owner, sprite)[1].sum() < sprite.area),
    }


def draw_image(seed: int, split: str, index: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw image ``index`` of a split; the same arguments always give the same picture.

    Returns:
        The RGB image, its shorter side 160 pixels and the other up to 220, and a dict for each of
        its objects:

        - ``name``: one of ``CLASSES``;
        - ``xyxy``: (x1, y1, x2, y2), whole numbers: first and last pixel of the visible part, both
          inclusive and counted from 1, as in the XML;
        - ``truncated``: whether part of the object is outside the frame;
        - ``difficult``: whether little of the object is visible, or it is tiny.

    Example:
        >>> image, objects = draw_image(seed=0, split="val", index=3)
        >>> min(image.size)
        160
    """
    rng = random.Random(f"{seed}-{split}-{index}")
    width, height = SHORT_SIDE, rng.randint(SHORT_SIDE, LONG_SIDE)
    if rng.random() < 0.5:
        width, height = height, width
    canvas = _background(rng, width, height)
    sprites, owner = _arrange(rng, width, height)
    for sprite in sprites:
        drop = round(0.03 * max(sprite.mask.size)) + 1
        canvas.paste((20, 20, 30), (sprite.x + drop // 2, sprite.y + drop), sprite.shadow)
        canvas.paste(sprite.paint, (sprite.x, sprite.y), sprite.mask)
    return canvas, [_describe(owner, number, sprite) for number, sprite in enumerate(sprites, 1)]


def _annotation(
    file_name: str, image: Image.Image, objects: list[dict[str, Any]]
) -> ElementTree.ElementTree:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, value: object) -> None:
        ElementTree.SubElement(parent, tag).text = str(value)

    add(root, "folder", "shapes")
    add(root, "filename", file_name)
    size = ElementTree.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*image.size, 3), strict=True):
        add(size, tag, value)
    add(root, "segmented", 0)
    for item in objects:
        node = ElementTree.SubElement(root, "object")
        add(node, "name", item["name"])
        add(node, "pose", "Unspecified")
        add(node, "truncated", int(item["truncated"]))
        add(node, "difficult", int(item["difficult"]))
        box = ElementTree.SubElement(node, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), item["xyxy"], strict=True):
            add(box, tag, value)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _write_set(root: Path, settings: dict[str, int]) -> None:
    pictures, annotations = root / "JPEGImages", root / "Annotations"
    lists = root / "ImageSets" / "Main"
    for folder in (pictures, annotations, lists):
        folder.mkdir(parents=True)
    everything = []
    for split in ("train", "val"):
        names = [f"{split}_{index:05d}" for index in range(settings[f"num_{split}"])]
        for index, name in enumerate(names):
            image, objects = draw_image(settings["seed"], split, index)
            image.save(pictures / f"{name}.jpg", quality=90)
            tree = _annotation(f"{name}.jpg", image, objects)
            tree.write(annotations / f"{name}.xml", encoding="utf-8")
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        everything += names
    (lists / "trainval.txt").write_text("".join(f"{name}\n" for name in everything))
    (root / "shapes.json").write_text(json.dumps(settings, indent=2) + "\n")


def _has_set(folder: Path, settings: dict[str, int]) -> bool:
    """Return whether ``folder`` is a finished set made with ``settings``.

    False for a folder that is missing or empty; ValueError for one with any other content.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    advice = "choose another folder, or delete this one yourself"
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"{folder} exists and is not a generated set (no readable shapes.json): {advice}"
        ) from None
    if found != settings:
        raise ValueError(f"{folder} was made with {found}, asked for {settings}: {advice}")
    wanted = settings["num_train"] + settings["num_val"]
    for part, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        present = len(list((folder / part).glob(f"*.{ending}")))
        if present != wanted:
            raise ValueError(f"{folder / part} holds {present} of {wanted} files: {advice}")
    return True


def shapes_folder() -> Path:
    """Return where the generated set of default size is kept: in the user's cache folder.

    The folder need not exist yet; ``write_shapes(shapes_folder())`` draws the set on first use.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "eecs598-fcos" / "shapes"


def write_shapes(
    folder: str | os.PathLike[str], *, num_train: int = 800, num_val: int = 200, seed: int = 0
) -> Path:
    """Draw the data set and write it to ``folder``, in the layout of the VOC devkit.

    The set is written beside its target and renamed, so that the folder is whole from the start. A
    folder that has the same set already is left as it is.

    Args:
        folder: to write to.
        num_train: number of training images.
        num_val: number of validation images.
        seed: of the drawings.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: the folder has any other content, which is left alone, or a number is below 1.
    """
    for name, count in (("num_train", num_train), ("num_val", num_val)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1 image in each split")
    settings = {"version": VERSION, "seed": seed, "num_train": num_train, "num_val": num_val}
    folder = Path(folder).absolute()
    if _has_set(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        root = Path(beside) / "shapes"
        _write_set(root, settings)
        try:
            if folder.exists():
                folder.rmdir()  # it is empty, and not every system renames onto a folder
            os.replace(root, folder)
        except OSError:
            # Another process may have written the same set in the meantime.
            if not _has_set(folder, settings):
                raise
    return folder
