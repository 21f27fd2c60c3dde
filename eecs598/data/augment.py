"""Augmentations: random changes of the training images and, with them, of their boxes.

Built from ``torchvision.transforms.v2``; images and boxes are changed together, as ``tv_tensors``.
Each training image has a seed of its own, so that a training run can be repeated and resumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["AUGMENTATIONS", "Augmentation", "local_seed"]

# To add an augmentation: its name here, its line in the docstring of ``Augmentation``, its
# transform in ``Augmentation._transforms``, at the place in the order where it is to act, or in
# ``Augmentation.__call__`` where v2 has none that takes boxes, too, and its name in
# ``DataSettings.augment`` of eecs598/training/settings.py, in the same order as here. One that
# combines images also has a part in ``choose_images`` and in ``TrainingSet.max_boxes``.
AUGMENTATIONS = ("flip", "zoom", "iou_crop", "photometric", "erasing", "mosaic")

# The color of padding: ImageNet's mean, which is 0 after normalization.
FILL = (124, 116, 104)

# For "zoom": longer side of the scaled image / side of the result. In evaluation the shorter side
# has that length, so a photograph of 4 to 3 is seen there at a scale of 1.33.
ZOOM_RANGE = (0.8, 2.0)

MOSAIC_PROBABILITY = 0.5

Target = dict[str, Tensor]  # "boxes" (M, 4) as ``tv_tensors.BoundingBoxes``, "labels" (M,)


@contextlib.contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Seed PyTorch's generator of the CPU for a block; afterwards it has its old state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU, too
        yield


class Augmentation:
    """Make square training images, changed at random.

    Random numbers come from PyTorch's generator of the CPU; ``local_seed`` makes them repeatable.

    Args:
        names: any of ``AUGMENTATIONS``:

            - ``"flip"``: mirror left to right, with probability 0.5;
            - ``"zoom"``: scale, then crop or pad at a random place (large-scale jitter,
              arXiv 2012.07177, section 3);
            - ``"iou_crop"``: take a random part that overlaps an object by at least a random IoU
              (SSD, arXiv 1512.02325, section 2.2);
            - ``"photometric"``: change brightness, contrast, saturation and hue (same section);
            - ``"erasing"``: hide a random rectangle of 2 to 20 % of the image, whatever is there,
              with probability 0.5 (arXiv 1708.04896, "image-aware");
            - ``"mosaic"``: put four images side by side, with probability 0.5 (arXiv 2004.10934,
              section 3.3).

    Raises:
        ValueError: a name is not one of ``AUGMENTATIONS``.

    Example:
        >>> pixels, boxes = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.zeros(0, 5)
        >>> with local_seed(0):
        ...     pixels, boxes = Augmentation(["flip"])([(pixels, boxes)], side=32)
        >>> pixels.shape, boxes.shape
        (torch.Size([3, 32, 32]), torch.Size([0, 5]))
    """

    def __init__(self, names: Sequence[str]) -> None:
        unknown = set(names) - set(AUGMENTATIONS)
        if unknown:
            raise ValueError(
                f"augmentation {', '.join(sorted(unknown))}; expected names of "
                f"{', '.join(AUGMENTATIONS)}."
            )
        self.names = frozenset(names)

    def choose_images(self, index: int, num_images: int) -> list[int]:
        """Choose which images one training image is made of.

        Args:
            index: of the image to make.
            num_images: number of images to choose from.

        Returns:
            ``[index]``, or for a mosaic ``index`` and three more, drawn at random.
        """
        if "mosaic" in self.names and torch.rand(()) < MOSAIC_PROBABILITY:
            return [index, *torch.randint(num_images, (3,)).tolist()]
        return [index]

    def __call__(self, images: Sequence[tuple[Tensor, Tensor]], side: int) -> tuple[Tensor, Tensor]:
        """Make one training image.

        Args:
            images: one image or four, as ``choose_images`` chose them: pixels ``(3, H, W)`` in
                uint8, which are not modified, and boxes ``(M, 5)`` in these pixels, with the class
                id last.
            side: of the result, in pixels.

        Returns:
            The pixels ``(3, side, side)`` in uint8 and the boxes ``(M, 5)``: x1, y1, x2, y2, class
            id. As without augmentation, an object keeps its box as long as anything of it is left;
            ``"iou_crop"`` alone also drops those whose center it cuts off.
        """
        parts = [_to_tv_tensors(pixels, boxes[:, :4], boxes[:, 4]) for pixels, boxes in images]
        whole, whole_target = parts[0] if len(parts) == 1 else _mosaic(parts, side)
        transforms = self._transforms(whole.shape[1:], side)
        pixels, target = v2.Compose(transforms)(whole, whole_target)
        if "erasing" in self.names:  # of the pixels alone: boxes stay, and v2 warns that they do
            pixels = v2.RandomErasing(p=0.5, scale=(0.02, 0.2), value=FILL)(pixels)
        boxes = target["boxes"].as_subclass(Tensor)
        boxes = torch.cat([boxes, target["labels"][:, None]], dim=1)
        is_left = (boxes[:, 2:4] > boxes[:, :2]).all(dim=1)  # crops clip the boxes
        return pixels.as_subclass(Tensor), boxes[is_left]

    def _transforms(self, size: Sequence[int], side: int) -> list[v2.Transform]:
        """Return the transforms in their order, for an image of ``size`` (height, width)."""
        # Of a strip that is a hundred times as long as wide, zoom would leave nothing.
        zoom = "zoom" in self.names and min(size) * side * ZOOM_RANGE[0] > 2 * max(size)
        transforms: list[v2.Transform] = []
        if "iou_crop" in self.names:
            transforms.append(v2.RandomIoUCrop())
        if zoom:
            transforms.append(v2.ScaleJitter((side, side), ZOOM_RANGE))
            transforms.append(v2.RandomCrop(side, pad_if_needed=True, fill=FILL))
        else:
            transforms += [v2.Resize(side), v2.CenterCrop(side)]
        if "flip" in self.names:
            transforms.append(v2.RandomHorizontalFlip())
        if "photometric" in self.names:  # Pillow is faster at colors than PyTorch
            transforms += [v2.ToPILImage(), v2.RandomPhotometricDistort(p=0.5), v2.PILToTensor()]
        return transforms


def _mosaic(parts: Sequence[tuple[Tensor, Target]], side: int) -> tuple[Tensor, Target]:
    """Make four images the quarters of one, each cut to a square of ``side`` pixels."""
    whole = torch.empty(3, 2 * side, 2 * side, dtype=torch.uint8)
    boxes, labels = [], []
    to_square = v2.Compose([v2.Resize(side), v2.RandomCrop(side)])
    for number, part in enumerate(parts):
        pixels, target = to_square(*part)
        left, top = side * (number % 2), side * (number // 2)
        whole[:, top : top + side, left : left + side] = pixels
        boxes.append(target["boxes"].as_subclass(Tensor) + torch.tensor([left, top] * 2))
        labels.append(target["labels"])
    return _to_tv_tensors(whole, torch.cat(boxes), torch.cat(labels))


def _to_tv_tensors(pixels: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Target]:
    """Return an image and its boxes as ``torchvision.transforms.v2`` takes them."""
    size = (pixels.shape[1], pixels.shape[2])
    return tv_tensors.Image(pixels), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": labels,
    }
