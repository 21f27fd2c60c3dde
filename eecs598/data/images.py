"""Image files: find them, read any kind as RGB, resize and normalize them for a detector.

Training, evaluation and prediction all read images here, so that a detector sees the same pixels
everywhere::

    from eecs598.data import find_images, normalize, read_image, resize_shorter_side, to_pixels

    for path in find_images(["photos", "more/**/*.png"]):
        image = read_image(path)
        pixels = normalize(resize_shorter_side(to_pixels(image), 224))  # (3, H, W)
"""

from __future__ import annotations

import contextlib
import glob
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageFiles",
    "LoadedImage",
    "annotated_size",
    "find_images",
    "normalize",
    "orientation_of",
    "read_annotated_image",
    "read_header",
    "read_image",
    "shows_upright",
    "resize_shorter_side",
    "resized_size",
    "to_pixels",
    "unnormalize",
]

# Statistics of the images that the pretrained backbones were trained on.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The formats that are opened, whatever the name of the file. Pillow supports more, but some of them
# are programs (Pillow hands EPS to Ghostscript), and the files may come from anyone.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Photographs of telephones that Pillow can't read: they cause an error and are not skipped.
_UNREADABLE_SUFFIXES = frozenset({".heic", ".heif"})

# Longer side / shorter side. With the shorter one resized to 224 pixels, an image of 1 x 5,000
# pixels would need more memory than there is.
MAX_ASPECT = 50

# Pillow refuses images above 179 megapixels, since a small file can unpack to any size. It also
# warns above 89, which ordinary photographs reach by now; these have at least this many bytes.
_PHOTOGRAPH_BYTES = 2**20
_warnings_lock = threading.Lock()  # warnings.catch_warnings is not made for several threads


def find_images(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """List the image files that files, folders and patterns stand for.

    Args:
        sources: a folder stands for the image files in it, sorted by name, without those in its
            subfolders; a pattern such as ``photos/**/*.jpg`` for those that match it, ``**``
            meaning any depth. In both, image files are recognized by their suffix, and names that
            begin with a dot are left out. A file is taken as it is. A name under which there is
            a file or a folder is never taken for a pattern.

    Returns:
        Every file once, in the order of the sources.

    Raises:
        ValueError: a source does not exist or has no image.
    """
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            paths = [path / name for name in os.listdir(path) if not name.startswith(".")]
        elif os.path.lexists(path):
            paths = []
            found.setdefault(os.path.abspath(path), path)
            continue
        else:
            paths = [Path(match) for match in glob.glob(str(source), recursive=True)]
            if not paths:
                raise ValueError(
                    f"{source}: no such file or folder, and as a pattern it matches nothing."
                )
        images = [p for p in paths if p.suffix.lower() in _suffixes() and not p.is_dir()]
        if not images:
            raise ValueError(
                f"{source}: no image among {len(paths)} files and folders. Image files end in "
                f"{' '.join(sorted(_suffixes()))}; those in subfolders are named by a pattern, "
                f"such as '{path if path.is_dir() else '.'}/**/*.jpg'."
            )
        for image in sorted(images):
            found.setdefault(os.path.abspath(image), image)
    return list(found.values())


def _suffixes() -> frozenset[str]:
    known = Image.registered_extensions()
    return _UNREADABLE_SUFFIXES.union(s for s, format_ in known.items() if format_ in FORMATS)


def read_image(path: str | os.PathLike, *, upright: bool = True) -> Image.Image:
    """Read a file as an RGB image with 8 bits per channel.

    Transparent parts become white. Values of 16 bits are scaled by their full range, whatever part
    of it the image uses; floating-point values from 0..1 or from 0..255, whichever range they lie
    in. An animation gives its first frame. Color profiles are not applied, neither to RGB nor to
    CMYK.

    Args:
        path: of the file.
        upright: turn the image as its EXIF orientation says, as every viewer does. For images with
            boxes there is ``read_annotated_image``.

    Raises:
        ValueError: the file can't be read, the image is too large, or the range of its values is
            not known. The message has the file and the reason.
    """
    with _opened(path) as image:
        image.load()
        if upright:
            return _to_rgb(_turned_upright(image))
        result = _to_rgb(image)
        # The conversion loses it for images with transparency or with more than 8 bits.
        if "exif" in image.info:
            result.info["exif"] = image.info["exif"]
        return result


def read_annotated_image(path: str | os.PathLike, annotated: tuple[int, int] | None) -> Image.Image:
    """Read a file as ``read_image``, in the orientation that its boxes were drawn in.

    Args:
        path: of the file.
        annotated: height and width that the annotation gives, see ``shows_upright``.

    Raises:
        ValueError: as ``read_image`` and ``shows_upright``.
    """
    image = read_image(path, upright=False)
    stored = image.height, image.width
    if annotated in (None, stored):  # the usual case, without a look at EXIF
        return image
    is_upright = shows_upright(path, stored, orientation_of(image), annotated)
    return _turned_upright(image) if is_upright else image


def read_header(
    path: str | os.PathLike, annotated: tuple[int, int] | None
) -> tuple[tuple[int, int], int]:
    """Return height and width of an image as stored, and its EXIF orientation.

    No more than the header of the file is read. The orientation is looked for only where it
    matters: where the annotation gives another size than the stored one; otherwise it is 1.

    Raises:
        ValueError: as ``read_image``, but pixels are not looked at.
    """
    with _opened(path) as image:
        stored = image.height, image.width
        return stored, 1 if annotated in (None, stored) else orientation_of(image)


def annotated_size(path: str | os.PathLike, annotated: tuple[int, int] | None) -> tuple[int, int]:
    """Return height and width of what ``read_annotated_image`` reads, from the file's header.

    Raises:
        ValueError: as ``read_annotated_image``, but pixels are not looked at.
    """
    stored, orientation = read_header(path, annotated)
    return stored[::-1] if shows_upright(path, stored, orientation, annotated) else stored


def shows_upright(
    path: str | os.PathLike,
    stored: tuple[int, int],
    orientation: int,
    annotated: tuple[int, int] | None,
) -> bool:
    """Return whether the boxes of an image are those of the picture turned upright by EXIF.

    The size in the annotation decides. Without one, and where both pictures have it, the boxes are
    those of the pixels as they are stored.

    Args:
        path: of the image file, for the message.
        stored: height and width of the stored pixels.
        orientation: of EXIF; 5 to 8 swap width and height.
        annotated: height and width that the annotation gives, if any.

    Raises:
        ValueError: the annotation is for a picture of another size.
    """
    if annotated in (None, stored):
        return False
    if orientation in range(5, 9) and annotated == stored[::-1]:
        return True
    height, width = annotated
    raise ValueError(
        f"{path} has {stored[1]} x {stored[0]} pixels, but its annotation is for {width} x {height}"
        ", so its boxes are elsewhere; use the image that was annotated, or correct the annotation."
    )


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none."""
    if image.format == "TIFF":  # Pillow turns these upright itself, and gives that size
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data; the pixels may still be good
        return 1


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    Image.init()
    try:
        with _opened_quietly(path) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(
                    f"it has {width} x {height} pixels, one side more than {MAX_ASPECT} times as "
                    "long as the other; cut it into pieces"
                )
            yield image
    except Exception as error:  # on damaged files, decoders raise errors of any kind
        raise ValueError(f"{path} can't be read as an image: {_reason(path, error)}") from error


def _opened_quietly(path: str | os.PathLike) -> Image.Image:
    formats = [name for name in FORMATS if name in Image.OPEN]
    # Python forgets at catch_warnings which warnings were shown already, so not for every file.
    if os.path.getsize(path) < _PHOTOGRAPH_BYTES:
        return Image.open(path, formats=formats)
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path, formats=formats)


def _reason(path: str | os.PathLike, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if not os.path.getsize(path):
            return "the file is empty."
        return f"it is in none of the formats {', '.join(FORMATS)}."
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        return f"it has more than {limit} megapixels, or claims so; make it smaller first."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return f"{str(error) or type(error).__name__}".rstrip(".") + "."


def _turned_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data; the pixels may still be good
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow has no direct conversion to RGBA
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale gray values ``(H, W)`` of more than 8 bits to uint8."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        scale = 255.0 if high <= 1 else 1.0
        in_range = low >= 0 and high <= 255  # False for NaN
    else:
        scale = 255 / 65535
        in_range = low >= 0 and high <= 65535
    if not in_range:
        raise ValueError(
            f"its pixels have values from {low:g} to {high:g}, and it is not known which value is "
            "white; convert it to 8 or 16 bits first"
        )
    return (values * scale).round().astype(np.uint8)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as a ``(3, H, W)`` uint8 tensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return height and width with a shorter side of ``side`` pixels, in the same proportion.

    Example:
        >>> resized_size(375, 500, 224)
        (224, 298)
    """
    shorter = min(height, width)
    return height * side // shorter, width * side // shorter


def resize_shorter_side(pixels: Tensor, side: int) -> Tensor:
    """Resize an image ``(3, H, W)`` in uint8 so that its shorter side has ``side`` pixels.

    Bilinear with antialiasing, as Pillow does it; values differ from Pillow's by at most 1 of 255.
    """
    height, width = pixels.shape[1:]
    # On uint8, PyTorch uses the processor's vector instructions; Pillow does not.
    return TF.resize(pixels, list(resized_size(height, width, side)), antialias=True)


_SCALE = 1 / (255 * torch.tensor(IMAGENET_STD)[:, None, None])
_SHIFT = -torch.tensor(IMAGENET_MEAN)[:, None, None] / torch.tensor(IMAGENET_STD)[:, None, None]


def normalize(pixels: Tensor) -> Tensor:
    """Normalize an image ``(3, H, W)`` in uint8 with ImageNet's mean and standard deviation.

    Returns:
        A new tensor in float32.
    """
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.mul_(_SCALE).add_(_SHIFT)


def unnormalize(images: Tensor) -> Tensor:
    """Undo the normalization of ``(..., 3, H, W)`` images: return RGB values in [0, 1]."""
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return images * std + mean


class LoadedImage(NamedTuple):
    """One image file, ready for a detector, or the reason why it can't be read.

    Attributes:
        path: of the file.
        pixels: ``(3, H, W)``, resized and normalized; None where the file can't be read.
        width: of the upright original in pixels.
        height: likewise.
        error: the reason, None where the file could be read.
    """

    path: Path
    pixels: Tensor | None = None
    width: int = 0
    height: int = 0
    error: str | None = None


class ImageFiles(Dataset[LoadedImage]):
    """Image files, prepared for a detector as in evaluation; a broken file is no exception.

    Args:
        paths: of the files.
        image_size: the shorter side is resized to it.
    """

    def __init__(self, paths: Sequence[Path], image_size: int) -> None:
        super().__init__()
        self.paths, self.image_size = list(paths), image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> LoadedImage:
        """Load one file; where that fails, the result has an ``error`` and no ``pixels``."""
        path = self.paths[index]
        try:
            image = read_image(path)
            width, height = image.size
            pixels = normalize(resize_shorter_side(to_pixels(image), self.image_size))
        except (ValueError, MemoryError) as error:
            return LoadedImage(path, error=str(error) or f"{path} does not fit into memory.")
        return LoadedImage(path, pixels, width, height)
