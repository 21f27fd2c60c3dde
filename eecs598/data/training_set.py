"""The training set: from the index of a data set to the items that a loader puts into batches.

The way of one image: ``AnnotatedImages`` decodes its file, or takes it from memory, and gives it
with its boxes; ``TrainingSet`` augments it, or resizes and crops it; ``make_item`` normalizes it
and pads its boxes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eecs598.data.augment import Augmentation, local_seed
from eecs598.data.image_cache import ImageCache
from eecs598.data.images import (
    annotated_size,
    normalize,
    read_annotated_image,
    resize_shorter_side,
    resized_size,
    to_pixels,
)
from eecs598.data.index import Instance
from eecs598.data.sampling import Sample

__all__ = ["MAX_CACHE_BYTES", "AnnotatedImages", "Item", "TrainingSet", "crop_center", "make_item"]

MAX_CACHE_BYTES = 4 * 2**30

# Path, normalized image (3, H, W), boxes (M, 5) padded with rows of -1.
Item = tuple[str, Tensor, Tensor]


class AnnotatedImages:
    """The images of one split with their boxes, decoded from files or taken from memory.

    Args:
        instances: the index, see ``eecs598.data.load_instances``.
        image_size: shorter side of resized images, in pixels.
        cache: keep images in memory, shared by the workers of a loader, so that each file is
            decoded once. Prints how much memory they take.
        cache_originals: keep the images at the size of their files. By default the cache keeps
            resized images, which take less memory, and ``original`` always reads the file.
        max_cache_bytes: limit of the cache; images beyond it are read from their files each time.
        ignore_difficult: give difficult objects, too, with ``IGNORED`` for a class id.
        pixel_edges: give boxes from edge to edge, see ``Instance.with_edges``; otherwise the
            annotation's numbers.

    Raises:
        ValueError: with ``cache``, an image file can't be read; with ``ignore_difficult``, it is
            not known which objects are difficult.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        image_size: int,
        *,
        cache: bool = False,
        cache_originals: bool = False,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        ignore_difficult: bool = False,
        pixel_edges: bool = False,
    ) -> None:
        self.instances, self.image_size = list(instances), image_size
        unknown = [i.path for i in self.instances if not i.difficult_known]
        if ignore_difficult and unknown:
            raise ValueError(
                f"ignore_difficult: of {len(unknown)} images, the first {unknown[0]}, it is not "
                "known which objects are difficult, since the course's index leaves them out; add "
                "the devkit's Annotations folder, or train without it."
            )
        given: Iterable[Instance] = self.instances
        if ignore_difficult:
            given = (instance.with_ignored for instance in given)
        if pixel_edges:
            given = (instance.with_edges for instance in given)
        self._boxes = [instance.ordinary for instance in given]
        self.max_boxes = max(map(len, self._boxes), default=0)
        self.cache: ImageCache | None = None
        self._cache_originals = cache_originals
        if cache:
            sizes = self.sizes
            if not cache_originals:
                sizes = [resized_size(*size, image_size) for size in sizes]
            self.cache = ImageCache(sizes, max_cache_bytes)
            print(f"images in memory: {self.cache}")

    def __len__(self) -> int:
        return len(self.instances)

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every original, read from the files' headers at the first use.

        Raises:
            ValueError: a file can't be read, or has another size than its annotation says.
        """
        return [annotated_size(instance.path, instance.size) for instance in self.instances]

    def original(self, index: int) -> tuple[Tensor, Tensor]:
        """Load an image at the size of its file, turned upright where its boxes are for that.

        Returns:
            The pixels ``(3, H, W)`` in uint8, RGB, which must not be modified, and the boxes
            ``(M, 5)`` in these pixels: x1, y1, x2, y2, class id.

        Raises:
            ValueError: the file can't be read, or has another size than its annotation says.
        """
        instance, boxes = self.instances[index], self._boxes[index]
        if self.cache is not None and self._cache_originals:
            return self.cache.get(index, lambda: _decode(instance)), boxes.clone()
        return _decode(instance), boxes.clone()

    def resized(self, index: int, side: int | None = None) -> tuple[Tensor, Tensor]:
        """Load an image with a shorter side of ``side`` pixels; otherwise as ``original``.

        Args:
            index: of the image.
            side: ``image_size`` unless given.
        """
        side = side or self.image_size
        boxes = self._boxes[index]
        if self.cache is not None and not self._cache_originals and side == self.image_size:
            instance = self.instances[index]
            original_height, original_width = self.sizes[index]
            pixels = self.cache.get(
                index, lambda: resize_shorter_side(_decode(instance), self.image_size)
            )
        else:
            original, _ = self.original(index)
            original_height, original_width = original.shape[1:]
            pixels = resize_shorter_side(original, side)
        height, width = pixels.shape[1:]
        scale_y, scale_x = height / original_height, width / original_width
        return pixels, boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y, 1.0])


def _decode(instance: Instance) -> Tensor:
    return to_pixels(read_annotated_image(instance.path, instance.size))


class TrainingSet(Dataset[Item]):
    """The training images that a ``TrainingSampler`` asks for, augmented.

    Args:
        instances: the index, see ``eecs598.data.load_instances``.
        image_size: usual side of the square training images, in pixels.
        augment: names of augmentations, see ``Augmentation``. Without any, an image is resized and
            its center is cut out.
        image_sizes: the sizes that the sampler chooses from, where batches differ in size.
        cache: keep decoded images in memory, see ``AnnotatedImages``.
        max_cache_bytes: limit of the cache.
        ignore_difficult: see ``AnnotatedImages``.
        pixel_edges: likewise.

    Raises:
        ValueError: an augmentation is not known, or as ``AnnotatedImages``.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        image_size: int,
        augment: Sequence[str] = (),
        *,
        image_sizes: Sequence[int] = (),
        cache: bool = False,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        ignore_difficult: bool = False,
        pixel_edges: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.augmentation = Augmentation(augment)
        self.images = AnnotatedImages(
            instances,
            image_size,
            cache=cache,
            # Augmentations and several sizes start from the originals.
            cache_originals=bool(augment or image_sizes),
            max_cache_bytes=max_cache_bytes,
            ignore_difficult=ignore_difficult,
            pixel_edges=pixel_edges,
        )
        # A mosaic shows four images.
        self.max_boxes = self.images.max_boxes * (4 if "mosaic" in augment else 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: Sample) -> Item:
        """Make one training image.

        Returns:
            The path of its file (in a mosaic, that of the first of the four); the normalized
            pixels ``(3, S, S)``, float32, S being the size that the sample asks for; the boxes
            ``(M, 5)`` as x1, y1, x2, y2 in pixels and class id, padded with rows of -1. Whatever
            the size, an object has a box as long as anything of it is left, see ``Augmentation``.
        """
        side = sample.image_size or self.image_size
        if not self.augmentation.names:
            pixels, boxes = crop_center(*self.images.resized(sample.index, side))
        else:
            with local_seed(sample.seed):
                indices = [sample.index]
                if sample.allows_mosaic:
                    indices = self.augmentation.choose_images(sample.index, len(self))
                originals = [self.images.original(index) for index in indices]
                pixels, boxes = self.augmentation(originals, side)
        path = self.images.instances[sample.index].path
        return make_item(path, pixels, boxes, self.max_boxes)


def crop_center(pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the largest square out of the center of an image.

    Args:
        pixels: ``(3, H, W)``.
        boxes: ``(M, 5)``: x1, y1, x2, y2 in these pixels, class id.

    Returns:
        The pixels ``(3, S, S)``, S = min(H, W), and the boxes ``(M, 5)``, clipped to the square; a
        box of which nothing is left becomes a row of -1.
    """
    height, width = pixels.shape[1:]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    corner = boxes.new_tensor([left, top, left, top])
    cropped = torch.cat([(boxes[:, :4] - corner).clamp(0, side), boxes[:, 4:]], dim=1)
    is_gone = (cropped[:, 2:4] <= cropped[:, :2]).any(dim=1, keepdim=True)
    pixels = pixels[:, top : top + side, left : left + side]
    return pixels, cropped.masked_fill(is_gone, -1.0)


def make_item(path: Path, pixels: Tensor, boxes: Tensor, max_boxes: int) -> Item:
    """Normalize an image and pad its boxes, so that images of one size can share a batch.

    Args:
        path: of the image file.
        pixels: ``(3, H, W)`` in uint8, RGB.
        boxes: ``(M, 5)``: x1, y1, x2, y2 in these pixels, class id.
        max_boxes: number of rows to pad the boxes to, at least M.

    Returns:
        The path as a string; the image ``(3, H, W)`` in float32, normalized with ImageNet's mean
        and standard deviation; the boxes ``(max_boxes, 5)``, filled up with rows of -1.
    """
    padded = torch.full((max_boxes, 5), -1.0)
    padded[: len(boxes)] = boxes
    return str(path), normalize(pixels), padded
